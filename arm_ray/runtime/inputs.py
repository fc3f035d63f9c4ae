"""Everything that is checked about a merge's checkpoints before anything long starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arm_ray.checkpoints import states
from arm_ray.checkpoints.formats import open_given
from arm_ray.checkpoints.fp8 import Fp8Storage
from arm_ray.checkpoints.huggingface import Checkpoint, open_tensors, resolve_path
from arm_ray.checkpoints.trainer_names import check_conventions
from arm_ray.checkpoints.validation import check_tied_head, check_zero_padding
from arm_ray.checkpoints.vocabulary import GrownBase, with_grown_base
from arm_ray.checkpoints.weight_file import STORED_DTYPES, TensorSpec
from arm_ray.config import MergeConfig
from arm_ray.errors import ArmRayError, ConfigError, NotACheckpointError, about
from arm_ray.model.checks import (
    base_dtype,
    check_tensors,
    derived_tensors,
    fp8_storage,
    layout_of,
    main_dtype,
    storage_dtypes,
)
from arm_ray.model.layout import ModelLayout
from arm_ray.model.unknown import check_all
from arm_ray.schedule import BASE, INITIAL, candidate_name

_DTYPE_BY_NAME = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class MergeInputs:
    """The checkpoints of a merge, checked, and what follows from them. Holds no weights.

    Attributes:
        checkpoints: `base`, `candidate-1`, …, `initial` -> checkpoint.
        layout: The model, from the base.
        compute_dtype: Of the forward pass; where `auto` was asked for, the base's, which is what is
            taken if the devices multiply it by themselves.
        storage_dtypes: Name -> dtype in the final model.
        tokenizer: Directory of the tokenizer, chat template and generation settings.
        second_moments: Name of a candidate -> its second moments; empty unless configured.
        unknown: What becomes of tensors that the model does not have: a sentence each.
        carried: The base's that are taken over; None: none.
        fp8: How weights of the final model are stored in FP8; None: none are.
    """

    checkpoints: Mapping[str, Checkpoint]
    layout: ModelLayout
    compute_dtype: torch.dtype
    storage_dtypes: Mapping[str, torch.dtype]
    tokenizer: Path
    second_moments: Mapping[str, Checkpoint]
    unknown: tuple[str, ...] = ()
    carried: states.Carried | None = None
    fp8: Fp8Storage | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """What is read -> cheap digest, to notice on resumption that an input has changed."""
        moments = {_moments_label(name): given for name, given in self.second_moments.items()}
        return {name: given.fingerprint for name, given in {**self.checkpoints, **moments}.items()}

    @property
    def notes(self) -> list[str]:
        """What is read, or written, otherwise than it lies there: a sentence each."""
        found = [f"{n}: {c.renamed}" for n, c in self.checkpoints.items() if c.renamed is not None]
        for label, checkpoint in self.checkpoints.items():
            derived = derived_tensors(checkpoint)
            if derived:
                found.append(
                    f"{label}: {len(derived)} buffer(s) follow from the configuration and are left "
                    f"out, the first is {derived[0]}"
                )
            if checkpoint.left_out:
                found.append(
                    f"{label}: {len(checkpoint.left_out)} entries of its files are not the "
                    f"model's, and are left out: the first is {checkpoint.left_out[0]}"
                )
        found += self.unknown
        base, known = self.checkpoints[BASE], self._architectures
        if isinstance(base, GrownBase):
            table = self.layout.embedding
            before, after = (c.tensors[table].shape[0] for c in (base.base, base))
            found.append(
                f"the candidates have {after} rows of the vocabulary, the base {before}: the rows "
                "in common are merged, the others are the candidates' mean (vocabulary: common)"
            )
        stored = base.config.get("architectures")
        if stored != known and known:
            given = f"names {stored}" if stored else "names no class"
            found.append(
                f"base: config.json {given}, which nothing can load; the merged model is written "
                f"as {known[0]}"
            )
        return found

    @property
    def _architectures(self) -> list[str]:
        """The class of the merged model: the base's, or its family's where that is none."""
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        stored = self.checkpoints[BASE].config.get("architectures")
        names = stored if isinstance(stored, list) else []
        if names and all(isinstance(n, str) and hasattr(transformers, n) for n in names):
            return names
        family = str(self.layout.config.model_type)
        if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            # The class is in the checkpoint's own code, or of a newer transformers.
            return names
        return [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]

    @property
    def final_config(self) -> dict[str, Any]:
        """Content of `config.json` of the final model."""
        if self.fp8 is None:
            dtypes = self.storage_dtypes
            return self.model_config(main_dtype(self.layout, dtypes.__getitem__))
        quantised = {"quantization_config": dict(self.fp8.base.settings)}
        return {**self.model_config(torch.bfloat16), **quantised}

    def model_config(self, dtype: torch.dtype) -> dict[str, Any]:
        """Content of `config.json` for weights in `dtype`; everything else as in the base."""
        config: dict[str, Any] = copy.deepcopy(dict(self.checkpoints[BASE].config))
        name = str(dtype).removeprefix("torch.")
        # transformers 5 writes `dtype`; version 4 wrote, and still reads, `torch_dtype`.
        key = "dtype" if "dtype" in config else "torch_dtype"
        known = self._architectures
        return {**config, key: name, **({"architectures": known} if known else {})}


def open_inputs(config: MergeConfig) -> MergeInputs:
    """Open the base and the candidates, and check that they can be merged.

    Reads configurations, headers, trainers' tables, and a few kilobytes of each weight file.

    Args:
        config: Of the merge.

    Raises:
        CheckpointError: Any of its kinds; says which checkpoint, and what about it.
    """
    sources = {BASE: config.base}
    sources |= {candidate_name(i): given for i, given in enumerate(config.candidates)}
    if config.initial_state is not None:
        sources[INITIAL] = config.initial_state
    checkpoints: dict[str, Checkpoint] = {}
    for label, given in sources.items():
        try:
            opened = open_given(
                given,
                checkpoints.get(BASE),
                config.precision.masters,
                config.runtime.scratch_path,
            )
            checkpoints[label] = opened
        except ArmRayError as error:
            raise error.of(label) from None
    base, per_group = checkpoints[BASE], config.runtime.layers_per_group
    with about(BASE):
        layout = layout_of(base, per_group, config.trust_remote_code)
        if config.vocabulary == "common":
            checkpoints = with_grown_base(checkpoints, layout.embedding, layout.token_rows)
        if checkpoints[BASE] is not base:
            base = checkpoints[BASE]
            layout = layout_of(base, per_group, config.trust_remote_code)
    layout, checkpoints, unknown = check_all(layout, checkpoints, config)
    for label, checkpoint in checkpoints.items():
        with about(label):
            where = f"{label}: {checkpoint.path}"
            if label != BASE:
                check_conventions(checkpoint, checkpoints[BASE], where)
            if layout.tied_copy is not None:
                check_tied_head(checkpoint, where, layout.embedding, layout.tied_copy)
    check_zero_padding(checkpoints)
    compute, storage = config.precision.compute_dtype, config.precision.storage_dtype
    return MergeInputs(
        checkpoints,
        layout,
        base_dtype(layout, base) if compute == "auto" else _DTYPE_BY_NAME[compute],
        storage_dtypes(layout, base, storage),
        _tokenizer_source(config, checkpoints),
        _open_second_moments(config, layout),
        tuple(unknown),
        _carried(layout, base),
        fp8_storage(base, storage),
    )


def _carried(layout: ModelLayout, base: Checkpoint) -> states.Carried | None:
    if not layout.carried:
        return None
    codes = {name: base.tensors[name].code for name in layout.carried}
    for name, code in codes.items():
        if code not in STORED_DTYPES:
            raise NotACheckpointError(
                f"the tensor {name} is stored in a number format that cannot be copied",
                where=base.tensors[name].file,
                got=code,
                expected=", ".join(STORED_DTYPES),
                hint="convert or remove this tensor of the base",
                subject=BASE,
            )
    return states.Carried(
        base,
        tuple(
            TensorSpec(name, STORED_DTYPES[codes[name]], shape)
            for name, shape in layout.carried.items()
        ),
    )


def _moments_label(candidate: str) -> str:
    return f"second moments of {candidate}"


def _open_second_moments(config: MergeConfig, layout: ModelLayout) -> dict[str, Checkpoint]:
    """Open the directories of `method.ota.second_moments`, which hold a tensor for each weight."""
    given = config.method.ota.second_moments
    if given is None:
        return {}
    if len(given) != len(config.candidates):
        raise ConfigError(
            "there is not one directory of second moments for each candidate",
            where="method.ota.second_moments",
            got=f"{len(given)} directories",
            expected=f"{len(config.candidates)}, in the order of the candidates",
        )
    opened: dict[str, Checkpoint] = {}
    for index, path in enumerate(given):
        candidate = candidate_name(index)
        label = _moments_label(candidate)
        try:
            opened[candidate] = open_tensors(resolve_path(path))
        except ArmRayError as error:
            raise error.of(label, candidate) from None
        with about(candidate):
            check_tensors(
                layout,
                opened[candidate],
                f"{label}: {opened[candidate].path}",
                hint="save exp_avg_sq of every weight under its name; zeros for one that was "
                "frozen",
            )
    return opened


def _tokenizer_source(config: MergeConfig, checkpoints: Mapping[str, Checkpoint]) -> Path:
    """The base's directory, or the last candidate's where only that one can do the job."""
    base = companions_of(checkpoints[BASE])
    last = companions_of(checkpoints[candidate_name(len(config.candidates) - 1)])
    if config.tokenizer == "base":
        chosen = base
    elif config.tokenizer == "last_candidate":
        chosen = last
    else:
        lacks = [
            test for test in (states.has_tokenizer, states.has_chat_template) if not test(base)
        ]
        # That of a vocabulary that has grown knows the new tokens.
        has_grown = isinstance(checkpoints[BASE], GrownBase) and states.has_tokenizer(last)
        chosen = last if has_grown or any(test(last) for test in lacks) else base
    if config.calibration is not None and not states.has_tokenizer(chosen):
        raise NotACheckpointError(
            "no tokenizer for the calibration samples",
            where=chosen,
            expected="tokenizer.json or tokenizer.model beside the weights",
            hint="copy the tokenizer into the base's directory, or set `tokenizer`",
        )
    return chosen


def companions_of(checkpoint: Checkpoint) -> Path:
    """The directory of a checkpoint's tokenizer: its own, or that of its configuration."""
    own, described = checkpoint.path, checkpoint.config_directory
    return described if states.has_tokenizer(described) and not states.has_tokenizer(own) else own
