"""Checkpoints behind URLs: whole models tensor by tensor, adapters by a local copy."""

from __future__ import annotations

import re
from pathlib import Path

from arm_ray.checkpoints.fp8 import read_as_bfloat16
from arm_ray.checkpoints.huggingface import INDEX_NAME, SINGLE_NAME, Checkpoint
from arm_ray.checkpoints.naming import FormatOrAuto
from arm_ray.checkpoints.peft import CONFIG_NAME, open_adapter
from arm_ray.checkpoints.remote import open_remote
from arm_ray.errors import CheckpointError, NotACheckpointError
from arm_ray.storage.mirror import mirror, with_adapter
from arm_ray.storage.store import Store, require
from arm_ray.storage.urls import SCHEMES

_FLATTENED = re.compile(rf"\b({'|'.join(SCHEMES)}):/(?!/)")


def open_url(
    given: str,
    base: Checkpoint | None,
    format: FormatOrAuto,  # noqa: A002 - the user's word for it
    scratch: Path,
) -> Checkpoint:
    """Open the checkpoint at a URL. Reads its configuration and headers, and no weights.

    Args:
        given: The URL of its directory.
        base: What an adapter is added to.
        format: How to read it; auto: as it looks.
        scratch: Where its configuration and tokenizer are copied to, and an adapter whole.

    Raises:
        StorageError: It cannot be read, or nothing is there.
        CheckpointError: Any of its kinds.
        DiskSpaceError: There is no room for the copy.
    """
    store = Store(given)
    if format not in ("auto", "hf", "peft"):
        raise NotACheckpointError(
            "checkpoints of this format are not read from URLs",
            where=store,
            got=format,
            expected="safetensors files with config.json, or a LoRA adapter",
            hint="copy the directory to a disk that all nodes see, and name that",
        )
    files = store.files()
    require(files, store.url)
    models = {SINGLE_NAME, INDEX_NAME} & files.keys()
    try:
        if format == "peft" or (format == "auto" and CONFIG_NAME in files and not models):
            if base is None:
                raise NotACheckpointError(
                    "the URL holds an adapter, and there is no base to add it to",
                    where=store,
                    got=CONFIG_NAME,
                    expected="a whole model",
                    hint="name the model that it was trained on as the base",
                )
            return open_adapter(mirror(store, scratch, with_adapter), base)
        return read_as_bfloat16(open_remote(store, mirror(store, scratch)))
    except CheckpointError as error:
        raise _with_whole_url(error) from None


def _with_whole_url(error: CheckpointError) -> CheckpointError:
    """The same error; in a path made of a URL one of two slashes is missing."""
    where = None if error.where is None else _FLATTENED.sub(r"\1://", error.where)
    return type(error)(
        error.what, where=where, got=error.got, expected=error.expected, hint=error.hint
    )
