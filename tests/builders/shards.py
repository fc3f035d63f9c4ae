"""One layer shard with all layers of a configuration's model, driven directly, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arm_ray.calibration.minibatch import MiniBatch, micro_batches
from arm_ray.checkpoints import states
from arm_ray.config import MergeConfig
from arm_ray.merging.method import open_method
from arm_ray.runtime.inputs import MergeInputs, open_inputs
from arm_ray.runtime.merge.specs import shard_specs
from arm_ray.runtime.shards.facts import NOTHING_KNOWN, ModelFacts, run_rounds
from arm_ray.runtime.shards.layer_shard import LayerShard
from arm_ray.runtime.shards.placement import Placement
from arm_ray.schedule import merge_sizes, plan_iteration

Weights = dict[str, torch.Tensor]
SAMPLES = 8


class DirectShard:
    """A `LayerShard`, and the calls that the driver makes."""

    def __init__(self, config: MergeConfig, **changes: Any) -> None:
        self.config, self.run = config, Path(config.output)
        self.inputs: MergeInputs = open_inputs(config)
        sizes = merge_sizes(config.schedule, len(config.candidates))
        self.method = open_method(config.method, *sizes)
        [spec] = shard_specs(config, self.method, self.inputs, self.run, Placement(1, "cpu"))
        # There is no driver whose word would be waited for.
        life = None if spec.life is None else replace(spec.life, may_end_early=False)
        self.spec = replace(spec, **{"life": life, **changes})
        self.shard = LayerShard(self.spec)

    def linear(self, iteration: int) -> Weights:
        """Run one iteration without forward passes; returns the state."""
        plan = plan_iteration(self.config.schedule, len(self.config.candidates), iteration)

        def measure(number: int, known: ModelFacts) -> list[dict[str, torch.Tensor]]:
            return [self.shard.measure(plan, g, None, number, known) for g in self.spec.groups]

        facts = run_rounds(self.method, len(plan.contributors), NOTHING_KNOWN, measure)
        for group in self.spec.groups:
            self.shard.merge_linear([plan], group, frozenset({iteration}), [], facts)
        return self.state(iteration)

    def with_forward(self, iteration: int) -> Weights:
        """Run one iteration with forward passes over eight short samples; returns the state."""
        plan = plan_iteration(self.config.schedule, len(self.config.candidates), iteration)
        ids = [np.arange(1 + i, 9 + i, dtype=np.int32) for i in range(SAMPLES)]
        batch = MiniBatch(iteration, list(range(SAMPLES)), ids)
        [micro] = micro_batches(batch, max_tokens=64, max_samples=64)
        for chunk in self.spec.chunks:
            for state in plan.inputs:
                self.shard.forward(plan, chunk, SAMPLES, state, 0, micro, None)
            for group in chunk:
                self.shard.merge(plan, group, np.arange(SAMPLES))
        self.shard.on("states", "write", iteration)
        return self.state(iteration)

    def state(self, iteration: int) -> Weights:
        """Read a merged state."""
        directory = states.state_directory(self.run, iteration)
        found: Weights = {}
        for group in self.inputs.layout.groups:
            read = states.read_group(directory, group.index, group.tensors)
            found.update({name: tensor.clone() for name, tensor in read.items()})
        return found
