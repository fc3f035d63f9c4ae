"""Whether other programs can load a model that was written: looked at before it is published."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from arm_ray.checkpoints import states
from arm_ray.checkpoints.huggingface import open_checkpoint
from arm_ray.errors import NotACheckpointError
from arm_ray.model.architecture import architecture_of
from arm_ray.model.remote_code import load_trusted


def loading_problems(directory: Path, *, trusts_code: bool = False) -> list[str]:
    """What keeps transformers or vLLM from loading a model directory; empty: nothing.

    The configuration is read, the class that it names is built on the `meta` device and compared
    with the tables of the weight files, and the tokenizer and the generation settings are loaded.
    Where vLLM is installed, its table of classes is searched, without importing it. No weights are
    read, and no code of the directory is run unless it is trusted.

    Args:
        directory: Of the model.
        trusts_code: Whether its classes are in it.

    Returns:
        A sentence each.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config: Any = (
            load_trusted(directory)
            if trusts_code
            else AutoConfig.from_pretrained(directory, trust_remote_code=False)
        )
        found = _of_weights(directory, config, trusts_code=trusts_code)
    except Exception as error:  # the library raises many types
        return [f"its configuration or weights cannot be loaded: {_line(error)}"]
    if (directory / "generation_config.json").is_file():
        try:
            GenerationConfig.from_pretrained(directory)
        except Exception as error:  # the same
            found.append(f"generation_config.json cannot be loaded: {_line(error)}")
    if states.has_tokenizer(directory):
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # the same
            found.append(f"its tokenizer cannot be loaded: {_line(error)}")
        else:
            rows = config.get_text_config(decoder=True).vocab_size
            if len(tokenizer) > rows:
                found.append(
                    f"its tokenizer has {len(tokenizer)} tokens, but the embedding only {rows} "
                    "rows: it is not the model's"
                )
    return found


def _of_weights(directory: Path, config: Any, *, trusts_code: bool) -> list[str]:
    """The same of the class that the configuration names, and its tensors."""
    import transformers

    [name] = config.architectures
    if not trusts_code and not hasattr(transformers, name):
        return [f"transformers, as it is installed, has no class {name}"]
    found = []
    if not vllm_knows(name):
        found.append(f"vLLM, as it is installed, has no class {name}")
    try:
        architecture = architecture_of(config, name)
    except NotACheckpointError:
        return found  # no causal language model, and its tensors are those of the base
    stored = {n: entry.shape for n, entry in open_checkpoint(directory).tensors.items()}
    weights, _ = architecture.weights(stored)
    made = {each for weight in weights for each in weight.names}
    other = sorted(architecture.shapes.keys() - made)
    for weight in weights:
        if weight.make is None and stored[weight.stored[0]] != architecture.shapes[weight.names[0]]:
            other.append(weight.stored[0])
    if other:
        found.append(
            f"{name} does not have the tensors of its files; the first that differs is {other[0]}"
        )
    return found


def vllm_knows(name: str) -> bool:
    """Whether vLLM has a class for models of this architecture; also where it is not installed.

    Args:
        name: As `architectures` of a configuration has it.
    """
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        return True
    # Importing it takes seconds, and starts what belongs to an engine.
    table = Path(package.origin).parent / "model_executor" / "models" / "registry.py"
    return not table.is_file() or f'"{name}"' in table.read_text(encoding="utf-8")


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
