"""What a merged model was made of, and digests of every byte of it: `arm_ray.json` beside it.

A weight file is covered by the digest of its header and one for each tensor, so that damage is told
by the tensor. Every other file has one digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arm_ray.checkpoints.huggingface import read_json
from arm_ray.checkpoints.weight_file import read_header
from arm_ray.errors import ArmRayError, CorruptCheckpointError
from arm_ray.storage.atomic import write_json
from arm_ray.storage.regular import open_regular

PROVENANCE_NAME = "arm_ray.json"
FORMAT = 1
_CHUNK = 1 << 23
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class FileDigests:
    """Of one file, hexadecimal SHA-256.

    Attributes:
        num_bytes: Its size.
        digest: Of the whole file; of a weight file, of its header.
        tensors: Name of a tensor in it -> digest of its data.
    """

    num_bytes: int
    digest: str
    tensors: Mapping[str, str]


def digests_of(directory: Path) -> dict[str, FileDigests]:
    """Read every byte of a model, with all cores: path in the directory -> digests.

    Raises:
        CorruptCheckpointError: A weight file's header cannot be read.
        OSError: A file cannot be.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return {name: _digests(directory / name, pool) for name in _names(directory)}


def _names(directory: Path) -> list[str]:
    found = (p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.is_file())
    return [
        path.as_posix()
        for path in found
        if path.name != PROVENANCE_NAME and not any(part.startswith(".") for part in path.parts)
    ]


def _digests(path: Path, pool: ThreadPoolExecutor) -> FileDigests:
    size = path.stat().st_size
    entries = read_header(path) if path.suffix == _WEIGHTS else {}
    first = min((entry.begin for entry in entries.values()), default=size)
    stretches = [(path, 0, first), *((path, e.begin, e.end) for e in entries.values())]
    whole, *rest = pool.map(_digest, stretches)
    return FileDigests(size, whole, dict(zip(entries, rest, strict=True)))


def _digest(stretch: tuple[Path, int, int]) -> str:
    path, begin, end = stretch
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(begin)
        left = end - begin
        while left > 0 and (chunk := file.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def write_provenance(directory: Path, made: Mapping[str, Any]) -> None:
    """Write `arm_ray.json` of a model whose other files are all written.

    Args:
        directory: Of the model.
        made: What it was made of, and how.
    """
    files = {name: asdict(found) for name, found in digests_of(directory).items()}
    write_json(directory / PROVENANCE_NAME, {"format": FORMAT, **made, "files": files})


def read_provenance(directory: Path) -> dict[str, Any]:
    """What `arm_ray.json` of a model says.

    Raises:
        CorruptCheckpointError: It is not there, not whole, or of a newer arm_ray.
    """
    file = directory / PROVENANCE_NAME
    hint = "a model that arm_ray has made has it, since 0.1.0; copy it along with the weights"
    try:
        content: dict[str, Any] = dict(read_json(file))
        files_of(content)
        version = content["format"]
    except (ArmRayError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpointError(
            "nothing says what the model was made of",
            where=file,
            got=_said(error),
            expected="what arm_ray writes beside a model",
            hint=hint,
        ) from None
    if version != FORMAT:
        raise CorruptCheckpointError(
            "what the model was made of is written in another format",
            where=file,
            got=f"format {version!r}",
            expected=f"format {FORMAT}",
            hint="use the version of arm_ray that the file names",
        )
    return content


def _said(error: Exception) -> str:
    if isinstance(error, ArmRayError):
        return f"{error.what}: {error.got}" if error.got else error.what
    if isinstance(error, KeyError):
        return f"no {error}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def files_of(content: Mapping[str, Any]) -> dict[str, FileDigests]:
    """The digests in what `read_provenance` gives."""
    files = content.get("files")
    if not isinstance(files, dict):
        raise ValueError("files is no object")
    return {name: _file_digests(name, found) for name, found in files.items()}


def _file_digests(name: str, found: Any) -> FileDigests:
    """What a manifest says of a file.

    Raises:
        ValueError: It is not what arm_ray writes.
    """
    if isinstance(found, dict) and found.keys() == {"num_bytes", "digest", "tensors"}:
        size, digest, tensors = found["num_bytes"], found["digest"], found["tensors"]
        has_tensors = isinstance(tensors, dict) and all(map(_is_text, tensors.values()))
        if type(size) is int and size >= 0 and _is_text(digest) and has_tensors:
            return FileDigests(size, digest, tensors)
    raise ValueError(f"what it says of {name[:100]!r} is no size with digests")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True)
class Damage:
    """What of a model is not as it was written.

    Attributes:
        what: A file's path in the directory, or a tensor's name.
        how: In words.
        is_text: Whether people may change it, such as the model card: the model stays what it was.
    """

    what: str
    how: str
    is_text: bool = False


_TEXTS = {"README.md"}


def damage_of(directory: Path, expected: Mapping[str, FileDigests]) -> Iterator[Damage]:
    """Compare every byte of a model with what was written.

    Args:
        directory: Of the model.
        expected: What its `arm_ray.json` says.

    Yields:
        What is missing, changed, or was added.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, wanted in expected.items():
            path, is_text = directory / name, name in _TEXTS
            if Path(name).is_absolute() or ".." in Path(name).parts:
                yield Damage(name, "is named, but is no file of the model")
                continue
            try:
                # Neither a pipe nor a device, which might never end.
                if path.exists() and not path.is_file():
                    yield Damage(name, "is no regular file", is_text)
                    continue
                found = _digests(path, pool)
            except FileNotFoundError:
                yield Damage(name, "is missing", is_text)
                continue
            except (ArmRayError, OSError, ValueError) as error:  # the last of names with a NUL
                got = getattr(error, "got", None)
                yield Damage(name, f"cannot be read: {got or error}", is_text)
                continue
            if found.digest != wanted.digest or found.tensors.keys() != wanted.tensors.keys():
                yield Damage(name, "is not as it was written", is_text)
                continue
            for tensor, digest in wanted.tensors.items():
                if found.tensors[tensor] != digest:
                    yield Damage(tensor, f"in {name} is not as it was written")
    for name in _names(directory):
        if name not in expected:
            yield Damage(name, "was added", is_text=True)
