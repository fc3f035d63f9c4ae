"""The loss of a state, or of one that is only tried, by the shards that hold its layers.

A state that is tried is the result of an iteration with a step of some length. It is never written:
each shard makes its layers for as long as samples run through them. The head's owner makes the
losses: the first shard where the head is the embedding, else the last one. What it is sent are
normalised hidden states of the tokens that count, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arm_ray.calibration.minibatch import MicroBatch
from arm_ray.errors import NumericalError
from arm_ray.model.activations import Wanted
from arm_ray.model.group import Decoder
from arm_ray.planning.workload import LOGITS
from arm_ray.runtime.shards.facts import ModelFacts
from arm_ray.runtime.shards.group_merge import GroupMerge
from arm_ray.runtime.shards.spec import ShardSpec
from arm_ray.runtime.shards.transport import pack_tensor, unpack_tensor
from arm_ray.runtime.shards.weights import WeightStore
from arm_ray.schedule import IterationPlan, Step

_NOTHING = Wanted(means=False)
Sent = Tensor | NDArray[np.generic]


@dataclass(frozen=True)
class Trial:
    """A step of an iteration that is tried.

    Attributes:
        name: Of the state that it would make; no other state has it.
        step: How far it goes.
        facts: What is known of the whole model for this step.
    """

    name: str
    step: Step
    facts: ModelFacts

    def plan(self, plan: IterationPlan) -> IterationPlan:
        """The iteration with this step."""
        return replace(plan, step=self.step)


class ShardLosses:
    """Runs samples through a shard's layers of some states, without keeping activations.

    Args:
        spec: The shard's.
        store: Its weights; layers of states that are tried are put there.
        merging: Makes these.
        decoder: Runs the forward passes.
    """

    def __init__(
        self,
        spec: ShardSpec,
        store: WeightStore,
        merging: GroupMerge,
        decoder: Decoder,
    ) -> None:
        self._spec, self._store, self._merging, self._decoder = spec, store, merging, decoder
        self._hidden: dict[tuple[str, int], Tensor] = {}

    def make(
        self,
        plan: IterationPlan,
        chunk: range,
        trials: Sequence[Trial],
        columns: NDArray[np.int64],
    ) -> None:
        """Make the decoder layers and norms of a chunk for some states that are tried.

        Args:
            plan: The iteration, whose own forward passes this shard has run.
            chunk: Layer groups, one of `ShardSpec.chunks`.
            trials: The states.
            columns: `[N]`: which of the different samples each sample of its mini-batch is.
        """
        torch.set_num_threads(self._spec.threads)
        for group in chunk:
            layout = self._spec.layout
            # Embedding and head are made by themselves; nothing runs what else lies outside.
            run = [
                name
                for name in layout.groups[group].tensors
                if layout.is_layer_tensor(name) or name in layout.tail
            ]
            for trial, made in zip(
                trials, self._made(plan, group, trials, run, columns), strict=True
            ):
                self._store.hold(trial.name, group, made)

    def make_embedding(self, plan: IterationPlan, trial: Trial, columns: NDArray[np.int64]) -> None:
        """Make the embedding of a state that is tried; only the first shard has one."""
        torch.set_num_threads(self._spec.threads)
        [made] = self._made(plan, 0, [trial], [self._spec.layout.embedding], columns)
        self._store.hold(trial.name, 0, made)

    def release_embedding(self, name: str) -> None:
        """Let go of the embedding of a state that was tried."""
        self._store.let_go(name, 0, self._spec.layout.embedding)

    def release(self, chunk: range, tried: Sequence[str], others: Sequence[str]) -> None:
        """Let go of what `make` has made, and of weights that do not stay.

        Args:
            chunk: Layer groups.
            tried: Names of the states that were tried.
            others: States whose copies in the compute dtype nothing else needs.
        """
        for group in chunk:
            for name in tried:
                self._store.let_go(name, group)
            self._store.release(group, others, keep=lambda _state: True)
            self._store.release_unless_resident(group)

    def run(
        self,
        chunk: range,
        state: str,
        micro_index: int,
        micro_batch: MicroBatch,
        hidden: Sent | None,
    ) -> Sent | None:
        """Run one micro-batch of a state through a chunk of the shard's layer groups.

        Args:
            chunk: Layer groups, one of `ShardSpec.chunks`.
            state: Name of a state, or of one that is tried.
            micro_index: Which micro-batch it is.
            micro_batch: Its token ids, lengths and labels.
            hidden: As for `LayerShard.forward`.

        Returns:
            The hidden states, where the layers that follow are another shard's; of the model's
            last chunk, the normalised ones `[labels, hidden]` before the tokens that count; else
            None.
        """
        torch.set_num_threads(self._spec.threads)
        device, key = self._store.device, (state, micro_index)
        if chunk[0] == 0:
            ids = torch.from_numpy(micro_batch.input_ids.copy()).to(device)
            current = self._store.embed(state, ids)
        elif hidden is not None:
            if not isinstance(hidden, Tensor):
                hidden = unpack_tensor(hidden, self._spec.compute_dtype)
            current = hidden.to(device)
        else:
            current = self._hidden.pop(key)
        lengths = torch.from_numpy(micro_batch.lengths.copy()).to(device)
        for group in chunk:
            weights = self._store.layers(state, group)
            runner = self._decoder.runner(group)
            current = runner.forward(weights, current, lengths, _NOTHING).hidden
        if chunk[-1] == len(self._spec.layout.groups) - 1:
            tail = {
                name: self._store.in_compute_dtype(state, chunk[-1], name)
                for name in self._spec.layout.tail
            }
            normed = self._decoder.final_norm(tail, current)
            return pack_tensor(normed[:, :-1][_counts(micro_batch).to(device)])
        if not self._spec.sends_after(chunk):
            self._hidden[key] = current
            return None
        return pack_tensor(current) if self._spec.transport == "object_store" else current

    def losses(
        self,
        plan: IterationPlan,
        state: Trial | str,
        columns: NDArray[np.int64],
        micro_batches: Sequence[MicroBatch],
        *hidden: NDArray[np.generic],
    ) -> NDArray[np.float64]:
        """The losses of a state, given what its last layers gave; called of the head's owner.

        Args:
            plan: The iteration.
            state: The state, or the one that is tried.
            columns: As for `make`.
            micro_batches: The samples.
            hidden: What `run` returned of each.

        Returns:
            `[samples, 2]`: of each sample the sum of -log p over the tokens that count, and their
            number.

        Raises:
            NumericalError: A loss is not finite, of a state that is not only tried.
        """
        torch.set_num_threads(self._spec.threads)
        group, names = self._spec.layout.head_group, self._spec.layout.head
        if isinstance(state, Trial):
            [head] = self._made(plan, group, [state], names, columns)
        else:
            head = {name: self._store.in_compute_dtype(state, group, name) for name in names}
        device = head[names[0]].device
        found = np.zeros((sum(len(batch.lengths) for batch in micro_batches), 2))
        for batch, packed in zip(micro_batches, hidden, strict=True):
            assert batch.labels is not None
            before = unpack_tensor(packed, self._spec.compute_dtype).to(device)
            targets = torch.from_numpy(batch.input_ids[:, 1:][batch.labels[:, 1:]])
            values = self._negative_log_likelihoods(head, before, targets.to(device)).cpu()
            counts = batch.labels.sum(1)
            owner = np.repeat(np.arange(len(counts)), counts)
            # On the host, in the order of the tokens: the same bits everywhere.
            sums = np.bincount(owner, values.numpy().astype(np.float64), len(counts))
            found[batch.sample_positions] = np.stack([sums, counts], axis=1)
        if not isinstance(state, Trial) and not np.isfinite(found).all():
            raise NumericalError(
                "the loss is NaN or infinite",
                where=f"{state}, iteration {plan.iteration}",
                got=f"compute_dtype {self._spec.compute_dtype}",
                hint="set precision.compute_dtype to float32 or bfloat16; if that is so already, "
                f"{state} is broken: leave it out",
                subject=state,
            )
        return found

    def _made(
        self,
        plan: IterationPlan,
        group: int,
        trials: Sequence[Trial],
        names: Sequence[str],
        columns: NDArray[np.int64],
    ) -> list[dict[str, Tensor]]:
        plans = [trial.plan(plan) for trial in trials]
        facts = [trial.facts for trial in trials]
        dtypes = {name: self._decoder.dtype_of(name) for name in names}
        return self._merging.trials(plans, group, names, columns, facts, dtypes)

    def _negative_log_likelihoods(
        self, head: Mapping[str, Tensor], hidden: Tensor, targets: Tensor
    ) -> Tensor:
        """`[labels]` float32 of `targets`, given `hidden` `[labels, hidden]`; in blocks."""
        step = max(1, LOGITS // len(head[self._spec.layout.head[0]]))
        parts = [
            torch.nn.functional.cross_entropy(
                self._decoder.logits(head, hidden[None, start : start + step])[0].float(),
                targets[start : start + step],
                reduction="none",
            )
            for start in range(0, len(targets), step)
        ]
        return torch.cat(parts) if parts else torch.zeros(0)


def _counts(batch: MicroBatch) -> Tensor:
    """`[rows, length - 1]`: at which positions the next token counts."""
    assert batch.labels is not None
    return torch.from_numpy(batch.labels[:, 1:].copy())
