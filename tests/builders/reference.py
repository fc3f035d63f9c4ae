"""The method as one plain program: whole models, hooked outputs, dense U, dense products.

It follows the formulas and shares no code with arm_ray. Models are float32 and held whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

Weights = dict[str, torch.Tensor]


def dense_rotation(shift: torch.Tensor, sign: str, tolerance: float) -> torch.Tensor | None:
    """U, `[d_out, d_out]` float64: LAPACK's Householder QR, completed, times the SVD of R."""
    shift = shift.double()
    d_out, count = shift.shape
    u: torch.Tensor
    if count < d_out:
        q, r = torch.linalg.qr(shift, mode="complete")
        small, sigma, _ = torch.linalg.svd(r[:count])
        rest = torch.eye(d_out - count, dtype=torch.float64)
        u = q @ torch.block_diag(small, rest)  # type: ignore[no-untyped-call]
    else:
        u, sigma, _ = torch.linalg.svd(shift, full_matrices=False)
    if sigma[0] == 0:
        return None
    rank = int((sigma > tolerance * sigma[0]).sum())
    if rank < min(d_out, count):
        q, r = torch.linalg.qr(u[:, :rank], mode="complete")
        rest = torch.eye(d_out - rank, dtype=torch.float64)
        u = q @ torch.block_diag(r[:rank], rest)  # type: ignore[no-untyped-call]
    if sign == "positive_diagonal":
        u = u * torch.where(u.diagonal() < 0, -1.0, 1.0)
    return u


def mean_outputs(model: Any, samples: list[torch.Tensor]) -> Weights:
    """Linear module -> `[d_out, N]`: mean over each sample's tokens, one sample at a time."""
    columns: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:

            def record(_m: Any, _a: Any, out: torch.Tensor, name: str = name) -> None:
                columns.setdefault(f"{name}.weight", []).append(out[0].float().mean(0))

            handles.append(module.register_forward_hook(record))
    with torch.no_grad():
        for ids in samples:
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    return {name: torch.stack(values, dim=1) for name, values in columns.items()}


def batches(config: dict[str, Any], iterations: int) -> list[list[torch.Tensor]]:
    """The mini-batches of token ids: shuffled once, wrapped round."""
    calibration = config["calibration"]
    tokenizer = AutoTokenizer.from_pretrained(config["base"])
    lines = Path(calibration["path"]).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    size, count = calibration["batch_size"], len(texts)
    order = np.arange(count)
    if calibration.get("shuffle", True):
        order = np.random.Generator(np.random.PCG64(calibration.get("seed", 0))).permutation(count)
    rows = [order[i % count] for i in range(size * iterations)]
    ids = [
        torch.tensor(tokenizer(texts[row])["input_ids"][: calibration["max_length"]])
        for row in rows
    ]
    return [ids[t * size : (t + 1) * size] for t in range(iterations)]


def streaming_merge(config: dict[str, Any]) -> list[Weights]:
    """Every merged state of a configuration, float32, in order."""
    method = {"operator": "arm", "coefficient": 0.7, **config.get("method", {})}
    rotation = {"sign": "positive_diagonal", "rank_tolerance": 1e-6, **method.get("rotation", {})}
    schedule = {"initial": "base", "window_size": 2, "window_divisor": "n", **config["schedule"]}
    model = AutoModelForCausalLM.from_pretrained(config["base"], dtype=torch.float32).eval()
    base = _weights(model)
    candidates = [
        _weights(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        for path in config["candidates"]
    ]
    count, n = len(candidates), schedule["window_size"]
    anchored = schedule["anchor_iterations"]
    history = [base, *candidates]
    if anchored:
        history = [base if schedule["initial"] == "base" else candidates[-1]]
    samples = batches(config, schedule["max_iterations"])
    for t in range(1, schedule["max_iterations"] + 1):
        if t <= anchored:
            reference, others, divisor = history[-1], candidates, count
        else:
            reference, others = history[-n], history[-n + 1 :]
            divisor = n if schedule["window_divisor"] == "n" else n - 1
        scale = method["coefficient"] / divisor
        activations = {}
        if method["operator"] == "arm":
            activations = {
                id(w): _activations(model, w, samples[t - 1]) for w in (reference, *others)
            }
        new = {}
        for name, weight in reference.items():
            total = torch.zeros_like(weight)
            for other in others:
                delta = other[name] - weight
                if name in activations.get(id(other), {}):
                    shift = activations[id(other)][name] - activations[id(reference)][name]
                    u = dense_rotation(shift, rotation["sign"], rotation["rank_tolerance"])
                    delta = delta if u is None else (u @ delta.double()).float()
                total += delta
            new[name] = weight + scale * total
        history.append(new)
    return history[-schedule["max_iterations"] :]


def _activations(model: Any, weights: Weights, samples: list[torch.Tensor]) -> Weights:
    model.load_state_dict(weights, strict=False)
    return mean_outputs(model, samples)


def _weights(model: Any) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
