"""What vLLM's workers do for us: take in another model's weights, in place.

The class is named to vLLM as `worker_extension_cls`; its methods are called in every worker, by
name, through `collective_rpc`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint
from arm_ray.checkpoints.peft import open_adapter


class WeightsExtension:
    """Mixed into vLLM's worker class, which has `reload_weights` and `model_runner`."""

    def take_weights(self, path: str, adapter: str | None) -> None:
        """Replace the weights by those of a checkpoint, or of an adapter over one.

        Args:
            path: Hugging Face directory, single or sharded, in any float dtype.
            adapter: Directory of a LoRA adapter; what is loaded is `W + s B A`.
        """
        worker: Any = self
        if adapter is None:
            worker.reload_weights(weights_path=path)
        else:
            opened = open_adapter(Path(adapter), open_checkpoint(Path(path)))
            worker.reload_weights(weights_iterator=_tensors(opened))
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


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their names in the checkpoint, one at a time."""
    for name in checkpoint.tensors:
        yield name, checkpoint.read([name])[name]
