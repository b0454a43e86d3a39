"""Pictures and captions on disk, paired."""
