"""From a row to token ids, and which of them carry loss: for training, and for losses elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arm_ray.calibration.formats import ChatSample, Layout, to_sample
from arm_ray.errors import CalibrationError


class Example(NamedTuple):
    """Token ids of one row, and the half-open ranges of them that carry loss."""

    ids: list[int]
    spans: list[tuple[int, int]]


def encode(tokenizer: Any, row: Mapping[str, Any], layout: Layout, where: object) -> Example:
    """Token ids of a row and what of them carries loss.

    Text: all of it, and the eos. Prompt and completion: the completion and the eos; the two are
    tokenised apart, so that the prompt has the same ids as at inference. Messages: the assistant's
    turns, through the chat template.

    Raises:
        CalibrationError: The row lacks a column or holds something else, or the template cannot
            be followed.
    """
    # It checks the columns, and says what is wrong with them.
    sample = to_sample(row, layout, where)
    if isinstance(sample, ChatSample):
        first = row[layout.columns[0]]
        skipped = len(first) if layout.format == "prompt_completion" else 0
        return _encode_chat(tokenizer, sample, skipped, where)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise CalibrationError(
            "the tokenizer has no end-of-sequence token",
            where=getattr(tokenizer, "name_or_path", None),
            expected="an eos_token, with which the model learns to stop",
            hint="set eos_token in tokenizer_config.json",
        )
    if layout.format == "text":
        ids = [*tokenizer(sample.text, verbose=False)["input_ids"]]
        ids += [eos] if not ids or ids[-1] != eos else []
        return Example(ids, [(0, len(ids))])
    prompt, completion = (row[name] for name in layout.columns)
    prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*prompt_ids, *completion_ids, eos]
    return Example(ids, [(len(prompt_ids), len(ids))])


def _encode_chat(tokenizer: Any, sample: ChatSample, skipped: int, where: object) -> Example:
    if not tokenizer.chat_template:
        raise CalibrationError(
            "the data are chat messages, but the tokenizer has no chat template",
            where=where,
            expected="a chat template",
            hint="use a model whose tokenizer has one, or give the data as text",
        )

    def rendered(count: int, prompt: bool) -> list[int]:
        if count == 0:
            return []
        try:
            encoded = tokenizer.apply_chat_template(
                sample.messages[:count],
                tools=sample.tools,
                add_generation_prompt=prompt,
                tokenize=True,
                return_dict=True,
            )
        except Exception as error:  # templates raise what they like
            raise CalibrationError(
                "a row cannot be put through the chat template",
                where=where,
                got=f"{type(error).__name__}: {error}",
                expected="messages that the template accepts",
                hint="correct or remove the row",
            ) from None
        ids: list[int] = list(encoded["input_ids"])
        return ids

    ids = rendered(len(sample.messages), False)
    spans = []
    for i, message in enumerate(sample.messages):
        if message["role"] != "assistant" or i < skipped:
            continue
        before, after = rendered(i, True), rendered(i + 1, False)
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise CalibrationError(
                "the chat template changes earlier messages when later ones follow, so that it "
                "cannot be told which tokens are the assistant's",
                where=where,
                got=f"message {i} is rendered differently alone and with what follows",
                expected="each conversation to start with the tokens of its own beginning",
                hint="give conversations of one assistant turn, or prompt and completion columns, "
                "or a template that keeps earlier messages (such as their reasoning) as they are",
            )
        spans.append((len(before), len(after)))
    if not spans:
        raise CalibrationError(
            "a conversation has no turn of the assistant",
            where=where,
            got="roles " + ", ".join(str(m["role"]) for m in sample.messages),
            expected="at least one message with the role 'assistant'",
            hint="correct or remove the row",
        )
    return Example(ids, spans)


def label_mask(example: Example) -> NDArray[np.bool_]:
    """Which tokens carry loss, bool ``[tokens]``. Never the first one."""
    mask = np.zeros(len(example.ids), dtype=np.bool_)
    for first, end in example.spans:
        mask[first:end] = True
    # Nothing comes before the first token that could predict it.
    mask[:1] = False
    return mask
