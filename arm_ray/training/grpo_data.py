"""The prompts of GRPO, and the rewards of what is generated for them."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arm_ray.calibration.formats import CONVERSATIONS, missing_column, plain_message
from arm_ray.errors import ArmRayError, CalibrationError, ConfigError, EvaluationError
from arm_ray.training.config import GrpoConfig
from arm_ray.training.data import PlacedRow, read_data
from arm_ray.training.split import keep_apart

Reward = Callable[[str, dict[str, Any]], float]

_HEAD = 80


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    Attributes:
        rows: For each, `prompt` (text or chat messages), `where` (its place in the data) and
            `row` (the whole row as JSON).
        read: Rows read.
        longest: Tokens of the longest prompt.
        notes: What the user should know.
    """

    rows: list[dict[str, Any]]
    read: int
    longest: int
    notes: tuple[str, ...]


def prepare_prompts(config: GrpoConfig, tokenizer: Any) -> Prompts:
    """Read, check and measure the prompts, and check that the reward can be loaded.

    Raises:
        CalibrationError: The data cannot be used, or there are too few prompts for a batch.
        ConfigError: The reward's file or function is not there.
    """
    load_reward(config)
    rows, columns = read_data(config.data)
    name = _prompt_column(config, columns)
    if config.reward == "math" and config.answer_column not in columns:
        raise missing_column(config.answer_column, columns, config.data.path, "data")
    prompts = [_prompt(place, name) for place in rows]
    by_place = dict(zip((place.where for place in rows), prompts, strict=True))
    questions = [_question(prompt) for prompt in prompts]
    kept, notes = keep_apart(rows, questions, config.apart_from, config.on_overlap)
    found, longest, too_long = [], 0, 0
    for where, row in kept:
        if config.reward == "math":
            _gold(row, config.answer_column, where)
        prompt = by_place[where]
        length = _length(tokenizer, prompt, where)
        if length > config.max_prompt_length:
            too_long += 1
            if config.too_long == "error":
                raise CalibrationError(
                    "a prompt has more tokens than max_prompt_length",
                    where=where,
                    got=f"{length} tokens",
                    expected=f"at most {config.max_prompt_length}",
                    hint="raise max_prompt_length, or set too_long to drop",
                )
            continue
        longest = max(longest, length)
        text = json.dumps(row, default=str)
        found.append({"prompt": prompt, "where": where, "row": text})
    if too_long:
        notes.append(
            f"{too_long} of {len(rows)} prompts have more than {config.max_prompt_length} tokens: "
            "dropped"
        )
    wanted = config.batch_size // config.num_generations
    if len(found) < wanted:
        raise CalibrationError(
            "there are fewer prompts than a batch needs",
            where=config.data.path,
            got=f"{len(found)} prompts of {len(rows)} rows, {too_long} too long",
            expected=f"at least {wanted}: batch_size / num_generations",
            hint="lower batch_size, raise max_prompt_length, or give more prompts",
        )
    return Prompts(found, len(rows), longest, tuple(notes))


def _prompt_column(config: GrpoConfig, columns: Mapping[str, bool]) -> str:
    names = [config.data.prompt_column, config.data.messages_column]
    if config.data.format == "messages":
        names.reverse()
    if config.data.format in ("auto", "messages"):
        for name in (*names, CONVERSATIONS):
            if name in columns:
                return name
    if names[0] not in columns:
        raise missing_column(names[0], columns, config.data.path, "data")
    return names[0]


def _prompt(place: PlacedRow, column: str) -> Any:
    value: Any = place.row.get(column)
    if isinstance(value, str) and value:
        return value
    is_list = isinstance(value, list) and bool(value)
    given = [plain_message(m) if isinstance(m, dict) else {} for m in value] if is_list else []
    if not given or not all(isinstance(m.get("role"), str) for m in given):
        raise CalibrationError(
            f"column {column!r} of a row is no prompt",
            where=place.where,
            got=repr(value)[:_HEAD],
            expected='text, or [{"role": "user", "content": "..."}, ...], or the same of ShareGPT',
            hint="correct or remove the row, or name another column",
        )
    messages = [{"role": m["role"], "content": m.get("content") or ""} for m in given]
    while messages and messages[-1]["role"] == "assistant":
        # The answer is what is to be generated.
        messages.pop()
    if not messages:
        raise CalibrationError(
            "a conversation has nothing to answer", where=place.where, got="assistant turns only"
        )
    return messages


def _question(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((str(m["content"]) for m in prompt if m["role"] == "user"), "")


def _length(tokenizer: Any, prompt: Any, where: object) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt, verbose=False)["input_ids"])
    try:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates raise what they like
        raise CalibrationError(
            "a prompt cannot be put through the chat template",
            where=where,
            got=f"{type(error).__name__}: {error}",
            expected="messages that the template accepts, and a tokenizer that has one",
        ) from None
    return len(encoded["input_ids"])


def _gold(row: Mapping[str, Any], column: str, where: object) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise CalibrationError(
            f"column {column!r} of a row holds no answer",
            where=where,
            got=repr(value)[:_HEAD],
            expected="the right answer, as text or a number",
            hint="correct or remove the row, or set answer_column",
        )
    return str(value)


def load_reward(config: GrpoConfig) -> Reward:
    """The function that says what a completion is worth, given its text and its prompt's row.

    Raises:
        ConfigError: The file or the function is not there, or cannot be loaded.
    """
    if config.reward == "math":

        def compare(completion: str, row: dict[str, Any]) -> float:
            from arm_ray.evaluation.grading import grade

            gold = _gold(row, config.answer_column, None)
            return float(grade(completion, gold, config.math_mode))

        return compare
    path, _, name = config.reward.rpartition(":")
    file = Path(path).expanduser()
    if not path or not file.is_file():
        raise ConfigError(
            "the reward is not there",
            where="reward",
            got=config.reward,
            expected="math, or path/file.py:function",
            hint="check the path; in a cluster, every node must see it",
        )
    spec = importlib.util.spec_from_file_location(f"arm_ray_reward_{file.stem}", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            "the reward's file cannot be loaded",
            where=file,
            got=f"{type(error).__name__}: {error}",
            expected="a Python file that imports",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"the reward's file has no function {name!r}",
            where=file,
            expected=f"def {name}(completion: str, row: dict) -> float",
        )
    return function  # type: ignore[no-any-return]


def checked_reward(reward: Reward, completion: str, example: Mapping[str, Any]) -> float:
    """The reward of one completion.

    Args:
        reward: The function.
        completion: The text that was generated.
        example: `prompt`, `where` and `row`, as in `Prompts`.

    Raises:
        EvaluationError: It raised, or what it returned is no finite number; names the sample.
    """
    try:
        value = reward(completion, json.loads(example["row"]))
    except ArmRayError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise _failed("raised", example, f"{type(error).__name__}: {error}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _failed("returned no number", example, repr(value)[:_HEAD]) from None
    if not math.isfinite(number):
        raise _failed("is not finite", example, number)
    return number


def _failed(how: str, example: Mapping[str, Any], got: object) -> EvaluationError:
    head = _question(example["prompt"])
    head = head if len(head) <= _HEAD else head[: _HEAD - 3] + "..."
    return EvaluationError(
        f"the reward of a completion {how}",
        where=f"{example['where']}, prompt {head!r}",
        got=got,
        expected="a finite number for every completion, for wrong and empty ones too",
        hint="correct the reward function; the run goes on from its last checkpoint",
    )
