"""Score models on the demo's held-out problems.

::

    python examples/smollm2/evaluate.py base=runs/smollm2/base arm=runs/smollm2/merge_arm/model

Two numbers per model: the loss (negative log-likelihood in nats per completion token, over all
held-out rows) and exact match (greedy answers whose final number is right, over the first
``--generate-rows`` rows). Results are kept in one JSON file under a digest of each model's
weights, so an unchanged model is not scored again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from arm_ray.errors import ArmRayError, NotACheckpointError
from jobs.sft import collate, encode, label_losses, pick_device, read_rows

Scores = dict[str, float]


def weights_digest(model: Path) -> str:
    """SHA-256 over the names and contents of the weight files.

    Raises:
        NotACheckpointError: The directory has no weight file.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise NotACheckpointError("the path holds no model.safetensors", where=model)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def final_number(text: str) -> str | None:
    """The last number in the text, which is the right-hand side of an equation."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return re.sub(r"\.0*$|(\.\d*?)0+$", r"\1", number)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``count`` items."""
    for start in range(0, count, size):
        yield slice(start, start + size)


@torch.inference_mode()
def score_loss(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], size: int) -> Scores:
    """Loss per label token, with the standard error over rows."""
    rows = [encode(tokenizer, *text, max_length=1024) for text in texts]
    rows.sort(key=lambda row: len(row.ids))
    sums: list[float] = []
    counts: list[int] = []
    for part in chunks(len(rows), size):
        batch = collate(rows[part], tokenizer.pad_token_id)
        per_row = batch.is_label.sum(dim=1).tolist()
        losses = label_losses(model, batch).double().cpu()
        sums += [piece.sum().item() for piece in torch.split(losses, per_row)]
        counts += per_row
    loss = sum(sums) / sum(counts)
    # Tokens of one row are not independent, rows are: the error of a ratio of two sums over rows.
    spread = sum((total - loss * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return {"loss": loss, "loss_error": math.sqrt(spread) / sum(counts)}


@torch.inference_mode()
def score_exact_match(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], size: int, max_new_tokens: int
) -> Scores:
    """Share of greedy answers with the right final number, with its standard error."""
    tokenizer.padding_side = "left"
    # Rows of like length together: less padding, and the short ones end together.
    texts = sorted(texts, key=lambda text: len(text[0]))
    right = 0
    for part in chunks(len(texts), size):
        prompts = [prompt for prompt, _ in texts[part]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for answer, (_, completion) in zip(answers, texts[part], strict=True):
            right += final_number(answer) == final_number(completion)
    share = right / len(texts)
    return {
        "exact_match": share,
        "exact_match_error": math.sqrt(share * (1 - share) / len(texts)),
    }


def score(path: Path, texts: Sequence[tuple[str, str]], options: argparse.Namespace) -> Scores:
    """Both numbers of one model."""
    begin = time.perf_counter()
    dtype = getattr(torch, options.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.to(pick_device(options.device)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    scores = score_loss(model, tokenizer, texts, options.batch_size)
    scores |= score_exact_match(
        model,
        tokenizer,
        texts[: options.generate_rows],
        options.generate_batch_size,
        options.max_new_tokens,
    )
    return {**scores, "seconds": round(time.perf_counter() - begin, 1)}


def show(results: dict[str, Scores], rows: int, generated: int) -> None:
    """Print the table."""
    table = Table(title="Held-out word problems (± one standard error)")
    table.add_column("model")
    table.add_column(f"loss, nats per token (n = {rows})", justify="right")
    table.add_column(f"exact match (n = {generated})", justify="right")
    for name, scores in results.items():
        table.add_row(
            name,
            f"{scores['loss']:.3f} ± {scores['loss_error']:.3f}",
            f"{scores['exact_match']:.1%} ± {scores['exact_match_error']:.1%}",
        )
    Console().print(table)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Score models on the held-out problems.")
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--data", type=Path, default=here / "data" / "heldout.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2/evaluation.json"))
    parser.add_argument("--generate-rows", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=32, help="for the loss")
    parser.add_argument("--generate-batch-size", type=int, default=100)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    for model in options.models:
        if "=" not in model:
            parser.error(f"got {model!r}, expected NAME=DIR")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    options = parse(arguments)
    transformers.logging.disable_progress_bar()
    try:
        texts = read_rows(options.data, ("prompt", "completion"))
        settings = {
            "data": hashlib.sha256(options.data.read_bytes()).hexdigest(),
            "generate_rows": min(options.generate_rows, len(texts)),
            "max_new_tokens": options.max_new_tokens,
            "dtype": options.dtype,
        }
        stored: dict[str, Any] = {}
        if options.output.is_file():
            stored = json.loads(options.output.read_text(encoding="utf-8"))
        if stored.get("settings") != settings:
            stored = {"settings": settings, "models": {}}
        results: dict[str, Scores] = {}
        for model in options.models:
            name, _, path = model.partition("=")
            digest = weights_digest(Path(path))
            if digest not in stored["models"]:
                print(f"scoring {name} ({path})", flush=True)
                stored["models"][digest] = {"path": path, **score(Path(path), texts, options)}
                options.output.parent.mkdir(parents=True, exist_ok=True)
                part = options.output.with_suffix(".part")
                part.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
                os.replace(part, options.output)
            results[name] = stored["models"][digest]
    except ArmRayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    show(results, len(texts), settings["generate_rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
