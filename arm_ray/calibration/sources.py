"""What a calibration path points at: files, a data set on disk, or one on the Hugging Face hub."""

from __future__ import annotations

import difflib
import glob
import os
import re
from dataclasses import dataclass
from typing import Any

from arm_ray.calibration.files import FILE_SUFFIXES
from arm_ray.errors import CalibrationError
from arm_ray.storage.store import Store, find_url, open_url
from arm_ray.storage.urls import is_url, parse_url, plain_path

_SUFFIXES_TEXT = ", ".join(FILE_SUFFIXES)
_SPLIT_FILE = re.compile(r"(train|validation|valid|val|dev|eval|test)[-_.]")
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*(/\w[\w.-]*)?)(/(?P<config>\w[\w.-]*))?(:(?P<split>.+))?")


@dataclass(frozen=True)
class FileSource:
    """Files to read, in order.

    Attributes:
        paths: Absolute paths or URLs, each with one of ``FILE_SUFFIXES``.
    """

    paths: tuple[str, ...]


@dataclass(frozen=True)
class DatasetSource:
    """A data set that the ``datasets`` package loads.

    Attributes:
        name: A directory written by ``save_to_disk``, or an id on the hub.
        on_disk: Which of the two.
        config: The hub data set's configuration, if one was named.
        split: The split, if one was named.
    """

    name: str
    on_disk: bool
    config: str | None = None
    split: str | None = None


def find_source(path: str, split: str | None = None) -> FileSource | DatasetSource:
    """Tells what a calibration path points at. What exists locally goes before the hub.

    Args:
        path: The path.
        split: Which part of a data set, or of a directory of files.

    Raises:
        CalibrationError: If nothing is there, or nothing that can be read.
        StorageError: If a URL cannot be read.
    """
    path = plain_path(path)
    local = os.path.abspath(os.path.expanduser(path))
    if not is_url(path) and os.path.isdir(local):
        return _in_directory(local, split)
    base, _, suffix = local.rpartition(":")
    if suffix and not is_url(path) and not os.path.exists(local) and os.path.isdir(base):
        return _in_directory(base, _one_of(path, suffix, split))
    match = _HUB_ID.fullmatch(path)
    is_hub = match is not None and not path.endswith(FILE_SUFFIXES)
    if split is not None and (is_url(path) or os.path.exists(local) or not is_hub):
        raise CalibrationError(
            "A split is named of what has none.",
            where=path,
            got=f"split {split!r}",
            expected="a data set, or a directory with a directory or files for each split",
            hint="Leave split out, or name the directory.",
        )
    if is_url(path):
        return _at_url(path)
    if os.path.exists(local):
        if not local.endswith(FILE_SUFFIXES):
            raise _unknown_file(path)
        return FileSource((local,))
    if glob.has_magic(path) and match is None:
        return _by_pattern(path, local)
    if match is None or not is_hub:
        raise _not_there(path, local)
    chosen = _one_of(path, match["split"], split) if match["split"] else split
    return DatasetSource(match["name"], on_disk=False, config=match["config"], split=chosen)


def _one_of(path: str, suffix: str, split: str | None) -> str:
    """The split that a path ends in, where no other one is named beside it."""
    if split not in (None, suffix):
        raise CalibrationError(
            "Two different splits are named.",
            where=path,
            got=f"{suffix!r} in the path, and split {split!r}",
            hint="Leave one of them out.",
        )
    return suffix


def _at_url(given: str) -> FileSource:
    """The file of a URL, or the files of the directory there."""
    url = parse_url(given)
    if url.name.endswith(FILE_SUFFIXES):
        if find_url(given) is None:
            # Told here, and not by the tasks of a run.
            open_url(given).close()
        return FileSource((str(url),))
    store = Store(url)
    files = store.files()
    names = [n for n in files if n.endswith(FILE_SUFFIXES) and not n.startswith((".", "_"))]
    if not names or {"dataset_dict.json", "dataset_info.json"} & files.keys():
        raise CalibrationError(
            "The URL holds no file that can be read.",
            where=url,
            got=", ".join(list(files)[:10]) or "nothing",
            expected=f"a file, or a directory of files, ending in {_SUFFIXES_TEXT}",
            hint="Name the file or its directory; patterns, and what datasets.save_to_disk writes, "
            "are read from disks only.",
        )
    return FileSource(tuple(str(url / name) for name in names))


def _in_directory(directory: str, split: str | None) -> FileSource | DatasetSource:
    names = sorted(os.listdir(directory))
    if "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names):
        return DatasetSource(directory, on_disk=True, split=split)
    paths = _data_files(directory)
    if not paths and os.path.isdir(os.path.join(directory, "data")):
        # As the repositories of data sets are laid out.
        return _in_directory(os.path.join(directory, "data"), split)
    splits = _splits_of(directory, paths)
    if split is None and paths and len(splits) < 2:
        return FileSource(paths)
    if split is None and len(splits) == 1:
        [only] = splits.values()
        return FileSource(only)
    if split is not None and split in splits:
        return FileSource(splits[split])
    if splits or split is not None:
        near = difflib.get_close_matches(split or "", splits, n=1) or [*splits, "train"]
        raise CalibrationError(
            "The data are in several splits, of which one has to be chosen."
            if split is None
            else f"The directory has no split {split!r}.",
            where=directory,
            got=f"splits {', '.join(map(repr, splits)) or 'none'}",
            expected="the name of one of them in the key split, or after the path, as in DIR:name",
            hint=f"Did you mean split: {near[0]}?" if splits else "Leave split out.",
        )
    raise CalibrationError(
        "The calibration directory holds no file that can be read.",
        where=directory,
        got=", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "an empty directory",
        expected=f"files ending in {_SUFFIXES_TEXT}, or what datasets.save_to_disk writes",
        hint="Name the directory that holds the files itself; those inside it are not searched.",
    )


def _data_files(directory: str) -> tuple[str, ...]:
    """The files of a directory that can be read."""
    return tuple(
        os.path.join(directory, name)
        for name in sorted(os.listdir(directory))
        if name.endswith(FILE_SUFFIXES)
        and not name.startswith((".", "_"))
        and os.path.isfile(os.path.join(directory, name))
    )


def _splits_of(directory: str, paths: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Split -> its files: a directory for each, or files that begin with a usual name of one."""
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        match = _SPLIT_FILE.match(os.path.basename(path))
        if match:
            found[match[1]] = (*found.get(match[1], ()), path)
    for name in () if paths else sorted(os.listdir(directory)):
        inner = os.path.join(directory, name)
        if not name.startswith((".", "_")) and os.path.isdir(inner):
            files = _data_files(inner)
            if files:
                found[name] = files
    return found


def _by_pattern(path: str, local: str) -> FileSource:
    paths = tuple(sorted(name for name in glob.glob(local, recursive=True) if os.path.isfile(name)))
    if not paths:
        raise CalibrationError(
            "The calibration pattern matches no file.",
            where=path,
            expected=f"files ending in {_SUFFIXES_TEXT}",
            hint="Check the pattern.",
        )
    for name in paths:
        if not name.endswith(FILE_SUFFIXES):
            raise _unknown_file(name)
    return FileSource(paths)


def _unknown_file(path: str) -> CalibrationError:
    return CalibrationError(
        "The calibration file is of an unknown kind.",
        where=path,
        got=f"a name ending in {os.path.splitext(path)[1]!r}",
        expected=f"a name ending in {_SUFFIXES_TEXT}",
        hint="Convert the file, or rename it if it is JSON Lines under another name.",
    )


def _not_there(path: str, local: str) -> CalibrationError:
    try:
        others = os.listdir(os.path.dirname(local))
    except OSError:
        others = []
    near = difflib.get_close_matches(os.path.basename(local), others, n=1)
    return CalibrationError(
        "The calibration data are not there.",
        where=path,
        got="no such file or directory",
        expected="a file, a directory, or a Hugging Face data set id",
        hint=f"Did you mean {near[0]!r}?" if near else "Check the path.",
    )


def load_dataset(source: DatasetSource) -> Any:
    """Loads a data set with the ``datasets`` package, memory-mapped, on this machine.

    Without a split named, the only split or ``train`` is taken.

    Returns:
        A ``datasets.Dataset``.

    Raises:
        CalibrationError: If the package is missing, the data set cannot be loaded (for
            instance offline), or it has no such split.
    """
    datasets = _datasets_package(source)
    if source.name == "pandas":
        # The builder of this name reads pickles in some versions; no data set has the name.
        raise _not_loaded(source, "the name of a reader of pickles")
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if source.on_disk:
            loaded = datasets.load_from_disk(source.name)
        else:
            # Slices such as train[:100] are for the package to cut. Code from the hub is
            # never run.
            loaded = datasets.load_dataset(
                source.name, source.config, split=source.split, trust_remote_code=False
            )
    except Exception as error:  # network, hub, format: it raises dozens of types
        text = str(error).strip() or "no message"
        raise _not_loaded(source, f"{type(error).__name__}: {text.splitlines()[0]}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    return _one_split(source, loaded)


def _datasets_package(source: DatasetSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "The calibration data need the package 'datasets', which is not installed.",
            where=source.name,
            got=str(error),
            expected="the package datasets, or a path to JSON Lines or Parquet files",
            hint="pip install 'arm-ray[datasets]'. If this was meant as a path: nothing is there.",
        ) from error
    return datasets


def _one_split(source: DatasetSource, loaded: Any) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    names = list(loaded)
    wanted = source.split or (names[0] if len(names) == 1 else "train")
    if wanted in loaded:
        return loaded[wanted]
    near = difflib.get_close_matches(wanted, names, n=1)
    raise CalibrationError(
        f"The calibration data set has no split {wanted!r}.",
        where=source.name,
        got=f"splits {', '.join(map(repr, names)) or 'none'}",
        expected="the name of a split after the data set's name, as in name:split",
        hint=f"Did you mean {source.name}:{(near or names or ['split'])[0]}?",
    )


def _not_loaded(source: DatasetSource, got: str) -> CalibrationError:
    if source.on_disk:
        return CalibrationError(
            "The calibration data set on disk cannot be loaded.",
            where=source.name,
            got=got,
            expected="a directory written by datasets.save_to_disk",
            hint="Write it again, or give JSON Lines or Parquet files.",
        )
    parts = (source.config and f"config {source.config}", source.split and f"split {source.split}")
    return CalibrationError(
        f"The calibration data {source.name!r} are no local path, and no data set of that name "
        "could be loaded from the Hugging Face hub.",
        where=", ".join([source.name, *(part for part in parts if part)]),
        got=got,
        expected="a path that exists, or a data set id the hub or the local cache knows",
        hint="Check the path or the id. Without network, download the data set first and give "
        "the path of its files.",
    )
