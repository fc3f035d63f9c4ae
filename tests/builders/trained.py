"""A tiny base and checkpoints of a training run on it: their losses fall as in real runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.builders.merge_case import MergeCase
from tests.builders.models import save, save_tokenizer, tiny_model

_WORDS = ("seven", "two", "green", "red")
_STEPS = (5, 10)


def write_questions(path: Path, rows: int, seed: int = 0) -> Path:
    """Prompts, and completions that repeat a word of theirs."""
    choose = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            words = choose.choices(_WORDS, k=choose.randint(2, 6))
            row = {"prompt": "Ann has " + " ".join(words), "completion": f" {words[0]} apples"}
            file.write(json.dumps(row) + "\n")
    return path


def trained_case(
    root: Path, family: str = "smollm2", rows: int = 96, learning_rate: float = 0.03
) -> MergeCase:
    """A base, two checkpoints of gradient descent on questions, and other such questions."""
    case, model = MergeCase(root), tiny_model(family, seed=1)
    save_tokenizer(save(model, root / "base"))
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    write_questions(root / "calibration.jsonl", rows)
    texts = write_questions(root / "train.jsonl", 32, seed=9).read_text().splitlines()
    samples = [encoded(tokenizer, text) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence([s[0] for s in samples], True)
    labels = torch.nn.utils.rnn.pad_sequence([s[1] for s in samples], True, -100)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for step in range(1, _STEPS[-1] + 1):
        optimizer.zero_grad()
        # Padding is on the right, where no label sees it.
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        if step in _STEPS:
            case.candidates.append(save(model, root / f"checkpoint-{step}"))
    return case


def encoded(tokenizer: Any, line: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a question, and its labels: -100 for the prompt."""
    row = json.loads(line)
    prompt = tokenizer(row["prompt"])["input_ids"]
    rest = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(prompt + rest), torch.tensor([-100] * len(prompt) + rest)


def plain_loss(model: Path | Any, tokenizer: Path, lines: list[str]) -> float:
    """Mean of -log p over the completions' tokens, by transformers, sample by sample."""
    network: Any = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model
    known, total, tokens = AutoTokenizer.from_pretrained(tokenizer), 0.0, 0
    for line in lines:
        ids, labels = encoded(known, line)
        count = int((labels != -100).sum())
        with torch.no_grad():
            total += float(network(input_ids=ids[None], labels=labels[None]).loss) * count
        tokens += count
    return total / tokens
