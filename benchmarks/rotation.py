"""Compact rotation against the full SVD and a dense product, float32 task vectors, N = 64.

The dense form is what the paper describes: the full singular value decomposition of the activation
shift, and the product of its `d_out × d_out` left factor with the task vector. It is timed in
float32; what the compact form gives is compared with the dense form in float64, because the float32
one is the less accurate of the two.
"""

from __future__ import annotations

import sys
import time

import torch

from arm_ray.merging.rotation import activation_rotation
from benchmarks.common import report, timed

SAMPLES = 64
SHAPES = [(1024, 1024), (3584, 3584), (5120, 5120), (13824, 5120)]


def dense(shift: torch.Tensor, task_vector: torch.Tensor) -> torch.Tensor:
    """`U ΔW` with the full SVD in float32 and signs that make the diagonal positive."""
    left, _, _ = torch.linalg.svd(shift, full_matrices=True)
    left = left * torch.where(left.diagonal() < 0.0, -1.0, 1.0)
    rotated: torch.Tensor = left @ task_vector
    return rotated


def compact(shift: torch.Tensor, task_vector: torch.Tensor) -> torch.Tensor:
    """`U ΔW` as the merge computes it."""
    rotation = activation_rotation(shift)
    assert rotation is not None
    return rotation.apply(task_vector)


def main() -> int:
    """Run the benchmark; returns the exit code."""
    rows = []
    for d_out, d_in in SHAPES:
        generator = torch.Generator().manual_seed(d_out)
        shift = torch.randn(d_out, SAMPLES, generator=generator)
        task_vector = torch.randn(d_out, d_in, generator=generator)
        ours = timed(lambda s=shift, t=task_vector: compact(s, t), repeats=5)  # type: ignore[misc]
        started = time.perf_counter()
        # Once: it takes minutes at the largest shape.
        dense(shift, task_vector)
        theirs = time.perf_counter() - started
        expected = dense(shift.double(), task_vector.double())
        error = (compact(shift, task_vector) - expected).norm() / expected.norm()
        rows.append(
            {
                "shape": f"{d_out} x {d_in}",
                "dense, s": theirs,
                "compact, s": ours,
                "times faster": theirs / ours,
                "relative error": float(error),
            }
        )
        print(rows[-1], flush=True)
    large = [row for row in rows if int(str(row["shape"]).split()[0]) >= 5120]
    slowest = min(float(str(row["times faster"])) for row in large)
    worst = max(float(str(row["relative error"])) for row in rows)
    report(
        "rotation",
        f"Rotation of a task vector, N = {SAMPLES}, {torch.get_num_threads()} threads",
        rows,
        [
            (f"at least 20 times faster at 5120 and above: {slowest:.1f}", slowest >= 20),
            (f"equal to 1e-5: {worst:.1e}", worst <= 1e-5),
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
