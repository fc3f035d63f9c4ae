"""Tensors that a model does not have, and candidates that store its own in another form.

Vision towers, projectors, layers that predict several tokens, counters of a trainer: none of them
takes part in the forward passes of a decoder on text, and none of them may be lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from arm_ray.checkpoints.huggingface import Checkpoint
from arm_ray.checkpoints.validation import check_no_adapter
from arm_ray.checkpoints.weight_file import DTYPES
from arm_ray.config import MergeConfig
from arm_ray.errors import ConfigError, MismatchError, NotACheckpointError, about
from arm_ray.merging.parts import unmatched, without_weight
from arm_ray.model.architecture import architecture_of
from arm_ray.model.checks import check_layout
from arm_ray.model.gate import try_family
from arm_ray.model.layout import DERIVED, ModelLayout
from arm_ray.model.remote_code import has_code
from arm_ray.schedule import BASE

UnknownTensors = Literal["merge", "base", "refuse"]


def settle_unknown(
    layout: ModelLayout, checkpoints: Mapping[str, Checkpoint], rule: UnknownTensors
) -> tuple[ModelLayout, list[str]]:
    """Decide what becomes of the tensors that the model does not have.

    Args:
        layout: From the base; all of its unknown tensors are merged.
        checkpoints: `base`, `candidate-1`, … -> checkpoint.
        rule: merge: a tensor that all checkpoints have, in one shape and in floating-point numbers,
            is merged, and the base's others are carried over; base: all of the base's are carried
            over; refuse: there must be none.

    Returns:
        The layout, and what to tell: a sentence each.

    Raises:
        MismatchError: There is one, and `rule` refuses it.
        NotACheckpointError: It is an adapter's.
    """
    notes, carried = [], set()
    for label, checkpoint in checkpoints.items():
        extra = sorted(
            name
            for name in checkpoint.tensors
            if name not in layout.shapes and name != layout.tied_copy and not DERIVED.search(name)
        )
        check_no_adapter(extra, checkpoint.path)
        if rule == "refuse" and (extra or layout.unknown):
            raise _refused(f"{label}: {checkpoint.path}", (extra or layout.unknown)[0], label)
        if extra:
            notes.append(
                f"{label}: {_count(extra)} that the base does not have, and no model could load: "
                f"left out, the first is {extra[0]}"
            )
    for name in layout.unknown:
        known = [checkpoint.tensors.get(name) for checkpoint in checkpoints.values()]
        same = all(
            entry is not None and entry.shape == layout.shapes[name] and entry.code in DTYPES
            for entry in known
        )
        if rule == "base" or not same:
            carried.add(name)
    merged = [name for name in layout.unknown if name not in carried]
    kind = layout.class_name or layout.config.model_type
    if merged:
        notes.append(
            f"base: {_count(merged)} that {kind} does not have: merged without activations, the "
            f"first is {merged[0]}"
        )
    if carried:
        why = "" if rule == "base" else ", and that not all checkpoints have as numbers to merge"
        notes.append(
            f"base: {_count(sorted(carried))} that {kind} does not have{why}: the base's are taken "
            f"over, the first is {min(carried)}"
        )
    return layout.carrying(carried), notes


def check_all(
    layout: ModelLayout, checkpoints: Mapping[str, Checkpoint], config: MergeConfig
) -> tuple[ModelLayout, dict[str, Checkpoint], list[str]]:
    """Check that all checkpoints are of one model, and that it can be run where it must be.

    Args:
        layout: From the base.
        checkpoints: `base`, `candidate-1`, … -> checkpoint.
        config: The configuration.

    Returns:
        The layout with what is merged, the checkpoints with the base's names, and what is done
        otherwise than one would expect, a sentence each.

    Raises:
        CheckpointError: A checkpoint is of another model, or not whole; or forward passes are
            wanted, and cannot be run.
    """
    named = {}
    for label, checkpoint in checkpoints.items():
        with about(label):
            named[label] = under_names_of(layout, checkpoint, label)
    layout, notes = settle_unknown(layout, named, config.unknown_tensors)
    for label, checkpoint in named.items():
        with about(label):
            check_layout(layout, checkpoint, label)
    problems = unmatched(config.method.by_part, list(layout.shapes))
    problems += without_weight(config.method, {n: layout.depth_of(n) for n in layout.shapes})
    if problems:
        raise ConfigError("\n".join(["the values by part do not fit the model", *problems]))
    if config.runs_forward:
        with about(BASE):
            layout, unseen = _runnable(layout, named[BASE])
        notes += unseen
    return layout, named, notes


def _runnable(layout: ModelLayout, base: Checkpoint) -> tuple[ModelLayout, list[str]]:
    """The layout of a model whose family was tried, and what is not rotated."""
    why, unseen = layout.no_forward, frozenset[str]()
    if why is None:
        tried = try_family(layout.config, layout.class_name)
        why, unseen = tried.why_not, tried.unseen
        layout = layout.with_transposed(tried.transposed)
    if why is not None:
        raise NotACheckpointError(
            "activations cannot be taken of the models of this family",
            where=base.config_directory / "config.json",
            got=why,
            expected="a decoder that gives the same bits run group by group as run whole",
            hint=_own_code_hint(base)
            + "merge without calibration: with method.operator task_arithmetic, ties, slerp or "
            "another that needs no activations, and without the section calibration",
        )
    names = layout.rotated_as(unseen)
    if not names:
        return layout, []
    note = (
        f"{len(names)} weights are merged without rotation, because the family's code takes them "
        f"without calling their modules: the first is {min(names)}"
    )
    return replace(layout, rotated=layout.rotated - names), [note]


def _own_code_hint(base: Checkpoint) -> str:
    """What to do where the family's code is in the checkpoint."""
    if not has_code(base.config):
        return ""
    family = base.config.get("model_type")
    return f"if you trust the code in the checkpoint, set trust_remote_code: [{family}]; or "


def _count(names: list[str]) -> str:
    return "a tensor" if len(names) == 1 else f"{len(names)} tensors"


def _refused(where: str, name: str, label: str) -> MismatchError:
    return MismatchError(
        "a tensor is there that the model does not have",
        where=where,
        got=name,
        expected="the model's tensors alone (unknown_tensors: refuse)",
        hint="set unknown_tensors to merge, or to base, which takes the base's over",
        subject=label,
    )


def under_names_of(layout: ModelLayout, checkpoint: Checkpoint, label: str) -> Checkpoint:
    """A checkpoint whose tensors are called as the base's are, where its files call them otherwise.

    Versions of transformers write the same model under other names: `model.layers.0…` and
    `model.language_model.layers.0…`.

    Args:
        layout: From the base.
        checkpoint: A candidate.
        label: How the configuration calls it, for messages.

    Raises:
        MismatchError: What is one tensor in one of them is several in the other.
    """
    missing = layout.shapes.keys() - checkpoint.tensors.keys() - set(layout.unknown)
    if not missing or layout.no_forward is not None:
        return checkpoint
    architecture = architecture_of(layout.config, layout.class_name)
    own = {n: w for w in architecture.weights(checkpoint.tensors)[0] for n in w.names}
    names: dict[str, str] = {}
    for weight in architecture.weights(layout.shapes)[0]:
        theirs = own.get(weight.names[0])
        if theirs is None or theirs.stored == weight.stored:
            continue
        if theirs.make is not None or weight.make is not None:
            raise MismatchError(
                f"{weight.names[0]} is stored in another form than in the base",
                where=f"{label}: {checkpoint.path}",
                got=_form(theirs.stored),
                expected=_form(weight.stored),
                hint="load and save one of them with the version of transformers that wrote the "
                "other",
                subject=label,
            )
        names[weight.stored[0]] = theirs.stored[0]
    return checkpoint.under(names) if names else checkpoint


def _form(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors, the first {names[0]}"
