"""Nothing that is half written can be seen under a final name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import INDEX_NAME
from arm_ray.checkpoints.inspect import inspect_checkpoint
from arm_ray.checkpoints.provenance import PROVENANCE_NAME, damage_of, files_of, read_provenance
from arm_ray.checkpoints.weight_file import read_header
from arm_ray.following.snapshots import RECORD
from arm_ray.runtime.verify import is_run, verify

# Logs, whose last line may be cut off, and whose readers pass over it.
_LOGS = ("events.jsonl", "merge.log")


def assert_nothing_torn(directory: Path, is_damaged: bool = False) -> None:
    """Read every file below a directory that has its final name, whole.

    What begins with a dot, or lies below a directory that ends in `.partial`, is nobody's yet. A
    state without `state.json` is none, but the weight files in it are whole.

    Args:
        directory: It.
        is_damaged: Whether it is a run some of whose bytes were changed: they are looked for by
            whoever knows, and here is looked at whether files can be read.
    """
    for path in _visible(directory):
        if not (is_damaged and _is_of_damage(path)):
            _check_file(path)
    if not is_damaged:
        _check_whole(directory)
    for link in directory.rglob("*"):
        if link.is_symlink() and not _is_hidden(link, directory):
            assert link.exists(), f"{link} leads nowhere"


def _is_of_damage(path: Path) -> bool:
    """Whether it is the configuration of a state, which the scenario of a repair damages."""
    return path.name == "config.json" and path.parent.parent.name == "states"


def _check_whole(directory: Path) -> None:
    """Every checksum of a run, its states and what is published."""
    if is_run(directory):
        found = verify(directory)
        assert found.is_whole, [f"{d.what}: {d.how}" for d in found.damage]
    for state in (directory / "states").glob("*"):
        if states.read_manifest(state) is not None:
            assert inspect_checkpoint(state).complete, state
    for card in directory.rglob(PROVENANCE_NAME):
        if _is_hidden(card, directory):
            continue
        # What is published beside a trainer has its evidence there alone.
        if "files" in json.loads(card.read_text(encoding="utf-8")):
            damaged = list(damage_of(card.parent, files_of(read_provenance(card.parent))))
            assert not damaged, (card, damaged)


def _visible(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not _is_hidden(path, directory) and not _is_of_no_state(path):
            yield path


def _is_hidden(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.startswith(".") or part.endswith(".partial") for part in parts)


def _is_of_no_state(path: Path) -> bool:
    """Whether a file is the companion of a state that is not finished."""
    state = path.parent
    is_unfinished = state.parent.name == "states" and states.read_manifest(state) is None
    return is_unfinished and path.suffix != ".safetensors"


def _check_file(path: Path) -> None:
    if path.name in _LOGS:
        return
    if path.suffix == ".safetensors":
        read_header(path)
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == INDEX_NAME:
            for name in set(content["weight_map"].values()):
                assert (path.parent / name).is_file(), f"{path}: no {name}"
        if path.name == RECORD:
            for name, (_, size, _) in content["files"].items():
                assert (path.parent / name).stat().st_size == size, f"{path}: {name}"
    elif path.suffix in (".yaml", ".yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            json.loads(line)
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.read_table(path)
    elif path.suffix == ".html":
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>"), path
