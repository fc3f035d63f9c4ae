"""Kills processes of runs at random moments, and compares what comes out with undisturbed runs."""
