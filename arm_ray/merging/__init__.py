"""Tensors in, tensors out: rotations and merge operators.

Nothing here knows of files, of Ray or of configuration objects.
"""
