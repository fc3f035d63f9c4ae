"""Merges beside a training run that is still going."""
