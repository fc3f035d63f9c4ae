"""Families whose code lies in the checkpoint: run only where the configuration trusts them by name.

transformers copies the code into a package of its own cache and imports it from there. That happens
once in each process that needs the model: the driver, and every layer shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_ray.checkpoints.huggingface import read_json
from arm_ray.errors import NotACheckpointError
from arm_ray.model.imports import import_model_classes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CONFIG, _MODEL = "AutoConfig", "AutoModelForCausalLM"


def has_code(content: Mapping[str, Any]) -> bool:
    """Whether a `config.json` says that its classes are in the checkpoint."""
    return isinstance(content.get("auto_map"), Mapping)


def load_trusted(directory: Path) -> PretrainedConfig:
    """Read a configuration by the checkpoint's own code, and make its model class known.

    Args:
        directory: Has `config.json` and the code. It runs here.

    Raises:
        NotACheckpointError: It names no classes for a causal language model, or has them elsewhere.
    """
    import_model_classes()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    # Before transformers looks: it would run the code of any repository in its cache.
    known = read_json(directory / "config.json").get("auto_map") or {}
    wrong = [key for key in (_CONFIG, _MODEL) if not isinstance(known.get(key), str)]
    # `owner/name--module.Class` is code of a repository on the hub, which nobody named here.
    elsewhere = [known[key] for key in (_CONFIG, _MODEL) if "--" in str(known.get(key))]
    if wrong or elsewhere:
        raise NotACheckpointError(
            "the checkpoint's own code is not all in it",
            where=directory / "config.json",
            got=f"auto_map {dict(known)!r}",
            expected=f"{_CONFIG} and {_MODEL}, of files in this directory",
            hint="download the code into the directory, and write `module.Class` into auto_map",
        )
    for module in (known[key].rpartition(".")[0] for key in (_CONFIG, _MODEL)):
        if not (directory / f"{module}.py").is_file():
            raise NotACheckpointError(
                "a file of the checkpoint's own code is missing",
                where=directory / f"{module}.py",
                expected="the code that auto_map of config.json names",
                hint="copy the .py files beside the base's config.json",
            )
    config: Any = AutoConfig.from_pretrained(
        directory, trust_remote_code=True, local_files_only=True
    )
    kind: Any = get_class_from_dynamic_module(known[_MODEL], directory, local_files_only=True)
    if kind.config_class is not type(config):
        kind.config_class = type(config)
    AutoModelForCausalLM.register(type(config), kind, exist_ok=True)
    found: PretrainedConfig = config
    return found
