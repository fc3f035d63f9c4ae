"""Runs that show what the program does, from a configuration to a table."""
