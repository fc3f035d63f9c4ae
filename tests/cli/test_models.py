"""What is said of a finished model: verify, reproduce, push, gguf."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from arm_ray.checkpoints.weight_file import read_header
from arm_ray.cli import main
from arm_ray.exports import hub
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from tests.builders.merge_case import MergeCase

_QUICK = ("method.operator=task_arithmetic", "calibration=null", "schedule.max_iterations=2")


@pytest.fixture
def run(case: MergeCase, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    case.make()
    return merge(case.config(*_QUICK), console=Console(quiet=True)).run


def damage(run: Path) -> str:
    """Change a tensor; returns its name."""
    file = run / "model" / "model.safetensors"
    name = "model.layers.0.mlp.up_proj.weight"
    data = bytearray(file.read_bytes())
    data[read_header(file)[name].begin] ^= 1
    file.unlink()
    file.write_bytes(data)
    return name


def test_verify_and_repair(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.endswith("whole\n")
    name = damage(run)
    assert main(["verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"DAMAGED  model/{name} in model.safetensors is not as it was written" in out
    assert f"to do: arm-ray verify --repair {run}" in out
    assert main(["verify", str(run), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert not content["whole"]
    assert [each["what"] for each in content["damage"]] == [f"model/{name}"]
    assert main(["verify", "--repair", str(run)]) == 0
    assert "made again: the same bits as before\nwhole\n" in capsys.readouterr().out


def test_verify_of_nothing_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nothing")]) == 1
    assert "there is no such directory" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1
    assert "nothing says what the model was made of" in capsys.readouterr().err


def test_reproduce(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, again = str(run / "model"), str(tmp_path / "again")
    assert main(["reproduce", model, "--output", again]) == 0
    assert "the same bits in all" in capsys.readouterr().out
    other = ["--output", str(tmp_path / "other"), "method.coefficient=0.2"]
    assert main(["reproduce", model, *other]) == 1
    assert "tensors differ" in capsys.readouterr().out


def test_push_says_where(run: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}

    def push(path: Path, repo: str, **options: object) -> str:
        asked.update({"path": path, "repo": repo, **options})
        return "https://hub/me/it"

    monkeypatch.setattr(hub, "push", push)
    assert main(["push", str(run), "me/it", "--public", "--base-model", "a/b"]) == 0
    assert capsys.readouterr().out == "https://hub/me/it\n"
    assert (asked["path"], asked["repo"], asked["private"]) == (run, "me/it", False)
    assert asked["base_models"] == ["a/b"]


def test_a_push_without_a_token_is_1(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["push", str(run), "me/it"]) == 1
    assert "there is no token" in capsys.readouterr().err


def test_gguf_without_a_converter_is_1(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")
    assert main(["gguf", str(run)]) == 1
    assert "convert_hf_to_gguf.py is not there" in capsys.readouterr().err
