"""Scores of models and merged states, by engines and graders."""
