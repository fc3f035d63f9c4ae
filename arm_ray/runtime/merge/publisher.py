"""Publishes what a merge makes: states, as far as they are wanted, and the final model."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from arm_ray.checkpoints import states
from arm_ray.checkpoints.peft_file import WEIGHTS_NAME
from arm_ray.checkpoints.provenance import write_provenance
from arm_ray.checkpoints.remote import local_copy
from arm_ray.checkpoints.weight_file import SharedWeightFile, write_weight_file
from arm_ray.evaluation.selection import Selection
from arm_ray.events import ModelWritten, StateWritten
from arm_ray.model.loading import loading_problems
from arm_ray.planning.state_life import StateLife
from arm_ray.report.model_card import write_model_card
from arm_ray.runtime.cluster.calls import get_results, wait_for
from arm_ray.runtime.cluster.node_files import COPIES
from arm_ray.runtime.merge.adapter import ReadTensor, write_adapter
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.policies import last_usable
from arm_ray.runtime.merge.promise import Promise
from arm_ray.runtime.merge.state_storage import StateStorage
from arm_ray.runtime.output.provenance import made_of
from arm_ray.runtime.shards.made_states import Written
from arm_ray.schedule import BASE, iterations_needed_after
from arm_ray.storage.atomic import put_directory

if TYPE_CHECKING:
    from ray import ObjectRef


@dataclass(frozen=True)
class _Writing:
    """A state that the shards are writing."""

    manifest: states.StateManifest
    refs: Sequence[ObjectRef[Written]]


class Publisher:
    """Writes into a run directory what one set of layer shards has made.

    Args:
        job: The merge.
        storage: Where the states lie.
        promise: Compares states by their losses, and needs the best of them; None: nothing does.
        life: Which states are written as they are made; None: the sweep says so.
    """

    def __init__(
        self,
        job: MergeJob,
        storage: StateStorage,
        promise: Promise | None = None,
        life: StateLife | None = None,
    ) -> None:
        self._job, self._storage, self._promise, self._life = job, storage, promise, life
        self._config, self._inputs, self._run = job.config, job.inputs, job.run
        self._is_exported = False
        self._writing: deque[_Writing] = deque()

    def made(self, manifest: states.StateManifest) -> None:
        """Take note of a state that all shards have merged, some of which are written."""
        if self._life is None or manifest.iteration in self._life.written:
            refs = self._storage.writing(manifest.iteration)
            self._writing.append(_Writing(manifest, refs))
        scoring = self._job.scoring
        self.publish_written(wait=scoring is not None and scoring.waits_for(manifest.iteration))

    def publish_written(self, *, wait: bool = False) -> None:
        """Make states visible that are written by now.

        Args:
            wait: Until all are.

        Raises:
            OSError: The disk is full, and the state is needed.
        """
        while self._writing:
            first = self._writing[0]
            _, running = wait_for(first.refs, None if wait else 0.0, all_of_them=True)
            if running:
                return
            self._writing.popleft()
            self._publish_as_written(first)

    def _publish_as_written(self, state: _Writing) -> None:
        iteration = state.manifest.iteration
        try:
            written = get_results(state.refs)
        except OSError as error:
            if self._life is None or iteration not in self._life.optional:
                raise
            self._storage.discard(iteration)
            self._job.reporter.warn(
                f"iteration {iteration} cannot be written for recovery: {error.strerror}; the "
                "merge goes on without"
            )
            return
        self.publish(state.manifest)
        num_bytes = sum(part.num_bytes for part in written)
        seconds = round(max(part.seconds for part in written), 3)
        if num_bytes:
            self._job.reporter.write(StateWritten(iteration, num_bytes, seconds))
        if iteration in self._run.finished:
            self._after(iteration)

    def publish(self, manifest: states.StateManifest) -> None:
        """Make a state that all shards have written visible: as a whole, or its manifest alone."""
        self._storage.wrote(manifest.iteration)
        if self._storage.is_shared or self._is_wanted_whole(manifest.iteration):
            self._publish_whole(manifest)
            return
        # Its weights stay on the nodes.
        directory = states.state_directory(self._run.path, manifest.iteration)
        states.publish_manifest(directory, manifest)

    def _is_wanted_whole(self, iteration: int) -> bool:
        """Whether a state is wanted in the run directory, not only on the nodes."""
        if self._config.keep_states == "all" or self._config.output_format == "adapter":
            return True
        if self._run.url is not None:
            return True  # each state is uploaded from there
        return self._job.scoring is not None and self._job.scoring.is_due(iteration)

    def write_states(self, iterations: Collection[int]) -> None:
        """Have states on disk that are in the shards' memory."""
        # Of a merge without forward passes none is in memory.
        for iteration in sorted(iterations) if self._life is not None else ():
            manifest = self._run.finished.get(iteration)
            if manifest is not None and not states.is_published(self._run.path, iteration):
                get_results(self._storage.write(iteration))
                self.publish(manifest)

    def collect_states(self, iterations: Collection[int]) -> None:
        """Have whole states in the run directory, so that others can go on from there."""
        self.publish_written(wait=True)
        self.write_states(iterations)
        for iteration in iterations:
            if not self._storage.is_shared and iteration in self._run.finished:
                self._publish_whole(self._run.finished[iteration])

    def _publish_whole(self, manifest: states.StateManifest) -> None:
        layout = self._inputs.layout
        self._storage.gather(manifest.iteration)
        states.publish_state(
            states.state_directory(self._run.path, manifest.iteration),
            manifest,
            [group.tensors for group in layout.groups],
            states.total_bytes(layout.shapes, torch.float32.itemsize),
            self._inputs.model_config(torch.float32),
            self._inputs.tokenizer,
            self._inputs.carried,
        )

    def finished(self, manifest: states.StateManifest) -> None:
        """Take note of a finished iteration: have it scored, and remove what nothing needs."""
        self._run.finished[manifest.iteration] = manifest
        self._after(manifest.iteration)

    def _after(self, iteration: int) -> None:
        """Have a state scored if it is on disk, and remove others that nothing needs."""
        held = {state.manifest.iteration for state in self._writing}
        if self._job.scoring is not None:
            self._job.scoring.state_finished(iteration)
            held |= self._job.scoring.held()
        if self._promise is not None:
            held |= self._promise.held()
        last, schedule, count = (
            self._run.last_iteration,
            self._config.schedule,
            self._job.num_candidates,
        )
        on_disk = last_usable(schedule, count, last, self._is_published)
        points = self._life.recovery if self._life is not None else ()
        for point in (on_disk, *(p for p in points if p > on_disk)):
            held |= iterations_needed_after(schedule, count, point)
        self._run.prune(held, last)
        self._storage.forget_pruned()

    def _is_published(self, iteration: int) -> bool:
        return states.is_published(self._run.path, iteration)

    def goes_on(self, iteration: int) -> None:
        """Have the shards let go of states, once the merge goes on after an iteration."""
        if self._life is None:
            return
        held = set[int]() if self._promise is None else self._promise.held(iteration)
        if iteration in self._life.recovery:
            # A merge that goes on from here may end with it.
            self.write_states(held - {state.manifest.iteration for state in self._writing})
        self._storage.settle(iteration, held)

    def create_model_files(self) -> list[SharedWeightFile]:
        """The final model's weight files, made, so that the shards of a linear merge fill them."""
        shutil.rmtree(self._run.partial_model, ignore_errors=True)
        self._run.partial_model.mkdir()
        files = [
            SharedWeightFile(self._run.partial_model / file.name, file.specs)
            for file in self._model_files()
            if not file.is_carried
        ]
        for file in files:
            file.create()
        self._is_exported = True
        return files

    def _model_files(self) -> Sequence[states.ExportFile]:
        return states.plan_export(
            self._inputs.layout.shapes,
            self._inputs.storage_dtypes,
            int(self._config.runtime.max_weight_file_gb * 1e9),
            () if self._inputs.carried is None else self._inputs.carried.specs,
        )

    def publish_model(self, selection: Selection) -> Path:
        """Write the final model, or the adapter, from a state or a checkpoint.

        Args:
            selection: Which one.

        Returns:
            Its directory.
        """
        started = time.monotonic()
        run, partial, iteration = self._run, self._run.partial_model, selection.iteration
        is_adapter = self._config.output_format == "adapter"
        self.publish_written(wait=True)
        if iteration is not None and (self._config.keep_states == "last" or is_adapter):
            self.collect_states([iteration])
        rank = None
        if is_adapter:
            # The state stays until it is published: with another rank or format, the run goes on
            # here.
            read = self._reader(selection)
            rank = write_adapter(partial, self._config, self._inputs, read, iteration or 0)
            num_bytes = (partial / WEIGHTS_NAME).stat().st_size
        else:
            num_bytes = self._export(selection)
        scoring = self._job.scoring
        scores = None if scoring is None else scoring.scores()
        last = run.finished[iteration or run.last_iteration]
        chosen = (selection.name, selection.verdict)
        write_model_card(partial, self._config, last, rank, scores, chosen)
        made = made_of(self._config, self._inputs.checkpoints, run, selection.name)
        write_provenance(partial, made)
        # The rename is the moment of publication: `model/` is whole or absent.
        put_directory(partial, run.model)
        seconds = round(time.monotonic() - started, 3)
        if self._config.keep_states == "none":
            shutil.rmtree(run.path / "states", ignore_errors=True)
        name = selection.name if iteration is None else f"{iteration:04d}"
        self._job.reporter.write(ModelWritten(name, str(run.model), num_bytes, seconds))
        return run.model

    def _reader(self, selection: Selection) -> ReadTensor:
        """What reads a tensor of a state, or of a checkpoint."""
        if selection.iteration is not None:
            state = states.state_directory(self._run.path, selection.iteration)
            return lambda group, name: states.read_group(state, group, [name])[name]
        given = self._inputs.checkpoints[selection.name]
        if not given.is_local:
            copies = self._config.runtime.scratch_path / COPIES
            tensors = tuple(group.tensors for group in self._inputs.layout.groups)
            given = local_copy(given, copies, tensors, lambda _num_bytes: None)
        return lambda _group, name: given.read([name])[name]

    def _export(self, selection: Selection) -> int:
        """Complete the final model in its unfinished directory; returns bytes of weights.

        The shards write it, each its own tensors, unless a linear merge has written it already, or
        the model is a checkpoint.
        """
        partial, files = self._run.partial_model, self._model_files()
        merged = [file for file in files if not file.is_carried]
        if selection.iteration is None:
            # Tensor by tensor, by this process, which has the checkpoints open.
            self._is_exported = True
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            read = self._reader(selection)
            for file in merged:
                tensors = (read(0, spec.name) for spec in file.specs)
                write_weight_file(partial / file.name, file.specs, tensors)
        if not self._is_exported:
            self._storage.write_model(merged, selection.iteration or 0)
        if self._inputs.carried is not None:
            self._inputs.carried.write(partial / files[-1].name)
        if self._inputs.fp8 is not None:
            files = [self._inputs.fp8.rewrite(partial, file) for file in files]
        states.write_export_index(partial, files)
        base = self._inputs.checkpoints[BASE].config_directory
        config, tokenizer = self._inputs.final_config, self._inputs.tokenizer
        states.write_companions(partial, config, tokenizer, base)
        is_own = self._inputs.layout.code is not None
        for problem in loading_problems(partial, trusts_code=is_own):
            self._job.reporter.warn(f"the merged model may not load: {problem}")
        return sum(file.num_bytes for file in files)
