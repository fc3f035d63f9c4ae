"""One decoder layer of Qwen2.5-14B's shape through one iteration of ARM, and what follows from it.

Random bfloat16 weights of a base and two candidates (three input states), 64 samples. Each stage of
an iteration is timed for itself: forward pass, capture of mean inputs, activations, factorisation,
products, the rest of the update, similarity and writing. From that follows the time of a whole 14B
iteration on this machine. For eight H100 it is computed from operations and bytes, at efficiencies
that are assumed and printed; nothing was measured there.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from arm_ray.checkpoints.weight_file import TensorSpec, write_weight_file
from arm_ray.merging.method import open_method
from arm_ray.merging.operator import TensorInputs
from arm_ray.merging.rotation import activation_rotation
from arm_ray.merging.settings import MethodSettings
from arm_ray.merging.similarity import similarity_sums
from arm_ray.model.activations import Wanted, output_shifts
from arm_ray.model.group import Decoder, GroupRunner
from arm_ray.model.layout import ModelLayout, model_layout
from benchmarks.common import report, synchronise
from benchmarks.random_models import SHAPES

SAMPLES = 64
STATES = 3
LAYERS = 48
MICRO_BATCH_TOKENS = 4096
VOCABULARY = 152064
CPU = torch.device("cpu")
SHAPE, QUICK_SHAPE = SHAPES["14b"], SHAPES["tiny"]


@dataclass(frozen=True)
class Accelerators:
    """Rates that the projection uses: data-sheet peaks, and fractions of them that are assumed.

    Attributes:
        count: GPUs.
        bf16: Dense bfloat16 operations a second of one.
        fp32: Float32, outside of the tensor cores.
        fp64: Float64, outside of the tensor cores.
        memory: Bytes a second of its memory.
        host_link: Bytes a second from it to host memory.
        disk: Bytes a second that the nodes' storage takes, all together.
        forward: Assumed fraction of `bf16` in the forward pass.
        products: Assumed fraction of `fp32` and `fp64` in thin products.
        factorisation: Assumed fraction of `fp64` in the QR of a tall matrix.
        bandwidth: Assumed fraction of `memory` and `host_link`.
    """

    count: int = 8
    bf16: float = 989e12
    fp32: float = 67e12
    fp64: float = 34e12
    memory: float = 3.35e12
    host_link: float = 64e9
    disk: float = 8e9
    forward: float = 0.4
    products: float = 0.4
    factorisation: float = 0.02
    bandwidth: float = 0.7


@dataclass(frozen=True)
class Work:
    """Operations and bytes of an iteration, by what bounds them."""

    forward_flops: float
    activation_flops: float
    factor_flops: float
    product_flops: float
    elementwise_bytes: float
    written_bytes: float


def layer_work(
    shapes: Mapping[str, tuple[int, ...]], samples: int, tokens: int, states: int, hidden: int
) -> Work:
    """What one decoder layer takes: `shapes` are its tensors, `tokens` those of one sample.

    Multiply and add count as two operations. Elementwise bytes: each input state is read in
    bfloat16 and each task vector is written, rotated (read and written twice) and added in float32,
    and the result is written and compared with base and previous state.
    """
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    parameters = float(sum(prod(shape) for shape in matrices))
    everything = float(sum(prod(shape) for shape in shapes.values()))
    contributors, n = states - 1, samples
    attention = 4.0 * tokens * tokens * hidden * samples
    return Work(
        states * (2.0 * parameters * samples * tokens + attention),
        states * 2.0 * parameters * n,
        # QR of [d_out, N], V'V and the small SVD's share.
        contributors * sum(4.0 * d_out * n * n for d_out, _ in matrices),
        # V'Y and V(TV'Y); the small products with T and the core are left out.
        contributors * 4.0 * parameters * n,
        everything * (states * 2.0 + contributors * 4.0 * 6 + 4.0 * 3),
        everything * 4.0,
    )


def times(work: Work, factor: float) -> Work:
    """So many times the work."""
    return Work(*(factor * value for value in vars(work).values()))


def projection(layers: Work, outside: int, states: int, gpus: Accelerators) -> dict[str, float]:
    """Seconds of each stage on the accelerators, and the line of arithmetic printed for each.

    Args:
        layers: The work of all decoder layers.
        outside: Parameters of embedding and head, which take a plain update.
        states: Input states.
        gpus: The rates.
    """
    count = gpus.count
    outside_bytes = outside * (2.0 * states + 4.0 * 4)
    written = layers.written_bytes + 4.0 * outside
    lines = [
        ("forward", layers.forward_flops, "flop", gpus.bf16, gpus.forward, count),
        ("activations", layers.activation_flops, "flop f64", gpus.fp64, gpus.products, count),
        ("factorisation", layers.factor_flops, "flop f64", gpus.fp64, gpus.factorisation, count),
        ("products", layers.product_flops, "flop f32", gpus.fp32, gpus.products, count),
        (
            "elementwise",
            layers.elementwise_bytes + outside_bytes,
            "bytes",
            gpus.memory,
            gpus.bandwidth,
            count,
        ),
        ("to the host", written, "bytes", gpus.host_link, gpus.bandwidth, count),
        ("to the disk", written, "bytes", gpus.disk, 1.0, 1),
    ]
    seconds = {}
    for name, amount, unit, rate, fraction, devices in lines:
        seconds[name] = amount / (devices * rate * fraction)
        print(
            f"  {name:14} {amount:.3g} {unit} / ({devices} x {rate:.3g}/s x {fraction:g})"
            f" = {seconds[name]:.3g} s"
        )
    return seconds


class Stopwatch:
    """Adds up seconds by stage, with what a stage has left to the device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to a stage."""
        synchronise(self._device)
        started = time.perf_counter()
        yield
        synchronise(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def make_layout(shape: Mapping[str, Any]) -> ModelLayout:
    """A model of one decoder layer; its vocabulary does not matter here."""
    options = {**shape, "num_hidden_layers": 1, "vocab_size": 256, "tie_word_embeddings": False}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return model_layout(config)


def make_states(layout: ModelLayout, device: torch.device) -> list[dict[str, Tensor]]:
    """A random base and candidates close to it."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: Sequence[int], scale: float) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
        return drawn * scale

    base: dict[str, Tensor] = {}
    for name, shape in layout.shapes.items():
        if layout.is_layer_tensor(name):
            random = draw(shape, 0.02)
            base[name] = torch.ones_like(random) if "norm" in name else random
    result = [base]
    for _ in range(STATES - 1):
        changed = {name: tensor + draw(tensor.shape, 0.002) for name, tensor in base.items()}
        result.append(changed)
    return result


def forward_all(
    runner: GroupRunner, states: list[dict[str, Tensor]], hidden: Tensor, wanted: Wanted
) -> list[dict[str, Tensor]]:
    """All samples of all states through the layer; returns each state's mean inputs."""
    samples, tokens = hidden.shape[:2]
    rows = max(1, MICRO_BATCH_TOKENS // tokens)
    result: list[dict[str, Tensor]] = []
    for weights in states:
        parts = []
        for start in range(0, samples, rows):
            micro = hidden[start : start + rows]
            lengths = torch.full((len(micro),), tokens, device=hidden.device)
            parts.append(runner.forward(weights, micro, lengths, wanted).means)
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        result.append(joined)
    return result


def merge_layer(
    layout: ModelLayout,
    states: list[dict[str, Tensor]],
    means: list[dict[str, Tensor]],
    watch: Stopwatch,
) -> dict[str, Tensor]:
    """Rotate and add as `merging.method` does, stage by stage; returns the new layer."""
    merged: dict[str, Tensor] = {}
    method = open_method(MethodSettings(), STATES - 1)
    for name in states[0]:
        with watch.stage("to float32"):
            reference, *others = (state[name].to(torch.float32) for state in states)
        if name in layout.rotated:
            with watch.stage("activations"):
                shifts = _shifts(states, means, name)
            with watch.stage("update"):
                total = torch.zeros_like(reference)
            for weight, shift in zip(others, shifts, strict=True):
                with watch.stage("factorisation"):
                    rotation = activation_rotation(shift)
                assert rotation is not None
                with watch.stage("update"):
                    task_vector = weight - reference
                with watch.stage("products"):
                    rotated = rotation.apply_(task_vector)
                with watch.stage("update"):
                    total += rotated
            with watch.stage("update"):
                total.mul_(method.settings.coefficient / (STATES - 1)).add_(reference)
        else:
            with watch.stage("update"):
                inputs = TensorInputs(name, reference, others, STATES - 1)
                total = method.merge(inputs).tensor
        with watch.stage("similarity"):
            similarity_sums(total, reference, reference)
        merged[name] = total
    return merged


def _shifts(
    states: list[dict[str, Tensor]], means: list[dict[str, Tensor]], name: str
) -> list[Tensor]:
    bias = name.removesuffix("weight") + "bias"
    return output_shifts(
        [state[name] for state in states],
        [state.get(bias) for state in states],
        [mean[name] for mean in means],
    )


def check(
    states: list[dict[str, Tensor]],
    means: list[dict[str, Tensor]],
    merged: Mapping[str, Tensor],
    name: str,
) -> None:
    """Make sure that what was timed is what `merging.method` computes."""
    shifts = _shifts(states, means, name)
    reference, *contributors = (state[name].to(torch.float32) for state in states)
    inputs = TensorInputs(name, reference, contributors, STATES - 1, shifts)
    expected = open_method(MethodSettings(), STATES - 1).merge(inputs).tensor
    torch.testing.assert_close(merged[name], expected, rtol=0.0, atol=0.0)


def write(merged: Mapping[str, Tensor], folder: Path) -> int:
    """Write the layer as a state does, synchronised; returns bytes."""
    specs = [TensorSpec(name, torch.float32, tuple(t.shape)) for name, t in merged.items()]
    return write_weight_file(folder / "group.safetensors", specs, merged.values())


def outside_seconds(elements: int) -> float:
    """Seconds for an element outside the layers: plain update, similarity; writing is extra."""
    method = open_method(MethodSettings(), STATES - 1)
    tensors = [torch.randn(elements).to(torch.bfloat16) for _ in range(STATES)]
    found = []
    for _ in range(3):
        started = time.perf_counter()
        reference, *others = (tensor.to(torch.float32) for tensor in tensors)
        inputs = TensorInputs("embedding", reference, others, STATES - 1)
        result = method.merge(inputs).tensor
        similarity_sums(result, reference, reference)
        found.append((time.perf_counter() - started) / elements)
    return statistics.median(found)


def measure(
    layout: ModelLayout,
    tokens: int,
    rounds: int,
    folder: Path | None,
    device: torch.device = CPU,
) -> tuple[dict[str, float], int]:
    """Median seconds of each stage of one layer, and the bytes written; without a folder none."""
    states = make_states(layout, device)
    runner = Decoder(layout, device, torch.bfloat16).runner(0)
    nothing = Wanted(means=False)
    hidden = torch.randn(
        (SAMPLES, tokens, layout.config.hidden_size),
        generator=torch.Generator(device).manual_seed(1),
        dtype=torch.bfloat16,
        device=device,
    )
    forward_all(runner, states[:1], hidden[:4], nothing)
    collected: dict[str, list[float]] = {}
    num_bytes = 0
    for number in range(rounds):
        watch = Stopwatch(device)
        with watch.stage("forward"):
            forward_all(runner, states, hidden, nothing)
        with watch.stage("with capture"):
            means = forward_all(runner, states, hidden, Wanted())
        merged = merge_layer(layout, states, means, watch)
        if folder is not None:
            with watch.stage("write"):
                num_bytes = write(merged, folder)
        if number == 0:
            check(states, means, merged, "model.layers.0.self_attn.k_proj.weight")
        for stage, seconds in watch.seconds.items():
            collected.setdefault(stage, []).append(seconds)
    middle = {stage: statistics.median(values) for stage, values in collected.items()}
    capture = max(0.0, middle.pop("with capture") - middle["forward"])
    return {"forward": middle.pop("forward"), "capture": capture, **middle}, num_bytes


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="of each sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny layer, nothing is recorded")
    arguments = parser.parse_args()
    quick = bool(arguments.quick)
    tokens = 16 if quick else int(arguments.tokens)
    layout = make_layout(QUICK_SHAPE if quick else SHAPE)
    root = Path("runs/bench")
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        seconds, num_bytes = measure(layout, tokens, 1 if quick else arguments.rounds, folder)
    finally:
        shutil.rmtree(folder)
    hidden = int(layout.config.hidden_size)
    shapes = {name: shape for name, shape in layout.shapes.items() if layout.is_layer_tensor(name)}
    work = layer_work(shapes, SAMPLES, tokens, STATES, hidden)
    total = sum(seconds.values())
    rows: list[dict[str, Any]] = [
        {"stage": stage, "s": value, "share, %": 100.0 * value / total}
        for stage, value in seconds.items()
    ]
    rows.append({"stage": "one layer", "s": total, "share, %": 100.0})
    for stage, amount, of in (
        ("forward", work.forward_flops, "bf16"),
        ("activations", work.activation_flops, "float64"),
        ("products", work.product_flops, "float32"),
    ):
        print(f"{stage}: {amount:.3g} operations, {amount / seconds[stage] / 1e9:.0f} G/s {of}")
    print(f"write: {num_bytes / 1e6:.0f} MB, {num_bytes / seconds['write'] / 1e6:.0f} MB/s")
    outside = 2 * VOCABULARY * hidden
    per_element = outside_seconds(1 << 16 if quick else 1 << 24)
    extra = outside * per_element + 4 * outside * seconds["write"] / num_bytes
    iteration = LAYERS * total + extra
    print("on this machine, one process, nothing overlapped:")
    print(f"  layers               {LAYERS} x {total:.3g} s = {LAYERS * total:.0f} s")
    print(f"  embedding and head   {outside:.3g} elements x {per_element:.3g} s, and written:")
    print(f"                       {extra:.0f} s")
    print(f"  iteration            {iteration:.0f} s = {iteration / 60:.1f} min")
    rows.append({"stage": "14B iteration, projected", "s": iteration, "share, %": ""})
    gpus = Accelerators()
    print(f"on {gpus.count} H100, all at work (a pipeline that is full), efficiencies assumed:")
    stages = projection(times(work, LAYERS), outside, STATES, gpus)
    to_disk = stages.pop("to the disk")
    device = sum(stages.values())
    print(f"  device               {device:.2f} s; the disk works meanwhile: {to_disk:.2f} s")
    rows.append({"stage": "14B on 8 H100, device, projected", "s": device, "share, %": ""})
    rows.append({"stage": "14B on 8 H100, disk, projected", "s": to_disk, "share, %": ""})
    if quick:
        for row in rows:
            print(row)
        print("a short run: nothing is recorded")
        return 0
    merging = 100.0 * (1.0 - seconds["forward"] / total)
    computed = total - seconds["write"]
    rotation = sum(seconds[stage] for stage in ("activations", "factorisation", "products"))
    title = f"One layer of Qwen2.5-14B's shape, {STATES} states, {SAMPLES} samples of {tokens} "
    title += f"tokens, bf16 forward, {torch.get_num_threads()} threads; forward is "
    title += f"{100.0 - merging:.0f}% of the time"
    report(
        "layer14b",
        title,
        rows,
        [
            (
                f"the rotation takes less than the forward passes: {rotation:.2f} s of "
                f"{computed:.2f} s computed, forward {seconds['forward']:.2f} s",
                rotation < seconds["forward"],
            )
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
