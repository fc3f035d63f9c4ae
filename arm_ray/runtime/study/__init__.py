"""Runs a study: trainings, merges and scorings, each once."""
