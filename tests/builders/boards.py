"""Reads what was written for TensorBoard, with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

Curves = dict[str, dict[int, float]]


def tensorboard(directory: Path) -> Curves:
    """Tag -> step -> value; a point that is there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory)).Reload()
    found: Curves = {}
    for tag in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(tag)
        found[tag] = {event.step: event.value for event in events}
        assert len(found[tag]) == len(events), tag
    return found
