"""Ray: joining it, its nodes, and calls of actors."""
