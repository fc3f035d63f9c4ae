"""What calibration data to read, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from arm_ray.errors import ConfigError

FormatName = Literal["auto", "text", "prompt_completion", "messages"]


@dataclass(frozen=True)
class CalibrationSettings:
    """What calibration data to read, and how.

    Attributes:
        path: A ``.jsonl``, ``.json`` (one object per line), ``.jsonl.gz``, ``.json.gz`` or
            ``.parquet`` file; a directory or glob pattern of such files; a directory written by
            ``datasets.save_to_disk`` (``directory:split`` picks a split); or a Hugging Face
            data set id, as ``name``, ``owner/name`` or ``owner/name/config``, each with an
            optional ``:split``.
        format: How a row becomes a sample; ``auto`` decides by the columns found.
        batch_size: Samples per mini-batch.
        max_length: Longest sample, in tokens; what is longer loses its end.
        shuffle: Whether the rows are shuffled, once, before the stream starts.
        seed: Seed of that shuffle.
        text_column: Column of the ``text`` format.
        prompt_column: First column of the ``prompt_completion`` format.
        completion_column: Second column of the ``prompt_completion`` format.
        messages_column: Column of the ``messages`` format.

    Raises:
        ConfigError: If a number or the format is out of range.
    """

    path: str
    format: FormatName = "auto"
    batch_size: int = 64
    max_length: int = 1024
    shuffle: bool = True
    seed: int = 0
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("max_length", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(
                    f"calibration.{name} is out of range.",
                    got=repr(value),
                    expected=f"an integer of {low} or more",
                )
        if self.format not in get_args(FormatName):
            raise ConfigError(
                "calibration.format is unknown.",
                got=repr(self.format),
                expected=", ".join(get_args(FormatName)),
            )
