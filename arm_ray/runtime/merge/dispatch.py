"""Submits the calls of iterations to layer shards that are placed; holds no weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arm_ray.checkpoints.weight_file import SharedWeightFile
from arm_ray.errors import ShardLostError
from arm_ray.model.partition import call_order, receivers
from arm_ray.runtime.cluster.actors import Handle, in_place_of
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.loss_passes import LossPasses
from arm_ray.runtime.merge.samples import NO_SAMPLES, Draw, draw_of
from arm_ray.runtime.shards.captures import forward_states
from arm_ray.runtime.shards.facts import NOTHING_KNOWN, ModelFacts, joined, run_rounds
from arm_ray.runtime.shards.files import ShardFiles
from arm_ray.runtime.shards.layer_shard import CONTROL, LayerShard, call_files
from arm_ray.runtime.shards.meter import ShardUsage
from arm_ray.runtime.shards.placement import ShardGang
from arm_ray.runtime.shards.spec import GroupReport, ShardSpec
from arm_ray.schedule import IterationPlan

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class Flight:
    """An iteration that is submitted.

    Attributes:
        plan: The iteration.
        forwards: Ends of the forward passes that send nothing.
        merges: Of each layer group, in order, what merging it gives.
        started: When it was submitted (`time.monotonic`).
    """

    plan: IterationPlan
    forwards: Sequence[ObjectRef[Any]]
    merges: Sequence[ObjectRef[GroupReport | None]]
    started: float


class Dispatcher:
    """Submits work to one set of layer shards; an actor takes its calls in this order.

    Args:
        job: The merge.
        gang: The shards, placed.
        specs: What each of them was given, in the same order.
    """

    def __init__(self, job: MergeJob, gang: ShardGang, specs: Sequence[ShardSpec]) -> None:
        self._job, self._gang, self._specs = job, gang, specs
        order = call_order([spec.groups for spec in specs], specs[0].residency)
        self._order = [(gang.actors[p], specs[p], chunk) for p, chunk in order]
        # Shards whose hidden states go to another node.
        sent = receivers(order).items() if gang.nodes else ()
        self._crossings = [p for p, q in sent if gang.nodes[p] != gang.nodes[q]]
        self.losses = LossPasses(gang, specs, self._order)

    @property
    def _by_group(self) -> Iterator[tuple[Handle[LayerShard], int]]:
        """Each layer group's shard and number, in the order of the layers."""
        for shard, _, chunk in self._order:
            for group in chunk:
                yield shard, group

    def check_weights(self) -> int:
        """Have every shard look for NaN and infinity in its layers; returns bytes read."""
        refs = [call_files(shard, ShardFiles.check_weights) for shard in self._gang.actors]
        return sum(get_results(refs))

    def draw(self, plan: IterationPlan) -> Draw:
        """The samples of an iteration, in micro-batches."""
        batch = self._job.directions(plan)
        if batch is None:
            return NO_SAMPLES
        return draw_of(batch, self._job.config.runtime.micro_batch_tokens)

    def submit(self, plan: IterationPlan, kept: Mapping[int, GroupReport]) -> Flight:
        """Submit an iteration, stage by stage.

        Args:
            plan: The iteration.
            kept: What shards that are gone have merged of it. It is taken over, and states are run
                only as far as the last layer group that is still to be merged.
        """
        draw, started = self.draw(plan), time.monotonic()
        groups = range(self._job.num_groups)
        end = max((group for group in groups if group not in kept), default=-1) + 1
        forwards: list[ObjectRef[Any]] = []
        merges: list[ObjectRef[GroupReport | None]] = []
        for shard, chunk, ends in self._chunks(plan, draw, end):
            forwards += ends
            for group in chunk:
                if group in kept:
                    merges.append(shard.call(LayerShard.adopt, plan, group, kept[group]))
                else:
                    merges.append(shard.call(LayerShard.merge, plan, group, draw.columns))
        return Flight(plan, forwards, merges, started)

    def submit_in_phases(self, plan: IterationPlan) -> Flight:
        """Run all layers, find what is known of the whole model, and submit the merges."""
        draw, started = self.draw(plan), time.monotonic()
        known = self.facts_of_all(plan, draw, self.submit_forward(plan, draw))
        facts = self.measured(plan, draw.columns, known)
        return self.submit_merges(plan, draw.columns, facts, started)

    def submit_forward(self, plan: IterationPlan, draw: Draw) -> list[ObjectRef[Any]]:
        """Submit the forward passes of an iteration's states through all layers."""
        refs: list[ObjectRef[Any]] = []
        for shard, chunk, ends in self._chunks(plan, draw, self._job.num_groups):
            refs += [*ends, shard.call(LayerShard.release_forward, chunk)]
        return refs

    def facts_of_all(
        self, plan: IterationPlan, draw: Draw, forwards: Sequence[ObjectRef[Any]]
    ) -> ModelFacts:
        """What all shards know together once the forward passes that are submitted are over."""
        get_results(forwards)
        summaries = [
            shard.call(LayerShard.summarise, plan, draw.columns) for shard in self._gang.actors
        ]
        return joined(get_results(summaries))

    def submit_merges(
        self, plan: IterationPlan, columns: NDArray[np.int64], facts: ModelFacts, started: float
    ) -> Flight:
        """Submit the merges of an iteration whose forward passes are over.

        Args:
            plan: The iteration.
            columns: Which of the different samples each sample is.
            facts: What is known of the whole model.
            started: When the iteration was.
        """
        merges = [
            shard.call(LayerShard.merge, plan, group, columns, facts)
            for shard, group in self._by_group
        ]
        return Flight(plan, [], merges, started)

    def measured(
        self, plan: IterationPlan, columns: NDArray[np.int64] | None, facts: ModelFacts
    ) -> ModelFacts:
        """Run the operator's rounds over the whole model."""

        def measure(number: int, known: ModelFacts) -> Sequence[Mapping[str, Any]]:
            return get_results(
                [
                    shard.call(LayerShard.measure, plan, group, columns, number, known)
                    for shard, group in self._by_group
                ]
            )

        return run_rounds(self._job.method, len(plan.contributors), facts, measure)

    def merge_linear(
        self,
        plans: Sequence[IterationPlan],
        written: frozenset[int],
        files: Sequence[SharedWeightFile],
        facts: ModelFacts = NOTHING_KNOWN,
    ) -> list[list[GroupReport]]:
        """All groups through some iterations without forward passes; of each group the reports."""
        return get_results(
            [
                shard.call(LayerShard.merge_linear, plans, group, written, files, facts)
                for shard, group in self._by_group
            ]
        )

    def abandon(self, last: int) -> None:
        """Have nothing more done for iterations after `last`."""
        get_results(
            [shard.call_with(CONTROL, LayerShard.abandon, last) for shard in self._gang.actors]
        )

    def take_usage(self, iteration: int) -> list[ShardUsage]:
        """What each shard has done since the last call; not behind what is submitted already."""
        return get_results(
            [
                shard.call_with(CONTROL, LayerShard.take_usage, iteration)
                for shard in self._gang.actors
            ]
        )

    def network_bytes(self, usage: Sequence[ShardUsage]) -> int:
        """Hidden states of what shards sent that went to another node; bytes."""
        return sum(usage[i].sent_bytes for i in self._crossings)

    def peak_bytes(self) -> tuple[int, ...]:
        """Largest resident memory of each shard so far; empty where one is lost by now."""
        try:
            return tuple(
                get_results([shard.call(LayerShard.peak_bytes) for shard in self._gang.actors])
            )
        except ShardLostError:
            return ()

    def _chunks(
        self, plan: IterationPlan, draw: Draw, end: int
    ) -> Iterator[tuple[Handle[LayerShard], range, list[ObjectRef[Any]]]]:
        """Submit forward calls by chunk: the shard, its layers, and those that send nothing.

        Args:
            plan: The iteration.
            draw: Its samples.
            end: No forward pass is needed from this layer group on.
        """
        micro = [self._gang.put(batch) for batch in draw.batches]
        hidden: dict[tuple[int, str], ObjectRef[Any]] = {}
        run_states = forward_states(self._job.method, plan)
        for shard, spec, chunk in self._order:
            if chunk.start >= end:
                yield shard, chunk, []
                continue
            sends = spec.sends_after(chunk) and chunk.stop < end
            direct = sends and self._gang.transport != "object_store"
            options = {"tensor_transport": self._gang.transport} if direct else {}
            ends: list[ObjectRef[Any]] = []
            for index, batch in enumerate(micro):
                for state in run_states:
                    # What this shard's own layers have made is where they left it.
                    before = hidden.pop((index, state), None)
                    ref = shard.call_with(
                        options,
                        LayerShard.forward,
                        plan,
                        chunk,
                        draw.num_samples,
                        state,
                        index,
                        in_place_of(batch),
                        in_place_of(before),
                        chunk.stop == end < self._job.num_groups,
                    )
                    if sends:
                        hidden[index, state] = ref
                    else:
                        ends.append(ref)
            yield shard, chunk, ends


class PartialMerges:
    """What shards that are gone have merged, so that others take it over."""

    def __init__(self) -> None:
        self._reports: dict[tuple[int, int], GroupReport] = {}

    def add(self, iteration: int, report: GroupReport) -> None:
        """Take note of a layer group of an iteration that is merged and written."""
        self._reports[iteration, report.group] = report

    def of(self, iteration: int) -> dict[int, GroupReport]:
        """Layer group -> what merging it gave, of one iteration."""
        return {group: report for (t, group), report in self._reports.items() if t == iteration}

    def forget(self, iteration: int) -> None:
        """Let go of an iteration that is finished."""
        self.keep(lambda t, _group: t != iteration)

    def keep(self, wanted: Callable[[int, int], bool]) -> None:
        """Let go of all but some iterations and layer groups."""
        self._reports = {key: value for key, value in self._reports.items() if wanted(*key)}

    @property
    def keys(self) -> set[tuple[int, int]]:
        """Iteration and layer group of all."""
        return set(self._reports)
