"""What a newcomer does with an installed arm_ray, on checkpoints that are made on the spot.

Writes a small base and three checkpoints of a run, has `arm-ray init` write a configuration for
them, plans, merges, and loads the result with transformers. Run by `scripts/release_check.sh` with
the Python of an environment that has nothing but arm_ray, from an empty directory:

    python newcomer.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import arm_ray


def run(*arguments: str) -> str:
    """Call `arm-ray` as a shell would; returns what it printed."""
    program = Path(sys.executable).parent / "arm-ray"
    print("$ arm-ray", *arguments, flush=True)
    done = subprocess.run(  # noqa: S603 -- our own program
        [str(program), *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode != 0:
        sys.exit(f"arm-ray {arguments[0]} ended with exit code {done.returncode}")
    return done.stdout


def write_checkpoints(base: Path, run_directory: Path) -> None:
    """A base, and what a training of it would leave: three checkpoints that drift away from it."""
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(base)
    for step in (10, 20, 30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(run_directory / f"checkpoint-{step}")


def main() -> None:
    """All of it."""
    where = Path(arm_ray.__file__).parent
    print(f"arm_ray {arm_ray.__version__} in {where}, Python {sys.version.split()[0]}", flush=True)
    if not (where / "py.typed").is_file():
        sys.exit("the package has no py.typed")
    base, run_directory = Path("base"), Path("sft")
    write_checkpoints(base, run_directory)
    checkpoints = [str(run_directory / f"checkpoint-{step}") for step in (20, 30)]
    run("--version")
    run("init", str(base), *checkpoints, "--output", "merge.yaml", "--yes")
    run("plan", "merge.yaml")
    run("merge", "merge.yaml", "output=merged")
    run("report", "merged")
    merged = AutoModelForCausalLM.from_pretrained("merged/model")
    last = AutoModelForCausalLM.from_pretrained(checkpoints[-1])
    moved = max(
        float((new - old).detach().abs().max())
        for new, old in zip(merged.parameters(), last.parameters(), strict=True)
    )
    if not 0.0 < moved < 1.0:
        sys.exit(f"the merged model is {moved} from the last checkpoint, expected above 0, below 1")
    print("ok", flush=True)


if __name__ == "__main__":
    main()
