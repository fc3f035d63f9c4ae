"""The names that are stable, and the page about them (docs/api.md).

    python -m arm_ray.public_api > docs/api.md

A name that is not here may change with any version.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

# Module -> its stable names.
PUBLIC: Mapping[str, tuple[str, ...]] = {
    "arm_ray": (
        "merge",
        "evaluate",
        "attach",
        "plan",
        "load_config",
        "MergeResult",
        "EvaluateResult",
        "AttachResult",
        "Score",
        "ArmRayError",
        "__version__",
    ),
    "arm_ray.merging": (
        "merge_tensors",
        "merge_state_dicts",
        "method_settings",
        "MethodSettings",
        "OPERATOR_NAMES",
        "activation_rotation",
        "minimal_rotation",
        "Rotation",
        "find_operator",
        "open_method",
        "Method",
        "Operator",
        "Statistics",
        "TaskVectors",
        "TensorInputs",
    ),
    "arm_ray.integrations": ("AttachCallback",),
}
# Modules that are run.
JOBS: tuple[str, ...] = ("merge", "evaluate", "pipeline", "study", "attach", "sft", "grpo")
_HEAD = """\
# Python API

What a program can rely on. The names on this page, the commands of `arm-ray`, the keys in
[configuration.md](configuration.md) and the events in [metrics.md](metrics.md) stay what they are;
any other name may change with any version. This page is generated, and a test holds it:
`python -m arm_ray.public_api > docs/api.md`.

```python
import arm_ray

result = arm_ray.merge("merge.yaml", schedule__max_iterations=4)
print(result.path, result.best)
for score in result.scores:
    print(score.model, score.task, score.mean, score.low, score.high)
```

`import arm_ray` loads nothing else; what a function needs is imported when it is called. A
configuration is a YAML file, a mapping of the same content, or what `load_config` returns.
Overrides are keywords, with two underscores where a configuration has a section
(`schedule__max_iterations=4`), or a mapping of dotted keys
(`overrides={"method.coefficient": 0.5}`). What goes wrong is an `ArmRayError`; its kinds are in
`arm_ray.errors`. A first merge, with models made on the spot:
[examples/notebooks/first_merge.ipynb](../examples/notebooks/first_merge.ipynb).

On tensors, without Ray and files:

```python
from arm_ray.merging import merge_state_dicts

merged = merge_state_dicts(base, [one, two], "task_arithmetic", coefficient=0.7)
```

Beside a training with transformers or TRL, in one line:

```python
from arm_ray.integrations import AttachCallback

trainer = SFTTrainer(model, args, train_dataset=rows, callbacks=[AttachCallback()])
```

The callback has `arm-ray attach` merge each new checkpoint, and ends it with the training
([attach.md](attach.md)).
"""
_JOBS_HEAD = """\
## Jobs

Each is run with `ray job submit … -- python -m MODULE CONFIG.yaml [section.key=value …]`. In a
checkout, `jobs.merge` and so on are the same, for `--working-dir .`.
"""


def as_markdown() -> str:
    """The page docs/api.md."""
    lines = [_HEAD]
    for module, names in PUBLIC.items():
        lines.append(f"## `{module}`\n")
        found = importlib.import_module(module)
        for name in names:
            lines += [*_entry(name, getattr(found, name)), ""]
    lines.append(_JOBS_HEAD)
    lines += [f"- `arm_ray.jobs.{name}`" for name in JOBS]
    return "\n".join(lines) + "\n"


def _entry(name: str, value: Any) -> Iterator[str]:
    yield f"### `{name}`\n"
    if isinstance(value, type) or callable(value):
        yield "```py"
        yield from _signature(name, value)
        yield "```\n"
        yield "```text"
        yield inspect.cleandoc(value.__doc__ or "")
        yield "```"
    elif isinstance(value, tuple):
        yield from textwrap.wrap(", ".join(f"`{item}`" for item in value), 96)
    else:
        yield "The version of the package." if name == "__version__" else repr(value)


def _signature(name: str, value: Any) -> Iterator[str]:
    """A call, with one argument in a line where it is long."""
    if isinstance(value, type) and issubclass(value, Exception):
        yield f"class {name}(Exception)"
        return
    signature = inspect.signature(value)
    kind = "class" if isinstance(value, type) else "def"
    returned = signature.return_annotation
    end = "" if kind == "class" or returned is inspect.Signature.empty else f" -> {returned}"
    shown = [_argument(text) for text in signature.parameters.values()]
    at = next(
        (i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY), None
    )
    if at is not None:
        shown.insert(at, "*")
    line = f"{kind} {name}({', '.join(shown)}){end}"
    if len(line) <= 96:
        yield line
        return
    yield f"{kind} {name}("
    for argument in shown:
        yield f"    {argument},"
    yield f"){end}"


def _argument(parameter: inspect.Parameter) -> str:
    # Defaults that are objects have an address in their text.
    text = re.sub(r"= <factory>|= <.*>", "= …", str(parameter))
    return re.sub(r"['\"]([A-Za-z_][\w\[\], |.]*)['\"](?= =|$)", r"\1", text)


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
