"""A model to score: where its weights are, and what must agree for an engine to hold it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from arm_ray.checkpoints.fp8 import Fp8Checkpoint
from arm_ray.checkpoints.huggingface import BareCheckpoint, Checkpoint
from arm_ray.checkpoints.peft import AdaptedCheckpoint
from arm_ray.checkpoints.remote import RemoteCheckpoint
from arm_ray.checkpoints.sharded import ShardedCheckpoint
from arm_ray.errors import EvaluationError
from arm_ray.evaluation.engine import ModelSource
from arm_ray.storage.regular import json_in

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
# Keys of config.json that say nothing about the shapes of the weights.
_NO_ARCHITECTURE = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Subject:
    """A model to score.

    Attributes:
        name: Its name in results: a directory name.
        source: Where its weights are.
        tokenizer: Directory of the tokenizer and chat template.
        identity: Digest that changes with the weights.
    """

    name: str
    source: ModelSource
    tokenizer: str
    identity: str


def model_source(checkpoint: Checkpoint) -> ModelSource:
    """Where an engine finds a checkpoint's weights, whatever its format."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        under = model_source(checkpoint.base)
        return replace(under, weights=f"peft:{checkpoint.path}", base=under.weights)
    if isinstance(checkpoint, ShardedCheckpoint):
        given = f"{checkpoint.kind}:{checkpoint.path}"
        return ModelSource(str(checkpoint.config_directory), given, masters=checkpoint.masters)
    if isinstance(checkpoint, BareCheckpoint):
        return ModelSource(str(checkpoint.described), f"hf:{checkpoint.path}")
    if isinstance(checkpoint, Fp8Checkpoint) and not checkpoint.is_local:
        raise EvaluationError(
            "engines do not load FP8 from a URL: they have the weights in bfloat16 from there",
            where=checkpoint.path,
            expected="a directory",
            hint="copy the checkpoint to a disk that all nodes see, and name that",
        )
    if isinstance(checkpoint, RemoteCheckpoint):
        # Engines fetch it tensor by tensor.
        return ModelSource(str(checkpoint.path), str(checkpoint.directory))
    return ModelSource(str(checkpoint.path))


def engine_kind(model: str, tokenizer: str) -> str:
    """What must agree for a model to go into a running engine: shapes, and the tokenizer.

    Args:
        model: Its directory, with a configuration.
        tokenizer: Directory of its tokenizer.

    Raises:
        EvaluationError: There is no model.
    """
    return architecture(model) + tokenizer_digest(tokenizer)


def architecture(model: str) -> str:
    """What of a model's configuration must agree for its weights to go into a running engine."""
    try:
        content = json_in(Path(model) / "config.json")
    except (OSError, ValueError) as error:
        raise EvaluationError(
            "the path holds no model",
            where=model,
            got=error,
            expected="a directory with config.json",
        ) from None
    shapes = {name: value for name, value in content.items() if name not in _NO_ARCHITECTURE}
    return json.dumps(shapes, sort_keys=True)


def tokenizer_digest(directory: str) -> str:
    """SHA-256 of what decides a tokenizer's ids, end tokens and chat template."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        file = Path(directory) / name
        if file.is_file():
            digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()
