"""A configuration for checkpoints at hand: what a run says, what is chosen, and the file."""
