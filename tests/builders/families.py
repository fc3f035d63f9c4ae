"""The families of models that are tried, and the page about them.

``python -m tests.builders.families > docs/families.md`` writes the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from arm_ray.errors import NotACheckpointError
from arm_ray.model.architecture import architecture_of
from arm_ray.model.gate import Tried, tiny_model_config, try_family
from arm_ray.model.layout import ModelLayout, model_layout

# Decoders on text: dense, then mixtures of experts, then with other layers than attention.
DENSE = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "olmo3",
    "glm",
    "glm4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "exaone4",
    "cohere",
    "cohere2",
    "ernie4_5",
    "hunyuan_v1_dense",
    "arcee",
    "smollm3",
    "granite",
    "apertus",
    "nemotron",
    "helium",
    "stablelm",
    "starcoder2",
    "gpt_neox",
    "falcon",
)
EXPERTS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "phimoe",
    "granitemoe",
    "ernie4_5_moe",
    "glm4_moe",
    "minimax_m2",
    "deepseek_v3",
    "mimo_v2_flash",
    "gpt_oss",
    "llama4_text",
)
HYBRID = (
    "qwen3_5_text",
    "qwen3_next",
    "qwen3_5_moe_text",
    "nemotron_h",
    "lfm2",
    "bamba",
    "granitemoehybrid",
    "kimi_linear",
    "jamba",
)
# Models of several parts, of which the text's is run.
WRAPPED = ("gemma3", "qwen3_vl", "qwen2_5_vl", "qwen3_5", "mistral3", "internvl")
# What cannot be run group by group, each for another reason.
REFUSED = ("gpt2", "opt", "gemma4_text", "bert", "t5")
FAMILIES = (*DENSE, *EXPERTS, *HYBRID, *WRAPPED)

# Settings of published checkpoints that the defaults of a family leave out.
_SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": {"rope_parameters": _SECTIONS}},
}


def config_of(family: str) -> Any:
    """A configuration of the family, in the sizes of its defaults."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **_SETTINGS.get(family, {}))


@dataclass(frozen=True)
class Row:
    """What is known of a family.

    Attributes:
        family: transformers' name of it.
        class_name: transformers' class of its models.
        tried: What came of trying it.
        layout: Of a small model; None: it has no layers that are found.
    """

    family: str
    class_name: str
    tried: Tried
    layout: ModelLayout | None


def row_of(family: str) -> Row:
    """Try a family."""
    config = config_of(family)
    tried = try_family(config)
    try:
        tiny = tiny_model_config(config)
        name = type(architecture_of(tiny).model).__name__
        layout = model_layout(tiny)
    except NotACheckpointError:
        return Row(family, "", tried, None)
    return Row(family, name, tried, layout)


def _ends(names: Iterable[str]) -> str:
    """What weights are called in a layer, without numbers: of each expert alike."""
    ends = {re.sub(r"^.*?\.\d+\.", "", name) for name in names}
    short = {re.sub(r"\.\d+\.", ".N.", end).removesuffix(".weight") for end in ends}
    return ", ".join(f"`{end}`" for end in sorted(short))


def page(rows: Iterable[Row]) -> str:
    """The page, as Markdown."""
    import transformers

    text = _HEAD.format(version=transformers.__version__)
    for row in rows:
        if row.layout is None or row.tried.why_not is not None:
            why = " ".join((row.tried.why_not or "").split())
            text += f"| {row.family} | {row.class_name} | no: {why} | | |\n"
            continue
        layout = row.layout
        rotated = layout.rotated - layout.rotated_as(row.tried.unseen)
        matrices = [
            name
            for name in layout.layer_numbers
            if name not in rotated and len(layout.shapes[name]) > 1
        ]
        text += (
            f"| {row.family} | {row.class_name} | yes | {_ends(rotated)} | {_ends(matrices)} |\n"
        )
    return text


_HEAD = """<!-- Written by: python -m tests.builders.families > docs/families.md -->

# Families of models

arm_ray has no list of families. Whatever transformers can build as a causal language model is
taken, from its own modules and its own tables of names. Two things differ between families:

- **Merging without activations** (Task Arithmetic, TIES, SLERP, averages and every other operator
  that needs no calibration) works for every checkpoint in safetensors, also of a family that
  transformers does not have, and of models without a decoder.
- **Forward passes** (ARM, line searches, losses) need a decoder that gives the same bits run layer
  group by layer group as run whole. This is tried at the start of each such merge, with a small
  model of the checkpoint's own configuration and random weights, which takes about a tenth of a
  second. A family that fails is refused with the reason, before anything long starts.

The table shows what came of trying each family with a small model of the default configuration of
transformers {version}. "Rotated" are the weights whose task vectors ARM rotates, each expert's by
itself. "Not rotated" are the other matrices of the layers, which are merged linearly, as are
embeddings, norms, biases and heads: routers, convolutions, and experts whose inputs cannot be seen
from outside a family's code. Models of several parts (the last ones) are run on text; their vision
towers and projectors are merged linearly.

| family | class | forward passes | rotated | not rotated |
|---|---|---|---|---|
"""


if __name__ == "__main__":
    print(page(map(row_of, (*FAMILIES, *REFUSED))), end="")
