"""Weights go to the disk while others compute, and what is in the file is the same."""

from __future__ import annotations

import itertools
import mmap
import os
from pathlib import Path

import pytest
import torch

from arm_ray.checkpoints.weight_file import TensorSpec, WeightFileWriter, read_tensors

ROWS, WIDTH, AT_ONCE = 700, 700, 300
SPECS = [
    TensorSpec("first", torch.float32, (3,)),
    TensorSpec("matrix", torch.float32, (ROWS, WIDTH)),
    TensorSpec("last", torch.float32, (3,)),
]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
def test_whole_pages_are_given_to_the_disk_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, int]] = []

    def advice(_descriptor: int, begin: int, size: int, kind: int) -> None:
        assert kind == os.POSIX_FADV_DONTNEED
        given.append((begin, begin + size))

    monkeypatch.setattr("arm_ray.storage.atomic.os.posix_fadvise", advice)
    tensors = write(tmp_path / "model.safetensors")
    # The small tensors are not worth it; no page is given twice, and none while it is half full.
    assert len(given) == -(-ROWS // AT_ONCE)
    assert all(position % mmap.PAGESIZE == 0 for piece in given for position in piece)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(given))
    missing = tensors["matrix"].nbytes - sum(end - begin for begin, end in given)
    assert 0 <= missing <= 2 * mmap.PAGESIZE * len(given)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_file_holds_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    if refuses:

        def refused(*_arguments: int) -> None:
            raise OSError("no such advice on this file system")

        monkeypatch.setattr("arm_ray.storage.atomic.os.posix_fadvise", refused, raising=False)
    path = tmp_path / "model.safetensors"
    expected = write(path)
    found = read_tensors(path, expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def write(path: Path) -> dict[str, torch.Tensor]:
    """Write the three tensors, the matrix in pieces that end within pages."""
    generator = torch.Generator().manual_seed(1)
    tensors = {spec.name: torch.randn(spec.shape, generator=generator) for spec in SPECS}
    with WeightFileWriter(path, SPECS) as writer:
        for name in ("first", "last"):
            writer.write(name, 0, tensors[name])
        for row in range(0, ROWS, AT_ONCE):
            writer.write("matrix", row, tensors["matrix"][row : row + AT_ONCE])
    return tensors
