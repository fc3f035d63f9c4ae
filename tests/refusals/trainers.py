"""Checkpoints in trainers' shards that are damaged, foreign, or mean harm."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.builders.hostile import WEIGHTS
from tests.builders.zero import write_zero
from tests.refusals.place import Malformed, Place

Change = Callable[[Path], object]
_OPTIMIZER, _MODEL = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"


class Harm:
    """What runs a command when it is unpickled as Python would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


def of(write: Callable[[Path, Path], object], change: Change) -> Malformed:
    """A merge of a trainer's checkpoint that is changed after it was written."""

    def make(place: Place) -> list[str]:
        path = place.root / "checkpoint"
        path.mkdir()
        write(place.good / "checkpoint-10", path)
        change(path)
        return place.merge(candidates=[str(path)])

    return Malformed(make)


def zero(change: Change, stage: int = 2) -> Malformed:
    def write(source: Path, target: Path) -> None:
        write_zero(source, target, stage)

    return of(write, lambda path: change(path / "global_step7"))


def _fsdp(source: Path, target: Path) -> None:
    """Two ranks of which the first has everything, as a model without sharded tensors."""
    shutil.copy(source / "config.json", target)
    for rank in range(2):
        torch.save(load_file(source / WEIGHTS), target / f"model_world_size_2_rank_{rank}.pt")


def _dcp(source: Path, target: Path) -> None:
    import torch.distributed.checkpoint as dcp

    shutil.copy(source / "config.json", target)
    with warnings.catch_warnings():
        # It says that there is one process.
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(dict(load_file(source / WEIGHTS)), checkpoint_id=target, no_dist=True)


def _universal(source: Path, target: Path) -> None:
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / WEIGHTS)
    for name, tensor in tensors.items():
        (target / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor.float()}, target / "zero" / name / "fp32.pt")
    shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
    torch.save({"param_shapes": shapes, "module": {}}, target / _MODEL)


def fsdp(change: Change) -> Malformed:
    return of(_fsdp, change)


def dcp_(change: Change) -> Malformed:
    return of(_dcp, change)


def universal(change: Change) -> Malformed:
    return of(_universal, change)


def saved(name: str, content: Any) -> Change:
    return lambda path: torch.save(content, path / name)


def raw(name: str, content: bytes) -> Change:
    return lambda path: (path / name).write_bytes(content)


def pickled(name: str, content: Any, protocol: int = 2) -> Change:
    return raw(name, pickle.dumps(content, protocol))


def cut(name: str, by: int = 300) -> Change:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - by)


def packed(name: str, table: bytes, how: int = zipfile.ZIP_STORED) -> Change:
    """A file as torch writes it, with this pickle in it."""

    def change(path: Path) -> None:
        with zipfile.ZipFile(path / name, "w", how) as archive:
            archive.writestr("archive/data.pkl", table)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return change


def changed(name: str, change: Callable[[Any], object]) -> Change:
    """Change what a file of torch's holds."""
    from tests.builders.zero import deepspeed

    def apply(path: Path) -> None:
        with deepspeed():
            content = torch.load(path / name, weights_only=False)
            change(content)
            torch.save(content, path / name)

    return apply


def _table(change: Callable[[Any], object]) -> Change:
    """Change the table of a distributed checkpoint."""

    def apply(path: Path) -> None:
        content = pickle.loads((path / ".metadata").read_bytes())
        change(content)
        (path / ".metadata").write_bytes(pickle.dumps(content))

    return apply


def _elsewhere(relative: str) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for info in content.storage_data.values():
            info.relative_path = relative

    return change


def _offsets(offset: int, length: int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for info in content.storage_data.values():
            info.offset, info.length = offset, length

    return change


# Pickles written by hand: what they do is said beside them.
_MEMO_BOMB = b"\x80\x02Nr\xff\xff\xff\x7f."  # keeps something at place 2^31 of its memory
_LONG_BYTES = b"\x80\x04\x8e" + struct.pack("<Q", 1 << 50) + b"x."  # 2^50 bytes follow
_LONG_ARRAY = b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x."  # 2^33 bytes that are made
_LONG_TEXT = b"\x80\x04\x8d" + struct.pack("<Q", 1 << 50) + b"x."
_ZEROS = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."  # of so many zeros
# What the old format begins with: its number, a version, and what the machine was.
_OLD = b"".join(
    pickle.dumps(part, 2)
    for part in (torch.serialization.MAGIC_NUMBER, 1001, {"little_endian": True})
)
_DEEP = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
_GROWING = b"\x80\x02]q\x00" + b"(h\x00h\x00h\x00e" * 100 + b"."  # holds itself
_GLOBAL = b"cos\nsystem\n(S'touch harmed'\ntR."
_NO_END = b"\x80\x02]q\x00"
_EXTENSION = b"\x80\x02\x84\xff\xff\xff\x7f."  # a name from copyreg's table
_BUFFER = b"\x80\x05\x97."  # data that is elsewhere
_BIG_INTEGER = b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b"x."
_FLOAT = b"Fxyz\n."


CASES: dict[str, Malformed] = {
    "ZeRO: an optimizer file cut": zero(cut(_OPTIMIZER)),
    "ZeRO: an optimizer file empty": zero(raw(_OPTIMIZER, b"")),
    "ZeRO: a rank missing": zero(lambda path: (path / _OPTIMIZER).unlink()),
    "ZeRO: no shapes": zero(lambda path: (path / _MODEL).unlink()),
    "ZeRO: text for a file": zero(raw(_OPTIMIZER, b"not a pickle")),
    "ZeRO: a list for a file": zero(saved(_OPTIMIZER, [1, 2])),
    "ZeRO: a state without a stage": zero(saved(_OPTIMIZER, {"optimizer_state_dict": {}})),
    "ZeRO: a stage that is a word": zero(
        changed(_OPTIMIZER, lambda c: c["optimizer_state_dict"].update(zero_stage="two"))
    ),
    "ZeRO: a count that is a word": zero(
        changed(_OPTIMIZER, lambda c: c["optimizer_state_dict"].update(partition_count="many"))
    ),
    "ZeRO: an empty count": zero(
        changed(_OPTIMIZER, lambda c: c["optimizer_state_dict"].update(partition_count=[]))
    ),
    "ZeRO: no count": zero(
        changed(_OPTIMIZER, lambda c: c["optimizer_state_dict"].pop("partition_count"))
    ),
    "ZeRO: no flat weights": zero(
        changed(
            _OPTIMIZER,
            lambda c: c["optimizer_state_dict"].pop("single_partition_of_fp32_groups"),
        )
    ),
    "ZeRO: fewer groups": zero(
        changed(
            _OPTIMIZER,
            lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop(),
        )
    ),
    "ZeRO: shorter groups": zero(
        changed(
            _OPTIMIZER,
            lambda c: c["optimizer_state_dict"].update(
                single_partition_of_fp32_groups=[torch.zeros(1), torch.zeros(1)]
            ),
        )
    ),
    "ZeRO: shapes that are a number": zero(changed(_MODEL, lambda c: c.update(param_shapes=7))),
    "ZeRO: shapes of words": zero(
        changed(_MODEL, lambda c: c["param_shapes"][0].update(x=["a", "b"]))
    ),
    "ZeRO: shapes below zero": zero(
        changed(_MODEL, lambda c: c["param_shapes"][0].update(x=[-3, 5]))
    ),
    "ZeRO: shapes beyond all memory": zero(
        changed(_MODEL, lambda c: c["param_shapes"][0].update(x=[1 << 40, 1 << 40]))
    ),
    "ZeRO: paddings that are a word": zero(
        changed(
            _OPTIMIZER,
            lambda c: c["optimizer_state_dict"].update(param_alignment_paddings="none"),
        )
    ),
    "ZeRO: a module that is a list": zero(changed(_MODEL, lambda c: c.update(module=[1]))),
    "ZeRO: frozen parameters without values": zero(
        changed(_MODEL, lambda c: c.update(frozen_param_shapes={"x": [2]}))
    ),
    "ZeRO: tied names that are a list": zero(
        changed(_MODEL, lambda c: c.update(shared_params=["a"]))
    ),
    "ZeRO 3: a file of the model missing": zero(
        lambda path: next(iter(path.glob("zero_pp_rank_1*_model_states.pt"))).unlink(), stage=3
    ),
    "ZeRO: tensor parallelism": zero(saved("mp_rank_01_model_states.pt", {})),
    "ZeRO: a pipe for a file": zero(
        lambda path: [(path / _OPTIMIZER).unlink(), os.mkfifo(path / _OPTIMIZER)]
    ),
    "ZeRO: a pickle that runs a command": zero(pickled(_OPTIMIZER, Harm())),
    "ZeRO: torch's file that runs a command": zero(saved(_OPTIMIZER, Harm())),
    "ZeRO: a name of the system": zero(raw(_OPTIMIZER, _GLOBAL)),
    "ZeRO: a packed bomb": zero(packed(_OPTIMIZER, bytes(1 << 28), zipfile.ZIP_DEFLATED)),
    "ZeRO: a memory of 2^31 places": zero(raw(_OPTIMIZER, _MEMO_BOMB)),
    "ZeRO: 2^50 bytes": zero(raw(_OPTIMIZER, _LONG_BYTES)),
    "ZeRO: an array of 2^33 bytes": zero(raw(_OPTIMIZER, _LONG_ARRAY)),
    "ZeRO: an array of 2^33 zeros": zero(packed(_OPTIMIZER, _ZEROS)),
    "ZeRO: an array of 2^33 zeros in the old format": zero(raw(_OPTIMIZER, _OLD + _ZEROS)),
    "DCP: a table with an array of 2^33 bytes": dcp_(raw(".metadata", _LONG_ARRAY)),
    "ZeRO: a text of 2^50 bytes": zero(raw(_OPTIMIZER, _LONG_TEXT)),
    "ZeRO: lists in lists": zero(raw(_OPTIMIZER, _DEEP)),
    "ZeRO: a list that holds itself": zero(raw(_OPTIMIZER, _GROWING)),
    "ZeRO: a pickle without an end": zero(raw(_OPTIMIZER, _NO_END)),
    "ZeRO: a number of the registry": zero(raw(_OPTIMIZER, _EXTENSION)),
    "ZeRO: data out of band": zero(raw(_OPTIMIZER, _BUFFER)),
    "ZeRO: an integer of 2^30 bytes": zero(raw(_OPTIMIZER, _BIG_INTEGER)),
    "ZeRO: a fraction of letters": zero(raw(_OPTIMIZER, _FLOAT)),
    "FSDP: a rank missing": fsdp(lambda path: (path / "model_world_size_2_rank_1.pt").unlink()),
    "FSDP: two numbers of ranks": fsdp(saved("model_world_size_3_rank_0.pt", {})),
    "FSDP: a file cut": fsdp(cut("model_world_size_2_rank_0.pt")),
    "FSDP: a list for a file": fsdp(saved("model_world_size_2_rank_0.pt", [1])),
    "FSDP: ranks that contradict each other": fsdp(
        saved("model_world_size_2_rank_1.pt", {"model.norm.weight": torch.zeros(3)})
    ),
    "FSDP: names that are numbers": fsdp(
        saved("model_world_size_2_rank_0.pt", {5: torch.zeros(3)})
    ),
    "FSDP: a pickle that runs a command": fsdp(saved("model_world_size_2_rank_0.pt", Harm())),
    "FSDP: no tensors": fsdp(
        lambda path: [saved(f"model_world_size_2_rank_{n}.pt", {})(path) for n in range(2)]
    ),
    "FSDP: a million ranks": fsdp(
        lambda path: [
            (path / "model_world_size_2_rank_0.pt").rename(
                path / "model_world_size_99999999_rank_0.pt"
            ),
            (path / "model_world_size_2_rank_1.pt").unlink(),
        ]
    ),
    "DCP: no table": dcp_(lambda path: (path / ".metadata").unlink()),
    "DCP: an empty table": dcp_(raw(".metadata", b"")),
    "DCP: a table cut": dcp_(cut(".metadata")),
    "DCP: a table that is a list": dcp_(pickled(".metadata", [1])),
    "DCP: a table that runs a command": dcp_(pickled(".metadata", Harm())),
    "DCP: a table with a memory of 2^31 places": dcp_(raw(".metadata", _MEMO_BOMB)),
    "DCP: a table of 2^50 bytes": dcp_(raw(".metadata", _LONG_BYTES)),
    "DCP: a table of lists in lists": dcp_(raw(".metadata", _DEEP)),
    "DCP: a table that refers out of band": dcp_(raw(".metadata", _BUFFER)),
    "DCP: a table with a name of the registry": dcp_(raw(".metadata", _EXTENSION)),
    "DCP: a file above the directory": dcp_(_table(_elsewhere("../x.distcp"))),
    "DCP: a file at an absolute path": dcp_(_table(_elsewhere("/etc/passwd"))),
    "DCP: a file that is not there": dcp_(_table(_elsewhere("__9_9.distcp"))),
    "DCP: pieces before the file": dcp_(_table(_offsets(-5, 10))),
    "DCP: pieces below zero": dcp_(_table(_offsets(5, -10))),
    "DCP: pieces beyond the file": dcp_(_table(_offsets(1 << 60, 1 << 60))),
    "DCP: pieces that are something else": dcp_(_table(_offsets(0, 10))),
    "DCP: no tensors": dcp_(_table(lambda c: c.state_dict_metadata.clear())),
    "DCP: no places": dcp_(_table(lambda c: c.storage_data.clear())),
    "DCP: a pipe for the data": dcp_(
        lambda path: [
            (path / "__0_0.distcp").unlink(),
            os.mkfifo(path / "__0_0.distcp"),
        ]
    ),
    "DCP: data cut": dcp_(cut("__0_0.distcp", 5000)),
    "universal: no shapes": universal(lambda path: (path / _MODEL).unlink()),
    "universal: shapes that are a word": universal(saved(_MODEL, {"param_shapes": "many"})),
    "universal: a parameter missing": universal(
        lambda path: shutil.rmtree(path / "zero" / "model.norm.weight")
    ),
    "universal: a parameter cut": universal(cut("zero/model.norm.weight/fp32.pt", 200)),
    "universal: a parameter without its tensor": universal(
        saved("zero/model.norm.weight/fp32.pt", {"step": 3})
    ),
    "universal: a parameter of another shape": universal(
        saved("zero/model.norm.weight/fp32.pt", {"param": torch.zeros(3)})
    ),
    "universal: a parameter that runs a command": universal(
        saved("zero/model.norm.weight/fp32.pt", Harm())
    ),
    "universal: a shape out of the directory": universal(
        saved(_MODEL, {"param_shapes": [{"../../x": [2]}], "module": {}})
    ),
    "torchtitan: other names": of(
        _dcp, lambda path: (path / "config.json").write_text('{"model_type": "opt"}')
    ),
    "Megatron: a marker of another kind": dcp_(
        raw("metadata.json", b'{"sharded_backend": "zarr"}')
    ),
    "Megatron: a marker without embeddings": dcp_(
        raw("metadata.json", b'{"sharded_backend": "torch_dist"}')
    ),
    "Megatron: a marker that is a list": dcp_(
        lambda path: [raw("metadata.json", b"[1]")(path), raw("common.pt", b"x")(path)]
    ),
    "Megatron: a tracker of letters": of(
        lambda source, target: _dcp(source, _made(target / "iter_0000100")),
        lambda path: [
            (path / "latest_checkpointed_iteration.txt").write_text("newest"),
            _made(path / "iter_0000200"),
        ],
    ),
}


def _made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path
