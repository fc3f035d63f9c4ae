"""From a sample to token ids. Runs in Ray workers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arm_ray.calibration.formats import ChatSample, TextSample
from arm_ray.errors import CalibrationError, StorageError
from arm_ray.storage.mirror import present


@lru_cache(maxsize=2)
def load_tokenizer(path: str) -> Any:
    """Loads the tokenizer in a directory, once per process. Never runs code from there.

    Raises:
        CalibrationError: If the directory holds no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer

    # The tokenizer of a checkpoint at a URL is copied to each node that needs it.
    try:
        is_there = present(path).is_dir()
    except StorageError as error:
        raise CalibrationError(
            f"The tokenizer cannot be copied here: {error.what}",
            where=error.where,
            got=error.got,
            expected=error.expected,
            hint=error.hint,
        ) from error
    if not is_there:
        raise CalibrationError(
            "The tokenizer's directory is not there.",
            where=path,
            expected="a directory with tokenizer.json or another tokenizer of transformers",
            hint="Check the path. In a cluster, every node must see it under this path.",
        )
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what this raises is not documented, and differs by version
        raise CalibrationError(
            "The tokenizer cannot be loaded.",
            where=path,
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="a tokenizer that transformers can load without running code from it",
            hint="Save the tokenizer beside the checkpoint, with its save_pretrained.",
        ) from error


def to_token_ids(
    tokenizer: Any, sample: TextSample | ChatSample, where: object
) -> NDArray[np.int32]:
    """Tokenises one sample, without cutting it.

    Args:
        tokenizer: A tokenizer of transformers.
        sample: The sample. Text gets the special tokens that the tokenizer adds by itself;
            messages go through the chat template, which brings its own.
        where: The sample's file and line, for errors.

    Returns:
        Token ids, int32 ``[length]``, length 1 or more.

    Raises:
        CalibrationError: If the sample cannot be tokenised, or holds no token at all.
    """
    try:
        ids = (
            _chat_ids(tokenizer, sample)
            if isinstance(sample, ChatSample)
            else _text_ids(tokenizer, sample)
        )
    except CalibrationError as error:
        error_at = CalibrationError(
            error.what, where=where, got=error.got, expected=error.expected, hint=error.hint
        )
        raise error_at from error
    except Exception as error:  # templates and tokenizers raise what they like
        raise CalibrationError(
            "A calibration row cannot be tokenised.",
            where=where,
            got=f"{type(error).__name__}: {_first_line(error)}",
            expected="a row that the tokenizer and its chat template accept",
            hint="Correct or remove the row.",
        ) from error
    if len(ids) == 0:
        raise CalibrationError(
            "A calibration row holds no tokens.",
            where=where,
            got="an empty sample",
            expected="at least one token",
            hint="Remove the row.",
        )
    return np.asarray(ids, dtype=np.int32)


def _text_ids(tokenizer: Any, sample: TextSample) -> list[int]:
    text = sample.text
    eos = tokenizer.eos_token
    if sample.end and eos and not text.endswith(eos):
        text += eos
    # Not verbose: it would warn about samples over the model's length, which are cut later.
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def _chat_ids(tokenizer: Any, sample: ChatSample) -> list[int]:
    if not tokenizer.chat_template:
        raise CalibrationError(
            "The calibration data are chat messages, but the tokenizer has no chat template.",
            got="no chat_template in the tokenizer",
            expected="a chat template",
            hint="Use a checkpoint whose tokenizer has one, or give the data as text, or as "
            "prompt and completion text.",
        )
    encoded = tokenizer.apply_chat_template(
        sample.messages, tools=sample.tools, tokenize=True, return_dict=True
    )
    ids: list[int] = encoded["input_ids"]
    return ids


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "no message"
