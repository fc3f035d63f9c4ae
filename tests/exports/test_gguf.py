"""GGUF files by a converter that stands in for llama.cpp's."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from arm_ray.errors import ConfigError, NotACheckpointError, WorkerError
from arm_ray.exports.gguf import SCRIPT, export_gguf, find_converter
from tests.builders.models import save, tiny_model

_WRITES = """
import sys
arguments = sys.argv[1:]
print("converting", arguments[0])
with open(arguments[arguments.index("--outfile") + 1], "wb") as file:
    file.write({content!r})
print("type", arguments[arguments.index("--outtype") + 1])
sys.exit({code})
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    made: PreTrainedModel = tiny_model("smollm2", seed=1)
    return save(made, tmp_path / "run" / "model")


def converter(folder: Path, content: bytes = b"GGUF data", code: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / SCRIPT).write_text(_WRITES.format(content=content, code=code))
    return folder


def test_a_model_becomes_one_file(model: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = export_gguf(
        model.parent, kind="q8_0", converter=converter(tmp_path / "llama.cpp"), say=told.append
    )
    assert made == tmp_path / "run" / "run-q8_0.gguf"
    assert made.read_bytes() == b"GGUF data"
    assert told[1:] == [f"converting {model}", "type q8_0"]
    assert [p.name for p in made.parent.iterdir() if p.name.startswith(".")] == []


def test_a_file_that_is_there_is_not_replaced(model: Path, tmp_path: Path) -> None:
    script = converter(tmp_path / "llama.cpp")
    target = tmp_path / "mine.gguf"
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="such a file already"):
        export_gguf(model, target, converter=script)
    assert target.read_bytes() == b"mine"
    export_gguf(model, target, converter=script, force=True)
    assert target.read_bytes() == b"GGUF data"


def test_a_converter_that_fails_leaves_nothing(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.gguf"
    with pytest.raises(WorkerError, match="exit code 3") as caught:
        export_gguf(model, target, converter=converter(tmp_path / "a", code=3))
    assert "converting" in str(caught.value)
    with pytest.raises(WorkerError, match="no GGUF file"):
        export_gguf(model, target, converter=converter(tmp_path / "b", content=b"PK"))
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_the_converter_is_looked_for_where_the_user_says(tmp_path: Path) -> None:
    folder = converter(tmp_path / "llama.cpp")
    script = folder / SCRIPT
    assert find_converter(folder, {}) == script
    assert find_converter(script, {}) == script
    assert find_converter(None, {"LLAMA_CPP": str(folder)}) == script
    script.chmod(0o755)
    assert find_converter(None, {"PATH": str(folder)}) == script
    with pytest.raises(ConfigError, match="is not there") as caught:
        find_converter(None, {"PATH": str(tmp_path)})
    assert "LLAMA_CPP" in str(caught.value)
    with pytest.raises(ConfigError, match="is not there"):
        find_converter(tmp_path / "nowhere", {"PATH": str(folder)})


def test_an_adapter_is_refused(tmp_path: Path, model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises((NotACheckpointError, ConfigError)):
        export_gguf(model, converter=converter(tmp_path / "llama.cpp"))
