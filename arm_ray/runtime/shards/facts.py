"""What is known of the whole model before a layer group is merged, and how shards find it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from arm_ray.merging.method import Method


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the whole model.

    Attributes:
        statistics: What the operator's rounds have found.
        head_relaxation: `[hidden]` float32: the factors of an embedding that is also the head, from
            the shard with the last layer; None where they are not wanted.
        largest_information: Contributor -> largest information that it shares with the reference at
            any place of the model; None where it is not wanted.
    """

    statistics: Mapping[str, object] = field(default_factory=dict)
    head_relaxation: Tensor | None = None
    largest_information: Mapping[str, float] | None = None


NOTHING_KNOWN = ModelFacts()


def joined(parts: Sequence[ModelFacts]) -> ModelFacts:
    """What all shards together know from their forward passes."""
    relaxations = [p.head_relaxation for p in parts if p.head_relaxation is not None]
    largest: dict[str, float] = {}
    for part in parts:
        for state, value in (part.largest_information or {}).items():
            largest[state] = max(largest.get(state, 0.0), value)
    return ModelFacts({}, relaxations[0] if relaxations else None, largest or None)


def run_rounds(
    method: Method,
    contributors: int,
    facts: ModelFacts,
    measure: Callable[[int, ModelFacts], Sequence[Mapping[str, Tensor]]],
) -> ModelFacts:
    """Run the operator's rounds over the whole model.

    Args:
        method: The method.
        contributors: How many an iteration has.
        facts: What is known before.
        measure: One round's numbers of each layer group, in the order of the layers.
    """
    for number in range(method.rounds(contributors)):
        parts = measure(number, facts)
        found = method.conclude(number, added_in_order(parts), facts.statistics)
        facts = replace(facts, statistics={**facts.statistics, **found})
    return facts


def added_in_order(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sums whose bits do not depend on who computed the parts; the parts stay as they are."""
    totals: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name in totals:
                # In place: a histogram is large, and there is one for each small tensor too.
                totals[name] += value
            else:
                totals[name] = value.clone()
    return totals
