"""What a training takes in memory, before anything is loaded."""
