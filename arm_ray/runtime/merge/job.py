"""What a merge is given: the same for all sets of layer shards that it goes through."""

from __future__ import annotations

from dataclasses import dataclass

from arm_ray.calibration.minibatch import MiniBatch, unique_samples
from arm_ray.calibration.stream import CalibrationStream
from arm_ray.checkpoints.states import StateManifest
from arm_ray.config import MergeConfig
from arm_ray.merging.method import Method
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.runtime.scoring.state_scoring import StateScoring
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.schedule import IterationPlan, has_converged, plan_iteration, should_stop
from arm_ray.steps import step_samples


@dataclass(frozen=True)
class MergeJob:
    """A merge that is to be run.

    Attributes:
        config: The configuration.
        method: How states are merged.
        inputs: The checked checkpoints.
        run: The run directory, open.
        stream: The calibration stream; None where no activations are needed.
        compared: Samples that states and checkpoints are compared on, and samples for the final
            losses; None where nothing is compared by losses.
        scoring: Scores the states beside the merge; None where nothing is scored.
        reporter: Told what happens.
        stop_after: Halt after this iteration, although the schedule goes on; None: do not.
    """

    config: MergeConfig
    method: Method
    inputs: MergeInputs
    run: RunDirectory
    stream: CalibrationStream | None
    compared: tuple[MiniBatch, MiniBatch] | None
    scoring: StateScoring | None
    reporter: Reporter
    stop_after: int | None = None

    @property
    def num_candidates(self) -> int:
        """How many candidates there are."""
        return len(self.config.candidates)

    @property
    def num_groups(self) -> int:
        """Layer groups of the model."""
        return len(self.inputs.layout.groups)

    @property
    def last(self) -> int:
        """The last iteration that is run."""
        most = self.config.schedule.max_iterations
        return min(most, self.stop_after or most)

    @property
    def needs_all_layers(self) -> bool:
        """Whether all layers must be known before the first is merged."""
        return self.method.needs_all_layers(has_own_head=self.inputs.layout.has_own_head)

    def plan(self, iteration: int) -> IterationPlan:
        """What an iteration merges."""
        return plan_iteration(self.config.schedule, self.num_candidates, iteration)

    def directions(self, plan: IterationPlan) -> MiniBatch | None:
        """The mini-batch that an iteration's activations are of; None where none are needed.

        Where steps are searched, mini-batches alternate: one finds directions, the next one chooses
        how far to go along them (`lengths`).
        """
        if self.stream is None or not self.method.needs_activations:
            return None
        return self.stream.batch(2 * plan.draw - 1 if self.method.tries_steps else plan.draw)

    def lengths(self, plan: IterationPlan) -> tuple[MiniBatch, MiniBatch]:
        """The samples that choose an iteration's step, and those that the choice is checked on."""
        assert self.stream is not None
        batch, _ = unique_samples(self.stream.batch(2 * plan.draw))
        choose, check = step_samples(len(batch.token_ids))
        everything = range(len(batch.token_ids))
        return batch.part(everything[:choose]), batch.part(everything[choose : choose + check])

    def ends_with(self, manifest: StateManifest) -> bool:
        """Whether the schedule, or the scores, end with a state."""
        if should_stop(self.config.schedule, manifest.iteration, manifest.task_vector_cosine):
            return True
        return self.scoring is not None and self.scoring.stops(manifest.iteration)

    def reason(self, manifest: StateManifest) -> str:
        """Why the merge ended with a state: `converged`, `max_iterations` or `patience`."""
        if has_converged(self.config.schedule, manifest.task_vector_cosine):
            return "converged"
        is_last = manifest.iteration >= self.config.schedule.max_iterations
        return "max_iterations" if is_last else "patience"
