"""Published models are whole or not there whatever happens, and links always lead somewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from arm_ray.errors import RunDirectoryError
from arm_ray.following import publish as publishing
from arm_ray.following.publish import best, evidence, published, recover
from arm_ray.following.publish import publish as publish_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "published"


def model(tmp_path: Path, content: str = "weights") -> Path:
    path = tmp_path / f"model-{content}"
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_text(content)
    (path / "config.json").write_text("{}")
    return path


def test_a_model_appears_with_its_evidence(tmp_path: Path, directory: Path) -> None:
    source = model(tmp_path)
    path = publish_model(source, directory, 20, {"value": 0.5}, keep=3, is_best=True)
    assert path == directory / "step-000020"
    assert sorted(p.name for p in path.iterdir()) == [
        "arm_ray.json", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert evidence(path) == {"value": 0.5}
    assert best(directory) == path
    assert os.readlink(directory / "latest") == "step-000020"
    # Links take no room, and outlive the source.
    assert (path / "model.safetensors").stat().st_nlink == 2
    shutil.rmtree(source)
    assert (path / "model.safetensors").read_text() == "weights"


def test_the_best_and_the_newest_stay(tmp_path: Path, directory: Path) -> None:
    for step in range(10, 80, 10):
        publish_model(model(tmp_path), directory, step, {"step": step}, 2, is_best=step == 20)
    assert list(published(directory)) == [20, 60, 70]
    assert best(directory) == directory / "step-000020"
    assert os.readlink(directory / "latest") == "step-000070"


def test_a_step_is_replaced_in_one_go(tmp_path: Path, directory: Path) -> None:
    publish_model(model(tmp_path, "old"), directory, 20, {"n": 1}, 3, is_best=True)
    before = (directory / "step-000020").stat().st_ino
    # The same again is left as it is.
    publish_model(model(tmp_path, "other"), directory, 20, {"n": 1}, 3, is_best=True)
    assert (directory / "step-000020").stat().st_ino == before
    publish_model(model(tmp_path, "new"), directory, 20, {"n": 2}, 3, is_best=True)
    assert (directory / "step-000020" / "model.safetensors").read_text() == "new"
    assert not [p for p in directory.iterdir() if p.name.startswith(".")]


def test_the_best_model_outlives_its_step_being_written_again(
    tmp_path: Path, directory: Path
) -> None:
    publish_model(model(tmp_path, "good"), directory, 20, {"n": 1}, 1, is_best=True)
    publish_model(model(tmp_path, "worse"), directory, 20, {"n": 2}, 1, is_best=False)
    found = best(directory)
    assert found == directory / "step-000020-replaced"
    assert (found / "model.safetensors").read_text() == "good"
    assert (directory / "step-000020" / "model.safetensors").read_text() == "worse"
    publish_model(model(tmp_path, "next"), directory, 30, {"n": 3}, 1, is_best=False)
    assert best(directory) == found
    # It goes when it is the best no more.
    publish_model(model(tmp_path, "better"), directory, 40, {"n": 4}, 1, is_best=True)
    assert sorted(p.name for p in directory.iterdir()) == ["best", "latest", "step-000040"]


def test_what_is_not_of_this_run_is_left_alone(tmp_path: Path, directory: Path) -> None:
    for name in ("step-1", "step-000010", "step-000020"):
        (directory / name).mkdir(parents=True)
        (directory / name / "theirs").write_text("x")
    publish_model(model(tmp_path), directory, 5, {"run": "/other"}, 9, is_best=False)
    with pytest.raises(RunDirectoryError, match="another run"):
        publish_model(model(tmp_path), directory, 20, {"run": "/a"}, 1, is_best=True)
    for step in (30, 40):
        publish_model(model(tmp_path), directory, step, {"run": "/a"}, 1, is_best=True)
    assert (directory / "step-000020" / "theirs").read_text() == "x"
    assert sorted(p.name for p in directory.glob("step-*")) == [
        "step-000005", "step-000010", "step-000020", "step-000040", "step-1",
    ]  # fmt: skip


class KilledError(BaseException):
    """Stands for the end of the process."""


STEPS = ["copy_tree", "write_json", "sync_directory", "_put", "_point", "_prune"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("call", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_after_a_kill_anywhere_the_same_call_completes_it(
    tmp_path: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    when: str,
    exchange: bool,
) -> None:
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    publish_model(model(tmp_path, "old"), directory, 20, {"n": 1}, 1, is_best=True)
    holder: Any = publishing
    original = getattr(holder, call)

    def killed(*arguments: Any, **named: Any) -> None:
        if when == "after":
            original(*arguments, **named)
        raise KilledError

    def again() -> Path:
        return publish_model(model(tmp_path, "new"), directory, 20, {"n": 2}, 1, is_best=True)

    with monkeypatch.context() as patch:
        patch.setattr(holder, call, killed)
        with pytest.raises(KilledError):
            again()
    recover(directory)
    # Whoever looks now finds a whole model, of before or after.
    found = best(directory)
    assert found is not None
    text = (found / "model.safetensors").read_text()
    assert {"old": 1, "new": 2}[text] == evidence(found)["n"]
    path = again()
    assert (path / "model.safetensors").read_text() == "new"
    assert evidence(path) == json.loads('{"n": 2}')
    assert sorted(p.name for p in directory.iterdir()) == ["best", "latest", "step-000020"]


@pytest.mark.parametrize("when", ["between", "after"])
def test_a_kill_between_two_renames_is_mended(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    publish_model(model(tmp_path, "old"), directory, 20, {"n": 1}, 1, is_best=True)
    rename, calls = Path.rename, [0]

    def killed(self: Path, target: Path) -> Path:
        calls[0] += 1
        if calls[0] == 2 and when == "between":
            raise KilledError
        result = rename(self, target)
        if calls[0] == 2:
            raise KilledError
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KilledError):
            publish_model(model(tmp_path, "new"), directory, 20, {"n": 2}, 1, is_best=True)
    recover(directory)
    found = best(directory)
    assert found is not None
    expected = "old" if when == "between" else "new"
    assert (found / "model.safetensors").read_text() == expected
    assert not [p for p in directory.iterdir() if p.name.startswith(".")]
