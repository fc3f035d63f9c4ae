"""The text of a configuration, with comments that say why each value is what it is."""

from __future__ import annotations

import json
import re
import textwrap

from arm_ray.drafting.choices import Choice

_WIDTH = 96
# What YAML reads as a text without quotes.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_WORDS = frozenset(("true", "false", "null", "yes", "no", "on", "off", "y", "n"))


def configuration(choice: Choice, file: str) -> str:
    """A commented configuration for `arm-ray merge`.

    Args:
        choice: What is in it.
        file: How the file is called, for the commands in its comments.
    """
    lines = [
        "# A merge of checkpoints, written by `arm-ray init`.",
        f"#   arm-ray plan {file}     what it takes; starts nothing",
        f"#   arm-ray merge {file}    does it; run again, it goes on",
        "#   arm-ray config KEY      what a key means",
        *_comment(*choice.notes),
        "",
        *_comment(f"The model that the training began with: {choice.base_reason}."),
        f"base: {_value(choice.base)}",
        *_comment(f"In the order of the training. {_sentence(choice.candidates_reason)}"),
        "candidates:",
        *(f"  - {_value(path)}" for path in choice.candidates),
        *_comment("The run's directory: the model is in model/, the report in report.html."),
        f"output: {_value(choice.output)}",
        "",
        *_method(choice),
        "",
        *_calibration(choice),
    ]
    if choice.compute_dtype is not None:
        lines += [
            "",
            *_comment(
                "Weights in float32 and a learning rate of 1e-5 or less: bfloat16 would round the "
                "differences away."
            ),
            "precision:",
            f"  compute_dtype: {choice.compute_dtype}",
        ]
    if choice.as_adapter:
        lines += [
            "",
            *_comment("Have an adapter over the base written, in place of a whole model:"),
            "# output_format: adapter",
        ]
    return "\n".join([*lines, "", *_evaluation(choice), ""])


def _method(choice: Choice) -> list[str]:
    lines = [
        *_comment(f"Which operator merges: {choice.method_reason}. See docs/which-merge.md."),
        "method:",
        f"  operator: {_value(choice.method)}",
    ]
    if choice.is_single:
        lines += [
            "",
            *_comment(
                "Steps whose length no losses choose are not repeated: they would go too far."
            ),
            "schedule:",
            "  max_iterations: 1",
        ]
        if choice.step is not None:
            lines.append(f"  step: {choice.step}")
    return lines


def _calibration(choice: Choice) -> list[str]:
    if choice.data is None:
        return [
            *_comment(
                "Rows of text, prompts or chats let arm rotate, and losses choose the step and the "
                "model: 200 or more that the run was not trained on."
            ),
            "# calibration:",
            "#   path: rows.jsonl",
        ]
    lines = [
        *_comment(f"Rows that tell directions and steps apart: {choice.data_reason}."),
        "calibration:",
        f"  path: {_value(choice.data)}",
    ]
    if choice.batch_size is not None:
        lines += [
            *_comment(
                "Samples of an iteration; fewer than usual, as there are few rows.", indent="  "
            ),
            f"  batch_size: {choice.batch_size}",
        ]
    return lines


def _evaluation(choice: Choice) -> list[str]:
    if not choice.tasks:
        return [
            *_comment("Score base, checkpoints and merge with vLLM (pip install arm-ray[vllm]):"),
            "# evaluation:",
            "#   tasks: [gsm8k, math500]",
        ]
    return [
        *_comment("Base, checkpoints and merge are scored on these with vLLM."),
        "evaluation:",
        f"  tasks: [{', '.join(map(_value, choice.tasks))}]",
    ]


def _comment(*texts: str, indent: str = "") -> list[str]:
    lines = []
    for text in texts:
        lines += textwrap.wrap(
            text,
            _WIDTH,
            initial_indent=f"{indent}# ",
            subsequent_indent=f"{indent}# ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _value(text: str) -> str:
    """A text as YAML has it."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)
