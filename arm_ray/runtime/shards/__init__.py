"""The layer shards: their actors, weights and files."""
