"""Many merges, large inputs, long runs."""
