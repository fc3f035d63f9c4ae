"""What an iteration did to each module, from the pieces of its tensors."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from arm_ray.events import ModuleChange
from arm_ray.merging.rotation import RotationFacts
from arm_ray.merging.similarity import SimilaritySums
from arm_ray.model.changes import Changes, module_name


@pytest.mark.parametrize(
    ("tensor", "layer", "name"),
    [
        ("model.layers.7.self_attn.q_proj.weight", 7, "self_attn.q_proj"),
        ("model.layers.1.mlp.experts.12.up_proj.weight", 1, "mlp.experts.*.up_proj"),
        ("model.layers.1.mlp.experts.gate_up_proj", 1, "mlp.experts.gate_up_proj"),
        ("transformer.h.0.attn.c_attn.weight", 0, "attn.c_attn"),
        ("model.embed_tokens.weight", None, "model.embed_tokens"),
    ],
)
def test_names_within_a_layer(tensor: str, layer: int | None, name: str) -> None:
    assert module_name(tensor, layer) == name


def layout() -> Any:
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in (0, 1)]
    shapes = dict.fromkeys(names, (4, 4)) | {"model.layers.0.norm.weight": (4,)}
    return SimpleNamespace(shapes=shapes, layer_numbers=dict.fromkeys(shapes, 0))


def test_experts_and_pieces_of_rows_are_one_module() -> None:
    changes = Changes()
    first, second, norm = layout().shapes
    # |W|², |P|², |W − P|², |W − B|², |P − B|² of each piece.
    changes.add(first, SimilaritySums(4.0, 9.0, 1.0, 1.0, 0.0))
    changes.add(first, SimilaritySums(4.0, 9.0, 1.0, 1.0, 0.0), [RotationFacts(1.0, 2, (4.0, 2.0))])
    changes.add(
        second, SimilaritySums(8.0, 7.0, 2.0, 2.0, 0.0), [RotationFacts(0.0, 3, (2.0, 1.0, 0.5))]
    )
    changes.add(norm, SimilaritySums(1.0, 1.0, 1.0, 1.0, 1.0))
    assert list(changes.of(layout())) == [
        ModuleChange(
            0,
            "mlp.experts.*.up_proj",
            update=float(f"{math.sqrt(4 / 25):.4g}"),
            distance=0.5,
            angle=60.0,
            rank=2.5,
            spectrum=(3.0, 1.5),
        )
    ]


def test_nothing_is_divided_by_a_norm_of_zero() -> None:
    changes = Changes()
    changes.add(next(iter(layout().shapes)), SimilaritySums(0.0, 0.0, 0.0, 0.0, 0.0))
    [change] = changes.of(layout())
    assert (change.update, change.distance, change.angle, change.spectrum) == (0.0, 0.0, None, ())
