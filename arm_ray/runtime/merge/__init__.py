"""A merge on Ray, from its configuration to its model."""
