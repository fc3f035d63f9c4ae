"""A base under candidates whose vocabulary has grown: tokens were added, or rows as padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.weight_file import DTYPES, TensorEntry
from arm_ray.schedule import BASE, INITIAL


@dataclass(frozen=True)
class GrownBase(Checkpoint):
    """A base with the rows that its candidates have added: the mean of theirs.

    Attributes:
        base: What is on disk.
        candidates: The candidates, which have equally many rows.
    """

    base: Checkpoint
    candidates: tuple[Checkpoint, ...]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors into host memory, in the base's own dtype."""
        found = self.base.read(names)
        for name, tensor in found.items():
            first = len(tensor)
            if self.tensors[name].shape[0] == first:
                continue
            added = [c.read([name])[name][first:].double() for c in self.candidates]
            mean = torch.stack(added).mean(dim=0)
            found[name] = torch.cat([tensor, mean.to(tensor.dtype)])
        return found

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files that some tensors are read from."""
        names = list(names)
        grown = [n for n in names if self.tensors[n].shape != self.base.tensors[n].shape]
        found = self.base.files(names)
        return found.union(*(candidate.files(grown) for candidate in self.candidates))

    @property
    def is_laid_out(self) -> bool:
        """No: the rows that were added are in the candidates' files."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether the weight files can be opened on the node that opened the checkpoint."""
        return all(given.is_local for given in (self.base, *self.candidates))

    @property
    def config_directory(self) -> Path:
        """The base's."""
        return self.base.config_directory

    @property
    def fingerprint(self) -> str:
        """A digest of the base's and the candidates'."""
        given = (self.base, *self.candidates)
        return hashlib.sha256("".join(c.fingerprint for c in given).encode()).hexdigest()


def _added_rows(checkpoints: Mapping[str, Checkpoint], embedding: str) -> int:
    """Rows that all candidates have more than the base; 0: none, or not equally many.

    Args:
        checkpoints: `base`, `candidate-1`, … -> checkpoint.
        embedding: Name of the embedding.
    """
    sizes = {
        label: checkpoint.tensors[embedding].shape[0]
        for label, checkpoint in checkpoints.items()
        if embedding in checkpoint.tensors and label != INITIAL
    }
    base = sizes.pop(BASE, 0)
    if len(set(sizes.values())) != 1:
        return 0
    return max(0, next(iter(sizes.values())) - base)


def with_grown_base(
    checkpoints: Mapping[str, Checkpoint], embedding: str, others: Iterable[str]
) -> dict[str, Checkpoint]:
    """The same with a base that has the rows of its candidates, where they have more.

    Args:
        checkpoints: `base`, `candidate-1`, … -> checkpoint.
        embedding: Name of the embedding.
        others: Names of what else has a row for each token: the head, and the copy of a tied one.
    """
    count, base = _added_rows(checkpoints, embedding), checkpoints[BASE]
    if not count:
        return dict(checkpoints)
    candidates = tuple(c for n, c in checkpoints.items() if n not in (BASE, INITIAL))
    tensors = dict(base.tensors)
    for name in dict.fromkeys((embedding, *others)):
        if name in tensors and all(name in candidate.tensors for candidate in candidates):
            tensors[name] = _longer(tensors[name], count)
        else:
            # The copy of a tied head.
            tensors.pop(name, None)
    size = {"vocab_size": tensors[embedding].shape[0]}
    config = {**base.config, **size}
    # Models of several parts say it of their text.
    if isinstance(text := base.config.get("text_config"), dict):
        config = {**base.config, "text_config": {**text, **size}}
    grown = GrownBase(base.path, config, tensors, base, candidates)
    return {**checkpoints, BASE: grown}


def _longer(entry: TensorEntry, rows: int) -> TensorEntry:
    shape = (entry.shape[0] + rows, *entry.shape[1:])
    return replace(entry, shape=shape, end=entry.begin + prod(shape) * DTYPES[entry.code].itemsize)
