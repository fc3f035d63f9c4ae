"""The directory that a run writes to: whose it is, what is in it, where it is copied to."""
