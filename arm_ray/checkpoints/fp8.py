"""Checkpoints in FP8 with a scale for each block, as DeepSeek and Qwen publish them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.states import ExportFile
from arm_ray.checkpoints.weight_file import (
    STORED_DTYPES,
    TensorSpec,
    read_tensors,
    write_weight_file,
)
from arm_ray.errors import CorruptCheckpointError

_CODE = "F8_E4M3"
_SCALE = "_scale_inv"
# The largest number of this format.
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8Checkpoint(Checkpoint):
    """A checkpoint whose weights in FP8 are read as bfloat16.

    Attributes:
        source: The same as it is stored, here or elsewhere, with the scales among its tensors.
        block: Rows and columns that share a scale.
        settings: `quantization_config` of `config.json`.
    """

    source: Checkpoint
    block: tuple[int, int]
    settings: Mapping[str, Any]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read some tensors into host memory; those in FP8 as bfloat16."""
        found = self.source.read(names)
        for name, tensor in found.items():
            if name in self.quantised:
                [scales] = self.source.read([name + _SCALE]).values()
                found[name] = dequantised(tensor, scales, self.block)
        return found

    @functools.cached_property
    def quantised(self) -> frozenset[str]:
        """Names of the weights that are stored in FP8."""
        return frozenset(n for n in self.tensors if self.source.tensors[n].code == _CODE)

    def under(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names for some of its tensors: new -> present."""
        scales = {n + _SCALE: old + _SCALE for n, old in names.items() if old in self.quantised}
        renamed = super().under(names)
        assert isinstance(renamed, Fp8Checkpoint)
        return replace(renamed, source=self.source.under({**names, **scales}))

    def files(self, names: Iterable[str]) -> set[Path]:
        """The files that some tensors are read from, with those of their scales."""
        return self.source.files(self.with_scales(names))

    def with_scales(self, names: Iterable[str]) -> list[str]:
        """Names of tensors, and of the scales of those in FP8."""
        names = list(names)
        return [*names, *(name + _SCALE for name in names if name in self.quantised)]

    @property
    def is_laid_out(self) -> bool:
        """No: what is read is twice as large as what lies in the files."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether the weight files can be opened on the node that opened the checkpoint."""
        return self.source.is_local

    @property
    def config_directory(self) -> Path:
        """The directory whose `config.json` describes the model."""
        return self.source.config_directory

    @property
    def fingerprint(self) -> str:
        """That of what is stored."""
        return self.source.fingerprint

    @property
    def storage(self) -> Fp8Storage:
        """How these weights are stored."""
        codes = {self.source.tensors[name + _SCALE].code for name in self.quantised}
        # Never several, and if so, the most exact one.
        dtype = max((STORED_DTYPES[code] for code in codes), key=lambda each: each.itemsize)
        return Fp8Storage(self, dtype)


@dataclass(frozen=True)
class Fp8Storage:
    """How a base stores weights in FP8, for a merged model that is to do so too.

    Attributes:
        base: The base.
        scale_dtype: Of its scales.
    """

    base: Fp8Checkpoint
    scale_dtype: torch.dtype

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights that are stored so."""
        return self.base.quantised

    def rewrite(self, directory: Path, file: ExportFile) -> ExportFile:
        """Quantise the weights in a weight file that the base has in FP8, in place.

        Those that are carried over from the base are copied as it stores them.

        Args:
            directory: Of the unfinished model.
            file: One of its files, with these weights in float32, so that they are rounded once.

        Returns:
            What the file holds now.

        Raises:
            OSError: The disk is full.
        """
        specs = tuple(spec for old in file.specs for spec in self._specs(old))
        if len(specs) > len(file.specs):
            path = directory / file.name
            tensors = (each for old in file.specs for each in self._tensors(path, file, old))
            write_weight_file(path, specs, tensors)
        return replace(file, specs=specs)

    def _specs(self, spec: TensorSpec) -> Iterator[TensorSpec]:
        if spec.name not in self.names:
            yield spec
            return
        grid = _grid(spec.shape, self.base.block)
        yield TensorSpec(spec.name, torch.float8_e4m3fn, spec.shape)
        yield TensorSpec(spec.name + _SCALE, self.scale_dtype, grid)

    def _tensors(self, path: Path, file: ExportFile, spec: TensorSpec) -> Iterator[Tensor]:
        name = spec.name
        if name not in self.names:
            yield read_tensors(path, [name])[name]
        elif file.is_carried:
            yield from self.base.source.read([name, name + _SCALE]).values()
        else:
            weight = read_tensors(path, [name])[name]
            is_power = self.base.settings.get("scale_fmt") == "ue8m0"
            yield from quantised(weight, self.base.block, self.scale_dtype, powers=is_power)


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


def quantised(
    weight: Tensor,
    block: tuple[int, int],
    scale_dtype: torch.dtype = torch.float32,
    *,
    powers: bool = False,
) -> tuple[Tensor, Tensor]:
    """`Q_ij` is the float8 number that is nearest to `W_ij / s_kl`, with `s_kl = max |W_kl| / 448`.

    448 is the largest number in float8 (e4m3). Where a block is zero, its scale is 1.

    Args:
        weight: `W` `[rows, columns]`, float32.
        block: Rows and columns of a block; the last ones may be smaller.
        scale_dtype: Of the scales; they are rounded to it before anything is divided by them.
        powers: Whether scales are powers of two, each the next above; they are where the scales'
            dtype has nothing else (`float8_e8m0fnu`).

    Returns:
        `Q` `[rows, columns]`, float8_e4m3fn, and `s` `[⌈rows / block[0]⌉, ⌈columns / block[1]⌉]`.
    """
    rows, columns = weight.shape
    down, across = _grid(weight.shape, block)
    padding = (0, across * block[1] - columns, 0, down * block[0] - rows)
    blocks = functional.pad(weight.to(torch.float32), padding).view(down, block[0], across, -1)
    largest = blocks.abs().amax(dim=(1, 3))
    tiny = torch.finfo(torch.float32).tiny
    scales = torch.where(largest > 0, (largest / _LARGEST).clamp(min=tiny), 1.0)
    if powers or scale_dtype.itemsize == 1:
        mantissa, exponent = torch.frexp(scales)
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    scales = scales.to(scale_dtype)
    low = (blocks / scales.to(torch.float32)[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = low.view(down * block[0], across * block[1])
    return whole[:rows, :columns].contiguous(), scales


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a matrix, down and across."""
    return ceil(shape[0] / block[0]), ceil(shape[1] / block[1])


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
    rows, columns = block
    tensors = dict(checkpoint.tensors)
    for name, entry in checkpoint.tensors.items():
        if entry.code != _CODE:
            continue
        scale = tensors.pop(name + _SCALE, None)
        expected = _grid(entry.shape, (rows, columns)) if len(entry.shape) == 2 else ()
        if scale is None or scale.shape != expected or scale.code not in STORED_DTYPES:
            raise CorruptCheckpointError(
                f"the scales of {name}, which is stored in FP8, are not there",
                where=entry.file,
                got="none" if scale is None else f"{name}{_SCALE} {scale.code} {list(scale.shape)}",
                expected=f"{name}{_SCALE} {list(expected)}, one for each block of {block}",
                hint="copy the checkpoint again",
            )
        tensors[name] = replace(entry, code="BF16", end=entry.begin + 2 * prod(entry.shape))
    config = {k: value for k, value in checkpoint.config.items() if k != "quantization_config"}
    return Fp8Checkpoint(
        checkpoint.path, config, tensors, checkpoint, (rows, columns), dict(settings)
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
