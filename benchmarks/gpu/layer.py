"""One decoder layer through one iteration on the device, stage by stage, against its floors."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch

from benchmarks.gpu.rates import Rates
from benchmarks.layer14b import SAMPLES, STATES, layer_work, make_layout, measure
from benchmarks.random_models import SHAPES

MODELS, QUICK_MODELS = ("7b", "14b", "72b"), ("tiny",)
TOKENS, QUICK_TOKENS = 1024, 16
_ROTATION = ("activations", "factorisation", "products")


def measure_layers(device: torch.device, rates: Rates, *, quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each model.

    The floor of the forward passes is their operations at the bfloat16 rate. That of the merge is
    its bytes: each state read once in bfloat16, the new one written once in float32.
    """
    for name in QUICK_MODELS if quick else MODELS:
        yield _measure(device, rates, name, quick)


def _measure(device: torch.device, rates: Rates, name: str, quick: bool) -> dict[str, Any]:
    layout = make_layout(SHAPES[name])
    tokens = QUICK_TOKENS if quick else TOKENS
    seconds, _ = measure(layout, tokens, 1 if quick else 5, None, device)
    shapes = {n: shape for n, shape in layout.shapes.items() if layout.is_layer_tensor(n)}
    work = layer_work(shapes, SAMPLES, tokens, STATES, int(layout.config.hidden_size))
    elements = sum(prod(shape) for shape in shapes.values())
    forward_floor = work.forward_flops / rates.bf16
    merge_floor = elements * (2.0 * STATES + 4.0) / rates.memory
    total = sum(seconds.values())
    rotation = sum(seconds[stage] for stage in _ROTATION)
    return {
        "model": name,
        "forward, ms": 1e3 * seconds["forward"],
        "of its floor": seconds["forward"] / forward_floor,
        "capture, ms": 1e3 * seconds["capture"],
        **{f"{stage}, ms": 1e3 * seconds[stage] for stage in _ROTATION},
        "rest, ms": 1e3 * (total - seconds["forward"] - seconds["capture"] - rotation),
        "all, ms": 1e3 * total,
        "floors, ms": 1e3 * (forward_floor + merge_floor),
        "of the floors": total / (forward_floor + merge_floor),
    }
