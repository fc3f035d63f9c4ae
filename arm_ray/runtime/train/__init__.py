"""Training jobs on Ray Train."""
