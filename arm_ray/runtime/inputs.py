"""Everything that is checked about a merge's checkpoints before anything long starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint, resolve_path
from arm_ray.checkpoints.peft import AdaptedCheckpoint, is_adapter, open_adapter
from arm_ray.checkpoints.validation import check_zero_padding
from arm_ray.checkpoints.weight_file import DTYPES
from arm_ray.config import MergeConfig
from arm_ray.errors import ArmRayError, NotACheckpointError
from arm_ray.model.layout import (
    ModelLayout,
    base_dtype,
    check_layout,
    load_config,
    model_layout,
)
from arm_ray.schedule import BASE, candidate_name

_DTYPE_BY_NAME = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class MergeInputs:
    """The checkpoints of a merge, checked, and what follows from them. Holds no weights.

    Attributes:
        checkpoints: `base`, `candidate-1`, … -> checkpoint.
        layout: The model, from the base.
        compute_dtype: Of the forward pass.
        storage_dtypes: Name -> dtype in the final model.
        tokenizer: Directory of the tokenizer, chat template and generation settings.
    """

    checkpoints: Mapping[str, Checkpoint]
    layout: ModelLayout
    compute_dtype: torch.dtype
    storage_dtypes: Mapping[str, torch.dtype]
    tokenizer: Path

    @property
    def fingerprints(self) -> dict[str, str]:
        """State name -> cheap digest, to notice on resumption that an input has changed."""
        return {name: checkpoint.fingerprint for name, checkpoint in self.checkpoints.items()}

    def model_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Content of `config.json` for weights in `dtype`; everything else as in the base."""
        config: dict[str, Any] = copy.deepcopy(dict(self.checkpoints[BASE].config))
        name = str(dtype).removeprefix("torch.")
        # transformers 5 writes `dtype`; version 4 wrote, and still reads, `torch_dtype`.
        key = "dtype" if "dtype" in config else "torch_dtype"
        return {**config, key: name}


def open_inputs(config: MergeConfig) -> MergeInputs:
    """Open the base and the candidates, and check that they can be merged.

    Reads configurations, headers and a few kilobytes of each weight file.

    Raises:
        CheckpointError: Any of its kinds; says which checkpoint, and what about it.
    """
    names = [BASE, *(candidate_name(i) for i in range(len(config.candidates)))]
    checkpoints: dict[str, Checkpoint] = {}
    for label, given in zip(names, [config.base, *config.candidates], strict=True):
        try:
            path = resolve_path(given)
            if label != BASE and is_adapter(path):
                checkpoints[label] = open_adapter(path, checkpoints[BASE])
            else:
                checkpoints[label] = open_checkpoint(path)
        except ArmRayError as error:
            raise error.of(label) from None
    base = checkpoints[BASE]
    layout = model_layout(load_config(base), config.runtime.layers_per_group)
    for label, checkpoint in checkpoints.items():
        check_layout(layout, checkpoint, label)
    check_zero_padding(
        {name: c for name, c in checkpoints.items() if not isinstance(c, AdaptedCheckpoint)}
    )
    compute, storage = config.precision.compute_dtype, config.precision.storage_dtype
    return MergeInputs(
        checkpoints,
        layout,
        base_dtype(layout, base) if compute == "auto" else _DTYPE_BY_NAME[compute],
        {
            name: DTYPES[base.tensors[name].code] if storage == "auto" else _DTYPE_BY_NAME[storage]
            for name in layout.shapes
        },
        _tokenizer_source(config, checkpoints),
    )


def _tokenizer_source(config: MergeConfig, checkpoints: Mapping[str, Checkpoint]) -> Path:
    """The base's directory, or the last candidate's where only that one can do the job."""
    base = checkpoints[BASE].path
    last = checkpoints[candidate_name(len(config.candidates) - 1)].path
    if config.tokenizer == "base":
        chosen = base
    elif config.tokenizer == "last_candidate":
        chosen = last
    else:
        lacks = [
            test for test in (states.has_tokenizer, states.has_chat_template) if not test(base)
        ]
        chosen = last if any(test(last) for test in lacks) else base
    if config.calibration is not None and not states.has_tokenizer(chosen):
        raise NotACheckpointError(
            "no tokenizer for the calibration samples",
            where=chosen,
            expected="tokenizer.json or tokenizer.model beside the weights",
            hint="copy the tokenizer into the base's directory, or set `tokenizer`",
        )
    return chosen
