"""What a merge will need, from its configuration and headers alone. No Ray, no weights read."""
