"""The model card of a merged model."""

from __future__ import annotations

from pathlib import Path

import yaml

import arm_ray
from arm_ray.checkpoints.naming import hub_id
from arm_ray.checkpoints.states import StateManifest
from arm_ray.config import MergeConfig
from arm_ray.report.scores import Scores, scores_as_markdown
from arm_ray.schedule import state_name
from arm_ray.secrets import hidden
from arm_ray.storage.atomic import write_text

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
{verdict}{scores}
## Make it again

These give the same model from the same checkpoints, with the configuration below as `merge.yaml`;
on the same kind of processor, bit for bit.

```
pip install arm-ray=={version}
arm-ray merge merge.yaml
```

```yaml
{config}```
"""


_ADAPTER = """
It is a LoRA adapter of rank {rank} over the base, to be loaded with PEFT.
"""


_SCORES = """
## Scores

Means over problems in %, losses in nats per token, ± half a {confidence:.0%} interval (bootstrap
over problems). This model is **{state}**.

{table}
"""


def write_model_card(
    directory: Path,
    config: MergeConfig,
    last: StateManifest,
    adapter_rank: int | None = None,
    scores: Scores | None = None,
    chosen: tuple[str, str] | None = None,
) -> None:
    """Write `README.md`: front matter for the hub, what was merged, and the whole configuration.

    Args:
        directory: Where.
        config: The configuration.
        last: What the state was made of that became the model.
        adapter_rank: Of an adapter; None: it is a whole model.
        scores: Of the checkpoints and states; None where nothing was scored.
        chosen: Name of the state or checkpoint that became the model, and why; None: `last` did.
    """
    name, verdict = chosen or (state_name(last.iteration), "")
    models = [hub_id(given) for given in (config.base, *config.candidates)]
    known = list(dict.fromkeys(model for model in models if model is not None))
    front: dict[str, object] = {
        # The hub takes ids of its own models alone.
        **({"base_model": known, "base_model_relation": "merge"} if known else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "arm-ray", config.method.operator],
    }
    if adapter_rank is not None:
        front |= {"library_name": "peft"} | ({"base_model_relation": "adapter"} if known else {})
    text = _TEMPLATE.format(
        front_matter=yaml.safe_dump(front, sort_keys=False),
        title=Path(config.output).name,
        count=len(config.candidates),
        operator=config.method.operator,
        form="" if adapter_rank is None else _ADAPTER.format(rank=adapter_rank),
        base=config.base,
        candidates=", ".join(f"`{name}`" for name in config.candidates),
        coefficient=_coefficient(config),
        anchored=config.schedule.anchor_iterations,
        window=config.schedule.window_size,
        done=last.iteration,
        weight_cosine=last.weight_cosine,
        task_vector_cosine=last.task_vector_cosine,
        verdict=f"\n{verdict}\n" if verdict else "",
        scores=_scores_text(config, name, scores),
        version=arm_ray.__version__,
        config=hidden(config.to_yaml()),
    )
    write_text(directory / "README.md", text)


def _coefficient(config: MergeConfig) -> str:
    if "coefficient" not in config.method.by_part:
        return str(config.method.coefficient)
    parts = config.method.values("coefficient")
    return "; ".join(f"{' to '.join(map(str, of))} (`{part}`)" for part, of in parts.items())


def _scores_text(config: MergeConfig, name: str, scores: Scores | None) -> str:
    if not scores or config.evaluation is None:
        return ""
    table = scores_as_markdown(scores, name)
    return _SCORES.format(confidence=config.evaluation.confidence, state=name, table=table)
