"""Merged states on disk, and the final model made from the last of them.

A state is `states/NNNN/` with one weight file for each layer group, an index that makes the
directory a model that other programs load as it is, and, written last, `state.json`. A state
without `state.json` is unfinished and is thrown away when a run resumes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from arm_ray.checkpoints.huggingface import INDEX_NAME, SINGLE_NAME, Checkpoint
from arm_ray.checkpoints.weight_file import (
    TensorSpec,
    read_tensors,
    write_json,
    write_weight_file,
)
from arm_ray.errors import RunDirectoryError
from arm_ray.storage.atomic import copy_file, copy_tree
from arm_ray.storage.regular import json_in

MANIFEST_NAME = "state.json"
CARRIED_NAME = "carried.safetensors"
# Everything beside the weights that loading a model or talking to it needs.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Carried:
    """Tensors of the base that are not merged, but are in every state and in the final model.

    Attributes:
        base: Where they are read from.
        specs: Their names, dtypes and shapes.
    """

    base: Checkpoint
    specs: tuple[TensorSpec, ...]

    def write(self, file: Path) -> int:
        """Write a weight file of them; returns bytes of data."""
        tensors = (self.base.read([spec.name])[spec.name] for spec in self.specs)
        write_weight_file(file, self.specs, tensors)
        return sum(spec.num_bytes for spec in self.specs)


@dataclass(frozen=True)
class StateManifest:
    """What `state.json` says: the state is complete, and what it was made of.

    `coefficients` are of a step that was chosen: for each block of layers, what each contributor's
    task vector was multiplied by (`λ f_i / m`).
    """

    iteration: int
    regime: str
    reference: str
    contributors: tuple[str, ...]
    weight_cosine: float | None
    task_vector_cosine: float | None
    coefficients: tuple[tuple[float, ...], ...] = ()


def state_directory(run: Path, iteration: int) -> Path:
    """`states/NNNN` of a run."""
    return run / "states" / f"{iteration:04d}"


def group_file(directory: Path, group: int) -> Path:
    """The weight file of one layer group of a state."""
    return directory / f"group-{group:05d}.safetensors"


def read_group(directory: Path, group: int, names: Iterable[str]) -> dict[str, Tensor]:
    """Read one layer group of a state into host memory."""
    return read_tensors(group_file(directory, group), names)


def publish_state(
    directory: Path,
    manifest: StateManifest,
    group_tensors: Sequence[Sequence[str]],
    num_bytes: int,
    config: Mapping[str, object],
    companions: Path,
    carried: Carried | None = None,
) -> None:
    """Write a state's index, configuration and tokenizer, and then its manifest.

    Args:
        directory: The state, with all its group files in place.
        manifest: What `state.json` gets.
        group_tensors: Names of the tensors of each group, in order.
        num_bytes: Size of all tensors.
        config: Content of `config.json`.
        companions: Directory that the tokenizer and generation settings are copied from.
        carried: The base's tensors that are not merged.

    Raises:
        RunDirectoryError: Not all weight files are there.
    """
    weight_map = {
        name: group_file(directory, index).name
        for index, names in enumerate(group_tensors)
        for name in names
    }
    if carried is not None:
        num_bytes += carried.write(directory / CARRIED_NAME)
        weight_map |= dict.fromkeys((spec.name for spec in carried.specs), CARRIED_NAME)
    for stale in directory.glob(".*.partial"):
        stale.unlink(missing_ok=True)
    write_companions(directory, config, companions)
    write_json(
        directory / INDEX_NAME,
        {"metadata": {"total_size": num_bytes}, "weight_map": weight_map},
    )
    for name in dict.fromkeys(weight_map.values()):
        # Somebody may have removed the directory meanwhile, which was made again for the rest.
        if not (directory / name).is_file():
            raise RunDirectoryError(
                "a file of a state was removed while it was made",
                where=directory / name,
                expected="a run directory that nobody else changes",
                hint="run the same command again to go on after the last complete iteration",
            )
    write_json(directory / MANIFEST_NAME, asdict(manifest))


def publish_manifest(directory: Path, manifest: StateManifest) -> None:
    """Write down that a state is complete whose weights lie elsewhere, in parts."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / MANIFEST_NAME, asdict(manifest))


def read_manifest(directory: Path) -> StateManifest | None:
    """The manifest of a state, or None if the state is not complete."""
    try:
        content = json_in(directory / MANIFEST_NAME)
        content["contributors"] = tuple(content["contributors"])
        content["coefficients"] = tuple(map(tuple, content.get("coefficients", ())))
        return StateManifest(**content)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_published(run: Path, iteration: int) -> bool:
    """Whether a state is complete, here or in parts on the nodes."""
    return (state_directory(run, iteration) / MANIFEST_NAME).is_file()


def state_directories(run: Path) -> dict[int, Path]:
    """Iteration -> directory, of all states of a run, complete or not; other names are not ours."""
    root = run / "states"
    found = root.iterdir() if root.is_dir() else ()
    numbered = {int(p.name): p for p in found if re.fullmatch(r"[0-9]{4,}", p.name) and p.is_dir()}
    return dict(sorted(numbered.items()))


def finished_states(run: Path) -> dict[int, StateManifest]:
    """Iteration -> manifest of each complete state of a run."""
    manifests = {t: read_manifest(path) for t, path in state_directories(run).items()}
    return {t: manifest for t, manifest in manifests.items() if manifest is not None}


def discard_unfinished_states(run: Path) -> list[str]:
    """Remove states that a stopped run left half-written; returns their names."""
    removed = []
    for directory in state_directories(run).values():
        if read_manifest(directory) is None:
            shutil.rmtree(directory)
            removed.append(directory.name)
    return removed


def discard_state(run: Path, iteration: int) -> None:
    """Remove one state, its manifest first, so that it is never taken for a whole one."""
    directory = state_directory(run, iteration)
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class ExportFile:
    """One weight file of the final model.

    Attributes:
        name: Its file name.
        specs: The tensors in it, in the dtype they are stored in.
        is_carried: Whether these are the base's, and not merged.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    is_carried: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(spec.num_bytes for spec in self.specs)


def plan_export(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    max_bytes: int,
    carried: Sequence[TensorSpec] = (),
) -> list[ExportFile]:
    """Spread the tensors of the final model over weight files of at most `max_bytes`.

    Args:
        shapes: Name -> shape of what is merged.
        dtypes: Name -> dtype that it is stored in.
        max_bytes: Of a file; a larger tensor has one to itself.
        carried: The base's tensors that are not merged, which have a file of their own, the last.
    """
    files: list[list[TensorSpec]] = [[]]
    size = 0
    for name, shape in shapes.items():
        spec = TensorSpec(name, dtypes[name], shape)
        if files[-1] and size + spec.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(spec)
        size += spec.num_bytes
    num_merged = len(files)
    if carried:
        files.append(list(carried))
    if len(files) == 1:
        return [ExportFile(SINGLE_NAME, tuple(files[0]))]
    return [
        ExportFile(
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors", tuple(specs), i >= num_merged
        )
        for i, specs in enumerate(files)
    ]


def write_export_file(
    directory: Path, export: ExportFile, state: Path, group_of: Mapping[str, int]
) -> int:
    """Write one weight file of the final model from a state, tensor by tensor; returns bytes."""
    tensors = (
        read_tensors(group_file(state, group_of[spec.name]), [spec.name])[spec.name]
        for spec in export.specs
    )
    return write_weight_file(directory / export.name, export.specs, tensors)


def write_export_index(directory: Path, files: Sequence[ExportFile]) -> None:
    """Write the index, which a model of a single weight file does not have."""
    if len(files) > 1:
        weight_map = {spec.name: file.name for file in files for spec in file.specs}
        total = sum(file.num_bytes for file in files)
        write_json(
            directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def write_companions(
    directory: Path, config: Mapping[str, object], source: Path, code: Path | None = None
) -> None:
    """Write `config.json`, and copy the tokenizer and generation settings.

    Args:
        directory: Where to.
        config: Content of `config.json`.
        source: Where the tokenizer is.
        code: Where the model's own code is, of a family that has some; None: there, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    copy_companions(directory, source)
    if "auto_map" in config:
        # Code of the model's own, which is copied and never run.
        for file in (code or source).glob("*.py"):
            copy_file(file, directory / file.name)


def copy_companions(directory: Path, source: Path) -> None:
    """Copy the tokenizer, chat template and generation settings from `source`."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            copy_file(source / name, directory / name)
    # Tokenizers with several chat templates keep them in a folder.
    if (source / "additional_chat_templates").is_dir():
        name = "additional_chat_templates"
        copy_tree(source / name, directory / name)


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint directory carries a tokenizer."""
    return any((directory / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))


def has_chat_template(directory: Path) -> bool:
    """Whether a checkpoint's tokenizer carries a chat template."""
    if any((directory / n).is_file() for n in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        content = json_in(directory / "tokenizer_config.json")
    except (OSError, ValueError):
        return False
    return bool(content.get("chat_template"))


def total_bytes(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
    """Size of a model of these shapes."""
    return sum(prod(shape) for shape in shapes.values()) * itemsize
