"""Settings of other trainers, turned into ours."""
