"""Faults of the file system, call by call: see `shim.c`."""
