"""Every format of a checkpoint against the model's own state_dict, as trainers write it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from arm_ray import cli
from arm_ray.checkpoints import formats, fsdp, pickles
from arm_ray.checkpoints.formats import find_format, missing, open_given, open_source
from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint
from arm_ray.checkpoints.inspect import inspect_checkpoint
from arm_ray.checkpoints.naming import model_names, split_source
from arm_ray.checkpoints.sharded import ShardedCheckpoint
from arm_ray.config import EvaluateConfig, parse_merge_config, validate
from arm_ray.errors import (
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
    PickleRefusedError,
)
from arm_ray.planning.sources import open_workload
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.scoring import evaluate
from arm_ray.runtime.scoring.subject import model_source

Weights = dict[str, Tensor]
# Fixture's directory -> the checkpoint in it, its format.
CASES = {
    "zero-1-tied/checkpoint-2": "zero",
    "zero-2-tied/checkpoint-2": "zero",
    "zero-3-tied/checkpoint-2": "zero",
    "zero-3-untied/checkpoint-2": "zero",
    "universal-1-tied": "universal",
    "universal-3-untied": "universal",
    "fsdp-1d-tied/global_step_7": "fsdp",
    "fsdp-1d-untied/global_step_7/actor": "fsdp",
    "fsdp-2d-tied/global_step_7": "fsdp",
    "dcp-tied/step-3": "dcp",
    "dcp-untied/checkpoint-3": "dcp",
}


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies one of the checkpoints, to be damaged."""

    def copied(name: str) -> Path:
        shutil.copytree(shards / name, tmp_path / name)
        return tmp_path / name

    return copied


def base_of(shards: Path, name: str) -> Checkpoint:
    return open_checkpoint(shards / f"base-{'untied' if 'untied' in name else 'tied'}")


def truth_of(shards: Path, name: str, kind: str = "truth") -> Weights:
    run = name.split("/")[0].replace("universal", "zero")
    return load_file(shards / "truth" / run / f"{kind}.safetensors")


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_the_models_own_state(shards: Path, name: str) -> None:
    path, base = shards / name, base_of(shards, name)
    assert find_format(path)[0] == CASES[name]
    assert missing(path) is None
    opened = open_source(path, base)
    expected = truth_of(shards, name)
    assert_equal(opened.read(opened.tensors), expected)
    for entry in opened.tensors.values():
        assert entry.shape == tuple(expected[entry.name].shape)
        assert entry.num_bytes == expected[entry.name].nbytes
    # It goes to actors, and stays the same.
    sent = pickle.loads(pickle.dumps(opened))
    assert sent.fingerprint == opened.fingerprint == open_source(path, base).fingerprint
    one = "model.layers.1.mlp.down_proj.weight"
    assert_equal(sent.read([one]), {one: expected[one]})


@pytest.mark.parametrize("name", [n for n, kind in CASES.items() if kind in ("zero", "universal")])
def test_without_masters_it_is_the_16_bit_model(shards: Path, name: str) -> None:
    opened = open_source(shards / name, base_of(shards, name), masters=False)
    assert_equal(opened.read(opened.tensors), truth_of(shards, name, "bf16"))
    assert opened.fingerprint != open_source(shards / name, base_of(shards, name)).fingerprint


def test_without_masters_float32_shards_take_the_configured_dtype(
    shards: Path, copy: Callable[[str], Path]
) -> None:
    path = copy("fsdp-1d-tied/global_step_7")
    file = path / "actor" / "huggingface" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    opened = open_source(path, masters=False)
    expected = {n: t.bfloat16() for n, t in truth_of(shards, "fsdp-1d-tied").items()}
    assert_equal(opened.read(opened.tensors), expected)


def test_the_model_alone_is_read_and_not_taken_for_complete(
    shards: Path, copy: Callable[[str], Path]
) -> None:
    path = copy("zero-2-tied/checkpoint-2")
    for file in path.glob("*/*_optim_states.pt"):
        file.unlink()
    opened = open_source(path)
    assert_equal(opened.read(opened.tensors), truth_of(shards, "zero-2-tied", "bf16"))
    # The optimizer may be still to come.
    assert missing(path) == "no *_optim_states.pt"


def test_where_the_configuration_is_looked_for(shards: Path, copy: Callable[[str], Path]) -> None:
    verl = shards / "fsdp-1d-tied" / "global_step_7"
    assert open_source(verl).config_directory == verl / "actor" / "huggingface"
    zero = shards / "zero-3-tied" / "checkpoint-2"
    assert open_source(zero / "global_step2").config_directory == zero
    bare = shards / "dcp-tied" / "checkpoint-3"
    with pytest.raises(NotACheckpointError, match=r"no configuration(?s:.*)copy config\.json"):
        open_source(bare)
    base = open_checkpoint(shards / "base-tied")
    assert open_source(bare, base).config_directory == base.path
    # OpenRLHF has it in the export beside the shards, or beside `_actor`.
    run = copy("zero-3-tied")
    for shallow in (run, run / "_actor"):
        shallow.mkdir(exist_ok=True)
        (run / "checkpoint-2" / "global_step2").rename(shallow / "global_step2")
        (run / "checkpoint-2" / "config.json").rename(run / "config.json")
        (run / "global_step2_hf").mkdir(exist_ok=True)
        (run / "config.json").rename(run / "global_step2_hf" / "config.json")
        found = open_source(shallow / "global_step2")
        assert found.config_directory == run / "global_step2_hf"
        (shallow / "global_step2").rename(run / "checkpoint-2" / "global_step2")
        (run / "global_step2_hf" / "config.json").rename(run / "checkpoint-2" / "config.json")


def test_an_export_is_preferred_and_any_format_can_be_forced(
    shards: Path, copy: Callable[[str], Path]
) -> None:
    path = copy("zero-2-tied/checkpoint-2")
    shutil.copy(shards / "base-tied" / "model.safetensors", path)
    assert find_format(path) == ("hf", "model.safetensors")
    assert open_given(str(path)).kind == "hf"
    forced = open_given(f"zero:{path}")
    assert forced.kind == "zero"
    assert_equal(forced.read(forced.tensors), truth_of(shards, "zero-2-tied"))
    assert split_source("zero:/runs/x") == ("zero", "/runs/x")
    assert split_source("org/model") == ("auto", "org/model")
    assert split_source("./zero:x") == ("auto", "./zero:x")
    for kind in ("universal", "fsdp", "dcp"):
        with pytest.raises(NotACheckpointError, match="the directory"):
            open_given(f"{kind}:{path}")


def damage_first(pattern: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = sorted(path.rglob(pattern))[0]
        data = file.read_bytes()
        file.write_bytes(data[:900])

    return damage


def remove_last(pattern: str) -> Callable[[Path], None]:
    return lambda path: sorted(path.rglob(pattern))[-1].unlink()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "zero-2-tied",
            remove_last("*optim_states.pt"),
            r"1 files .*\(expected 2, one of each rank",
        ),
        ("zero-3-tied", remove_last("*model_states.pt"), r"1 files .*\(expected 2"),
        ("zero-3-tied", damage_first("*optim_states.pt"), "cannot be read"),
        ("universal-1-tied", remove_last("fp32.pt"), "lacks the parameter"),
        ("universal-1-tied", damage_first("model.*/fp32.pt"), "cannot be read"),
        ("fsdp-1d-tied", remove_last("*rank_1.pt"), r"1 of 2 files .*rank_1\.pt"),
        ("fsdp-1d-tied", damage_first("*rank_0.pt"), "cannot be read"),
        ("dcp-tied", remove_last("step-3/__*.distcp"), "no such file"),
        ("dcp-tied", damage_first("step-3/__*.distcp"), "truncated.*bytes"),
        ("dcp-tied", remove_last("step-3/.metadata"), r"no table of its tensors.*\.metadata"),
        ("dcp-tied", damage_first("step-3/.metadata"), "cannot be read"),
    ],
)
def test_what_is_missing_or_truncated(
    copy: Callable[[str], Path], name: str, damage: Callable[[Path], None], message: str
) -> None:
    run = copy(name)
    path = next((p for p in (run / "checkpoint-2", run / "global_step_7", run / "step-3")
                 if p.is_dir()), run)  # fmt: skip
    damage(run)
    told = missing(path)
    assert told is not None
    assert "\n" not in told
    assert re.search(message, told), told
    found = inspect_checkpoint(path)
    assert (found.complete, found.reason) == (False, told)
    with pytest.raises(CorruptCheckpointError):
        open_source(path, Checkpoint(path, {}, {}))


def test_a_file_that_goes_away_meanwhile(copy: Callable[[str], Path]) -> None:
    name = "model.norm.weight"
    for source, pattern in (
        ("fsdp-1d-tied/global_step_7", "actor/*rank_0.pt"),
        ("dcp-tied/step-3", "__*.distcp"),
    ):
        path = copy(source)
        opened = open_source(path)
        assert isinstance(opened, ShardedCheckpoint)
        for file in path.glob(pattern):
            file.unlink()
        with pytest.raises(CorruptCheckpointError, match=f"cannot be read, for {name}"):
            opened.read([name])
    path = copy("universal-1-tied")
    opened = open_source(path, Checkpoint(path, {}, {}))
    torch.save({"param": torch.zeros(3)}, next(path.glob(f"*/zero/{name}/fp32.pt")))
    with pytest.raises(CorruptCheckpointError, match="written again meanwhile"):
        opened.read([name])


class Harmful:
    """Makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def plant(path: Path) -> Path:
    """Put something harmful into a pickle, beside what is there."""
    if path.name == ".metadata":
        content: Any = pickle.loads(path.read_bytes())
        content.planner_data = Harmful()
        path.write_bytes(pickle.dumps(content))
    else:
        content = torch.load(path, weights_only=False)
        torch.save({**content, "more": Harmful()}, path)
    return path


@pytest.mark.filterwarnings("ignore:.*pickle:UserWarning")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("zero-2-tied/checkpoint-2", "global_step2/*optim_states.pt"),
        ("zero-3-tied/checkpoint-2", "global_step2/*model_states.pt"),
        ("universal-1-tied", "*/zero/model.norm.weight/fp32.pt"),
        ("universal-1-tied", "*/mp_rank_00_model_states.pt"),
        ("fsdp-1d-tied/global_step_7", "actor/*rank_1.pt"),
        ("dcp-tied/step-3", ".metadata"),
    ],
)
def test_what_is_planted_in_a_pickle_does_not_run(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    path = copy(name)
    monkeypatch.chdir(path)
    where = plant(sorted(path.glob(file))[0])
    base = Checkpoint(path, {}, {})
    with pytest.raises(PickleRefusedError, match=r"posix\.mkdir") as caught:
        open_source(path, base)
    assert caught.value.where == str(where)
    told = missing(path)
    assert told is not None
    assert "posix.mkdir" in told
    assert not (path / "harmed").exists()


@pytest.mark.filterwarnings("ignore:.*pickle:UserWarning")
def test_a_piece_of_a_distributed_checkpoint_that_is_something_else(
    shards: Path, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy("dcp-tied/step-3")
    monkeypatch.chdir(path)
    opened = open_source(path)
    assert isinstance(opened, ShardedCheckpoint)
    name = "model.norm.weight"
    piece = opened.stored[name].pieces[0]
    data = bytearray(piece.file.read_bytes())
    begin, length = (int(part) for part in piece.key)
    torch.save(Harmful(), path / "harm.pt")
    harm = (path / "harm.pt").read_bytes()
    data[begin : begin + length] = harm.ljust(length, b"\0")[:length]
    piece.file.write_bytes(data)
    with pytest.raises((PickleRefusedError, CorruptCheckpointError)):
        opened.read([name])
    assert not (path / "harmed").exists()


def test_old_pickles_and_those_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.pt"
    torch.save({"a": torch.arange(3.0)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(pickles.load(file)["a"], torch.arange(3.0))
    file.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(PickleRefusedError, match=r"posix\.mkdir"):
        pickles.load(file)
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        pickles.load(file)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CorruptCheckpointError, match="another pickle"):
        pickles.load(file)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_tensor_may_have_any_name(tmp_path: Path, is_zip: bool) -> None:
    file, name = tmp_path / "x.pt", "builtins.bytearray"
    saved = {name: torch.arange(3.0)}
    torch.save(saved, file, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(pickles.load(file)[name], saved[name])
    assert torch.equal(pickles.load_bytes(file.read_bytes(), file)[name], saved[name])
    torch.save({"a": bytearray(3)}, file, _use_new_zipfile_serialization=is_zip)
    for load in (pickles.load, lambda path: pickles.load_bytes(path.read_bytes(), path)):
        with pytest.raises(PickleRefusedError, match=r"builtins\.bytearray"):
            load(file)


@pytest.fixture
def without_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


def test_files_without_checksums_are_read(tmp_path: Path, without_checksums: None) -> None:
    torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pt")
    assert torch.equal(pickles.load(tmp_path / "x.pt")["a"], torch.arange(3.0))
    torch.save({"a": bytearray(3)}, tmp_path / "x.pt")
    with pytest.raises(PickleRefusedError, match=r"builtins\.bytearray"):
        pickles.load(tmp_path / "x.pt")


def test_a_checksum_that_is_there_is_looked_at(tmp_path: Path) -> None:
    torch.save({"a_tensor": torch.arange(3.0)}, tmp_path / "x.pt")
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content.replace(b"a_tensor", b"b_tensor"))
    with pytest.raises(CorruptCheckpointError, match="Bad CRC-32"):
        pickles.load(tmp_path / "x.pt")


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Whether a tensor's numbers are a file's pages, and no copy."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(str(file))
    return False


def test_a_layer_is_read_without_the_rest(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a distributed checkpoint only a tensor's own bytes; of the others mapped pieces."""
    names = [f"model.layers.1.{part}.weight" for part in ("mlp.up_proj", "self_attn.q_proj")]
    wanted = sum(truth_of(shards, "dcp-tied")[name].nbytes for name in names)
    read: list[int] = []
    load = pickles.load_bytes

    def counted(data: bytes, where: object) -> Any:
        read.append(len(data))
        return load(data, where)

    monkeypatch.setattr(pickles, "load_bytes", counted)
    opened = open_source(shards / "dcp-tied" / "step-3")
    assert read == []
    opened.read(names)
    assert wanted <= sum(read) < wanted + 4 * 2000
    for name in ("zero-3-tied/checkpoint-2", "fsdp-1d-tied/global_step_7", "universal-1-tied"):
        sharded = open_source(shards / name, base_of(shards, name))
        assert isinstance(sharded, ShardedCheckpoint)
        piece = sharded.stored[names[0]].pieces[0]
        stored = sharded.load(piece.file, piece.key)
        assert is_mapped(stored, piece.file)


@pytest.mark.parametrize("sizes", [(7, 5), (1, 3), (8, 2)])
@pytest.mark.parametrize("mesh", [(2, 3), (1, 4), (4, 1), (3, 2)])
def test_parts_are_where_torch_puts_them(sizes: tuple[int, ...], mesh: tuple[int, int]) -> None:
    from torch.distributed.tensor import Replicate, Shard

    whole = torch.arange(sizes[0] * sizes[1]).reshape(sizes)
    for placements in ((Replicate(), Shard(0)), (Shard(0), Shard(1)), (Shard(0), Shard(0))):
        covered = torch.zeros(sizes, dtype=torch.int64)
        for first in range(mesh[0]):
            for second in range(mesh[1]):
                part, at = whole, (first, second)
                for placement, count, index in zip(placements, mesh, at, strict=True):
                    if isinstance(placement, Shard):
                        chunks = torch.chunk(part, count, dim=placement.dim)
                        empty = part.narrow(placement.dim, 0, 0)
                        part = chunks[index] if index < len(chunks) else empty
                found = fsdp.part_of(sizes, placements, mesh, at)
                assert found is not None
                offsets, lengths, is_first = found
                box = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
                assert torch.equal(whole[box], part)
                covered[box] += is_first
        assert bool((covered == 1).all())


def test_names_of_wrapped_models() -> None:
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    for prefix in ("", "module.", "_fsdp_wrapped_module.", "model.", "model.module."):
        names = [prefix + embedding, f"{prefix}model._orig_mod.norm.weight"]
        found = model_names(names, Path("x"))
        assert list(found.values()) == [embedding, norm]
    found = model_names(["m." + embedding, "other.weight"], Path("x"), others=True)
    assert found == {"m." + embedding: embedding}
    with pytest.raises(MismatchError, match="more than one model"):
        model_names([f"model.{embedding}", f"ema.{embedding}"], Path("x"))
    with pytest.raises(MismatchError, match="the same name"):
        model_names([embedding, norm, f"module.{norm}"], Path("x"))


def test_what_shards_are_refused(copy: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy("zero-2-tied/checkpoint-2")
    file = path / "global_step2" / "mp_rank_00_model_states.pt"
    for name, text in (
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("layer_00-model_00-model_states.pt", "pipeline parallelism"),
        ("zero_pp_rank_0_expp_rank_0_mp_rank_00_optim_states.pt", "expert parallelism"),
    ):
        shutil.copy(file, file.with_name(name))
        with pytest.raises(NotACheckpointError, match=text):
            open_source(path)
        file.with_name(name).unlink()
    shutil.copy(file, tmp_path / "model_world_size_2_rank_0.pt")
    shutil.copy(file, tmp_path / "model_world_size_3_rank_0.pt")
    with pytest.raises(CorruptCheckpointError, match="world size 2, world size 3"):
        open_source(tmp_path)


def write_plain(shards: Path, name: str, path: Path) -> Path:
    """A fixture's checkpoint as safetensors in float32."""
    from safetensors.torch import save_file

    weights = truth_of(shards, name)
    weights.pop("lm_head.weight")  # tied
    path.mkdir(parents=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shards / "base-tied" / file, path)
    return path


@pytest.mark.usefixtures("shards_in_process")
def test_a_merge_of_all_formats_equals_that_of_the_exports(shards: Path, tmp_path: Path) -> None:
    names = ["dcp-tied/checkpoint-3", "zero-3-tied/checkpoint-2", "fsdp-1d-tied/global_step_7",
             "universal-1-tied"]  # fmt: skip
    plain = [write_plain(shards, name, tmp_path / name.replace("/", "-")) for name in names]
    # What transformers leaves without: the base must have its own.
    base = tmp_path / "dcp"
    shutil.copytree(shards / names[0], base)
    shutil.copy(shards / "base-tied" / "config.json", base)
    given = [f"dcp:{base}", *(str(shards / name) for name in names[1:])]

    def merged(sources: list[str], output: str) -> Weights:
        content = {
            "base": sources[0],
            "candidates": sources[1:],
            "output": str(tmp_path / output),
            "method": {"operator": "task_arithmetic"},
            "schedule": {"anchor_iterations": 2, "max_iterations": 3, "tolerance": 0.0},
            "runtime": {"layer_shards": 1},
        }
        config = parse_merge_config(content)
        open_workload(config)
        result = merge(config, console=Console(quiet=True))
        return load_file(result.model / "model.safetensors")

    assert_equal(merged(given, "sharded"), merged([str(p) for p in plain], "plain"))


def test_what_an_engine_is_told(shards: Path) -> None:
    base = open_checkpoint(shards / "base-tied")
    zero = open_source(shards / "zero-3-tied" / "checkpoint-2", base)
    source = model_source(zero)
    assert source.path == str(zero.config_directory)
    assert source.given == f"zero:{zero.path}"
    assert model_source(base).given == str(base.path)
    from arm_ray.evaluation.vllm_worker import open_weights

    bare = open_source(shards / "dcp-tied" / "checkpoint-3", base, masters=False)
    told = model_source(bare)
    assert (told.path, told.masters) == (str(base.path), False)
    found = open_weights(Path(told.path), told.weights, told.base, told.masters)
    assert_equal(found.read(found.tensors), bare.read(bare.tensors))


def test_shards_are_scored_over_a_base_that_is_named(shards: Path) -> None:
    base, bare = str(shards / "base-tied"), str(shards / "dcp-tied" / "checkpoint-3")
    given = {"models": {"dcp": bare}, "output": "x", "evaluation": {"tasks": ["gsm8k"]}}
    config = validate(EvaluateConfig, {**given, "adapter_base": base}, source="x")
    subject = evaluate.subject_of("dcp", bare, config)
    assert (subject.source.path, subject.source.weights) == (base, f"dcp:{bare}")
    assert subject.tokenizer == base
    with pytest.raises(NotACheckpointError, match="dcp: the checkpoint has no configuration"):
        evaluate.subject_of("dcp", bare, validate(EvaluateConfig, given, source="x"))


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = cli.main(["inspect", *arguments])
    out = capsys.readouterr().out
    return code, json.loads(out) if "--json" in arguments else out


def test_inspect_says_what_a_checkpoint_is(
    shards: Path, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards / "zero-3-tied" / "checkpoint-2"
    code, text = inspected(capsys, str(path))
    assert code == 0
    for part in ("zero (global_step2/*_states.pt)", "float32 masters", "F32 21", "complete"):
        assert part in text, text
    code, found = inspected(capsys, str(path), "--json")
    expected = open_source(path)
    assert (code, found["step"], found["details"]["ranks"]) == (0, 2, 2)
    assert found["num_tensors"] == len(expected.tensors)
    tied = sum(t.numel() for n, t in truth_of(shards, "zero-3-tied").items() if "lm_head" not in n)
    assert found["num_parameters"] == tied
    assert found["model_type"] == "llama"
    code, found = inspected(capsys, f"dcp:{shards / 'dcp-tied' / 'checkpoint-3'}", "--json")
    assert (code, found["step"], found["config"], found["found_by"]) == (0, 3, None, "forced")
    code, found = inspected(capsys, str(shards / "base-tied"), "--format", "hf", "--json")
    assert (code, found["format"], found["step"]) == (0, "hf", None)
    broken = copy("fsdp-1d-tied/global_step_7")
    next(broken.rglob("*rank_0.pt")).unlink()
    code, found = inspected(capsys, str(broken), "--json")
    assert (code, found["complete"], found["step"]) == (1, False, 7)
    assert "1 of 2 files" in found["reason"]
    assert cli.main(["inspect", str(broken / "nowhere")]) == 1


def test_inspect_lists_the_checkpoints_of_a_run(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = inspected(capsys, str(shards / "dcp-tied"))
    assert code == 0
    assert "run's directory (hf)" in text
    code, found = inspected(capsys, str(shards / "dcp-tied"), "--json")
    [row] = found["checkpoints"]
    assert (row["step"], row["complete"]) == (3, True)
    code, found = inspected(capsys, str(shards / "zero-3-tied" / "checkpoint-2"), "--json")
    assert "checkpoints" not in found


def test_missing_raises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing(tmp_path / "nowhere") is not None
    assert missing(tmp_path) is not None

    def fail(_path: Path) -> Any:
        raise ValueError("half\na file")

    monkeypatch.setattr(formats, "find_format", fail)
    assert missing(tmp_path) == "ValueError: half a file"
