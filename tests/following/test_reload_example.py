"""A running `vllm serve` takes over what attach publishes, by the example's hook."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from arm_ray.following.hooks import HookSettings, run_hook
from tests.builders.models import SERVED, fine_tuned, save, save_tokenizer, tiny_model
from tests.builders.paths import ROOT

pytestmark = pytest.mark.minutes
PROMPT = [5, 80, 33, 120, 7]
NUM_TOKENS = 8


class Server:
    """A vLLM server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        found: dict[str, Any] = json.loads(text) if text else {}
        return found

    def complete(self) -> list[int]:
        sampling = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
        body = {"model": "served", "prompt": PROMPT, "return_token_ids": True, **sampling}
        ids: list[int] = self.ask("/v1/completions", body)["choices"][0]["token_ids"]
        return ids


def greedy(path: Path) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_model("smollm2", seed=1, num_layers=2, sizes=SERVED)
    paths = {"base": save_tokenizer(save(base, root / "base"))}
    for step in (10, 20):
        moved = fine_tuned(base, seed=step, scale=0.1)
        paths[f"step-{step:06d}"] = save_tokenizer(save(moved, root / f"step-{step:06d}"))
    return paths


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    env = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
    command = [
        # What `vllm serve` runs, which wants the name of the package for GPUs.
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(models["base"]),
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served",
        "--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory-bytes", "50000000",
        "--worker-extension-cls", "arm_ray.evaluation.vllm_worker.WeightsExtension",
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env={**env, "VLLM_SERVER_DEV_MODE": "1"}, stdout=file, stderr=file, cwd=ROOT
        )
    found = Server(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                found.ask("/health")
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def test_the_server_takes_over_the_best_model_alone(
    server: Server, models: dict[str, Path]
) -> None:
    hook = str(ROOT / "examples" / "attach" / "reload_vllm.py")
    settings = HookSettings(command=(sys.executable, hook, server.address), retries=0)
    expected = {name: greedy(path) for name, path in models.items()}
    assert len({tuple(ids) for ids in expected.values()}) == 3
    assert server.complete() == expected["base"]
    for name, is_best, serves in (
        ("step-000010", True, "step-000010"),
        ("step-000020", False, "step-000010"),
        ("step-000020", True, "step-000020"),
    ):
        step = int(name.removeprefix("step-"))
        payload = {"step": step, "path": str(models[name]), "is_best": is_best}
        assert run_hook(settings, payload).problems == ()
        assert server.complete() == expected[serves]
        assert server.ask("/weight_info") == {"weight_version": serves}
    wrong = {"step": 30, "path": str(models["base"] / "nothing"), "is_best": True}
    assert "HTTP 500" in run_hook(settings, wrong).problems[0]


def test_a_server_that_is_not_there_is_told() -> None:
    hook = str(ROOT / "examples" / "attach" / "reload_vllm.py")
    settings = HookSettings(command=(sys.executable, hook, "http://127.0.0.1:1"), retries=0)
    [problem] = run_hook(settings, {"step": 1, "path": "/x", "is_best": True}).problems
    assert "refused" in problem
