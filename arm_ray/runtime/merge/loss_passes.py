"""Submits the forward passes that losses are made of to the layer shards, chunk by chunk.

As in `dispatch`: an actor takes its calls in the order of submission, so that states that are tried
follow an iteration's own states through the layers (`LayerShard.forward`), one stage behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arm_ray.evaluation.losses import SampleLosses
from arm_ray.runtime.cluster.actors import Handle, in_place_of
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.merge.samples import NO_SAMPLES, Draw
from arm_ray.runtime.shards.captures import forward_states
from arm_ray.runtime.shards.layer_shard import LayerShard, call_losses
from arm_ray.runtime.shards.losses import ShardLosses, Trial
from arm_ray.runtime.shards.placement import ShardGang
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.schedule import IterationPlan

if TYPE_CHECKING:
    from ray import ObjectRef


class LossPasses:
    """Loss passes on one set of layer shards.

    Args:
        gang: The shards, placed.
        specs: What each of them was given, in the same order.
        order: The chunks of layers with whose they are, in the order of the layers.
    """

    def __init__(
        self,
        gang: ShardGang,
        specs: Sequence[ShardSpec],
        order: Sequence[tuple[Handle[LayerShard], ShardSpec, range]],
    ) -> None:
        self._gang, self._specs, self._order = gang, specs, order

    def run(
        self,
        plan: IterationPlan,
        subjects: Sequence[Trial | str],
        samples: Draw,
        columns: NDArray[np.int64],
    ) -> list[SampleLosses]:
        """The losses of states, and of states that are tried.

        Args:
            plan: The iteration; where states are tried, its own forward passes are submitted.
            subjects: The states, each once.
            samples: What they are run on.
            columns: `[N]`: which of the different samples each sample of the iteration's mini-batch
                is.

        Returns:
            The losses of each state, in the same order.
        """
        trials = [s for s in subjects if isinstance(s, Trial)]
        names = [s.name if isinstance(s, Trial) else s for s in subjects]
        method = self._specs[0].method
        used_again = forward_states(method, plan) if trials else ()
        others = [s for s in subjects if isinstance(s, str) and s not in used_again]
        micro = [self._gang.put(batch) for batch in samples.batches]
        # (state, micro-batch) -> what the layers so far have made of it.
        hidden: dict[tuple[str, int], ObjectRef[Any]] = {}
        waits: list[ObjectRef[Any]] = []
        for shard, spec, chunk in self._order:
            if trials:
                waits.append(call_losses(shard, {}, ShardLosses.make, plan, chunk, trials, columns))
            sends = spec.sends_after(chunk)
            direct = sends and self._gang.transport != "object_store"
            options = {"tensor_transport": self._gang.transport} if direct else {}
            for subject, name in zip(subjects, names, strict=True):
                makes_embedding = chunk[0] == 0 and isinstance(subject, Trial)
                if makes_embedding:
                    # One at a time: of a large vocabulary it is larger than many layers.
                    assert isinstance(subject, Trial)
                    made = call_losses(
                        shard, {}, ShardLosses.make_embedding, plan, subject, columns
                    )
                    waits.append(made)
                for index, batch in enumerate(micro):
                    before = hidden.pop((name, index), None)
                    ref = call_losses(
                        shard,
                        options,
                        ShardLosses.run,
                        chunk,
                        name,
                        index,
                        in_place_of(batch),
                        in_place_of(before),
                    )
                    if sends or chunk.stop == len(spec.layout.groups):
                        hidden[name, index] = ref
                    else:
                        waits.append(ref)
                if makes_embedding:
                    waits.append(call_losses(shard, {}, ShardLosses.release_embedding, name))
            waits.append(
                call_losses(shard, {}, ShardLosses.release, chunk, [t.name for t in trials], others)
            )
        losses = self._of_head(plan, subjects, names, samples, columns, hidden)
        get_results(waits)
        return [SampleLosses.of(found) for found in get_results(losses)]

    def of_states(self, plan: IterationPlan) -> Callable[[Sequence[str], Draw], list[SampleLosses]]:
        """The same of states that are there, by their names; the plan is of any iteration."""

        def run(names: Sequence[str], samples: Draw) -> list[SampleLosses]:
            return self.run(plan, names, samples, NO_SAMPLES.columns)

        return run

    def _of_head(
        self,
        plan: IterationPlan,
        subjects: Sequence[Trial | str],
        names: Sequence[str],
        samples: Draw,
        columns: NDArray[np.int64],
        hidden: dict[tuple[str, int], ObjectRef[Any]],
    ) -> list[ObjectRef[NDArray[np.float64]]]:
        group = self._specs[0].layout.head_group
        owner = next(
            shard
            for shard, spec in zip(self._gang.actors, self._specs, strict=True)
            if group in spec.groups
        )
        return [
            call_losses(
                owner,
                {},
                ShardLosses.losses,
                plan,
                subject,
                columns,
                samples.batches,
                *(in_place_of(hidden[name, index]) for index in range(len(samples.batches))),
            )
            for subject, name in zip(subjects, names, strict=True)
        ]
