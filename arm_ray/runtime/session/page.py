"""The report of a run, written when the run ends; it never fails a run, nor holds it up."""

from __future__ import annotations

import threading
from pathlib import Path

from arm_ray.runtime.session.reporter import Reporter

# How long the end of a run waits for a page that is being written.
_WAIT_S = 30.0


def write_page(run: Path, reporter: Reporter) -> None:
    """Write a run's report; where that fails, say so and nothing else.

    Args:
        run: Its directory, with all that it has come to.
        reporter: Told where the page is, or why there is none.
    """
    try:
        reporter.say(f"report: {_written(run)}")
    except Exception as error:  # the run has its result, whatever is wrong with a page
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        reporter.warn(f"the report is not written: {text}; arm-ray report {run} tries again")


class LivePage:
    """Writes the report of a run that goes on, beside it: never two at a time.

    Args:
        run: Its directory.
        reporter: Told why a page is not written.
    """

    def __init__(self, run: Path, reporter: Reporter) -> None:
        self._run, self._reporter = run, reporter
        self._thread: threading.Thread | None = None

    def refresh(self) -> None:
        """Have the page written; returns at once. While one is written, no other is begun."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._write, name="report", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Write the page once more, with all that there is by now."""
        if self._thread is not None:
            self._thread.join(_WAIT_S)
        write_page(self._run, self._reporter)

    def _write(self) -> None:
        # Only what goes wrong is worth a line each time.
        try:
            _written(self._run)
        except Exception as error:  # as above
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._reporter.warn(f"the report is not written: {text}")


def _written(run: Path) -> Path:
    # Here, because only the end of a run needs it.
    from arm_ray.report.page.write import write_report

    return write_report([run])
