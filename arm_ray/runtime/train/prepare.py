"""What of a training is known before anything is started: its data and its steps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.training.config import GrpoConfig, SftConfig
from arm_ray.training.data import encode_rows, layout_of, make_stream, question_of, read_data
from arm_ray.training.split import keep_apart


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is started: see `run_sft`."""

    payload: Any
    digest: str
    rows: int
    kept: int
    steps: int
    length: int
    notes: tuple[str, ...]


def prepare_sft(config: SftConfig, model: Path) -> Prepared:
    """Read, tokenize and order the rows of a fine-tuning.

    Raises:
        ArmRayError: The data or the tokenizer cannot be used, or the configuration does not fit.
    """
    tokenizer = load_tokenizer(str(model))
    rows, columns = read_data(config.data)
    layout = layout_of(config.data, columns)
    questions = [question_of(row, layout) for _, row in rows]
    rows, notes = keep_apart(rows, questions, config.apart_from, config.on_overlap)
    encoded, report = encode_rows(
        tokenizer,
        rows,
        layout,
        max_length=config.max_length,
        too_long=config.too_long,
        where=config.data.path,
    )
    if report.too_long:
        what = "cut" if config.too_long == "cut" else "dropped"
        notes.append(
            f"{report.too_long} of {report.rows} rows have more than {config.max_length} tokens: "
            f"{what}"
        )
    if report.without_labels:
        notes.append(
            f"{report.without_labels} of {report.rows} rows dropped: nothing in them carries loss "
            f"within {config.max_length} tokens"
        )
    stream = make_stream(
        encoded,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=config.steps,
        epochs=config.epochs,
        pack_to=config.max_length if config.packing else None,
    )
    digest = hashlib.sha256()
    for part in (encoded.ids, encoded.is_label, encoded.starts):
        digest.update(np.ascontiguousarray(part).tobytes())
    return Prepared(
        stream,
        digest.hexdigest(),
        report.rows,
        report.kept,
        len(stream) // config.batch_size,
        int(config.max_length if config.packing else encoded.lengths.max()),
        tuple(notes),
    )


def prepare_grpo(config: GrpoConfig, model: Path) -> Prepared:
    """Read the prompts of a training by GRPO; as `prepare_sft`."""
    from arm_ray.training.grpo_data import prepare_prompts

    tokenizer = load_tokenizer(str(model))
    prompts = prepare_prompts(config, tokenizer)
    count = len(prompts.rows)
    steps = config.steps
    if steps is None:
        per_step = config.batch_size // config.num_generations
        steps = max(1, int(np.ceil(count * (config.epochs or 1.0) / per_step - 1e-9)))
    return Prepared(
        prompts.rows,
        hashlib.sha256(json.dumps(prompts.rows, default=str).encode()).hexdigest(),
        prompts.read,
        count,
        steps,
        prompts.longest + config.max_completion_length,
        prompts.notes,
    )
