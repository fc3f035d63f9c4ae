"""arm_ray merges a training run's own checkpoints into a better model, without training.

It implements Streaming Merging with ARM (Activation-guided Rotation-aware Merging,
arXiv 2602.03237) on Ray.
"""

__version__ = "0.1.0"
