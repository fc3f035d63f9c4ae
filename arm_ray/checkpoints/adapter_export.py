"""A merged model as a LoRA adapter over its base, where their difference is of low rank.

Merging adapters of rank `r` gives differences of rank `k r` at most for `k` candidates, because a
rotation keeps the rank; such a model can be served as the adapters were. For each weight, with the
singular value decomposition `W − W_base = U diag(σ) Vᵀ` cut off at the rank,

    B = U diag(√σ),   A = diag(√σ) Vᵀ,   s = 1
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from arm_ray.checkpoints.peft import CONFIG_NAME, PREFIX
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.checkpoints.weight_file import TensorSpec, write_json, write_weight_file
from arm_ray.errors import CheckpointError

# The largest rank that is written where none is asked for.
MAX_RANK = 256
# Elements that are in float64 at a time.
_BLOCK = 1 << 22
# Half the spacing of float32 numbers at 1: the relative error of one rounding.
_UNIT = 2.0**-24


def export_adapter(
    directory: Path,
    weights: Iterable[tuple[str, Tensor, Tensor]],
    linear: Collection[str],
    *,
    base_model: str,
    fixed_rank: int | None = None,
    max_rank: int = MAX_RANK,
    roundings: float = 4.0,
) -> int:
    """Write `adapter_model.safetensors` and, last, `adapter_config.json`.

    All modules get the largest rank that one of them needs, the others filled up with zeros,
    because not every program that serves adapters reads ranks of single modules.

    Args:
        directory: Where; made if it is not there.
        weights: Name, merged weight (float32, before it is rounded for storage) and the base's, of
            every tensor of the model; one at a time, only their factors are kept.
        linear: Names of the weights of linear modules; all other tensors have to equal the base's.
        base_model: Path or hub id of the base, for `base_model_name_or_path`.
        fixed_rank: The rank to write; None: the largest that one module needs.
        max_rank: The largest rank to write without `fixed_rank`.
        roundings: How often the merged weights were rounded to float32. An error matrix with
            entries of at most `2⁻²⁴ |W_ij|` has no singular value above `2⁻²⁴ ‖W‖`, so that
            singular values up to `roundings · 2⁻²⁴ ‖W‖` (Frobenius) are taken for rounding.

    Returns:
        The rank.

    Raises:
        CheckpointError: A tensor's difference has a higher rank, or it is of a tensor that an
            adapter cannot change, or there is no difference at all; names the tensor.
        OSError: The disk is full, or the directory cannot be written.
    """
    most = max_rank if fixed_rank is None else fixed_rank
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    unchanged: set[str] = set()
    for name, merged, base in weights:
        module = name.removesuffix(".weight")
        if name not in linear:
            if not torch.equal(merged, base.to(merged.dtype)):
                raise CheckpointError(
                    f"an adapter cannot hold the difference of {name}",
                    where=directory,
                    got="a tensor that is not the weight of a linear module, and differs",
                    expected="the base's",
                    hint="write the model itself (output_format: model)",
                )
            continue
        b, a = _factors(merged, base, roundings)
        rank = len(a)
        if rank > most:
            raise CheckpointError(
                f"the difference of {name} is not of low rank",
                where=directory,
                got=f"rank {rank} of {min(merged.shape)}",
                expected=f"at most {most}",
                hint="write the model itself (output_format: model), or allow a higher rank "
                "(adapter_rank)",
            )
        if rank:
            factors[module] = (b, a)
        else:
            unchanged.add(module)
    if not factors:
        raise CheckpointError(
            "the merged model equals its base, so that there is no adapter to write",
            where=directory,
        )
    rank = fixed_rank or max(len(a) for _, a in factors.values())
    directory.mkdir(parents=True, exist_ok=True)
    specs = []
    for module, (b, a) in factors.items():
        for side, shape in (("A", (rank, a.shape[1])), ("B", (b.shape[0], rank))):
            specs.append(TensorSpec(f"{PREFIX}{module}.lora_{side}.weight", torch.float32, shape))
    write_weight_file(directory / WEIGHTS_NAME, specs, _padded(factors.values(), rank))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _targets(factors, unchanged),
    }
    write_json(directory / CONFIG_NAME, config)
    return rank


def adapter_bytes(
    shapes: Mapping[str, tuple[int, ...]], linear: Collection[str], fixed_rank: int | None
) -> int:
    """At most so many bytes an adapter takes: all modules changed, at the largest rank."""
    sizes = [shapes[name] for name in linear]
    largest = max((min(size) for size in sizes), default=0)
    rank = min(MAX_RANK, largest) if fixed_rank is None else fixed_rank
    return torch.float32.itemsize * rank * sum(map(sum, sizes))


def _targets(changed: Collection[str], unchanged: Collection[str]) -> list[str]:
    """Modules by the last part of their names; in full where others of it are unchanged."""
    mixed = {module.rpartition(".")[2] for module in unchanged}
    short = {module: module.rpartition(".")[2] for module in changed}
    return sorted({module if short[module] in mixed else short[module] for module in changed})


def _padded(factors: Iterable[tuple[Tensor, Tensor]], rank: int) -> Iterator[Tensor]:
    """A and B of each module in turn, with rows and columns of zeros up to the rank."""
    for b, a in factors:
        missing = rank - len(a)
        yield torch.nn.functional.pad(a, (0, 0, 0, missing))
        yield torch.nn.functional.pad(b, (0, missing))


def _factors(merged: Tensor, base: Tensor, roundings: float) -> tuple[Tensor, Tensor]:
    """B `[d_out, r]` and A `[r, d_in]`, float32, from the Gram matrix of the smaller side."""
    wide = merged.shape[0] < merged.shape[1]
    tall, start = (merged.T, base.T) if wide else (merged, base)
    short = tall.shape[1]
    step = max(1, _BLOCK // short)

    def blocks() -> Iterator[Tensor]:
        for first in range(0, len(tall), step):
            rows = slice(first, first + step)
            yield tall[rows].to(torch.float64) - start[rows].to(torch.float64)

    gram = torch.zeros(short, short, dtype=torch.float64, device=merged.device)
    for block in blocks():
        gram.addmm_(block.T, block)
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.clamp(min=0.0).sqrt().flip(0)
    # Rounding of the Gram matrix itself looks like singular values up to 1e-8 of the largest.
    noise = max(
        roundings * _UNIT * float(torch.linalg.vector_norm(merged, dtype=torch.float64)),
        float(sigma[0]) * (short * torch.finfo(torch.float64).eps) ** 0.5,
    )
    rank = int((sigma > noise).sum())
    right = vectors.flip(1)[:, :rank]
    root = sigma[:rank].sqrt()
    long = torch.cat([(block @ right) / root for block in blocks()]).float()
    narrow = (right * root).T.float()
    return (narrow.T, long.T) if wide else (long, narrow)
