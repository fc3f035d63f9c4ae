"""Tiny random models of each family, and their checkpoints."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from arm_ray.config import MergeConfig, parse_merge_config
from tests.doubles import in_process, stores
from tests.doubles.plain_engine import PlainEngineActor

ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
# vLLM's attention on CPUs wants heads of 32 or more.
SERVED = {"hidden_size": 128, "intermediate_size": 160}
# Fixtures that start Ray, a server, or trainers.
PROCESSES = {"local_ray", "object_store", "shards"}
WORDS = ("seven", "red", "apples", "and", "two", "green", "ones", "are", "in", "Ann", "has", "left")
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> configuration class, settings beside SIZES
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3.2": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": ROPE}),
    "smollm2": (LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2.5": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 16}),
}


def tiny_model(
    family: str, seed: int, num_layers: int = 3, sizes: dict[str, int] | None = None
) -> PreTrainedModel:
    """A random model; norms and biases are random as well, so that no tensor is trivial."""
    cls, extra = FAMILIES[family]
    config = cls(**{**SIZES, **(sizes or {})}, num_hidden_layers=num_layers, **extra)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.15 * noise)
    return model


def fine_tuned(model: PreTrainedModel, seed: int, scale: float = 0.03) -> PreTrainedModel:
    """A copy with every parameter moved a little, as training would."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return copy


def save(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Save a copy of a model as a Hugging Face checkpoint in `dtype`."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_tokenizer(path: Path) -> Path:
    """A byte-level BPE tokenizer of 320 tokens with a chat template, in a checkpoint directory."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    )
    fast.save_pretrained(path)
    return path


def write_texts(path: Path, rows: int = 24, seed: int = 0) -> Path:
    """A JSON Lines file of random short texts of different lengths."""
    choose = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            text = " ".join(choose.choices(WORDS, k=choose.randint(2, 20)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


class MergeCase:
    """A base, candidates and calibration texts on disk, and configurations for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.candidates: list[Path] = []

    def make(
        self,
        family: str = "smollm2",
        count: int = 2,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        num_layers: int = 3,
        rows: int = 24,
        sizes: dict[str, int] | None = None,
    ) -> MergeCase:
        """Write the checkpoints and the calibration file."""
        base = tiny_model(family, seed=1, num_layers=num_layers, sizes=sizes)
        save_tokenizer(save(base, self.root / "base", dtype, max_shard_size))
        for i in range(count):
            path = self.root / f"checkpoint-{10 * (i + 1)}"
            self.candidates.append(save(fine_tuned(base, seed=10 + i), path, dtype, max_shard_size))
        write_texts(self.root / "calibration.jsonl", rows)
        return self

    def content(self, output: str = "run") -> dict[str, Any]:
        """Configuration content: 8 samples an iteration, 2 anchored iterations and 2 of window."""
        return {
            "base": str(self.root / "base"),
            "candidates": [str(path) for path in self.candidates],
            "output": str(self.root / output),
            "calibration": {
                "path": str(self.root / "calibration.jsonl"),
                "batch_size": 8,
                "max_length": 32,
            },
            "schedule": {"anchor_iterations": 2, "max_iterations": 4, "tolerance": 0.0},
            "runtime": {"layer_shards": 1, "micro_batch_tokens": 96},
        }

    def config(self, *overrides: str, output: str = "run") -> MergeConfig:
        """A configuration with overrides."""
        return parse_merge_config(self.content(output), overrides)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes (see the tiers in CONTRIBUTING.md), and run long files first.

    So that at the end no worker is left with a long one. Within a file the order stays.
    """
    ranks: dict[Path, int] = {}
    for item in items:
        if PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.processes)
        marked = [item.get_closest_marker(name) is not None for name in ("minutes", "processes")]
        rank = (*marked, True).index(True)
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture
def case(tmp_path: Path) -> MergeCase:
    """An empty `MergeCase`."""
    return MergeCase(tmp_path)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests that need one, with slots for four shards."""
    # Workers are new processes: they find the package, and tests that define tasks, by this path.
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Workers keep the environment that Ray began with: they are told now where the object store
        # of the tests will listen.
        runtime_env={"env_vars": {"PYTHONPATH": paths, **stores.ENVIRONMENT}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def shards_in_process(
    request: pytest.FixtureRequest, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer shards are no actors, unless the test is marked so (see `tests.doubles.in_process`)."""
    if request.node.get_closest_marker("actors") is None:
        monkeypatch.setattr("arm_ray.runtime.merge.run.placed_shards", in_process.placed_shards)


@pytest.fixture(params=["in process", pytest.param("ray train", marks=pytest.mark.minutes)])
def trainers(
    request: pytest.FixtureRequest, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Where training runs: in this process (`tests.doubles.in_process`), or on Ray Train."""
    if request.param == "in process":
        monkeypatch.setattr("arm_ray.runtime.train._on_ray_train", in_process.on_ray_train)
    return str(request.param)


@pytest.fixture(params=["plain", pytest.param("vllm", marks=pytest.mark.minutes)])
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What models are scored by: vLLM's engines, or plain ones (`tests.doubles.plain_engine`).

    Plain ones are no actors, unless the test is marked so (see `tests.doubles.in_process`).
    """
    if request.param == "plain":
        if request.node.get_closest_marker("actors") is None:
            gang = "arm_ray.runtime.scoring.evaluator.EvaluatorGang"
            monkeypatch.setattr(gang, in_process.PlainEvaluators)
        monkeypatch.setattr("arm_ray.runtime.scoring.evaluator.EngineActor", PlainEngineActor)
    return str(request.param)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.builders.trainer_shards` writes, by two processes."""
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("shards")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.builders.trainer_shards", str(root)],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0][-3000:]
    return root


@pytest.fixture(scope="session")
def object_store() -> Iterator[None]:
    """A local S3 server; see `bucket`."""
    with stores.s3_server():
        yield


@pytest.fixture
def bucket(object_store: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of a new bucket on a local S3 server, with the environment to reach it."""
    for name, value in stores.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # The default scratch directory is below it.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    stores.make_bucket(name)
    return f"s3://{name}"
