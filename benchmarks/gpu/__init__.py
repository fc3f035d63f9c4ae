"""What one GPU does with a merge: rotation, one layer, and whole merges through Ray."""
