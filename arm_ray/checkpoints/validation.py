"""Checks of checkpoints that need a little of their data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.weight_file import TensorEntry
from arm_ray.errors import CorruptCheckpointError, MismatchError, NotACheckpointError
from arm_ray.storage.regular import open_regular

_TAIL_BYTES = 4096
_PIECE = 1 << 20


def check_zero_padding(checkpoints: Mapping[str, Checkpoint]) -> None:
    """Refuse a weight file that ends in zeros where another checkpoint has numbers.

    Some writers reserve a file's full size first, so a file that is still being written has the
    right length and opens without an error, but ends in zeros.

    Args:
        checkpoints: Label -> checkpoint; all with the same tensors. Those that store them in
            another form, or elsewhere, are passed over.

    Raises:
        CorruptCheckpointError: Names the file and the tensor.
    """
    checkpoints = {label: c for label, c in checkpoints.items() if c.is_laid_out and c.is_local}
    for label, checkpoint in checkpoints.items():
        last: dict[Path, TensorEntry] = {}
        for entry in checkpoint.tensors.values():
            if entry.file not in last or entry.end > last[entry.file].end:
                last[entry.file] = entry
        for entry in last.values():
            if not tail_is_zero(entry) or entry.name.endswith(".bias"):
                continue
            others = [
                other
                for other in checkpoints.values()
                if other is not checkpoint and entry.name in other.tensors
            ]
            if any(not tail_is_zero(other.tensors[entry.name]) for other in others):
                raise CorruptCheckpointError(
                    "a weight file ends in zeros: it was probably still being written",
                    where=f"{label}: {entry.file}",
                    got=f"zeros at the end of {entry.name}",
                    expected="numbers, as in the other checkpoints",
                    hint="wait for the run to finish the checkpoint, or copy it again",
                    subject=label,
                )


def check_no_adapter(names: Iterable[str], path: Path) -> None:
    """Refuse a model with adapters that are not merged into its weights: they would be lost.

    Raises:
        NotACheckpointError: Names the first of their tensors.
    """
    adapter = next((name for name in names if ".lora_" in name), None)
    if adapter is not None:
        raise NotACheckpointError(
            "the checkpoint is of a model with adapters",
            where=path,
            got=adapter,
            expected="the parameters of a whole model",
            hint="name the directory of the adapter that the trainer has saved, with "
            "adapter_config.json (verl: lora_adapter), or merge it into the model first",
        )


def check_tied_head(checkpoint: Checkpoint, where: object, embedding: str, head: str) -> None:
    """Refuse a head that is stored with other numbers than the embedding that it is tied to.

    A copy is common. A head of its own would be lost: a model that ties the two reads one of them.

    Args:
        checkpoint: Of a model whose configuration ties them.
        where: For the message.
        embedding: Name of the embedding's weight.
        head: What a copy of it as the head would be called.

    Raises:
        MismatchError: Names both, and the largest difference.
    """
    if head not in checkpoint.tensors:
        return
    found = checkpoint.read([embedding, head])
    left, right = found[embedding], found[head]
    if left.shape == right.shape:
        rows = max(1, _PIECE // max(1, left.shape[-1]))
        pairs = zip(torch.split(left, rows), torch.split(right, rows), strict=True)
        largest = max((float((a.float() - b.float()).abs().max()) for a, b in pairs), default=0.0)
        if largest == 0.0:
            return
        got = f"a difference of up to {largest:.3g}"
    else:
        got = f"{list(left.shape)} and {list(right.shape)}"
    raise MismatchError(
        f"{head} is not {embedding}, although config.json ties them (tie_word_embeddings)",
        where=where,
        got=got,
        expected="one tensor, or two equal ones",
        hint=f"if the head was trained by itself, set tie_word_embeddings to false in config.json "
        f"of the base, which needs a {head} then, and of all candidates; if not, save the "
        f"checkpoint without {head}",
    )


def tail_is_zero(entry: TensorEntry) -> bool:
    """Whether the last kilobytes of a stored tensor are all zero."""
    length = min(_TAIL_BYTES, entry.num_bytes)
    with open_regular(entry.file) as file:
        file.seek(entry.end - length)
        return not any(file.read(length))


def check_finite(tensor: Tensor, name: str, where: object) -> None:
    """Refuse NaN and infinity.

    Raises:
        CorruptCheckpointError: Names the tensor and the first bad position.
    """
    # A sum is finite if all terms are, up to overflow: one pass without a mask in the usual case,
    # in pieces because the library makes a float64 copy first.
    pieces = torch.split(tensor.reshape(-1), _PIECE)
    if all(bool(torch.isfinite(piece.sum(dtype=torch.float64))) for piece in pieces):
        return
    bad = torch.nonzero(~torch.isfinite(tensor))
    if len(bad) == 0:
        return
    position = bad[0].tolist()
    raise CorruptCheckpointError(
        f"the tensor {name} holds NaN or infinity",
        where=where,
        got=f"{tensor[tuple(position)].item()} at {position}, and {len(bad) - 1} more",
        expected="finite weights",
        hint="the run diverged or the save failed; choose another checkpoint",
    )


def check_second_moments(moments: Tensor, name: str, first_row: int, where: object) -> None:
    """Refuse what a running mean of squares cannot be: negative, NaN or infinite.

    Args:
        moments: Some rows of a tensor, float32.
        name: The tensor's.
        first_row: The first of them in the whole tensor.
        where: For the message.

    Raises:
        CorruptCheckpointError: Names the tensor and the first bad position.
    """
    low, high = torch.aminmax(moments)
    # Both are NaN where one entry is, and no comparison with NaN holds.
    if bool(low >= 0.0) and bool(high < torch.inf):
        return
    bad = torch.nonzero(~((moments >= 0.0) & (moments < torch.inf)))
    position = bad[0].tolist()
    value = moments[tuple(position)].item()
    if position:
        position[0] += first_row
    raise CorruptCheckpointError(
        f"the second moments of {name} hold numbers that no mean of squares can be",
        where=where,
        got=f"{value} at {position}",
        expected="finite numbers of at least 0",
        hint="name directories with Adam's exp_avg_sq, saved after a step that did not diverge",
    )
