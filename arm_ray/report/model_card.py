"""The model card of a merged model."""

from __future__ import annotations

from pathlib import Path

import yaml

from arm_ray.checkpoints.states import StateManifest
from arm_ray.config import MergeConfig

_TEMPLATE = """---
{front_matter}---

# {title}

A merge of {count} checkpoint(s) into their base, made without training by
[arm_ray](https://arxiv.org/abs/2602.03237) with the operator `{operator}`.
{form}
| | |
|---|---|
| base | `{base}` |
| candidates | {candidates} |
| operator | `{operator}`, coefficient {coefficient} |
| schedule | {anchored} anchored iteration(s), then a sliding window of {window}; {done} done |
| cos(W_t, W_t-1) | {weight_cosine} |
| cos of the task vectors | {task_vector_cosine} |

## Configuration

```yaml
{config}```
"""


_ADAPTER = """
It is a LoRA adapter of rank {rank} over the base, to be loaded with PEFT.
"""


def write_model_card(
    directory: Path, config: MergeConfig, last: StateManifest, adapter_rank: int | None = None
) -> None:
    """Write `README.md`: front matter for the hub, what was merged, and the whole configuration.

    Args:
        directory: Where.
        config: The configuration.
        last: What the last state was made of.
        adapter_rank: Of an adapter; None: it is a whole model.
    """
    front = {
        "base_model": [config.base],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "arm-ray", config.method.operator],
    }
    if adapter_rank is not None:
        front |= {"library_name": "peft", "base_model_relation": "adapter"}
    text = _TEMPLATE.format(
        front_matter=yaml.safe_dump(front, sort_keys=False),
        title=Path(config.output).name,
        count=len(config.candidates),
        operator=config.method.operator,
        form="" if adapter_rank is None else _ADAPTER.format(rank=adapter_rank),
        base=config.base,
        candidates=", ".join(f"`{name}`" for name in config.candidates),
        coefficient=config.method.coefficient,
        anchored=config.schedule.anchor_iterations,
        window=config.schedule.window_size,
        done=last.iteration,
        weight_cosine=last.weight_cosine,
        task_vector_cosine=last.task_vector_cosine,
        config=config.to_yaml(),
    )
    (directory / "README.md").write_text(text, encoding="utf-8")
