"""The samples of a merge: the calibration stream, and those that models are compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arm_ray.calibration.minibatch import MicroBatch, MiniBatch, micro_batches, unique_samples
from arm_ray.calibration.stream import CalibrationStream, open_stream
from arm_ray.config import MergeConfig
from arm_ray.errors import CalibrationError, ConfigError
from arm_ray.lazy import ray_is_joined
from arm_ray.merging.method import Method
from arm_ray.planning.workload import MAX_MICRO_BATCH_SAMPLES
from arm_ray.runtime.cluster.nodes import alive_nodes
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.runtime.session.reporter import Reporter


@dataclass(frozen=True)
class Draw:
    """Samples.

    Attributes:
        batches: Micro-batches of the different samples.
        columns: `[N]` int64: which of these each sample is.
    """

    batches: Sequence[MicroBatch]
    columns: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        """How many different samples there are."""
        return sum(len(batch.lengths) for batch in self.batches)


NO_SAMPLES = Draw([], np.zeros(0, dtype=np.int64))


def draw_of(batch: MiniBatch, max_tokens: int) -> Draw:
    """A mini-batch in micro-batches of at most so many padded tokens."""
    different, columns = unique_samples(batch)
    batches = micro_batches(different, max_tokens=max_tokens, max_samples=MAX_MICRO_BATCH_SAMPLES)
    return Draw(batches, columns)


def open_calibration(
    config: MergeConfig,
    method: Method,
    inputs: MergeInputs,
    run: RunDirectory,
    reporter: Reporter,
) -> CalibrationStream | None:
    """Open the calibration stream; None where no sample is run.

    Raises:
        CalibrationError: The data do not fit the model, or have too few rows.
        ConfigError: There are none.
    """
    if not method.needs_forward:
        return None
    if config.calibration is None:
        why = f"the operator {config.method.operator!r}"
        if not method.needs_activations:
            why = "schedule.step" if method.tries_steps else "select.promise"
        raise ConfigError(
            f"{why} needs calibration samples",
            where="calibration",
            hint="name a dataset in calibration.path",
        )
    needed = config.schedule.offset + config.schedule.max_iterations
    if method.tries_steps:
        # One finds directions, one chooses how far to go.
        needed *= 2
    stream = open_stream(
        config.calibration,
        inputs.tokenizer,
        needed_batches=needed,
        held_back=config.select.held_back if config.compares_losses else lambda _rows: 0,
        has_labels=method.tries_steps or method.takes_losses,
        here=_reads_here(config),
    )
    vocabulary = int(inputs.layout.text_config.vocab_size)
    if stream.max_token_id >= vocabulary:
        raise CalibrationError(
            "the tokenizer does not belong to the model",
            where=inputs.tokenizer,
            got=f"token id {stream.max_token_id}",
            expected=f"ids below the vocabulary size {vocabulary}",
            hint="copy the training run's tokenizer into the base's directory",
        )
    rows, size = stream.num_rows - stream.num_held_back, config.calibration.batch_size
    if method.tries_steps and rows < 2 * size:
        raise CalibrationError(
            "the calibration data have too few rows to choose a step by",
            where=config.calibration.path,
            got=f"{rows} rows that mini-batches may use, of {stream.num_rows}",
            expected=f"{2 * size}: one mini-batch finds directions, another chooses the step",
            hint=f"give more rows, set calibration.batch_size to {max(1, rows // 2)} or less, or "
            "schedule.step to fixed",
        )
    run.record_inputs({"calibration": stream.digest})
    for message in stream.warnings:
        reporter.warn(message)
    return stream


def open_compared(
    config: MergeConfig,
    inputs: MergeInputs,
    stream: CalibrationStream | None,
    reporter: Reporter,
) -> tuple[MiniBatch, MiniBatch] | None:
    """Open the samples that models are compared on, and those of the final losses.

    Returns:
        None where nothing is compared by losses.

    Raises:
        CalibrationError: Samples of `select.final_path` are calibrated on, or compare models.
    """
    if not config.compares_losses:
        return None
    assert stream is not None
    select, held = config.select, stream.held_back()
    samples, final_samples = select.sizes(stream.num_rows)
    middle = samples if select.path is None else 0
    everything = range(len(held.token_ids))
    validation, final = held.part(everything[:middle]), held.part(everything[middle:])
    if select.path is not None and samples:
        validation = _first_rows(config, inputs, select.path, samples)
    if select.final_path is not None and final_samples:
        final = _first_rows(config, inputs, select.final_path, final_samples)
    used = {ids.tobytes() for ids in stream.served().token_ids}
    shared = sum(ids.tobytes() in used for ids in validation.token_ids)
    if shared:
        reporter.warn(
            f"{shared} of {len(validation.token_ids)} samples that models are compared on (select)"
            " are also calibrated on: there, merges look better than they are"
        )
    used |= {ids.tobytes() for ids in validation.token_ids}
    new = [i for i, ids in enumerate(final.token_ids) if ids.tobytes() not in used]
    shared = len(final.token_ids) - len(new)
    if shared and select.final_path is not None:
        raise CalibrationError(
            "samples of the final losses have been seen before",
            where=select.final_path,
            got=f"{shared} of {len(final.token_ids)} samples are also calibrated on, or compare "
            "models",
            expected="samples that choose nothing",
            hint="name other data in select.final_path, or set select.final_samples to 0",
        )
    # Rows that are there twice, of which one is calibrated on.
    return validation, final.part(new)


def _first_rows(config: MergeConfig, inputs: MergeInputs, path: str, rows: int) -> MiniBatch:
    """Samples of other data of the calibration's format, in the order that its seed gives."""
    assert config.calibration is not None
    settings = config.calibration.model_copy(update={"path": path})
    stream = open_stream(
        settings,
        inputs.tokenizer,
        needed_batches=0,
        held_back=lambda _rows: rows,
        has_labels=True,
        here=_reads_here(config),
    )
    return stream.held_back()


def _reads_here(config: MergeConfig) -> bool:
    # Whether nodes share storage is known for certain only once shards are placed.
    if config.runtime.storage == "shared" or not ray_is_joined():
        return False
    return len(alive_nodes()) > 1
