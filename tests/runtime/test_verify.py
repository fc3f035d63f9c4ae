"""Damage is found to the tensor, a run is made whole again, and a model is made a second time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from arm_ray.checkpoints.provenance import PROVENANCE_NAME, digests_of, read_provenance
from arm_ray.checkpoints.weight_file import read_header
from arm_ray.errors import ArmRayError, ConfigError, CorruptCheckpointError, RunDirectoryError
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from arm_ray.runtime.verify import repair, reproduce, tensors_in, verify
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.merge_case import MergeCase

_WEIGHTS = "model.safetensors"


@pytest.fixture
def run(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished merge with all of its states."""
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    case.make()
    return merge(case.config(), console=Console(quiet=True)).run


def flip(file: Path, position: int) -> None:
    """Another bit of a byte."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.unlink()  # it may be mapped
    file.write_bytes(data)


def test_what_is_whole_is_said_to_be(run: Path) -> None:
    found = verify(run)
    assert found.is_whole
    assert found.damage == ()
    assert found.to_do is None
    assert len(found.looked_at) == 1 + 4  # the model and four states
    assert verify(run / "model").is_whole


def test_every_byte_of_a_model_is_covered(run: Path) -> None:
    """A flipped bit is found wherever it is: here one of every 997 bytes of each file."""
    model = run / "model"
    for path in sorted(model.iterdir()):
        if path.name == PROVENANCE_NAME:
            continue
        size = path.stat().st_size
        for position in range(0, size, max(997, size // 12)):
            flip(path, position)
            assert verify(model).damage, f"{path.name}, byte {position}"
            flip(path, position)
    assert verify(model).damage == ()


def test_damage_is_told_by_the_tensor(run: Path) -> None:
    model = run / "model"
    entries = read_header(model / _WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    flip(model / _WEIGHTS, entries[name].begin + 5)
    [damage] = verify(model).damage
    assert damage.what == name
    [damage] = verify(run).damage
    assert damage.what == f"model/{name}"
    assert "--repair" in (verify(run).to_do or "")


def test_a_text_may_be_changed(run: Path) -> None:
    (run / "model" / "README.md").write_text("my own words")
    (run / "model" / "notes.txt").write_text("more")
    found = verify(run / "model")
    assert {d.what for d in found.damage} == {"README.md", "notes.txt"}
    assert found.is_whole
    assert found.to_do is None


def test_files_that_are_missing_or_cut_are_told(run: Path) -> None:
    model = run / "model"
    (model / "config.json").unlink()
    data = (model / _WEIGHTS).read_bytes()
    (model / _WEIGHTS).unlink()
    (model / _WEIGHTS).write_bytes(data[:-100])
    found = {d.what: d.how for d in verify(model).damage}
    assert found["config.json"] == "is missing"
    assert "bytes" in found[_WEIGHTS]


@pytest.mark.parametrize("what", ["tensor", "missing", "model gone", "state"])
def test_a_run_is_made_whole_again_bit_for_bit(run: Path, what: str) -> None:
    model = run / "model"
    before = load_all(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    looked_at = verify(run).looked_at
    if what == "tensor":
        flip(model / _WEIGHTS, 5000)
    elif what == "missing":
        (model / "config.json").unlink()
    elif what == "model gone":
        shutil.rmtree(model)
        assert [d.what for d in verify(run).damage] == ["model"]
    else:
        file = next((run / "states" / "0002").glob("group-*.safetensors"))
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-10])
        assert [d.what for d in verify(run).damage] == ["states/0002"]
    found, same = repair(run, console=Console(quiet=True))
    assert found.is_whole
    if what in ("tensor", "missing"):
        assert same is True
        # What was damaged is still there.
        assert (run / "model.damaged").is_dir()
    assert_same_bits(load_all(model), before)
    assert verify(run).looked_at == looked_at


def test_a_whole_run_is_left_alone(run: Path) -> None:
    stamp = (run / "model" / _WEIGHTS).stat().st_mtime_ns
    found, same = repair(run, console=Console(quiet=True))
    assert found.is_whole
    assert same is None
    assert (run / "model" / _WEIGHTS).stat().st_mtime_ns == stamp


def test_what_is_no_run_cannot_be_repaired(run: Path) -> None:
    with pytest.raises(RunDirectoryError, match="only a run"):
        repair(run / "model")
    with pytest.raises(RunDirectoryError, match="no such directory"):
        verify(run / "nothing")


def test_a_model_is_made_a_second_time(run: Path, case: MergeCase) -> None:
    found = reproduce(run / "model", case.root / "again", console=Console(quiet=True))
    assert found.differing == ()
    assert found.changed == ()
    assert found.num_tensors == len(load_all(run / "model"))
    again = tensors_in(digests_of(found.model))
    assert again == tensors_in(digests_of(run / "model"))


def test_what_came_out_otherwise_is_named(run: Path, case: MergeCase) -> None:
    file = run / "model" / PROVENANCE_NAME
    content = json.loads(file.read_text())
    content["environment"]["packages"]["torch"] = "1.0"
    file.write_text(json.dumps(content))
    found = reproduce(
        run / "model",
        case.root / "again",
        ["method.coefficient=0.5"],
        console=Console(quiet=True),
    )
    assert "model.embed_tokens.weight" in found.differing
    [changed] = found.changed
    assert changed.startswith("packages torch: 1.0 then, ")


def test_a_model_that_says_nothing_is_told(run: Path) -> None:
    (run / "model" / PROVENANCE_NAME).unlink()
    with pytest.raises(CorruptCheckpointError, match="nothing says"):
        verify(run / "model")
    # Of a run, its tables are looked at.
    found = verify(run)
    assert found.is_whole
    assert any("without digests" in line for line in found.looked_at)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "files": {}}', '{"files": 3}'])
def test_provenance_that_is_broken_is_an_error(run: Path, text: str) -> None:
    (run / "model" / PROVENANCE_NAME).write_text(text)
    with pytest.raises(CorruptCheckpointError):
        read_provenance(run / "model")


def test_a_secret_is_not_written_down(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    secret = "hf_" + "q" * 34
    case.make()
    # Which nothing knew to be one when it was read; where it is known, it is refused.
    config = case.config(f"runtime.scratch={case.root}/{secret}")
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(ConfigError, match="a text holds a secret"):
        case.config(f"runtime.scratch={case.root}/{secret}")
    outcome = merge(config, console=Console(quiet=True))
    text = ((outcome.model or Path()) / PROVENANCE_NAME).read_text()
    assert secret not in text


def test_names_outside_of_the_model_are_not_read(run: Path) -> None:
    """What the file says is not trusted: it came with the model."""
    file = run / "model" / PROVENANCE_NAME
    content = json.loads(file.read_text())
    entry = content["files"]["config.json"]
    content["files"] |= {"../config.yaml": entry, "/dev/zero": entry}
    file.write_text(json.dumps(content))
    os.mkfifo(run / "model" / "pipe")
    content["files"]["pipe"] = entry
    file.write_text(json.dumps(content))
    found = {d.what: d.how for d in verify(run / "model").damage}
    assert found == {
        "../config.yaml": "is named, but is no file of the model",
        "/dev/zero": "is named, but is no file of the model",
        "pipe": "is no regular file",
    }


def test_a_run_that_was_moved_is_repaired_where_it_is(run: Path) -> None:
    """Not where its configuration says that it was."""
    moved = run.with_name("moved")
    shutil.move(run, moved)
    text = (moved / "config.yaml").read_text()
    flip(moved / "model" / _WEIGHTS, 5000)
    found, same = repair(moved, console=Console(quiet=True))
    assert found.is_whole
    assert same is True
    assert not run.exists()
    assert (moved / "config.yaml").read_text() == text


def test_what_cannot_be_made_again_is_not_touched(run: Path, case: MergeCase) -> None:
    flip(run / "model" / _WEIGHTS, 5000)
    shutil.move(case.root / "base", case.root / "elsewhere")
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    with pytest.raises(ArmRayError):
        repair(run, console=Console(quiet=True))
    assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


def test_a_merge_that_fails_gives_the_damaged_model_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run / "model" / _WEIGHTS, 5000)

    def failing(*_args: object, **_options: object) -> None:
        raise RunDirectoryError("the disk is full")

    monkeypatch.setattr("arm_ray.runtime.verify.merge", failing)
    with pytest.raises(RunDirectoryError, match="the disk is full"):
        repair(run, console=Console(quiet=True))
    assert (run / "model" / _WEIGHTS).is_file()
    assert not (run / "model.damaged").exists()


def test_provenance_that_cannot_be_read_is_damage_of_the_run(run: Path) -> None:
    (run / "model" / PROVENANCE_NAME).write_text("{")
    found = verify(run)
    assert [d.what for d in found.damage] == [f"model/{PROVENANCE_NAME}"]
    assert not found.is_whole


def test_checkpoints_are_found_where_they_lay(run: Path, case: MergeCase) -> None:
    """A relative name leads nowhere from another directory."""
    file = run / "model" / PROVENANCE_NAME
    content = json.loads(file.read_text())
    content["config"]["base"] = "relative/base"
    file.write_text(json.dumps(content))
    found = reproduce(run / "model", case.root / "again", console=Console(quiet=True))
    assert found.differing == ()
