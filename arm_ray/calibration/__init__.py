"""Calibration data: from files or a data set to a fixed stream of tokenised mini-batches.

* ``sources``: what a path or a data set id points at.
* ``files``: indexing and reading of JSON Lines and Parquet files.
* ``formats``: from a row to a sample (text, prompt and completion, chat messages).
* ``tokens``: from a sample to token ids.
* ``tasks``: what Ray Data's tasks do with these.
* ``stream``: runs the tasks over Ray Data; the only module that imports Ray.
* ``minibatch``: the order of the rows, mini-batches and micro-batches; numpy only.

Importing this package imports neither Ray nor transformers.
"""

from arm_ray.calibration.minibatch import MicroBatch, MiniBatch, micro_batches
from arm_ray.calibration.stream import CalibrationStream, open_stream

__all__ = [
    "CalibrationStream",
    "MicroBatch",
    "MiniBatch",
    "micro_batches",
    "open_stream",
]
