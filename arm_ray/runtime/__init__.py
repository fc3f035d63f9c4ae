"""The layer-shard actors, the driver that coordinates them, and their placement on a cluster."""
