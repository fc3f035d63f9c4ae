"""The last state of a run as a LoRA adapter over the base, instead of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from arm_ray.checkpoints import states
from arm_ray.checkpoints.adapter_export import export_adapter
from arm_ray.config import MergeConfig
from arm_ray.runtime.inputs import MergeInputs
from arm_ray.schedule import BASE

# Of a layer group and a name: the tensor, in host memory.
ReadTensor = Callable[[int, str], Tensor]


def write_adapter(
    directory: Path, config: MergeConfig, inputs: MergeInputs, read: ReadTensor, iteration: int
) -> int:
    """Write an adapter and the tokenizer's files into a directory; returns the rank.

    It is done in this process, tensor by tensor: a singular value decomposition of each weight's
    difference, once a run, for which two copies of the largest tensor and all factors are held.

    Args:
        directory: Where; made if it is not there.
        config: The configuration.
        inputs: The checked checkpoints.
        read: Reads the state, or the checkpoint, that it is made from.
        iteration: That state's; 0: a checkpoint.

    Raises:
        CheckpointError: The difference is not that of an adapter; names the tensor, and its rank.
        OSError: The disk is full.
    """
    threads = torch.get_num_threads()
    # As in the shards: the bits of a decomposition depend on the number of threads.
    torch.set_num_threads(config.runtime.threads)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        rank = export_adapter(
            directory,
            _weights(inputs, read),
            inputs.layout.matrices,
            base_model=config.base,
            fixed_rank=config.adapter_rank,
            # The candidates were rounded when they were read, and each iteration adds less than
            # two roundings of its own: of the update's scale, and of the result.
            roundings=2.0 + 2.0 * iteration,
        )
    finally:
        torch.set_num_threads(threads)
    states.copy_companions(directory, inputs.tokenizer)
    return rank


def _weights(inputs: MergeInputs, read: ReadTensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, merged weight and the base's, of one tensor after the other."""
    base = inputs.checkpoints[BASE]
    for group in inputs.layout.groups:
        for name in group.tensors:
            yield name, read(group.index, name), base.read([name])[name]
