"""What an iteration did to each module of a layer group, from what its merge computes anyway."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from arm_ray.events import ModuleChange
from arm_ray.merging.rotation import RotationFacts
from arm_ray.merging.similarity import SimilaritySums
from arm_ray.model.layout import ModelLayout

_DIGITS = 4


@dataclass
class Changes:
    """Collects what merging the pieces of a layer group's tensors gave.

    Attributes:
        pieces: Name of a tensor, the comparison of states, and its rotations; piece by piece.
    """

    pieces: list[tuple[str, SimilaritySums, Sequence[RotationFacts]]] = field(default_factory=list)

    def add(self, name: str, sums: SimilaritySums, rotations: Sequence[RotationFacts] = ()) -> None:
        """Take note of a piece."""
        self.pieces.append((name, sums, rotations))

    def of(self, layout: ModelLayout) -> Iterator[ModuleChange]:
        """The modules' changes, in the order of their first pieces.

        Vectors (norms, biases) are left out.
        """
        sums: dict[tuple[int | None, str], list[SimilaritySums]] = {}
        rotations: dict[tuple[int | None, str], list[RotationFacts]] = {}
        for name, part, found in self.pieces:
            if len(layout.shapes[name]) < 2:
                continue
            layer = layout.layer_numbers.get(name)
            key = (layer, module_name(name, layer))
            sums.setdefault(key, []).append(part)
            rotations.setdefault(key, []).extend(found)
        for (layer, module), parts in sums.items():
            yield _change(layer, module, parts, rotations[layer, module])


def module_name(tensor: str, layer: int | None) -> str:
    """A weight's name within its decoder layer; experts are not told apart.

    Args:
        tensor: Its name in the files.
        layer: Of the decoder; None: it is in none.
    """
    _, is_there, rest = tensor.partition(f".{layer}.")
    name = (rest if layer is not None and is_there else tensor).removesuffix(".weight")
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _change(
    layer: int | None,
    module: str,
    parts: Sequence[SimilaritySums],
    rotations: Sequence[RotationFacts],
) -> ModuleChange:
    def norm(name: str) -> float:
        return math.sqrt(math.fsum(getattr(part, name) for part in parts))

    update = _ratio(norm("change"), norm("previous"))
    distance = _ratio(norm("new_task_vector"), norm("new"))
    if not rotations:
        return ModuleChange(layer, module, update, distance)
    count = len(rotations)
    cosine = math.fsum(r.mean_diagonal for r in rotations) / count
    points = min(len(r.spectrum) for r in rotations)
    spectrum = [math.fsum(r.spectrum[i] for r in rotations) / count for i in range(points)]
    return ModuleChange(
        layer,
        module,
        update,
        distance,
        _short(math.degrees(math.acos(min(1.0, max(-1.0, cosine))))),
        _short(sum(r.rank for r in rotations) / count),
        tuple(_short(value) for value in spectrum),
    )


def _ratio(part: float, whole: float) -> float:
    return _short(part / whole) if whole > 0.0 else 0.0


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
