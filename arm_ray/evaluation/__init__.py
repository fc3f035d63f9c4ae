"""Scoring of merged states: benchmarks, generation, graders."""
