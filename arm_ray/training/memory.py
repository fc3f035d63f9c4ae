"""How much memory a training worker needs, told from the model's config.json before it starts.

Weights, gradients and AdamW's moments are exact; activations are a rough estimate. See
`estimate` for the terms.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.errors import PlacementError
from arm_ray.training.config import SftConfig, TrainingConfig
from arm_ray.training.label_loss import CHUNK_TOKENS

_GIB = 2**30
# Of a decoder layer, in multiples of the hidden and the intermediate size, per token: inputs and
# outputs of the linear modules, norms and the residual stream that the backward pass needs.
_HIDDEN_COPIES, _INTERMEDIATE_COPIES = 12, 4
# Interpreter, libraries, communication buffers, bytes of one process.
_PROCESS = _GIB
# Version 2, and version 1: directory, limit, usage.
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one worker needs at most, by what for."""

    weights: int
    gradients: int
    optimizer: int
    logits: int
    activations: int
    process: int = _PROCESS

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.weights, self.gradients, self.optimizer, self.logits, self.activations)
        return sum(parts) + self.process

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "logits", "activations")
        named = ", ".join(f"{name} {getattr(self, name) / _GIB:.2f}" for name in parts)
        return f"{self.total / _GIB:.2f} GiB ({named})"


def parameter_counts(model: Path, config: TrainingConfig) -> tuple[int, int, Any]:
    """Parameters in all and trainable ones, and the model's text configuration.

    The architecture is laid out without memory for its weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    everything = sum(p.numel() for p in skeleton.parameters())
    trainable = everything
    if config.lora is not None:
        wanted = config.lora.target_modules
        head = skeleton.get_output_embeddings()
        trainable = sum(
            config.lora.rank * sum(module.weight.shape)
            for name, module in skeleton.named_modules()
            if isinstance(module, torch.nn.Linear)
            and module is not head
            and (wanted == "all-linear" or name.rpartition(".")[2] in wanted)
        )
    return everything, trainable, settings.get_text_config()


def estimate(
    model: Path, config: TrainingConfig, *, workers: int, micro_batch: int, length: int
) -> MemoryEstimate:
    """Estimate what one worker needs.

    With P parameters, T of them trained, W workers and b bytes a number of the forward pass:
    weights 4 P, gradients 4 T, moments 8 T; with ZeRO-3, (P b + T 4) / W, T b / W and 8 T / W, and
    2 b times the largest layers in flight (taken as P / layers); with LoRA, T is the adapter.
    Logits: three copies of [labels, vocabulary] in float32, of at most 2048 tokens.

    Args:
        model: Directory with the model's config.json.
        config: The configuration.
        workers: W.
        micro_batch: Samples of one forward pass.
        length: Tokens of the longest sample.
    """
    total, trained, text = parameter_counts(model, config)
    if config.lora is not None:
        total += trained
    width = 2 if config.precision == "bfloat16" else 4
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    if config.runtime.zero_stage == 3:
        in_flight = 2 * width * total // layers
        weights = (total * width + trained * 4 * (width == 2)) // workers + in_flight
        gradients, moments = trained * width // workers + in_flight, 8 * trained // workers
    else:
        weights, gradients, moments = 4 * total, 4 * trained, 8 * trained
        if workers > 1:
            # DistributedDataParallel keeps gradients in buckets of its own while it starts.
            gradients += 4 * trained
    tokens = micro_batch * length
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    layer = tokens * (_HIDDEN_COPIES * hidden + _INTERMEDIATE_COPIES * inner) * width
    if config.attention == "eager":
        heads = int(getattr(text, "num_attention_heads", 1))
        layer += 3 * micro_batch * heads * length * length * width
    kept = tokens * hidden * width * layers + layer if config.gradient_checkpointing else (
        layer * layers
    )  # fmt: skip
    labels = min(tokens, CHUNK_TOKENS) if isinstance(config, SftConfig) else tokens
    logits = 3 * 4 * labels * int(text.vocab_size)
    return MemoryEstimate(weights, gradients, moments, logits, kept)


def free_host_bytes() -> int:
    """Host memory that can still be taken: MemAvailable, and what the cgroup leaves."""
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]))
    for directory, limit, usage in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            # "max" is no number: there is no limit. Cached files count as used, but give way.
            stat = dict(
                line.split() for line in (directory / "memory.stat").read_text().splitlines()
            )
            cached = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
            used = int((directory / usage).read_text()) - cached
            free.append(int((directory / limit).read_text()) - used)
    if not free:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min(free))


def check(
    needed: MemoryEstimate,
    config: TrainingConfig,
    *,
    free: int,
    sharing: int,
    where: str = "memory of a node",
) -> None:
    """Refuse a training that will not fit.

    Args:
        needed: By one worker.
        config: The configuration, to say what to change.
        free: Bytes there are.
        sharing: Workers that share them.
        where: Which memory, for the error.

    Raises:
        PlacementError: It will not fit; says what is asked, found, and what to change.
    """
    asked = needed.total * sharing
    if asked <= free:
        return
    hints = ["a smaller micro_batch_size or max_length", "fewer runtime.workers on a node"]
    if not config.gradient_checkpointing:
        hints.insert(0, "gradient_checkpointing: true")
    if config.lora is None:
        hints.append("lora")
    if config.runtime.zero_stage != 3:
        hints.append("runtime.zero_stage: 3 with several nodes or GPUs")
    raise PlacementError(
        "the training does not fit into memory",
        where=where,
        got=f"{free / _GIB:.2f} GiB free",
        expected=f"{asked / _GIB:.2f} GiB: {sharing} worker(s) of {needed}",
        hint="change " + ", or ".join(hints),
    )
