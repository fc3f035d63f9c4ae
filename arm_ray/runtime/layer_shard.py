"""One actor's part of the model: it runs, merges and writes its own layer groups.

A plain class; the driver makes it a Ray actor. It holds, of each state that the iteration reads,
its own layers and nothing else.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.calibration.minibatch import MicroBatch
from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.validation import check_finite
from arm_ray.errors import NumericalError
from arm_ray.merging.operator import MergeSettings, TensorInputs
from arm_ray.merging.registry import OPERATORS
from arm_ray.merging.similarity import SimilaritySums, similarity_sums
from arm_ray.model.group import GroupRunner, embed, mean_outputs
from arm_ray.model.layout import EMBEDDING, LayerGroup, ModelLayout, is_layer_tensor
from arm_ray.schedule import BASE, IterationPlan, iteration_of


@dataclass(frozen=True)
class ShardSpec:
    """What a layer shard is given once.

    Attributes:
        layout: The model.
        groups: Indices of the shard's layer groups, consecutive.
        checkpoints: State name (`base`, `candidate-1`, …) -> checkpoint.
        run: The run directory.
        operator: Name of the merge operator.
        settings: Its settings.
        device: torch device of the shard, for example `cuda`; Ray gives each actor its own GPU.
        compute_dtype: Of the forward pass.
        threads: CPU threads.
    """

    layout: ModelLayout
    groups: range
    checkpoints: Mapping[str, Checkpoint]
    run: Path
    operator: str
    settings: MergeSettings
    device: str
    compute_dtype: torch.dtype
    threads: int


@dataclass(frozen=True)
class GroupReport:
    """What merging one layer group gave; times in seconds, sizes in bytes."""

    group: int
    similarity: tuple[SimilaritySums, ...]
    rotated: int
    rank_deficient: tuple[str, ...]
    seconds: float
    num_bytes: int


class LayerShard:
    """Runs, merges and writes the layer groups of one shard."""

    def __init__(self, spec: ShardSpec) -> None:
        # The sums of a matrix product depend on the number of threads: it is part of the result.
        torch.set_num_threads(spec.threads)
        torch.set_float32_matmul_precision("highest")
        self._spec = spec
        self._device = torch.device(spec.device)
        self._operator = OPERATORS[spec.operator]
        self._runners: dict[int, GroupRunner] = {}
        self._weights: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._compute: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._mean_inputs: dict[tuple[int, str, str], Tensor] = {}
        self._forward_seconds = 0.0

    def ready(self) -> str:
        """Answer once the actor runs: the device's name."""
        if self._device.type == "cuda":
            return str(torch.cuda.get_device_name(self._device))
        return self._device.type

    def check_weights(self) -> int:
        """Look for NaN and infinity in the shard's layers of all checkpoints; returns bytes read.

        Raises:
            CorruptCheckpointError: Says in which tensor of which checkpoint.
        """
        total = 0
        for label, checkpoint in self._spec.checkpoints.items():
            for index in self._spec.groups:
                for name, tensor in self._load(label, index).items():
                    check_finite(tensor, name, f"{label}: {checkpoint.tensors[name].file}")
                    total += tensor.nbytes
        return total

    def forward(
        self,
        plan: IterationPlan,
        num_samples: int,
        state: str,
        micro_batch: MicroBatch,
        hidden: NDArray[np.generic] | None,
    ) -> NDArray[np.generic] | None:
        """Run one micro-batch of one input state through the shard's layers.

        Args:
            plan: The iteration.
            num_samples: Different samples in the iteration's mini-batch.
            state: Name of the input state.
            micro_batch: Its token ids and lengths.
            hidden: Hidden states from the shard before, as `pack_tensor` made them; None for the
                first shard, which embeds the token ids.

        Returns:
            The hidden states for the next shard, or None from the last.
        """
        started = time.monotonic()
        lengths = torch.from_numpy(micro_batch.lengths).to(self._device)
        groups = self._spec.groups
        if hidden is None:
            ids = torch.from_numpy(micro_batch.input_ids).to(self._device)
            current = embed(self._compute_weights(state, groups[0]), ids)
        else:
            current = unpack_tensor(hidden, self._spec.compute_dtype).to(self._device)
        positions = torch.from_numpy(micro_batch.sample_positions).to(self._device)
        for index in groups:
            weights = self._compute_weights(state, index)
            current, means = self._runner(index).forward(weights, current, lengths)
            for name, mean in means.items():
                key = (plan.iteration, state, name)
                if key not in self._mean_inputs:
                    self._mean_inputs[key] = mean.new_empty(num_samples, mean.shape[1])
                self._mean_inputs[key][positions] = mean
        self._forward_seconds += time.monotonic() - started
        is_last = groups[-1] == len(self._spec.layout.groups) - 1
        return None if is_last else pack_tensor(current)

    def merge(
        self,
        plan: IterationPlan,
        group: int,
        columns: NDArray[np.int64],
        keep: frozenset[str],
    ) -> GroupReport:
        """Merge one layer group of an iteration, write it, and release what is not needed again.

        Args:
            plan: The iteration, whose forward passes this shard has run.
            group: Index of the layer group.
            columns: `[N]`: which of the different samples each sample of the mini-batch is.
            keep: Names of the states that later iterations read.
        """
        started = time.monotonic()
        merged: dict[str, Tensor] = {}
        similarity, rotated, deficient = [], 0, []
        for name in self._spec.layout.groups[group].tensors:
            inputs = self._tensor_inputs(plan, group, name, columns)
            result = self._operator.merge(inputs, self._spec.settings)
            if not bool(torch.isfinite(result.tensor.sum(dtype=torch.float64))):
                raise NumericalError(
                    f"merging {name} gave NaN or infinity",
                    where=f"iteration {plan.iteration}",
                    hint="use a smaller method.coefficient",
                )
            merged[name] = result.tensor
            previous = self._as_float32(plan.previous, group, name)
            base = self._as_float32(BASE, group, name)
            similarity.append(similarity_sums(result.tensor, previous, base))
            rotated += result.rotated
            deficient += [f"{name} ({rank} of {full})" for rank, full in result.rank_deficient]
        directory = states.state_directory(self._spec.run, plan.iteration)
        host = {name: tensor.cpu() for name, tensor in merged.items()}
        num_bytes = states.write_group(directory, group, host)
        self._weights[plan.output, group] = host
        self._release(plan, group, keep)
        return GroupReport(
            group,
            tuple(similarity),
            rotated,
            tuple(deficient),
            time.monotonic() - started,
            num_bytes,
        )

    def take_forward_seconds(self) -> float:
        """Seconds spent in forward passes since the last call."""
        seconds, self._forward_seconds = self._forward_seconds, 0.0
        return seconds

    def export(self, directory: Path, file: states.ExportFile, iteration: int) -> int:
        """Write one weight file of the final model from the state of `iteration`."""
        group_of = {
            name: group.index for group in self._spec.layout.groups for name in group.tensors
        }
        state = states.state_directory(self._spec.run, iteration)
        return states.write_export_file(directory, file, state, group_of)

    def peak_bytes(self) -> int:
        """Largest resident memory of the process so far."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def _group(self, index: int) -> LayerGroup:
        return self._spec.layout.groups[index]

    def _runner(self, index: int) -> GroupRunner:
        if index not in self._runners:
            spec = self._spec
            self._runners[index] = GroupRunner(
                spec.layout, self._group(index), self._device, spec.compute_dtype
            )
        return self._runners[index]

    def _load(self, state: str, index: int) -> dict[str, Tensor]:
        """The group's tensors of a state in host memory, in the dtype they are stored in."""
        key = (state, index)
        if key not in self._weights:
            names = self._group(index).tensors
            iteration = iteration_of(state)
            if iteration is None:
                self._weights[key] = self._spec.checkpoints[state].read(names)
            else:
                directory = states.state_directory(self._spec.run, iteration)
                self._weights[key] = states.read_group(directory, index, names)
        return self._weights[key]

    def _compute_weights(self, state: str, index: int) -> dict[str, Tensor]:
        """What the forward pass uses of it, on the device in the compute dtype, for one iteration.

        The head and the final norm are not among it: nothing after the last layer is run.
        """
        key = (state, index)
        if key not in self._compute:
            self._compute[key] = {
                name: tensor.to(device=self._device, dtype=self._spec.compute_dtype)
                for name, tensor in self._load(state, index).items()
                if name == EMBEDDING or is_layer_tensor(name)
            }
        return self._compute[key]

    def _as_float32(self, state: str, group: int, name: str) -> Tensor:
        return self._load(state, group)[name].to(device=self._device, dtype=torch.float32)

    def _tensor_inputs(
        self, plan: IterationPlan, group: int, name: str, columns: NDArray[np.int64]
    ) -> TensorInputs:
        reference, *contributors = (self._as_float32(s, group, name) for s in plan.inputs)
        if not (self._operator.needs_activations and name in self._spec.layout.rotated):
            return TensorInputs(name, reference, contributors, plan.divisor)
        chosen = torch.from_numpy(columns.copy()).to(self._device)
        first, *others = (
            self._activation(plan, state, group, name)[:, chosen] for state in plan.inputs
        )
        return TensorInputs(name, reference, contributors, plan.divisor, first, others)

    def _activation(self, plan: IterationPlan, state: str, group: int, name: str) -> Tensor:
        weights = self._compute_weights(state, group)
        bias = weights.get(name.removesuffix("weight") + "bias")
        mean_input = self._mean_inputs.pop((plan.iteration, state, name))
        activation = mean_outputs(weights[name], bias, mean_input)
        if not bool(torch.isfinite(activation).all()):
            raise NumericalError(
                f"the activations of {name} are NaN or infinite",
                where=f"{state}, iteration {plan.iteration}",
                got=f"compute_dtype {self._spec.compute_dtype}",
                hint="set precision.compute_dtype to float32 or bfloat16",
            )
        return activation

    def _release(self, plan: IterationPlan, group: int, keep: frozenset[str]) -> None:
        for state in plan.inputs:
            self._compute.pop((state, group), None)
        for key in [k for k in self._weights if k[1] == group and k[0] not in keep]:
            del self._weights[key]


def pack_tensor(tensor: Tensor) -> NDArray[np.generic]:
    """A tensor as an array that Ray stores without pickling; 16-bit floats travel as int16."""
    tensor = tensor.detach().cpu().contiguous()
    array: NDArray[np.generic] = (
        tensor.view(torch.int16) if tensor.dtype.itemsize == 2 else tensor
    ).numpy()
    return array


def unpack_tensor(array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
    """The tensor that `pack_tensor` packed. Copies, because Ray's arrays are read-only."""
    return torch.from_numpy(array.copy()).view(dtype)
