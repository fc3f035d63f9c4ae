"""The callback that has attach run beside a training, with a real trainer and a child in its place.

The child in place of `arm-ray attach` writes down how it was started, and what ended it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from arm_ray.errors import ConfigError
from arm_ray.following.config import load_attach_config
from arm_ray.integrations import AttachCallback
from tests.builders.models import save, save_tokenizer, tiny_model
from tests.builders.paths import ROOT

CHILD = """
import json, os, signal, sys, threading
log = sys.argv[1]
def tell(what):
    with open(log, "a") as file:
        print(json.dumps(what), file=file, flush=True)
def told(*_):
    tell({"ended": "SIGTERM"})
    os._exit(130)
signal.signal(signal.SIGTERM, told)
tell({"started": sys.argv[2:], "ranks": [n for n in ("RANK", "WORLD_SIZE") if n in os.environ]})
mode = os.environ["CHILD"]
if mode == "fails":
    print("error: the base is wrong", flush=True)
    sys.exit(1)
if mode == "ends" or any(text.startswith("run.last_step") for text in sys.argv):
    tell({"ended": "by itself"})
    sys.exit(0)
sys.stdin.buffer.read()
told()
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """What the child that stands for attach has written down."""
    log, program = tmp_path / "child.jsonl", tmp_path / "child.py"
    program.write_text(CHILD)
    monkeypatch.setenv("CHILD", "waits")
    monkeypatch.setattr(
        "arm_ray.integrations.callback._PROGRAM", (sys.executable, str(program), str(log))
    )
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) + index
        return {"input_ids": ids, "labels": ids}


def base(tmp_path: Path) -> Path:
    path = save(tiny_model("smollm2", seed=1, num_layers=1), tmp_path / "base", torch.float32)
    save_tokenizer(path)
    return path


def trained(tmp_path: Path, callback: AttachCallback, steps: int = 4, save_steps: int = 2) -> Path:
    """A training of a few steps, with the callback and nothing else of ours."""
    output = tmp_path / "sft"
    model = AutoModelForCausalLM.from_pretrained(base(tmp_path))
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, save_steps=save_steps, save_strategy="steps",
        per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
        logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    return output


def test_one_line_is_enough(
    tmp_path: Path, child: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHILD", "ends")
    callback = AttachCallback()
    output = trained(tmp_path, callback)
    file = tmp_path / "sft-merged.attach.yaml"
    assert child() == [{"started": [str(file)], "ranks": []}, {"ended": "by itself"}]
    config = load_attach_config(file)
    assert config.followed == output
    assert config.merge.base == str(tmp_path / "base")
    assert config.published == tmp_path / "sft-merged"
    assert config.publish.promote == "always"
    assert (callback.config_file, callback.process) == (file, None)


def test_a_configuration_holds(
    tmp_path: Path, child: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHILD", "ends")
    given = tmp_path / "attach.yaml"
    given.write_text(yaml.safe_dump({"merge": {"base": "org/base", "candidates": 3}}))
    callback = AttachCallback(
        given, overrides={"run.poll_s": 1.0}, publish__dir=str(tmp_path / "out")
    )
    trained(tmp_path, callback)
    config = load_attach_config(tmp_path / "out.attach.yaml")
    assert (config.merge.base, config.merge.candidates, config.run.poll_s) == ("org/base", 3, 1.0)


def test_a_child_that_waits_for_more_is_told_the_last_step(
    tmp_path: Path, child: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a training that is stopped before its last step, whose trainer saves no more.
    monkeypatch.setattr(
        "transformers.trainer_callback.DefaultFlowCallback.on_step_end", stop_after(3)
    )
    callback = AttachCallback()
    trained(tmp_path, callback)
    file = str(callback.config_file)
    assert child() == [
        {"started": [file], "ranks": []},
        {"ended": "SIGTERM"},
        {"started": [file, "run.last_step=2"], "ranks": []},
        {"ended": "by itself"},
    ]


def stop_after(last: int) -> Callable[..., Any]:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_save = state.global_step == 2
        control.should_training_stop = state.global_step == last
        return control

    return on_step_end


def test_it_is_ended_with_the_training(
    tmp_path: Path, child: Callable[[], list[dict[str, Any]]]
) -> None:
    callback = AttachCallback(at_end="stop")
    trained(tmp_path, callback)
    assert [next(iter(entry)) for entry in child()] == ["started", "ended"]
    assert callback.process is None


def test_a_wait_has_an_end(tmp_path: Path, child: Callable[[], list[dict[str, Any]]]) -> None:
    callback = AttachCallback(timeout_s=0.01)
    with pytest.warns(UserWarning, match=r"not done 0\.01 s after the training.*goes on"):
        trained(tmp_path, callback)
    assert child()[-1] == {"ended": "SIGTERM"}


def test_one_that_fails_ends_no_training(
    tmp_path: Path, child: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHILD", "fails")
    callback = AttachCallback()
    with pytest.warns(UserWarning, match="code 1; the training goes on") as caught:
        output = trained(tmp_path, callback)
    assert len(caught) == 1
    assert "error: the base is wrong" in str(caught[0].message)
    assert (output / "checkpoint-4" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"publish__keeep": 3}, "did you mean 'keep'?"),
        ({"publish__dir": "sft/inside"}, "nothing may be written below"),
        ({"merge": 3}, "merge"),
    ],
)
def test_a_wrong_configuration_is_told_when_the_training_begins(
    tmp_path: Path, keys: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path, AttachCallback(**keys))
    assert words in str(caught.value)


def test_an_unknown_base_and_an_unknown_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at_end"):
        AttachCallback(at_end="wait")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="which model the training begins with"):
        AttachCallback()._content(tmp_path, object())


def test_only_the_first_rank_starts_one(tmp_path: Path) -> None:
    callback = AttachCallback()

    class State:
        is_world_process_zero = False

    callback.on_train_begin(None, State(), None)
    assert callback.process is None


@pytest.mark.processes
def test_attach_ends_with_its_input(tmp_path: Path) -> None:
    """As when the trainer's process is killed: nothing of it can say so."""
    config = {
        "run": {"path": str(tmp_path / "run")},
        "merge": {"base": str(base(tmp_path)), "method": {"operator": "task_arithmetic"}},
        "publish": {"dir": str(tmp_path / "out"), "promote": "always"},
    }
    file = tmp_path / "attach.yaml"
    file.write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "arm_ray.integrations.beside", str(file)],
        cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stdin is not None
    assert process.stderr.readline().startswith("arm_ray ")
    assert "following" in process.stderr.readline()
    process.stdin.close()
    assert process.wait(60) == 130
    assert "run the same command again" in process.stderr.read()
    process.stderr.close()


@pytest.mark.minutes
def test_checkpoints_are_merged_beside_a_training(tmp_path: Path) -> None:
    callback = AttachCallback(run__poll_s=0.2, run__start="all")
    trained(tmp_path, callback, steps=6)
    assert callback.log_file is not None
    published = sorted((tmp_path / "sft-merged").glob("step-*"))
    assert published, callback.log_file.read_text()
    assert (published[-1] / "model.safetensors").is_file()
    assert published[-1].name == "step-000006"
