"""Checkpoints in FP8 with a scale for each block, as DeepSeek and Qwen publish them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.weight_file import TensorEntry, read_tensors
from arm_ray.errors import CorruptCheckpointError

_CODE = "F8_E4M3"
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class Fp8Checkpoint(Checkpoint):
    """A checkpoint whose weights in FP8 are read as bfloat16.

    Attributes:
        scales: Name of a weight in its file -> its scales.
        block: Rows and columns that share a scale.
    """

    scales: Mapping[str, TensorEntry]
    block: tuple[int, int]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors into host memory; those in FP8 as bfloat16."""
        found = super().read(names)
        for name, tensor in found.items():
            if tensor.dtype == torch.float8_e4m3fn:
                scale = self._scale_of(name)
                [values] = read_tensors(scale.file, [scale.stored or scale.name]).values()
                found[name] = dequantised(tensor, values, self.block)
        return found

    def _scale_of(self, name: str) -> TensorEntry:
        return self.scales[self.tensors[name].stored or name]

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files that some tensors are read from, with those of their scales."""
        names = list(names)
        stored = [self.tensors[name].stored or name for name in names]
        return super().files(names) | {self.scales[n].file for n in stored if n in self.scales}

    @property
    def is_laid_out(self) -> bool:
        """No: what is read is twice as large as what lies in the files."""
        return False


def dequantised(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """`W_ij = Q_ij s_kl` in bfloat16, where entry `ij` lies in block `kl`.

    Args:
        weight: `Q` `[rows, columns]`, float8.
        scales: `s` `[⌈rows / block[0]⌉, ⌈columns / block[1]⌉]`; the last blocks may be smaller.
        block: Rows and columns of a block.
    """
    found = weight.to(torch.float32)
    wide = scales.to(torch.float32).repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    for number, row in enumerate(wide):
        found[number * block[0] : (number + 1) * block[0]] *= row
    return found.to(torch.bfloat16)


def read_as_bfloat16(checkpoint: Checkpoint) -> Checkpoint:
    """The same without its scales, and with bfloat16 in place of FP8, where it has any.

    Raises:
        CorruptCheckpointError: Weights and scales do not fit together.
    """
    settings = checkpoint.config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return checkpoint
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(_is_size(size) for size in block)):
        return checkpoint  # one scale for each tensor: refused as any other quantisation
    tensors = dict(checkpoint.tensors)
    scales: dict[str, TensorEntry] = {}
    for name, entry in checkpoint.tensors.items():
        if entry.code != _CODE:
            continue
        scale = tensors.pop(f"{name}{_SCALE}", None)
        expected = tuple(ceil(size / each) for size, each in zip(entry.shape, block, strict=False))
        if len(entry.shape) != 2 or scale is None or scale.shape != expected:
            raise CorruptCheckpointError(
                f"the scales of {name}, which is stored in FP8, are not there",
                where=entry.file,
                got="none" if scale is None else f"{name}{_SCALE} {list(scale.shape)}",
                expected=f"{name}{_SCALE} {list(expected)}, one for each block of {block}",
                hint="copy the checkpoint again",
            )
        scales[entry.stored or name] = scale
        end = entry.begin + 2 * prod(entry.shape)
        tensors[name] = replace(entry, code="BF16", end=end)
    config = {k: value for k, value in checkpoint.config.items() if k != "quantization_config"}
    rows, columns = block
    return Fp8Checkpoint(checkpoint.path, config, tensors, scales, (rows, columns))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
