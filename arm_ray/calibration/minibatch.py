"""The order of the rows, mini-batches, and micro-batches for the forward pass. Numpy only.

Iteration t uses mini-batch t of the calibration stream. The rows are put in an order once;
the stream runs through that order and starts again when it ends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# What one more micro-batch costs, in tokens of it: about as much as reading its weights once more.
_CALL_TOKENS = 64


@dataclass(frozen=True, eq=False)
class MiniBatch:
    """The samples of one iteration.

    Attributes:
        iteration: Number of the iteration, from 1.
        row_indices: Row of the data that each sample comes from, counted from 0. A row occurs
            more than once when the mini-batch is larger than the data.
        token_ids: Token ids of each sample, int32 ``[length]``, length 1 or more.
        labels: Which tokens of each sample carry loss, bool ``[length]``, never the first; empty
            where losses are not wanted.
    """

    iteration: int
    row_indices: list[int]
    token_ids: list[NDArray[np.int32]]
    labels: list[NDArray[np.bool_]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256, in hex, over the token ids, sample by sample."""
        found = hashlib.sha256()
        for ids in self.token_ids:
            found.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        return found.hexdigest()

    def part(self, samples: Sequence[int]) -> MiniBatch:
        """Some of the samples, by their positions."""
        return MiniBatch(
            self.iteration,
            [self.row_indices[i] for i in samples],
            [self.token_ids[i] for i in samples],
            [self.labels[i] for i in samples] if self.labels else [],
        )


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Samples of a mini-batch that go through the model together, padded on the right.

    Attributes:
        sample_positions: Position of each row's sample in the mini-batch, int64 ``[rows]``.
        input_ids: Token ids, 0 where padded, int64 ``[rows, length]``.
        attention_mask: 1 for a token, 0 for padding, int64 ``[rows, length]``.
        lengths: Tokens in each row, int64 ``[rows]``, falling.
        labels: Which tokens carry loss, bool ``[rows, length]``; None where losses are not wanted.
    """

    sample_positions: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    lengths: NDArray[np.int64]
    labels: NDArray[np.bool_] | None = None


def row_order(num_rows: int, *, shuffle: bool, seed: int) -> NDArray[np.int64]:
    """Returns the order in which the stream goes through the rows.

    Numpy makes the permutation, so that it depends on nothing but the arguments: not on Ray,
    nor on how many workers read the data.

    Returns:
        A permutation of ``0 .. num_rows - 1``, int64; the identity without ``shuffle``.
    """
    if not shuffle:
        return np.arange(num_rows, dtype=np.int64)
    return np.random.Generator(np.random.PCG64(seed)).permutation(num_rows).astype(np.int64)


def stream_positions(iteration: int, batch_size: int, num_rows: int) -> NDArray[np.int64]:
    """Returns the places in the row order that an iteration uses.

    Args:
        iteration: Number of the iteration, from 1.
        batch_size: Samples per mini-batch.
        num_rows: Rows of the data, 1 or more.

    Returns:
        ``((iteration - 1) * batch_size + j) mod num_rows`` for each j, int64 ``[batch_size]``.

    Raises:
        ValueError: If ``iteration`` is below 1.
    """
    if iteration < 1:
        raise ValueError(f"iterations count from 1, got {iteration}")
    # Python integers first: the product has no limit there.
    start = (iteration - 1) * batch_size % num_rows
    return (start + np.arange(batch_size, dtype=np.int64)) % num_rows


def unique_samples(batch: MiniBatch) -> tuple[MiniBatch, NDArray[np.int64]]:
    """Leaves out samples that equal an earlier one of the mini-batch.

    Equal samples must give equal activations to the last bit: run in different micro-batches they
    would differ by rounding, and that noise would count as a direction of its own.

    Returns:
        The mini-batch of the different samples, in order; and for each sample of ``batch`` its
        position in that, int64 ``[N]``.
    """
    first: dict[bytes, int] = {}
    kept: list[int] = []
    positions: list[int] = []
    for index, ids in enumerate(batch.token_ids):
        position = first.setdefault(ids.tobytes(), len(first))
        if position == len(kept):
            kept.append(index)
        positions.append(position)
    return batch.part(kept), np.array(positions, dtype=np.int64)


def micro_batches(batch: MiniBatch, *, max_tokens: int, max_samples: int) -> list[MicroBatch]:
    """Cuts a mini-batch into micro-batches that fit a budget of tokens.

    Samples go longest first (equal lengths in their order), and are cut where padding and the cost
    of a call are least together. The result depends on nothing but the arguments.

    Args:
        batch: The mini-batch.
        max_tokens: Most ``rows * length`` of a micro-batch, padding counted. A sample that
            alone is longer gets a micro-batch for itself.
        max_samples: Most rows of a micro-batch.

    Returns:
        Micro-batches that hold each sample exactly once, the one with the longest first.

    Raises:
        ValueError: If a limit is below 1.
    """
    if max_tokens < 1 or max_samples < 1:
        raise ValueError(f"limits must be 1 or more, got {max_tokens=} and {max_samples=}")
    lengths = np.array([len(ids) for ids in batch.token_ids], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    cuts = _cuts(lengths[order].tolist(), max_tokens, max_samples)
    return [_padded(batch, order[start:end], lengths) for start, end in cuts]


def _cuts(lengths: Sequence[int], max_tokens: int, max_samples: int) -> list[tuple[int, int]]:
    """Where to cut samples of falling lengths, so that the fewest tokens are computed.

    Returns:
        Start and end of each micro-batch.
    """
    # Of the samples up to each one: the fewest tokens, and the start of the last micro-batch.
    fewest, starts = [0], [0]
    for end in range(1, len(lengths) + 1):
        options = []
        for start in range(end - 1, max(-1, end - 1 - max_samples), -1):
            # Sorted, so the first row is the longest.
            padded = (end - start) * lengths[start]
            if padded > max_tokens and end - start > 1:
                break
            options.append((fewest[start] + padded + _CALL_TOKENS, start))
        tokens, start = min(options)
        fewest.append(tokens)
        starts.append(start)
    cuts, end = list[tuple[int, int]](), len(lengths)
    while end:
        cuts.append((starts[end], end))
        end = starts[end]
    return cuts[::-1]


def _padded(
    batch: MiniBatch, positions: NDArray[np.int64], all_lengths: NDArray[np.int64]
) -> MicroBatch:
    lengths = all_lengths[positions]
    mask = (np.arange(lengths[0])[None, :] < lengths[:, None]).astype(np.int64)
    input_ids = np.zeros(mask.shape, dtype=np.int64)
    labels = np.zeros(mask.shape, dtype=np.bool_) if batch.labels else None
    for row, position in enumerate(positions):
        input_ids[row, : lengths[row]] = batch.token_ids[position]
        if labels is not None:
            labels[row, : lengths[row]] = batch.labels[position]
    return MicroBatch(positions.astype(np.int64), input_ids, mask, lengths, labels)
