"""Learning-rate schedules and their drawings."""
