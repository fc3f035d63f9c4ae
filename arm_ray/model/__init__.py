"""A layer group as a function of its weights; activation capture; partition into shards."""
