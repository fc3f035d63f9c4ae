"""`arm-ray init`: what it finds, what it chooses, and that the file is a configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from arm_ray.cli import main
from arm_ray.config import MergeConfig, load_merge_config
from arm_ray.drafting.choices import Answers, choose
from arm_ray.drafting.findings import look_at_checkpoints, look_at_run
from arm_ray.errors import NotACheckpointError
from tests.builders.adapters import write_adapters
from tests.builders.merge_case import MergeCase
from tests.builders.models import fine_tuned, save, save_tokenizer, tiny_model, write_texts


def trainer_state(path: Path, step: int, rates: tuple[float, ...] = ()) -> None:
    history = [{"learning_rate": rate, "step": number} for number, rate in enumerate(rates)]
    content = {"global_step": step, "max_steps": 100, "log_history": history}
    (path / "trainer_state.json").write_text(json.dumps(content))


def told_base(path: Path, base: str) -> None:
    """As transformers before version 5 wrote it."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": base}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four checkpoints in full, of which the last is not complete."""
    base = tiny_model("smollm2", seed=1, num_layers=2)
    save_tokenizer(save(base, tmp_path / "base", torch.float32))
    for step in (10, 20, 30, 40):
        path = tmp_path / "sft" / f"checkpoint-{step}"
        save(fine_tuned(base, seed=step), path, torch.float32)
        told_base(path, str(tmp_path / "base"))
        trainer_state(path, step, (1e-4, 1e-4))
    (tmp_path / "sft" / "checkpoint-40" / "trainer_state.json").unlink()
    save(fine_tuned(base, seed=9), tmp_path / "other" / "last", torch.float32)
    write_texts(tmp_path / "rows.jsonl", 64)
    return tmp_path / "sft"


@pytest.fixture
def written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., MergeConfig]:
    """Runs the command in a directory of its own; the configuration, which can be planned."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def init(*arguments: str) -> MergeConfig:
        code = main(["init", *arguments])
        assert code == 0, capsys.readouterr().err
        config = load_merge_config("merge.yaml")
        assert main(["plan", "merge.yaml"]) == 0
        text = Path("merge.yaml").read_text()
        assert max(map(len, text.splitlines())) <= max(100, 8 + len(str(tmp_path)) * 2)
        assert yaml.safe_load(text)["base"] == config.base
        return config

    return init


def steps_of(config: MergeConfig) -> list[str]:
    return [Path(path).name for path in config.candidates]


def test_of_a_run_with_full_checkpoints(run: Path, written: Callable[..., MergeConfig]) -> None:
    config = written(str(run), "--data", str(run.parent / "rows.jsonl"))
    assert config.base == str(run.parent / "base")
    assert steps_of(config) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    assert config.output == "runs/sft-merge"
    assert (config.method.operator, config.schedule.step) == ("arm", "subspace")
    assert config.calibration is not None
    assert config.calibration.batch_size == 16
    text = " ".join(Path("merge.yaml").read_text().replace("\n# ", " ").split())
    assert "steps 10, 20, 30" in text
    assert "left out: 40" in text
    assert "config.json" in text
    assert "has 64 rows" in text


def test_without_data_a_step_is_made_once(run: Path, written: Callable[..., MergeConfig]) -> None:
    config = written(str(run), "--last", "2", "--run-dir", "/runs/mine", "--method", "ties")
    assert steps_of(config) == ["checkpoint-20", "checkpoint-30"]
    assert (config.method.operator, config.schedule.max_iterations) == ("ties", 1)
    assert (config.calibration, config.output) == (None, "/runs/mine")


def test_the_file_can_be_merged(
    run: Path, written: Callable[..., MergeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arm_ray.runtime.merge.run.is_up_or_named", lambda _address: False)
    written(str(run), "--yes", "--data", str(run.parent / "rows.jsonl"))
    assert main(["merge", "merge.yaml", "--quiet"]) == 0
    assert (Path("runs/sft-merge/model") / "model.safetensors").is_file()


def test_of_adapters(case: MergeCase, tmp_path: Path, written: Callable[..., MergeConfig]) -> None:
    case.make()
    for step, path in zip((5, 10), write_adapters(case), strict=True):
        place = tmp_path / "lora" / f"checkpoint-{step}"
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
        file = place / "adapter_config.json"
        content = json.loads(file.read_text())
        content["base_model_name_or_path"] = str(case.root / "base")
        file.write_text(json.dumps(content))
        trainer_state(place, step)
    config = written(str(tmp_path / "lora"), "--data", str(case.root / "calibration.jsonl"))
    assert config.base == str(case.root / "base")
    assert steps_of(config) == ["checkpoint-5", "checkpoint-10"]
    assert config.method.operator == "task_arithmetic"
    assert "# output_format: adapter" in Path("merge.yaml").read_text()


def test_what_tells_nothing_is_passed_over(run: Path, written: Callable[..., MergeConfig]) -> None:
    data = run.parent / "rows.jsonl"
    data.unlink()
    for pipe in (data, run / "README.md", run / "config.yaml"):
        os.mkfifo(pipe)
    written(str(run), "--no-data")
    (run / "README.md").unlink()
    (run / "README.md").write_text("---\na: &a [x, x]\nb: [*a\n---\n")
    assert look_at_run(run).data is None


def test_of_checkpoints_by_name(run: Path, written: Callable[..., MergeConfig]) -> None:
    given = [str(run.parent / "base"), str(run / "checkpoint-20"), str(run.parent / "other/last")]
    config = written(*given)
    assert [config.base, *config.candidates] == given
    assert config.method.operator == "task_arithmetic"


def test_of_other_layouts(tmp_path: Path) -> None:
    model = tiny_model("smollm2", seed=1, num_layers=2)
    for step in (1, 2, 3):
        path = save(model, tmp_path / "run" / "ckpt" / f"global_step{step}_hf", torch.float32)
        save_tokenizer(path)
    found = look_at_run(tmp_path / "run" / "ckpt")
    chosen = choose(found, Answers(base="org/model"))
    assert found.layout == "openrlhf"
    assert [Path(path).name for path in chosen.candidates] == ["global_step2_hf", "global_step3_hf"]
    assert "reinforcement" in chosen.candidates_reason


@pytest.mark.parametrize(
    ("rates", "method", "dtype"),
    [
        ((1e-4, 1e-4), "arm", None),
        ((1e-4, 5e-6), "task_arithmetic", None),
        ((1e-5, 1e-5), "arm", "float32"),
        ((), "arm", None),
    ],
)
def test_the_method_follows_the_learning_rate(
    run: Path, rates: tuple[float, ...], method: str, dtype: str | None
) -> None:
    trainer_state(run / "checkpoint-30", 30, rates)
    chosen = choose(look_at_run(run), Answers(data=str(run.parent / "rows.jsonl")))
    assert (chosen.method, chosen.compute_dtype) == (method, dtype)


def without_names(run: Path) -> None:
    for path in run.glob("checkpoint-*/config.json"):
        content = json.loads(path.read_text())
        content.pop("_name_or_path", None)
        path.write_text(json.dumps(content))


CARD = "---\nbase_model: org/model\ndatasets:\n- org/rows\n- generator\n---\n# A card\n"
JOB = yaml.safe_dump({"model": "org/other", "data": {"path": "org/sums"}, "output": "x"})


@pytest.mark.parametrize(
    ("name", "text", "base", "data"),
    [
        ("README.md", CARD, "org/model", "org/rows"),
        ("checkpoint-30/README.md", CARD, "org/model", "org/rows"),
        ("config.yaml", JOB, "org/other", "org/sums"),
        ("README.md", "---\nbase_model: [a/b, c/d]\n---\n", None, None),
        ("README.md", "---\n: [\n---\n", None, None),
        ("README.md", "# none", None, None),
        ("training_args.bin", "\x80\x04base_model: org/model", None, None),
    ],
)
def test_where_base_and_data_are_said(
    run: Path, name: str, text: str, base: str | None, data: str | None
) -> None:
    without_names(run)
    (run / name).write_text(text)
    found = look_at_run(run)
    assert (found.base and found.base.value, found.data and found.data.value) == (base, data)


def test_a_base_that_nobody_knows_is_asked_for(run: Path, monkeypatch, capsys) -> None:
    without_names(run)
    monkeypatch.chdir(run.parent)
    assert main(["init", str(run)]) == 1
    assert "--base" in capsys.readouterr().err
    assert not Path("merge.yaml").exists()


def test_a_file_that_is_there_stays(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parent)
    Path("merge.yaml").write_text("mine")
    assert main(["init", str(run)]) == 1
    assert "--force" in capsys.readouterr().err
    assert Path("merge.yaml").read_text() == "mine"
    assert main(["init", str(run), "--force"]) == 0
    assert load_merge_config("merge.yaml").candidates


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "tise"], "did you mean 'ties'?"),
        (["--data", "x.jsonl", "--no-data"], "named and refused"),
        (["--method", "arm"], "calibration: required"),
    ],
)
def test_a_wrong_answer_leaves_no_file(
    run: Path, arguments: list[str], words: str, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(run.parent)
    assert main(["init", str(run), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not Path("merge.yaml").exists()


def test_what_is_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(NotACheckpointError, match="does not exist"):
        look_at_run(tmp_path / "nowhere")
    with pytest.raises(NotACheckpointError, match="no complete checkpoint"):
        look_at_run(tmp_path)
    with pytest.raises(NotACheckpointError, match="no complete checkpoint"):
        look_at_run(run / "checkpoint-10")
    (run / "checkpoint-20" / "model.safetensors").unlink()
    with pytest.raises(NotACheckpointError, match="not complete"):
        look_at_checkpoints([run / "checkpoint-10", run / "checkpoint-20"])


def test_six_questions(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = iter(["", "zero", "2", str(run.parent / "rows.jsonl"), "tise", "ties", "", "none"])

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("builtins.input", answer)
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert main(["init", str(run)]) == 0
    config = load_merge_config("merge.yaml")
    assert config.base == str(run.parent / "base")
    assert steps_of(config) == ["checkpoint-20", "checkpoint-30"]
    assert config.method.operator == "ties"
    assert len(set(asked)) == 6
    assert "[arm]" in next(q for q in asked if q.startswith("Operator"))


def test_an_end_of_the_answers_is_an_interruption(run: Path, monkeypatch, capsys) -> None:
    def end(_question: str) -> Any:
        raise EOFError

    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("builtins.input", end)
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    assert main(["init", str(run)]) == 130
    assert not Path("merge.yaml").exists()
