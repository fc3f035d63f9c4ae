"""The axes of a study and their combinations, the cells. Pure.

Labels are compared as texts, so that `1` in one place of a file is the `"1"` of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from arm_ray.config.reading import nearest
from arm_ray.presets import merged
from arm_ray.study.columns import COLUMNS
from arm_ray.study.config import StudyConfig

Label = str | int
SERIES, SEED, CALIBRATION_SEED, CANDIDATES, TASK = (
    "series",
    "seed",
    "calibration_seed",
    "candidates",
    "task",
)
KNOWN_AXES = (SERIES, SEED, CALIBRATION_SEED, CANDIDATES)
# What results and tables have columns for: no names of axes.
RESERVED = frozenset({*COLUMNS, "average"})
# Keys of a merge that the study sets.
OWN_KEYS = ("base", "candidates", "output", "push_to_hub")


@dataclass(frozen=True)
class Cell:
    """One combination of the axes.

    Attributes:
        labels: Axis -> label, of all axes, in their order.
        steps: Of the candidates.
        dotted: What the axes set of the merge, one after another.
    """

    labels: Mapping[str, Label]
    steps: tuple[int, ...]
    dotted: tuple[Mapping[str, Any], ...] = ()

    @property
    def series(self) -> str:
        """Name of its series."""
        return str(self.labels[SERIES])

    @property
    def seed(self) -> int | None:
        """Seed of the training; None: that of its series."""
        return self.labels.get(SEED)  # type: ignore[return-value]

    def __str__(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.labels.items())


@dataclass
class Grid:
    """The axes, read, and what is wrong with them.

    Attributes:
        labels: Axis -> its labels, in the order of the file; known axes first.
        problems: One line each.
    """

    config: StudyConfig
    labels: dict[str, list[Label]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        axes = self.config.axes
        self._candidates: dict[str, list[tuple[int, ...]]] = {}
        self._values: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._read_series(axes.get(SERIES))
        for axis in (SEED, CALIBRATION_SEED):
            if axis in axes:
                self._read_seeds(axis, axes[axis])
        self._read_candidates(axes.get(CANDIDATES))
        for axis, given in axes.items():
            if axis not in KNOWN_AXES:
                self._read_values(axis, given)
        for index, selector in enumerate(self.config.exclude):
            self.check(selector, f"exclude.{index}")

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that models are scored on."""
        return [task.name for task in self.config.evaluation.task_settings]

    def cells(self, series: str) -> Iterator[Cell]:
        """The cells of a series, without those that are excluded."""
        known = [axis for axis in (SEED, CALIBRATION_SEED) if axis in self.labels]
        others = [axis for axis in self.labels if axis not in KNOWN_AXES]
        for seeds in product(*(self.labels[axis] for axis in known)):
            for steps in self._candidates.get(series, []):
                for chosen in product(*(self.labels[axis] for axis in others)):
                    labels: dict[str, Label] = {SERIES: series}
                    labels |= dict(zip(known, seeds, strict=True))
                    labels |= {CANDIDATES: candidates_label(steps)}
                    labels |= dict(zip(others, chosen, strict=True))
                    dotted = tuple(self._values[a][str(labels[a])] for a in others)
                    if not any(matches(selector, labels) for selector in self.config.exclude):
                        yield Cell(labels, steps, dotted)

    def check(self, selector: Mapping[str, Any], where: str) -> None:
        """Note what a selector names and is not there."""
        for axis, asked in selector.items():
            if axis not in self.labels:
                self.note(f"{where}: there is no axis {axis!r}", axis, self.labels)
                continue
            known = [str(label) for label in self.labels[axis]]
            for label in labels_of(axis, asked):
                if label not in known:
                    self.note(f"{where}.{axis}: there is no {label!r}", label, known)

    def note(self, problem: str, got: str, known: Any) -> None:
        """Note a problem with a name, and which names there are."""
        names = [str(name) for name in known]
        self.problems.append(f"{problem}; {nearest(got, names) or 'known: ' + ', '.join(names)}")

    def _read_series(self, given: Any) -> None:
        names = [*self.config.series] if given is None else given
        if not isinstance(names, list) or not names:
            self.problems.append(f"axes.series: got {names!r}; expected a list of names")
            names = []
        for name in names:
            if name not in self.config.series:
                self.note(
                    f"axes.series: there is no series {name!r}", str(name), self.config.series
                )
        self.labels[SERIES] = [name for name in names if name in self.config.series]

    def _read_seeds(self, axis: str, given: Any) -> None:
        is_good = isinstance(given, list) and given and all(type(seed) is int for seed in given)
        if not is_good or min(given) < 0 or len(set(given)) < len(given):
            self.problems.append(
                f"axes.{axis}: got {given!r}; expected a list of different integers, at least 0"
            )
            return
        self.labels[axis] = given

    def _read_candidates(self, given: Any) -> None:
        by_series = given
        if isinstance(given, list):
            by_series = dict.fromkeys(map(str, self.labels[SERIES]), given)
        if not isinstance(by_series, dict) or not by_series:
            self.problems.append(
                f"axes.candidates: got {given!r}; expected lists of steps: [[10, 20], [20]], or for"
                " each series such lists"
            )
            by_series = {}
        self.labels[CANDIDATES] = []
        for series, lists in by_series.items():
            where = f"axes.candidates{'' if isinstance(given, list) else f'.{series}'}"
            if series not in self.config.series:
                self.note(f"{where}: there is no series {series!r}", series, self.config.series)
                continue
            if not isinstance(lists, list) or not lists or not all(map(_are_steps, lists)):
                text = f"{where}: got {lists!r}; expected lists of steps: [[10, 20], [20]]"
                if text not in self.problems:
                    self.problems.append(text)
                continue
            self._candidates[series] = list(dict.fromkeys(tuple(steps) for steps in lists))
        for series in self.labels[SERIES]:
            self.labels[CANDIDATES] += map(candidates_label, self._candidates.get(str(series), []))
            if by_series and series not in by_series:
                self.problems.append(f"axes.candidates: there are none for the series {series!r}")
        self.labels[CANDIDATES] = list(dict.fromkeys(self.labels[CANDIDATES]))

    def _read_values(self, axis: str, given: Any) -> None:
        if axis in RESERVED or not axis.isidentifier():
            self.problems.append(
                f"axes.{axis}: results have a column of this name; choose another one"
                if axis in RESERVED
                else f"axes.{axis}: expected a name of letters, digits and underscores"
            )
            return
        if isinstance(given, list) or not given:
            near = nearest(axis, KNOWN_AXES)
            self.problems.append(
                f"axes.{axis}: got {given!r}; expected label -> dotted keys of the merge: "
                f"{{a: {{method.coefficient: 0.7}}}}{'; ' + near if near else ''}"
            )
            return
        for label, keys in given.items():
            where = f"axes.{axis}.{label}"
            if keys is not None and not isinstance(keys, dict):
                self.problems.append(f"{where}: got {keys!r}; expected dotted keys of the merge")
                given = {**given, label: {}}
            self.problems += own_key_problems(keys or {}, where)
        self._values[axis] = {str(label): keys or {} for label, keys in given.items()}
        self.labels[axis] = [*map(str, given)]


def candidates_label(steps: Sequence[int]) -> str:
    """The label of candidates: `10+20`."""
    return "+".join(map(str, steps))


def labels_of(axis: str, asked: Any) -> list[str]:
    """The labels that a selector asks for; a list of steps is one label of candidates."""
    if axis == CANDIDATES and _are_steps(asked):
        return [candidates_label(asked)]
    return [str(label) for label in (asked if isinstance(asked, list) else [asked])]


def matches(selector: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """Whether labels are those that a selector asks for."""
    return all(str(labels.get(axis)) in labels_of(axis, asked) for axis, asked in selector.items())


def with_dotted(content: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Content with dotted keys set; sections are merged key by key."""
    result = dict(content)
    for dotted, value in keys.items():
        for part in reversed(dotted.split(".")):
            value = {part: value}
        result = merged(result, value)
    return result


def own_key_problems(content: Mapping[str, Any], where: str) -> list[str]:
    """What content sets that only the study may set, a line each."""
    return [
        f"{where}.{key}: is set by the study; remove it here" for key in OWN_KEYS if key in content
    ]


def _are_steps(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(s) is int and s > 0 for s in value)
