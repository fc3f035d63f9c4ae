"""Runs code that a model wrote, in a sandbox, and scores the code benchmarks with it."""
