"""What vLLM's workers do for us: take in another model's weights, in place.

The class is named to vLLM as `worker_extension_cls`; its methods are called in every worker, by
name, through `collective_rpc`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from arm_ray.checkpoints import pickles
from arm_ray.checkpoints.formats import find_format, open_given, split_source
from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint, read_json


class WeightsExtension:
    """Mixed into vLLM's worker class, which has `reload_weights` and `model_runner`."""

    def take_weights(
        self,
        path: str,
        weights: str | None = None,
        base: str | None = None,
        masters: bool = True,
    ) -> None:
        """Replace the weights by those of a checkpoint of any format.

        Args:
            path: Of a `ModelSource`, as are the others.
            weights: What is loaded instead of those in `path`; of an adapter `W + s B A`.
            base: What an adapter is added to instead of those in `path`.
            masters: Whether float32 is read where shards hold it.
        """
        worker: Any = self
        # An engine that was started without weights has no loader for a directory of them.
        has_loader = worker.vllm_config.load_config.load_format != "dummy"
        if weights is None and has_loader:
            worker.reload_weights(weights_path=path)
        else:
            opened = open_weights(Path(path), weights, base, masters)
            try:
                worker.reload_weights(weights_iterator=all_tensors(opened))
            finally:
                # The engine outlives the checkpoints that it scores.
                pickles.let_go()
        self._refresh_packed_embeddings()

    def _refresh_packed_embeddings(self) -> None:
        """Have embedding modules form again what they derive from their weight.

        On CPUs a tied `lm_head` multiplies with a packed copy of the embedding, and reloading (as
        of vLLM 0.32) leaves the old copy in place.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        worker: Any = self
        for module in worker.model_runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)


def open_weights(path: Path, weights: str | None, base: str | None, masters: bool) -> Checkpoint:
    """The checkpoint that a `ModelSource` stands for; the arguments are its fields."""
    if weights is None:
        return open_checkpoint(path)
    # Shards without a configuration of their own have that of `path`.
    under = Checkpoint(path, read_json(path / "config.json"), {})
    if base is not None:
        under = open_given(base, under, masters)
    elif _is_adapter(weights):
        under = open_checkpoint(path)
    return open_given(weights, under, masters)


def _is_adapter(given: str) -> bool:
    kind, path = split_source(given)
    return kind == "peft" or (kind == "auto" and find_format(Path(path))[0] == "peft")


def all_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their names in the checkpoint, one at a time."""
    for name in checkpoint.tensors:
        yield name, checkpoint.read([name])[name]
