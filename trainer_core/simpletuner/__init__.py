"""SimpleTuner's configuration as one of ours."""
