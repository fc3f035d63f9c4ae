"""What `arm-ray config` says of the configuration's keys, and the page that is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from arm_ray.cli import main
from arm_ray.config import MergeConfig
from arm_ray.config_keys import Key, all_keys, as_markdown, find_keys, type_in_words
from arm_ray.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs/configuration.md"


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in all_keys() if not key.meaning] == []


def test_the_page_is_the_one_that_the_command_makes() -> None:
    assert PAGE.read_text(encoding="utf-8") == as_markdown(), (
        "run arm-ray config --markdown > docs/configuration.md"
    )


def test_every_key_that_a_merge_writes_down_is_listed() -> None:
    names = {key.name for key in all_keys() if "arm-ray merge" in key.readers}
    written = MergeConfig(base="a", candidates=["b"], output="c").model_dump()
    for section in ("schedule", "precision", "runtime", "tracking"):
        assert {f"{section}.{key}" for key in written[section]} <= names
    assert set(written) <= names


def one(name: str) -> Key:
    [key] = find_keys(name)
    return key


def test_a_key_in_full() -> None:
    key = one("schedule.window_size")
    assert (key.takes, key.default, key.readers) == ("integer ≥ 2", "2", ("arm-ray merge",))
    assert key.meaning.startswith("States in the sliding window")
    assert one("learning_rate").readers == ("arm_ray.jobs.sft", "arm_ray.jobs.grpo")
    assert one("learning_rate").default is None
    assert one("method.ties.keep").readers == ("method.operator ties, aim",)
    assert one("method.timber.gamma").readers == ("method.edit timber",)
    # A merge and a training have different ones of this name.
    assert len(find_keys("runtime.device")) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("schedule.window_size", "result"),
        ("runtime.threads", "result"),
        ("runtime.lookahead", "nothing"),
        ("output_format", "model"),
        ("evaluation.select.by", "model"),
        ("evaluation.every", "nothing"),
        ("run.kind", "result"),
        ("run.poll_s", "nothing"),
        ("learning_rate", "result"),
        ("log_every", "nothing"),
        ("models", ""),
    ],
)
def test_what_a_key_decides(name: str, expected: str) -> None:
    assert find_keys(name)[0].decides == expected


def test_what_a_key_decides_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "runtime.lookahead"]) == 0
    assert "decides: nothing of the result: it may change" in capsys.readouterr().out


def test_a_section_comes_with_its_keys() -> None:
    found = [key.name for key in find_keys("evaluation.select")]
    assert found == [
        "evaluation.select",
        "evaluation.select.by",
        "evaluation.select.metric",
        "evaluation.select.patience",
    ]
    assert "evaluation.tasks[].name" in [key.name for key in find_keys("evaluation.tasks")]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Literal["a", "b", 3], "a, b or 3"),
        (Literal["auto"] | Annotated[int, Field(ge=1)], "auto or integer ≥ 1"),
        (Annotated[float, Field(ge=0.0, lt=1.0)] | None, "number ≥ 0 and < 1 or null"),
        (Annotated[list[str], Field(min_length=1)], "list of text (not empty)"),
        (tuple[Literal["a", "b"], ...] | None, "list of (a or b) or null"),
        (dict[str, bool], "mapping of names to (true/false)"),
    ],
    ids=str,
)
def test_types_in_words(annotation: object, words: str) -> None:
    assert type_in_words(annotation) == words


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schedule.window_size"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "  takes: integer ≥ 2"
    assert main(["config"]) == 0
    assert "runtime.residency" in capsys.readouterr().out
    assert main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown()


@pytest.mark.parametrize(
    ("given", "meant"),
    [("window_size", "schedule.window_size"), ("schedule.windowsize", "schedule.window_size")],
)
def test_an_unknown_key_names_the_nearest(given: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_keys(given)
    assert meant in str(caught.value)
