"""Which model a merge publishes: the best of its states and of the checkpoints it was made from.

With `select.promise`, the base, every candidate and every state have their loss taken on the same
samples, which chose no step, by the layer shards themselves. A state becomes the model only if it
is better than the best checkpoint beyond the error; else that checkpoint does. The losses that are
reported in the end are of further samples, which have chosen nothing at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from arm_ray.calibration.minibatch import MiniBatch
from arm_ray.checkpoints.weight_file import write_json
from arm_ray.evaluation.losses import SampleLosses
from arm_ray.evaluation.selection import Contender, Selection, checkpoint_title, keep_promise
from arm_ray.events import ModelSelected, StateLoss
from arm_ray.runtime.merge.job import MergeJob
from arm_ray.runtime.merge.samples import Draw, draw_of
from arm_ray.runtime.output.run_directory import RunDirectory
from arm_ray.schedule import BASE, candidate_name, iteration_of, state_name
from arm_ray.storage.regular import json_in

_FILE = "selection.json"
# Runs states by their names on samples: of each, its losses.
RunLosses = Callable[[Sequence[str], Draw], list[SampleLosses]]


class Promise:
    """Compares a merge's states and checkpoints, and keeps what was found in the run directory.

    Args:
        job: The merge; its stream has rows held back.
    """

    def __init__(self, job: MergeJob) -> None:
        self._job = job
        tokens = job.config.runtime.micro_batch_tokens
        assert job.compared is not None
        validation, final = job.compared
        self._samples, self._final = draw_of(validation, tokens), draw_of(final, tokens)
        self._losses = _Kept(job.run, validation)

    @property
    def checkpoints(self) -> list[str]:
        """Names of the base and the candidates."""
        count = self._job.num_candidates
        return [BASE, *(candidate_name(i) for i in range(count))]

    def state_finished(self, iteration: int, run: RunLosses) -> None:
        """Take the loss of a state whose weights are there."""
        self._take([state_name(iteration)], run)

    def held(self, last: int | None = None) -> set[int]:
        """The iteration whose state is the best so far, which must stay.

        Args:
            last: Of the states up to this iteration; None: of all.
        """
        known = {name: iteration_of(name) for name in self._losses.known}
        best = self._best([n for n, t in known.items() if t and (last is None or t <= last)])
        found = iteration_of(best) if best else None
        return set() if found is None else {found}

    def select(self, run: RunLosses) -> Selection:
        """Take the checkpoints' losses too, and say which model is published."""
        job, made = self._job, self._job.run.finished
        states = [state_name(iteration) for iteration in sorted(made)]
        self._take([*self.checkpoints, *states], run)
        rival, best = self._best(self.checkpoints), self._best(states)
        assert rival is not None
        known = self._losses.known
        assert best is not None, "the first iteration always makes a state"
        selection = keep_promise(
            Contender(best, best, known[best].mean),
            Contender(rival, self._title(rival), known[rival].mean),
            known[best].minus(known[rival]),
            higher_is_better=False,
            what="loss",
        )
        verdict, final = selection.verdict, dict[str, SampleLosses]()
        if self._final.batches:
            shown = [*self.checkpoints, best]
            final = dict(zip(shown, run(shown, self._final), strict=True))
            verdict += "; " + self._final_text(final[best], final[rival], best, rival)
        job.reporter.write(
            ModelSelected(
                selection.name,
                verdict,
                tuple(_event(name, losses) for name, losses in known.items()),
                tuple(_event(name, losses) for name, losses in final.items()),
                self._samples.num_samples,
                self._final.num_samples,
            )
        )
        return Selection(selection.name, verdict)

    def _take(self, names: Sequence[str], run: RunLosses) -> None:
        missing = [name for name in names if name not in self._losses.known]
        if missing:
            found = run(missing, self._samples)
            self._losses.add(dict(zip(missing, found, strict=True)))

    def _best(self, names: Sequence[str]) -> str | None:
        known = self._losses.known
        return min(
            (name for name in names if name in known),
            key=lambda name: known[name].mean,
            default=None,
        )

    def _final_text(self, ours: SampleLosses, theirs: SampleLosses, best: str, rival: str) -> str:
        found = ours.minus(theirs)
        return (
            f"on {found.num_problems} samples that chose nothing: {best} {ours.mean:.4f}, "
            f"{self._title(rival)} {theirs.mean:.4f}, difference {found.difference:+.4f}, "
            f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
        )

    def _title(self, name: str) -> str:
        return checkpoint_title(name, self._job.config.candidates)


class _Kept:
    """Losses by name, in the run directory, so that what is known is not run again."""

    def __init__(self, run: RunDirectory, samples: MiniBatch) -> None:
        self._path, self._digest = run.path / _FILE, samples.digest
        self.known: dict[str, SampleLosses] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            content = json_in(self._path)
            if content["samples"] == self._digest:
                for name, columns in content["losses"].items():
                    # Of a state that is not there any more the loss still counts: see `held`.
                    self.known[name] = SampleLosses.of(_columns(columns))
        for name in [n for n in self.known if (iteration_of(n) or 0) > run.last_iteration]:
            del self.known[name]

    def add(self, found: Mapping[str, SampleLosses]) -> None:
        """Take note of losses."""
        self.known |= found
        losses = {
            name: np.stack([each.sums, each.tokens], axis=1).tolist()
            for name, each in self.known.items()
        }
        write_json(self._path, {"samples": self._digest, "losses": losses})


def _columns(rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    return np.array(rows, dtype=np.float64)


def _event(name: str, losses: SampleLosses) -> StateLoss:
    found = losses.estimate()
    return StateLoss(name, found.mean, found.low, found.high)
