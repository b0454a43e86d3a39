"""Import SimpleTuner's configuration as a job."""
