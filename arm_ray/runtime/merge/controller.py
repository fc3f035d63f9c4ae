"""Takes a merge from its first set of layer shards to the published model.

Shards are a gang: what one holds of the hidden states dies with it, and the transport between them
is fixed when it is made. So when one is lost, or when there is room for more, all end and a new set
is placed on what the cluster has by then. It goes on after the last finished iteration, with the
layer groups that are merged of the following ones.

::

    placing -> checking -> sweeping -> publishing -> ended
       ^                      |
       +---- regrouping <-----+   (a shard was lost, a transfer failed, or nodes have joined)
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import arm_ray
from arm_ray.checkpoints import states
from arm_ray.errors import ArmRayError, PlacementError, ShardLostError, TransportError
from arm_ray.evaluation.selection import Selection
from arm_ray.events import RunStarted, Warned
from arm_ray.planning.state_life import StateLife
from arm_ray.runtime.cluster.calls import get_results
from arm_ray.runtime.cluster.nodes import ClusterView, alive_nodes, view_of_cluster
from arm_ray.runtime.merge.dispatch import Dispatcher, PartialMerges
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.policies import RecoveryPolicy, ScalingPolicy, last_usable
from arm_ray.runtime.merge.promise import Promise
from arm_ray.runtime.merge.publisher import Publisher
from arm_ray.runtime.merge.specs import check_gpu_memory, planned, shard_specs
from arm_ray.runtime.merge.state_storage import StateStorage, storage_of
from arm_ray.runtime.merge.stepped import sweep_for
from arm_ray.runtime.merge.sweeps import SweepParts
from arm_ray.runtime.session.heartbeat import activity
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.placement import (
    Place,
    Placement,
    ShardGang,
    check_object_store,
    placed_here,
    placed_shards,
)
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.schedule import iterations_needed_after, state_name
from arm_ray.storage.room import size_text


class Stage(Enum):
    """What a merge is doing; see the module."""

    PLACING = "placing"
    CHECKING = "checking"
    SWEEPING = "sweeping"
    REGROUPING = "regrouping"
    PUBLISHING = "publishing"
    ENDED = "ended"


@dataclass(frozen=True)
class Ending:
    """How a merge ended.

    Attributes:
        reason: `max_iterations`, `converged`, `no_gain`, `patience` or `stop_after`.
        model: The final model; None where the merge was halted before its end.
        selection: The state or checkpoint that the model is.
        peak_bytes: Largest resident memory of each shard.
    """

    reason: str
    model: Path | None
    selection: Selection
    peak_bytes: tuple[int, ...]


class MergeController:
    """Runs a merge; see the module.

    Args:
        job: The merge.
        cluster: What there was when the first set of shards was planned.
        placement: That set, as `scaling` has planned it.
        recovery: Decides whether it goes on after an error.
        scaling: Decides how many shards there are.
        place: Places them; None: `placed_shards`.
    """

    def __init__(
        self,
        job: MergeJob,
        cluster: ClusterView,
        placement: Placement,
        recovery: RecoveryPolicy,
        scaling: ScalingPolicy,
        place: Place | None = None,
    ) -> None:
        self._place = place
        self._job, self._run = job, job.run
        self._placement, self._recovery, self._scaling = placement, recovery, scaling
        self._known_nodes = cluster.nodes
        self._shard_nodes: set[str] = set()
        self._partial = PartialMerges()
        self._promise = Promise(job) if job.compared is not None else None
        self._is_first = True
        self.stage = Stage.PLACING

    def run(self) -> Ending:
        """Run the merge to its end.

        Raises:
            ShardLostError: Shards were lost again and again, without an iteration between.
            ArmRayError: Whatever else ended the merge.
        """
        while True:
            try:
                ending = self._run_one_set()
            except (TransportError, PlacementError, ShardLostError) as error:
                self._recover(error)
            else:
                if ending is not None:
                    self.stage = Stage.ENDED
                    return ending
                self._job.reporter.say(
                    "nodes have joined: a new set of layer shards from iteration "
                    f"{self._run.last_iteration + 1}"
                )
            self._regroup()

    def _run_one_set(self) -> Ending | None:
        """Place one set of shards and go on; None where more shards are to go on."""
        job, placement = self._job, self._placement
        runtime = job.config.runtime.model_copy(update={"transport": self._recovery.transport})
        last = job.last if job.stop_after is not None else None
        specs = shard_specs(job.config, job.method, job.inputs, self._run.path, placement, last)
        self.stage = Stage.PLACING
        place = placed_here if placement.is_here else self._place or placed_shards
        with (
            place(specs, runtime, placement, job.reporter, self._has_shrunk) as gang,
            storage_of(
                job.config, self._run, job.inputs, gang, specs, self._shard_nodes
            ) as storage,
        ):
            self._shard_nodes |= set(gang.nodes)
            self._go_back(storage)
            dispatcher = Dispatcher(job, gang, specs)
            publisher = Publisher(job, storage, self._promise, specs[0].life)
            self.stage = Stage.CHECKING
            self._check(gang, specs, dispatcher)
            self._announce(specs[0].life)
            self.stage = Stage.SWEEPING
            parts = SweepParts(
                job,
                dispatcher,
                storage,
                publisher,
                self._promise,
                self._partial,
                self._has_grown,
            )
            reason = sweep_for(parts).run()
            if reason == "regroup":
                self._keep_for_next(publisher)
                return None
            self.stage = Stage.PUBLISHING
            return self._publish(reason, dispatcher, publisher)

    def _check(self, gang: ShardGang, specs: Sequence[ShardSpec], dispatcher: Dispatcher) -> None:
        job = self._job
        if self._placement.device == "cuda":
            found = get_results([shard.call(LayerShard.device_memory) for shard in gang.actors])
            check_gpu_memory(job.config, job.inputs, [spec.groups for spec in specs], found)
        if not job.method.needs_forward:
            # A linear merge reads every byte once, and looks at it then.
            return
        # Hidden states of the largest micro-batch.
        config, inputs = job.config, job.inputs
        longest = config.calibration.max_length if config.calibration is not None else 0
        tokens = max(config.runtime.micro_batch_tokens, longest)
        width = int(inputs.layout.text_config.hidden_size)
        check_object_store(gang, tokens * width * inputs.compute_dtype.itemsize)
        with activity("checking the weights for NaN and infinity"):
            dispatcher.check_weights()

    def _publish(self, reason: str, dispatcher: Dispatcher, publisher: Publisher) -> Ending:
        job, run, last = self._job, self._run, self._run.last_iteration
        if reason == "stop_after":
            needed = iterations_needed_after(job.config.schedule, job.num_candidates, last)
            publisher.collect_states(sorted(needed))
            return Ending(reason, None, Selection(state_name(last)), dispatcher.peak_bytes())
        if job.scoring is not None:
            # It may not have been known to be the last one.
            publisher.collect_states([last])
        selection = self._select(last, dispatcher)
        with activity("writing the model"):
            model = publisher.publish_model(selection)
        if job.scoring is not None:
            job.scoring.report(job.reporter.console, selection.name)
        chosen = set() if selection.iteration is None else {selection.iteration}
        needed = iterations_needed_after(job.config.schedule, job.num_candidates, last)
        run.prune(needed | chosen, last)
        return Ending(reason, model, selection, dispatcher.peak_bytes())

    def _keep_for_next(self, publisher: Publisher) -> None:
        """Write what the next set of shards reads of the states in this one's memory."""
        last, job = self._run.last_iteration, self._job
        needed = iterations_needed_after(job.config.schedule, job.num_candidates, last)
        publisher.publish_written(wait=True)
        publisher.write_states(needed | self._held(last))

    def _held(self, last: int) -> set[int]:
        """The iteration whose state is the best of those up to one, if that counts."""
        return set() if self._promise is None else self._promise.held(last)

    def _select(self, last: int, dispatcher: Dispatcher) -> Selection:
        """The state, or checkpoint, that becomes the model."""
        scored = None if self._job.scoring is None else self._job.scoring.select(last)
        if self._promise is None:
            return scored or Selection(state_name(last))
        with activity("comparing the states with the checkpoints"):
            return self._promise.select(dispatcher.losses.of_states(self._job.plan(last)))

    def _recover(self, error: ArmRayError) -> None:
        """Take the policy's decision after an error; raises the error where that ends the merge."""
        has_shrunk = isinstance(error, PlacementError) and self._has_shrunk()
        recovery = self._recovery.after(error, self._run.last_iteration, has_shrunk=has_shrunk)
        if recovery is None:
            raise error
        if recovery.warning is not None:
            self._job.reporter.warn(recovery.warning)
        self._recovery = recovery.policy

    def _regroup(self) -> None:
        """Plan the next set of shards."""
        self.stage = Stage.REGROUPING
        shutil.rmtree(self._run.partial_model, ignore_errors=True)
        cluster = view_of_cluster()
        self._known_nodes, self._is_first = cluster.nodes, False
        self._placement = self._scaling.next(cluster)

    def _has_grown(self) -> bool:
        # Asked between all iterations: the resources only where there are new nodes.
        if self._placement.is_here or not alive_nodes() - self._known_nodes:
            return False
        return self._scaling.has_grown(view_of_cluster(), self._known_nodes, self._placement)

    def _has_shrunk(self) -> bool:
        is_first = self._is_first
        return not is_first and self._scaling.has_shrunk(view_of_cluster(), self._placement)

    def _go_back(self, storage: StateStorage) -> None:
        """Go back to the last state from which this set can go on, and give it what it reads."""
        run, schedule, count = self._run, self._job.config.schedule, self._job.num_candidates
        last = last_usable(schedule, count, run.last_iteration, storage.has_state, self._held)
        if last < run.last_iteration:
            goes_on = f"going on after iteration {last}" if last else "beginning again"
            self._job.reporter.warn(
                f"states that iterations after {run.last_iteration} read are gone: they were in "
                f"memory alone, or with their node; {goes_on}"
            )
        for iteration in [t for t in run.finished if t > last]:
            storage.discard(iteration)
            del run.finished[iteration]
        self._partial.keep(lambda t, group: t > last and storage.has_group(t, group))
        begun = {iteration for iteration, _ in self._partial.keys}
        for iteration in states.state_directories(run.path):
            if iteration > last and iteration not in begun:
                storage.discard(iteration)
        needed = iterations_needed_after(schedule, count, last) | self._held(last)
        storage.bring(sorted(needed), self._partial.keys)

    def _announce(self, life: StateLife | None) -> None:
        """Say that iterations begin, and with what."""
        job, placement, layout = self._job, self._placement, self._job.inputs.layout
        dtype = str(job.inputs.compute_dtype).removeprefix("torch.")
        job.reporter.write(
            RunStarted(
                arm_ray.__version__,
                self._run.last_iteration + 1,
                job.config.schedule.max_iterations,
                job.config.method.operator,
                len(layout.shapes),
                len(layout.rotated),
                len(layout.groups),
                placement.num_shards,
                placement.device,
                dtype,
                job.stream.num_rows if job.stream else 0,
                job.stream.digest if job.stream else "",
            )
        )
        self._write_plan()
        last = self._run.last_iteration
        verb = f"going on after iteration {last}" if self._run.finished else "merging"
        job.reporter.say(
            f"{verb}: {job.config.method.operator}, {job.num_candidates} candidate(s), "
            f"{len(layout.shapes)} tensors ({len(layout.rotated)} in linear modules of the "
            "layers), "
            f"{placement.num_shards} layer shard(s) on {placement.device}, {dtype} forward pass"
        )
        if life is not None and last + 1 < life.last:
            job.reporter.say(life.loss_text)
        scored = [] if life is None or job.scoring is None else sorted(life.written - life.optional)
        if scored and job.config.keep_states != "all":
            size = size_text(states.total_bytes(layout.shapes, 4))
            job.reporter.say(
                f"{len(scored)} states are written, {size} each, because they are scored "
                f"(evaluation.every); they go once nothing needs them (keep_states: "
                f"{job.config.keep_states})"
            )

    def _write_plan(self) -> None:
        """Write down what is planned, for whoever compares it with what comes."""
        job = self._job
        last = job.last if job.stop_after is not None else None
        try:
            plan = planned(job.config, job.method, job.inputs, self._placement, last)
        except Exception as error:  # it is for people: no merge ends because of it
            job.reporter.write(Warned(f"the merge could not be planned: {error}"))
        else:
            job.reporter.write(plan)
