"""Trainers' pickles, read without running what they hold.

torch's restricted unpickler makes tensors and plain containers, and looks every class up in a list.
The list is torch's own, and here: DeepSpeed's few objects, for which stand-ins that do nothing are
made. Whatever else a file names is an error, and the file is not read any further.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from arm_ray.checkpoints.pickle_scan import check_pickle
from arm_ray.errors import CorruptCheckpointError, PickleRefusedError
from arm_ray.storage.regular import open_regular


class StandIn:
    """Takes the place of an object whose content is not needed."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _Number(int):
    """Takes the place of an enumeration of whole numbers."""


# Class in the file -> what is made instead.
_STAND_INS = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": StandIn,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": StandIn,
    "deepspeed.utils.tensor_fragment.fragment_address": StandIn,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Number,
}
_CLASS = re.compile(r"(?:GLOBAL |class |function )([A-Za-z_][\w.]*\.\w+)")
_HINTS = {
    "torch.distributed._shard.sharded_tensor": "it is FSDP1's ShardedTensor: train with FSDP2, or "
    "save with torch.distributed.checkpoint or as a full state_dict in safetensors",
}
_HINT = (
    "pickles may run code; where you trust it, convert it to safetensors with the trainer's own "
    "tool (DeepSpeed: zero_to_fp32.py --safe_serialization; verl: verl.model_merger; "
    "Hugging Face: save_pretrained)"
)
# torch's list has this class, which makes as many zeros as a number says. A pickle names it in a
# line of its own, and torch's unpickler knows no other way to name one; a tensor's name may have
# the word in it, and no ends of lines.
_ARRAY, _ARRAY_CLASS = b"\nbytearray\n", "class builtins.bytearray"
# Mapped files that are kept: more than a merge reads from.
_MAX_KEPT = 4096

# The list of classes is torch's, and global: one load at a time.
_lock = threading.Lock()
_kept: OrderedDict[Path, tuple[tuple[int, int, int], Any]] = OrderedDict()


def load(file: Path) -> Any:
    """Read what `torch.save` has written; tensors stay in the file, mapped, unless it is very old.

    Raises:
        PickleRefusedError: The file holds something else than tensors and containers; names it.
        CorruptCheckpointError: It is damaged, or none of torch's.
        OSError: It cannot be read.
    """
    with open_regular(file) as opened:
        is_zip = opened.read(2) == b"PK"
    # torch's old format is several pickles one after another, and cannot be mapped.
    if not is_zip:
        if unpickle(file, {}) != torch.serialization.MAGIC_NUMBER:
            raise _corrupt(file, "another pickle than torch's", "what torch.save has written")
        with open_regular(file) as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as m:
            if m.find(_ARRAY) >= 0:
                raise refused(file, _ARRAY_CLASS)
    if is_zip:
        with open_regular(file) as opened:
            _check_unpacked(opened, file)
    return _load(file, file, mapped=is_zip)


def load_bytes(data: bytes, where: object) -> Any:
    """The same for a tensor in the middle of a file.

    Raises:
        CheckpointError: As `load`.
    """
    if data[:2] == b"PK":
        _check_unpacked(io.BytesIO(data), where)
    elif _ARRAY in data:
        raise refused(where, _ARRAY_CLASS)
    return _load(io.BytesIO(data), where, mapped=False)


def _check_unpacked(file: IO[bytes], where: object) -> None:
    """Refuse a file whose parts are packed: a few bytes may then stand for any number of them."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            packed = [part for part in parts if part.compress_type != zipfile.ZIP_STORED]
            tables = [] if packed else [p for p in parts if p.filename.endswith("data.pkl")]
            for table in tables:
                # What torch writes without checksums (`set_crc32_options`), and reads unchecked.
                if table.CRC == 0:
                    table.CRC = None  # type: ignore[assignment]
            has_arrays = any(_ARRAY in archive.read(table) for table in tables)
    except Exception as error:  # of damaged archives, of many types
        text = " ".join(str(error).split())[:300]
        raise _corrupt(where, text, "a whole file, as the trainer wrote it") from None
    if packed:
        got = f"{packed[0].filename}, packed, of {packed[0].file_size} bytes"
        raise _corrupt(where, got, "parts that are stored as they are, as torch does")
    if has_arrays:
        raise refused(where, _ARRAY_CLASS)


def load_kept(file: Path) -> Any:
    """The same as `load`, kept for the next call in this process while the file is as it was."""
    status = file.stat()
    identity = (status.st_ino, status.st_size, status.st_mtime_ns)
    with _lock:
        known = _kept.get(file)
        if known is not None and known[0] == identity:
            _kept.move_to_end(file)
            return known[1]
    content = load(file)
    with _lock:
        _kept[file] = (identity, content)
        while len(_kept) > _MAX_KEPT:
            _kept.popitem(last=False)
    return content


def let_go() -> None:
    """Forget the kept files: a mapped one takes room on disk even when it has been removed."""
    with _lock:
        _kept.clear()


def _load(source: Any, where: object, *, mapped: bool) -> Any:
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with _lock, torch.serialization.safe_globals(allowed):
            return torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if _CLASS.search(str(error)) is None:
            text = " ".join(str(error).rpartition("error:")[2].split())[:300]
            raise _corrupt(where, text, "a whole file, as the trainer wrote it") from None
        raise refused(where, str(error)) from None
    except OSError:
        raise
    except Exception as error:  # zip, storage and format errors of many types
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise _corrupt(where, text, "a whole file, as the trainer wrote it") from None


def refused(where: object, text: str) -> PickleRefusedError:
    """The error for a pickle that holds more than weights, from torch's words or a class's name."""
    text = " ".join(text.split())
    found = _CLASS.search(text)
    name = found[1] if found else text[:300]
    hints = [hint for start, hint in _HINTS.items() if name.startswith(start)]
    return PickleRefusedError(
        "a pickle holds objects that are not read",
        where=where,
        got=name,
        expected="tensors, containers, and what the trainer itself puts beside them",
        hint=hints[0] if hints else _HINT,
    )


def unpickle(file: Path, known: Mapping[str, Any]) -> Any:
    """Read a plain pickle that names only some classes and functions.

    Args:
        file: The file.
        known: Class, function or constant in the file, with its module -> what is taken instead.

    Raises:
        CheckpointError: As `load`.
        OSError: It cannot be read.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" in known:
                return known[f"{module}.{name}"]
            raise refused(file, f"class {module}.{name}")

        def persistent_load(self, pid: Any) -> Any:
            raise refused(file, f"class persistent.{type(pid).__name__}")

    with open_regular(file) as opened:
        try:
            with mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
                check_pickle(data)
            return Restricted(opened).load()
        except (PickleRefusedError, OSError):
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise _corrupt(file, text, "a whole pickle, as the trainer wrote it") from None


def _corrupt(where: object, got: str, expected: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "a file of a checkpoint cannot be read",
        where=where,
        got=got,
        expected=expected,
        hint="copy the checkpoint again; if a run is still writing it, wait",
    )
