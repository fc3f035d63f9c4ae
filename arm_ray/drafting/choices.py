"""Which checkpoints to merge, and how: by docs/which-merge.md, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arm_ray.drafting.findings import RunFindings
from arm_ray.storage.regular import lines_of, open_regular

# Checkpoints that are merged where nobody says how many.
USUAL_CANDIDATES = 3
# Operators whose step is searched by default.
_SEARCHED = ("arm", "task_arithmetic")
# Learning rates at which float32 weights change by less than bfloat16 can tell.
_SMALL_RATE = 1.0e-5
# A mini-batch of the usual size, of which an iteration takes one and the comparison two.
_USUAL_ROWS = 4 * 64
_SMALLEST_BATCH = 4
# Fewer rows than that do not tell which model is better; see docs/which-merge.md.
FEW_ROWS = 100


@dataclass(frozen=True)
class Answers:
    """What a user wants; None: what is sensible for the run.

    Attributes:
        base: The model that the run began with.
        candidates: How many of the last complete checkpoints, or which.
        data: Calibration data; empty: none.
        method: The operator.
        run_dir: Where the merge's run goes.
        tasks: Benchmarks to score on.
    """

    base: str | None = None
    candidates: int | Sequence[str] | None = None
    data: str | None = None
    method: str | None = None
    run_dir: str | None = None
    tasks: Sequence[str] = ()


@dataclass(frozen=True)
class Choice:
    """A configuration's values, with the reasons that are written beside them.

    Attributes:
        base: Of the merge.
        base_reason: Where it is from.
        candidates: Directories, in the order of the training.
        candidates_reason: Which they are and why.
        data: Calibration data; None: none.
        data_reason: Where it is from, or what none means.
        method: The operator.
        method_reason: Why.
        output: Of the merge.
        is_single: Whether one iteration is all.
        step: `schedule.step`; None: the default.
        batch_size: Of the calibration; None: the default.
        compute_dtype: Of the forward pass; None: the default.
        as_adapter: Whether the result may be an adapter.
        tasks: Benchmarks.
        notes: What the user should know, beside.
    """

    base: str
    base_reason: str
    candidates: tuple[str, ...]
    candidates_reason: str
    data: str | None
    data_reason: str
    method: str
    method_reason: str
    output: str
    is_single: bool = False
    step: str | None = None
    batch_size: int | None = None
    compute_dtype: str | None = None
    as_adapter: bool = False
    tasks: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def usual_count(found: RunFindings) -> tuple[int, str]:
    """How many of the last checkpoints to merge, and why."""
    if found.is_reinforced:
        return 2, "after reinforcement learning, the last two"
    return USUAL_CANDIDATES, "the last three, or all where there are fewer"


def usual_method(found: RunFindings, has_data: bool) -> tuple[str, str]:
    """The operator, and why."""
    if not has_data:
        return "task_arithmetic", (
            "needs no data. With calibration rows, arm rotates by activations, and the length of "
            "the step is searched"
        )
    if found.are_adapters:
        return "task_arithmetic", "for LoRA adapters; arm was not better there"
    if found.is_decayed:
        return "task_arithmetic", "the learning rate was decayed: expect little, and arm no more"
    if found.is_reinforced:
        return "task_arithmetic", "after reinforcement learning a plain mean with λ = 0.7 is best"
    return "arm", "for a run that still improves, or whose learning rate was not decayed"


def choose(found: RunFindings, answers: Answers) -> Choice:
    """What is to be merged, and how; `answers.base` or `found.base` must be there."""
    base = answers.base or (found.base.value if found.base else None)
    if base is None:
        raise ValueError("base: neither given nor found")
    base_reason = "as given"
    if answers.base is None and found.base is not None:
        base_reason = f"as {found.base.by} says"
    candidates, candidates_reason = _candidates(found, answers.candidates)
    data, data_reason = _data(found, answers.data)
    method, method_reason = usual_method(found, data is not None)
    if answers.method is not None and answers.method != method:
        method, method_reason = answers.method, "as given"
    rows = None if data is None else _rows(data)
    notes = []
    if rows is not None and rows < FEW_ROWS:
        notes.append(
            f"{data} has {rows} rows: with fewer than about {FEW_ROWS} it is not known which model"
            " is better"
        )
    is_small = found.is_float32 and found.rates is not None and found.rates[0] <= _SMALL_RATE
    fixed = found.is_reinforced and data is not None and method in _SEARCHED
    return Choice(
        base,
        base_reason,
        candidates,
        candidates_reason,
        data,
        data_reason,
        method,
        method_reason,
        answers.run_dir or f"runs/{_name(found)}-merge",
        is_single=data is None or fixed or method not in _SEARCHED,
        step="fixed" if fixed else None,
        batch_size=None if rows is None or rows >= _USUAL_ROWS else _batch(rows),
        compute_dtype="float32" if is_small and data is not None else None,
        as_adapter=found.are_adapters and method == "task_arithmetic",
        tasks=tuple(answers.tasks),
        notes=tuple(notes),
    )


def _candidates(
    found: RunFindings, given: int | Sequence[str] | None
) -> tuple[tuple[str, ...], str]:
    if given is not None and not isinstance(given, int):
        return tuple(given), "as given"
    if found.path is None:
        return tuple(str(path) for path in found.complete.values()), "as given"
    count, why = usual_count(found) if given is None else (given, f"the last {given}")
    steps = sorted(found.complete)
    chosen = steps[-count:]
    told = f"{why}: of {len(steps)} complete checkpoints, steps {', '.join(map(str, chosen))}"
    if found.incomplete:
        left = ", ".join(map(str, sorted(found.incomplete)))
        told += f". Not complete, and left out: {left}"
    return tuple(str(found.complete[step]) for step in chosen), told


def _data(found: RunFindings, given: str | None) -> tuple[str | None, str]:
    if given:
        return given, "as given"
    if given is None and found.data is not None:
        return found.data.value, (
            f"the training data, as {found.data.by} says; 200 rows or more that the run was not "
            "trained on are better"
        )
    return None, "none"


def _rows(data: str) -> int | None:
    """Rows of a JSON Lines file; None: it is none."""
    path = Path(data).expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    try:
        with open_regular(path) as file:
            return sum(1 for line in lines_of(file) if line.strip())
    except OSError:
        return None


def _batch(rows: int) -> int:
    """A power of two that four mini-batches of fit into the rows."""
    size = _SMALLEST_BATCH
    while 8 * size <= rows:
        size *= 2
    return size


def _name(found: RunFindings) -> str:
    if found.path is not None:
        return found.path.name or "run"
    return found.complete[max(found.complete)].name
