"""What a study asks for: trainings, merges and models to score, each named by what decides it.

::

    output/trainings/SERIES-DIGEST/        a training run
    output/cells/LABELS-DIGEST/cell.json   what became of a merge
    output/cells/LABELS-DIGEST/run/        the run directory of the merge
    output/scores/MODEL/                   records of a scored model
    output/results.parquet, results.jsonl  all numbers, one row each
    output/tables/, output/figures/        what is made of them

A digest is that of all keys that decide a result. So a cell that asks for the same merge as another
shares it, what is there is found again, and a study can be extended by any axis.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arm_ray.config import MergeConfig, parse_merge_config
from arm_ray.errors import ArmRayError, ConfigError
from arm_ray.identity import identity
from arm_ray.planning.methods import method_of
from arm_ray.study.config import StudyConfig
from arm_ray.study.grid import (
    CALIBRATION_SEED,
    SEED,
    Cell,
    Grid,
    matches,
    own_key_problems,
    with_dotted,
)
from arm_ray.study.parts import Merge, Run, ScoredModel, saved_steps
from arm_ray.study.series import (
    check_series,
    given_checkpoints,
    in_order,
    needed_by,
    with_moments,
)
from arm_ray.study.shown import check_shown
from arm_ray.training.config import GrpoConfig, SftConfig, TrainingConfig, parse_training_config

# Of a digest, in names of directories.
_DIGITS = 8
_LONGEST_LABEL = 80
# Labels that one line of problems names.
_SHOWN = 3


class Study:
    """The parts of a study, each checked as its own command checks it.

    Args:
        config: The study.
        source: File that it is from, for errors.

    Attributes:
        axes: Axis -> its labels.
        cells: All cells, in the order of the axes.
        runs: In an order in which each follows the merges that it begins with.
        merges: Name -> merge, in the order of the cells.
        models: Name -> base or checkpoint that is scored.

    Raises:
        ConfigError: All that cannot be, a line each.
    """

    def __init__(self, config: StudyConfig, source: str = "config") -> None:
        self.config = config
        self.output = config.output.expanduser().resolve()
        self._grid = Grid(config)
        self.axes = self._grid.labels
        self._problems = self._grid.problems
        self.cells: list[Cell] = []
        self.runs: list[Run] = []
        self.merges: dict[str, Merge] = {}
        self.models: dict[str, ScoredModel] = {}
        self._tokens: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._merge_of: dict[tuple[str, ...], str] = {}
        # What is wrong -> the cells that it is wrong with.
        self._failures: dict[str, list[Cell]] = {}
        self._problems += own_key_problems(config.merge, "merge")
        for name in config.series:
            check_series(self._grid, name)
        if isinstance(config.checkpoints, dict):
            for name in config.checkpoints:
                if name not in config.series:
                    self._grid.note(
                        f"checkpoints: there is no series {name!r}", name, config.series
                    )
        if not self._problems:
            for name in in_order(self._grid):
                self._open_series(name)
            for text, found in self._failures.items():
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                named = "; ".join(map(str, found[:_SHOWN]))
                self._problems.append(f"cell ({named}){more}: {text}")
            if not self.cells and not self._problems:
                self._problems.append("exclude: no cell is left")
        for kind, shown in (("tables", config.tables), ("figures", config.figures)):
            for name, given in shown.items():
                check_shown(self._grid, self.cells, f"{kind}.{name}", name, given)
        if self._problems:
            count = len(self._problems)
            raise ConfigError(
                "\n".join(
                    [
                        f"the study has {count} problem{'s' if count > 1 else ''}",
                        *(f"  - {problem}" for problem in self._problems),
                    ]
                ),
                where=source,
                hint="correct the keys above; nothing was started",
            )

    @property
    def levels(self) -> list[int]:
        """The levels of the runs, ascending."""
        return sorted({run.level for run in self.runs})

    @property
    def starts(self) -> set[str]:
        """Names of the merges whose models trainings begin with."""
        return {run.start for run in self.runs if run.start is not None}

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that models are scored on."""
        return self._grid.tasks

    @property
    def scores(self) -> Path:
        """Where models' records are."""
        return self.output / "scores"

    def merge_of(self, cell: Cell) -> Merge:
        """The merge that a cell asks for."""
        return self.merges[self._merge_of[_key(cell)]]

    def run_of(self, cell: Cell) -> Run:
        """The run whose checkpoints a cell merges. Its merge may be another run's as well."""
        return next(r for r in self.runs if (r.series, r.seed) == (cell.series, cell.seed))

    def _open_series(self, name: str) -> None:
        cells = list(self._grid.cells(name))
        for seed in dict.fromkeys(cell.seed for cell in cells):
            mine = [cell for cell in cells if cell.seed == seed]
            run = self._open_run(name, seed, mine)
            if run is None:
                continue
            for cell in mine:
                try:
                    self._open_cell(cell, run)
                except ArmRayError as error:
                    self._failures.setdefault(_text(error), []).append(cell)

    def _open_run(self, name: str, seed: int | None, cells: Sequence[Cell]) -> Run | None:
        series = self.config.series[name]
        start = None if series.start_from is None else self._start(name, series.start_from, seed)
        if series.start_from is not None and start is None:
            return None
        if start is None:
            base = root = str(series.base or self.config.base)
            base_model = "base" if base == self.config.base else f"{_slug(name)}-base"
        else:
            base, base_model, root = str(start.model), start.name, start.run.root
        extra = self.config.checkpoints
        extra = extra.get(name, []) if isinstance(extra, dict) else extra
        steps = sorted({step for cell in cells for step in cell.steps} | set(extra))
        try:
            training = self._training(name, seed, start, base, steps)
        except ArmRayError as error:
            self._problems.append(f"series.{name}.train: {_text(error)}")
            return None
        if training is None:
            paths = given_checkpoints(self._grid, name, seed, base, self.runs)
            if len(paths) < len(series.checkpoints or {}):
                return None
            saved, label = sorted(paths), _slug(name if seed is None else f"{name}-seed{seed}")
        else:
            saved, label = saved_steps(training), training.output.name
            paths = {step: str(training.output / f"checkpoint-{step}") for step in steps}
        missing = [step for step in steps if step not in saved]
        if missing:
            self._problems.append(
                f"series.{name}: has no checkpoint of step {', '.join(map(str, missing))}; it has "
                + ", ".join(map(str, saved))
            )
            return None
        others = [run.level for run in self.runs if run.series in needed_by(series)]
        level = max(others, default=0) if start is None else start.run.level + 1
        names = {step: self._names.setdefault(paths[step], f"{label}-{step}") for step in steps}
        run = Run(name, seed, base, base_model, root, paths, names, training,
                  start.name if start else None, level)  # fmt: skip
        self.runs.append(run)
        if start is None:
            self._add_model(ScoredModel(base_model, base, base, run))
        for step in steps:
            self._add_model(ScoredModel(names[step], paths[step], base, run))
        return run

    def _add_model(self, model: ScoredModel) -> None:
        known = self.models.setdefault(model.name, model)
        if known.path != model.path:
            self._problems.append(
                f"series: {model.run.series} and {known.run.series} would have models of the same "
                f"name, {model.name}; rename one"
            )

    def _start(self, name: str, selector: Mapping[str, Any], seed: int | None) -> Merge | None:
        """The merge that a series begins with."""
        asked = dict(selector)
        if seed is not None:
            asked.setdefault(SEED, seed)
        names = {
            self._merge_of[_key(cell)]
            for cell in self.cells
            if matches(asked, cell.labels) and _key(cell) in self._merge_of
        }
        if len(names) == 1:
            return self.merges[names.pop()]
        if not self._problems:
            self._problems.append(
                f"series.{name}.start_from: names {len(names)} different merges; expected labels "
                "of one cell"
            )
        return None

    def _training(
        self, name: str, seed: int | None, start: Merge | None, base: str, steps: Sequence[int]
    ) -> TrainingConfig | None:
        series = self.config.series[name]
        if series.train is None:
            return None
        content = copy.deepcopy(series.train)
        content |= {"model": base, "output": str(self.output / "trainings" / "x")}
        if seed is not None:
            content[SEED] = seed
        if start is not None and series.moments == "kept":
            content["optimizer_from"] = with_moments(start)
        model = SftConfig if series.job == "sft" else GrpoConfig
        parsed: TrainingConfig = parse_training_config(model, content, source="train")
        if parsed.save_total_limit is not None:
            raise ConfigError("save_total_limit: would remove checkpoints that are used; remove it")
        digest = self._digest({"job": series.job, **parsed.identity()})
        label = name if seed is None else f"{name}-seed{seed}"
        output = self.output / "trainings" / self._directory("trainings", label, digest)
        for step in saved_steps(parsed):
            self._tokens[str(output / f"checkpoint-{step}")] = f"@{digest}/{step}"
        # As far as it is used; a later study may have it go on.
        last = max(steps, default=None)
        return parsed.model_copy(update={"output": output, "stop_after": last})

    def _open_cell(self, cell: Cell, run: Run) -> None:
        self.cells.append(cell)
        content = self._merge_content(cell)
        content["base"] = run.base
        content["candidates"] = [run.checkpoints[step] for step in cell.steps]
        content["output"] = "x"
        config = parse_merge_config(content, source="merge")
        method_of(config)
        decides = identity(MergeConfig, config.model_dump(mode="json"), with_model=True)
        if not config.method.needs_calibration:
            # It reads no samples: their order makes no other merge.
            decides.pop("calibration", None)
        digest = self._digest(decides)
        name = self._directory("cells", self._label(cell), digest)
        known = self.merges.get(name)
        if known is None:
            output = self.output / "cells" / name / "run"
            config = config.model_copy(update={"output": str(output)})
            self._tokens[str(output / "model")] = f"@{digest}"
        else:
            config = known.config
        cells = (cell,) if known is None else (*known.cells, cell)
        run = run if known is None else known.run
        self.merges[name] = Merge(name, digest, config, run, cells)
        self._merge_of[_key(cell)] = name

    def _merge_content(self, cell: Cell) -> dict[str, Any]:
        # A study looks at the models: states in between would only take room.
        content: dict[str, Any] = {"keep_states": "none"}
        for keys in (self.config.merge, self.config.series[cell.series].merge, *cell.dotted):
            content = with_dotted(content, keys)
        if CALIBRATION_SEED in cell.labels and content.get("calibration") is not None:
            content = with_dotted(content, {"calibration.seed": cell.labels[CALIBRATION_SEED]})
        return content

    def _label(self, cell: Cell) -> str:
        prefix = {SEED: "seed", CALIBRATION_SEED: "calibration"}
        return "-".join(f"{prefix.get(axis, '')}{label}" for axis, label in cell.labels.items())

    def _digest(self, decides: Mapping[str, Any]) -> str:
        """SHA-256 of what decides a result, with names of our own in place of our own paths."""
        text = json.dumps(_replaced(decides, self._tokens), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _directory(self, room: str, label: str, digest: str) -> str:
        """Name of a directory: the one that is there, whatever the axes were called then."""
        digest = digest[:_DIGITS]
        there = sorted((self.output / room).glob(f"*-{digest}"))
        if there:
            return there[0].name
        known = self._names.get(digest)
        if known is None:
            known = self._names[digest] = f"{_slug(label)[:_LONGEST_LABEL]}-{digest}"
        return known


def _key(cell: Cell) -> tuple[str, ...]:
    return tuple(f"{axis}={label}" for axis, label in cell.labels.items())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9+._]+", "-", text.lower()).strip("-.") or "x"


def _text(error: ArmRayError) -> str:
    """An error in one line."""
    lines = [line.strip().removeprefix("- ") for line in error.what.splitlines()]
    # The first of several only counts the others.
    what = "; ".join(lines[1:] if len(lines) > 1 else lines)
    parts = [what, *(f"got {error.got}" for _ in [0] if error.got is not None)]
    parts += [f"expected {error.expected}" for _ in [0] if error.expected is not None]
    return "; ".join(" ".join(part.split()) for part in parts)


def _replaced(content: Any, tokens: Mapping[str, str]) -> Any:
    if isinstance(content, Mapping):
        return {key: _replaced(value, tokens) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replaced(value, tokens) for value in content]
    return tokens.get(content, content) if isinstance(content, str) else content
