"""GRPO on Ray Train, and what can be wrong with rewards and prompts."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.errors import CalibrationError, ConfigError, EvaluationError
from arm_ray.runtime.train.run import run_grpo
from arm_ray.training.config import GrpoConfig, parse_training_config
from arm_ray.training.grpo_data import checked_reward, load_reward, prepare_prompts
from tests.builders.training import logged, make_base

REWARDS = """
def length(completion, row):
    assert row["answer"] == "5"
    return len(completion) / 100

def raises(completion, row):
    return row["nothing"]

def not_a_number(completion, row):
    return float("nan")

def text(completion, row):
    return "good"
"""


pytestmark = pytest.mark.usefixtures("trainers")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def values(base: Path, tmp_path: Path) -> dict[str, Any]:
    data, rewards = tmp_path / "rows.jsonl", tmp_path / "rewards.py"
    rewards.write_text(REWARDS)
    rows = [{"prompt": f"{i} red apples and", "answer": "5"} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": str(base), "output": str(tmp_path / "out"), "data": {"path": str(data)},
        "reward": f"{rewards}:length", "learning_rate": 1e-2, "steps": 3, "save_steps": [2, 3],
        "batch_size": 8, "num_generations": 4, "max_completion_length": 8,
        "save_dtype": "float32",
        "runtime": {"device": "cpu", "max_failures": 0, "cpus_per_worker": 1},
    }  # fmt: skip


def make(values: dict[str, Any], *overrides: str) -> GrpoConfig:
    return parse_training_config(GrpoConfig, values, overrides)


def test_grpo_trains_and_goes_on(values: dict[str, Any], local_ray: None) -> None:
    pytest.importorskip("trl")
    console = Console(file=StringIO(), width=200)
    run_grpo(make(values, "stop_after=2"), console=console)
    found = run_grpo(make(values), console=console)
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-3"]
    log = logged(Path(values["output"]))
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert all(0 <= entry["reward"] < 1 for entry in log)
    assert isinstance(console.file, StringIO)
    assert "going on after step 2" in console.file.getvalue()
    before = AutoModelForCausalLM.from_pretrained(values["model"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(found[-1]).state_dict()
    assert any((before[name] != after[name]).any() for name in before)


def test_a_reward_that_fails_in_a_worker_names_the_sample(
    values: dict[str, Any], local_ray: None
) -> None:
    pytest.importorskip("trl")
    values["reward"] = values["reward"].replace(":length", ":not_a_number")
    with pytest.raises(EvaluationError, match=r"not finite(?s:.*)line \d, prompt '\d red apples"):
        run_grpo(make(values), console=Console(file=StringIO()))


@pytest.mark.parametrize(
    ("name", "said"),
    [("raises", "KeyError"), ("not_a_number", "finite"), ("text", "no number(?s:.*)'good'")],
)
def test_rewards_that_fail_name_the_sample(values: dict[str, Any], name: str, said: str) -> None:
    values["reward"] = values["reward"].replace("length", name)
    reward = load_reward(make(values))
    example = {"prompt": "2 red", "where": "rows.jsonl, line 3", "row": '{"answer": "5"}'}
    with pytest.raises(EvaluationError, match=said) as caught:
        checked_reward(reward, "x", example)
    assert "rows.jsonl, line 3, prompt '2 red'" in str(caught.value)


def test_the_math_reward_grades_the_final_answer(values: dict[str, Any]) -> None:
    pytest.importorskip("math_verify")
    reward = load_reward(make(values, "reward=math"))
    assert reward(r"So it is \boxed{5}.", {"answer": "5"}) == 1.0
    assert reward(r"So it is \boxed{6}.", {"answer": 5}) == 0.0


def test_rewards_that_are_not_there(values: dict[str, Any], tmp_path: Path) -> None:
    for reward, said in (
        ("maths", "not there"),
        (f"{tmp_path / 'none.py'}:f", "not there"),
        (f"{tmp_path / 'rewards.py'}:f", "no function 'f'"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_reward(make({**values, "reward": reward}))
    (tmp_path / "rewards.py").write_text("import nothing_of_this_name")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_reward(make(values))


def test_prompts(values: dict[str, Any], base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    prompts = prepare_prompts(make(values), tokenizer)
    assert (prompts.read, len(prompts.rows)) == (6, 6)
    assert json.loads(prompts.rows[0]["row"]) == {"prompt": "0 red apples and", "answer": "5"}
    with pytest.raises(CalibrationError, match="no column 'gold'"):
        prepare_prompts(make(values, "reward=math", "answer_column=gold"), tokenizer)
    with pytest.raises(CalibrationError, match="fewer prompts"):
        prepare_prompts(make(values, "batch_size=32"), tokenizer)
    with pytest.raises(CalibrationError, match=r"line 1(?s:.*)at most 2"):
        prepare_prompts(make(values, "max_prompt_length=2", "too_long=error"), tokenizer)
    other = tmp_path / "heldout.jsonl"
    other.write_text('{"q": "3 red apples and?"}\n{"q": "3 red apples and some"}\n')
    assert len(prepare_prompts(make(values, f"apart_from=[{other}]"), tokenizer).rows) == 6
    chat = [{"role": "user", "content": "how many red apples are left"}]
    data = Path(values["data"]["path"])
    answer = {"role": "assistant", "content": "5"}
    data.write_text((json.dumps({"messages": [*chat, answer], "answer": 5}) + "\n") * 2)
    prompts = prepare_prompts(make(values), tokenizer)
    assert prompts.rows[0]["prompt"] == chat
    assert prompts.longest > len(tokenizer("how many red apples are left")["input_ids"])
    shared = [{"from": "human", "value": "how many red apples are left"}]
    shared += [{"from": "gpt", "value": "5"}]
    data.write_text((json.dumps({"conversations": shared, "answer": 5}) + "\n") * 2)
    assert prepare_prompts(make(values), tokenizer).rows[0]["prompt"] == chat
    data.write_text('{"prompt": 3}\n')
    with pytest.raises(CalibrationError, match="is no prompt"):
        prepare_prompts(make(values), tokenizer)
