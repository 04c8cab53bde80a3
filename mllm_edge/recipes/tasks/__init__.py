"""Training tasks, one file per task."""
