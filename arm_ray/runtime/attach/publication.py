"""Publishes a merged arrival, says whether it is the best, and runs the user's hook."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from arm_ray.evaluation.selection import Criterion
from arm_ray.following import publish as publishing
from arm_ray.following.config import AttachConfig
from arm_ray.following.events import ArrivalPublished
from arm_ray.following.hooks import run_hook
from arm_ray.following.journal import Arrival, Journal
from arm_ray.runtime.attach.held import HeldCheckpoints
from arm_ray.runtime.session.progress import duration
from arm_ray.runtime.session.reporter import Reporter


class ArrivalPublisher:
    """Brings merged models to where the user reads them.

    Args:
        config: The configuration.
        journal: Of what was published before.
        held: The checkpoints.
        criterion: What models are compared by; None: nothing.
        reporter: Told what is published.
    """

    def __init__(
        self,
        config: AttachConfig,
        journal: Journal,
        held: HeldCheckpoints,
        criterion: Criterion | None,
        reporter: Reporter,
    ) -> None:
        self._config, self._journal, self._held = config, journal, held
        self._criterion, self._reporter = criterion, reporter

    def publish(
        self, arrival: Arrival, model: Path, evidence: dict[str, Any], started: float
    ) -> None:
        """Publish a merged model, and write it down.

        Args:
            arrival: What was merged.
            model: The model.
            evidence: What it is made of, and its scores.
            started: When its merge was begun (`time.monotonic`).
        """
        value, beside = evidence.get("value"), evidence.get("checkpoint_value")
        is_best, why = self._is_best(value, beside)
        evidence |= {"is_best": is_best, "reason": why}
        settings = self._config.publish
        path = publishing.publish(
            model, self._config.published, arrival.step, evidence, settings.keep, is_best
        )
        seconds = round(time.monotonic() - started, 3)
        self._reporter.say(
            f"step {arrival.step}: published {path} after {duration(seconds)}"
            f"{'; it is the best' if is_best else ''} ({why})"
        )
        event = ArrivalPublished(
            arrival.step,
            arrival.members,
            str(path),
            is_best,
            value,
            beside,
            seconds,
            self._lag_s(arrival),
            evidence.get("weight_cosine"),
            evidence.get("task_vector_cosine"),
        )
        self._run_hook(event, evidence)
        self._reporter.write(event)
        self._journal.end(
            outcome="published", value=value, checkpoint_value=beside, is_best=is_best
        )

    def _lag_s(self, arrival: Arrival) -> float | None:
        """Seconds since an arrival's checkpoint was taken; None where it is held no more."""
        held = self._held.get(arrival.step)
        try:
            return None if held is None else round(time.time() - held.taken_at, 3)
        except OSError:
            return None

    def _is_best(self, value: float | None, beside: float | None) -> tuple[bool, str]:
        """Whether a merged model with this value becomes the best, and why."""
        if self._config.publish.promote == "always":
            return True, "publish.promote: always"
        assert self._criterion is not None
        if value is None or beside is None:
            return False, "it has no scores"
        best = self._journal.best
        if not self._criterion.is_better(value, beside):
            return False, f"{value:.4f} is no better than the checkpoint's {beside:.4f}"
        held = None if best is None else best.value
        if best is not None and held is not None and not self._criterion.is_better(value, held):
            return False, f"{value:.4f} is no better than {held:.4f} of step {best.step}"
        return True, f"{value:.4f}, the checkpoint {beside:.4f}"

    def _run_hook(self, event: ArrivalPublished, evidence: dict[str, Any]) -> None:
        """Tell whoever wants to know; what goes wrong there does not end the run."""
        payload = {
            "event": event.name,
            "step": event.step,
            "path": event.path,
            "is_best": event.is_best,
            "metrics": {
                name: {task: given["metrics"] for task, given in model["tasks"].items()}
                for name, model in evidence.get("models", {}).items()
            },
            "value": event.value,
            "checkpoint_value": event.checkpoint_value,
        }
        result = run_hook(self._config.publish.hook, payload)
        for problem in result.problems:
            self._reporter.warn(f"step {event.step}: {problem}")
