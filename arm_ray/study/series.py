"""One series of a study: what is wrong with it, and what it takes of other series."""

from __future__ import annotations

from collections.abc import Sequence

from arm_ray.errors import ConfigError
from arm_ray.study.config import SeriesConfig, StepOf
from arm_ray.study.grid import SEED, SERIES, Grid, own_key_problems
from arm_ray.study.parts import Merge, Run


def check_series(grid: Grid, name: str) -> None:
    """Note what is wrong with a series by itself."""
    series, problems = grid.config.series[name], grid.problems
    where = f"series.{name}"
    if (series.train is None) == (series.checkpoints is None):
        problems.append(f"{where}: give exactly one of train and checkpoints")
    if series.start_from is not None:
        if series.train is None:
            problems.append(f"{where}.start_from: is for a series with train")
        if series.base is not None:
            problems.append(f"{where}.start_from: takes the place of base; remove one")
        if SERIES not in series.start_from:
            problems.append(f"{where}.start_from: names no series")
        grid.check(series.start_from, f"{where}.start_from")
    elif series.moments == "kept":
        problems.append(f"{where}.moments: kept is for a series with start_from")
    elif series.base is None and grid.config.base is None:
        problems.append(f"{where}.base: required, as the study has no base")
    problems += own_key_problems(series.merge, f"{where}.merge")
    taken = [
        "model",
        "output",
        "stop_after",
        "optimizer_from",
        *([SEED] if SEED in grid.labels else []),
    ]
    problems += [
        f"{where}.train.{key}: is set by the study; remove it here"
        for key in taken
        if key in (series.train or {})
    ]
    seeds = grid.labels.get(SEED, []) if name in grid.labels[SERIES] else []
    given = (series.checkpoints or {}).values()
    paths = [path for path in given if isinstance(path, str)]
    if len(seeds) > 1 and any("{seed}" not in path for path in paths):
        problems.append(
            f"{where}.checkpoints: are the same for all of axes.seed; put {{seed}} into each path"
        )
    for other in (part.series for part in given if isinstance(part, StepOf)):
        if other not in grid.labels[SERIES]:
            grid.note(
                f"{where}.checkpoints: there is no series {other!r}", other, grid.labels[SERIES]
            )


def in_order(grid: Grid) -> list[str]:
    """The series, each after those that it begins with or takes checkpoints of."""
    waiting = [str(name) for name in grid.labels[SERIES]]
    done: list[str] = []
    while waiting:
        ready = [name for name in waiting if needed_by(grid.config.series[name]) <= {*done}]
        if not ready:
            grid.problems.append(
                f"series: {', '.join(waiting)} need each other, by start_from or checkpoints, "
                "or a series that is no label of axes.series"
            )
            return []
        done += ready
        waiting = [name for name in waiting if name not in ready]
    return done


def needed_by(series: SeriesConfig) -> set[str]:
    """The series that one begins with, or takes checkpoints of."""
    given = (series.checkpoints or {}).values()
    found = {part.series for part in given if isinstance(part, StepOf)}
    return found | ({str(series.start_from[SERIES])} if series.start_from else set())


def given_checkpoints(
    grid: Grid, name: str, seed: int | None, base: str, runs: Sequence[Run]
) -> dict[int, str]:
    """Step -> path of a series that is not trained; what is wrong is noted, and left out.

    Args:
        grid: The axes.
        name: Of the series.
        seed: Of the axis.
        base: That it begins with.
        runs: Those that are there by now.
    """
    series, problems = grid.config.series[name], grid.problems
    paths = {}
    for number, part in (series.checkpoints or {}).items():
        if isinstance(part, str):
            paths[number] = part.replace("{seed}", str(seed))
            continue
        where = f"series.{name}.checkpoints.{number}"
        for run in runs:
            if (run.series, run.seed) != (part.series, seed):
                continue
            if run.base != base:
                problems.append(
                    f"{where}: {part.series} begins with {run.base}, and {name} with {base}; "
                    "expected the same base"
                )
            elif part.step not in run.checkpoints:
                known = ", ".join(map(str, run.checkpoints))
                problems.append(
                    f"{where}: no merge of {part.series} uses step {part.step}; add it to "
                    f"checkpoints.{part.series}, or take one of {known}"
                )
            else:
                paths[number] = run.checkpoints[part.step]
        known_runs = [(run.series, run.seed) for run in runs]
        if (part.series, seed) not in known_runs and not problems:
            text = "" if seed is None else f" of seed {seed}"
            problems.append(
                f"{where}: {part.series} has no cell{text} that is not excluded, so it is not "
                "trained"
            )
    return paths


def with_moments(start: Merge) -> str:
    """The checkpoint whose optimizer a series takes over that begins with a merge.

    Raises:
        ConfigError: It is not trained here, or without saving its optimizer.
    """
    training = start.run.training
    is_whole = training is not None and training.lora is None and training.runtime.zero_stage != 3
    if training is None or not is_whole or not training.save_optimizer:
        raise ConfigError(
            f"moments: kept needs the optimizer of {start.run.series}'s checkpoints: a series with "
            "a train of all weights, without ZeRO-3, and with save_optimizer: true"
        )
    return start.config.candidates[-1]
