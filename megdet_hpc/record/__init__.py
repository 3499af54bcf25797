"""What a run's folder tells: written by the run for onlookers, and read back from a live, dead or older run."""
