"""A callback of transformers' Trainer, and of TRL's, that has attach run beside the training."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import arm_ray
from arm_ray.api import load_config, overridden_content
from arm_ray.errors import ConfigError
from arm_ray.storage.atomic import atomic_file

# What a child is started with, before the configuration's path and overrides.
_PROGRAM = (sys.executable, "-m", "arm_ray.integrations.beside")
# Of the trainer's place in a distributed training, which the child has none in.
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a child may take to end after SIGTERM, before it is killed.
_END_S = 60.0


class AttachCallback(TrainerCallback):
    """Runs `arm-ray attach` beside a training, in a child process of the first rank.

        trainer = SFTTrainer(model, args, callbacks=[AttachCallback()])

    Without a configuration the last two checkpoints are averaged into the model at each save, and
    published in `<output_dir>-merged`; nothing is scored. What the callback knows need not be
    configured: `run.path` is the trainer's `output_dir`, `merge.base` the model that the trainer
    was given, if it was loaded from somewhere. The child's configuration and output are in
    `<publish.dir>.attach.yaml` and `.attach.log`.

    The child never fails a training, nor outlives it: it ends with the trainer's process, however
    that ends.

    Args:
        config: A YAML file of `arm-ray attach`, or a mapping of its content; None: as above.
        overrides: Dotted key -> value, in place of what that says.
        at_end: `finish`: the end of the training waits until its last checkpoint is merged and
            published; `stop`: the child is ended at once, and `arm-ray attach` with the same
            configuration goes on.
        timeout_s: Longest wait of `finish`, in seconds; then the child is ended. None: no limit.
        keys: Overrides by name, with `__` in place of dots: `publish__dir="/runs/merged"`.

    Raises:
        ConfigError: `at_end` is none of the two. What is wrong with the configuration is raised
            when the training begins.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        at_end: Literal["finish", "stop"] = "finish",
        timeout_s: float | None = 3600.0,
        **keys: Any,
    ) -> None:
        if at_end not in ("finish", "stop"):
            raise ConfigError(
                "the end of a training is not one of the known",
                where="at_end",
                got=repr(at_end),
                expected="'finish' or 'stop'",
            )
        self._config, self._overrides, self._keys = config, overrides, keys
        self._at_end, self._timeout_s = at_end, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._last_saved: int | None = None
        self._is_told = False
        self.config_file: Path | None = None
        self.log_file: Path | None = None

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The child; None: it has not been started, or is ended."""
        return self._process

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Start the child."""
        if not state.is_world_process_zero or self._process is not None:
            return
        content = self._content(Path(str(args.output_dir)), given.get("model"))
        # What is wrong is told now, and not by a child that nobody looks at.
        config = load_config(content, "attach")
        place = config.published
        place.parent.mkdir(parents=True, exist_ok=True)
        self.config_file = place.with_name(f"{place.name}.attach.yaml")
        self.log_file = place.with_name(f"{place.name}.attach.log")
        with atomic_file(self.config_file) as file:
            file.write(yaml.safe_dump(content, sort_keys=False).encode())
        self._last_saved, self._is_told = None, False
        self._start()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Note the step, and say of a child that has failed that it has."""
        self._last_saved = state.global_step
        self._tell_failure()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Wait for what is left to merge, or end the child."""
        if self._process is None:
            return
        try:
            if self._at_end == "finish" and self._last_saved is not None:
                if self._last_saved != state.max_steps:
                    # It waits for a later checkpoint. What it has done, it does not do again.
                    self._end()
                    self._start(f"run.last_step={self._last_saved}")
                self._wait()
        finally:
            self._tell_failure()
            self._end()

    def _content(self, output_dir: Path, model: Any) -> dict[str, Any]:
        """The configuration's content, with what the trainer knows below what is given."""
        output = output_dir.expanduser().absolute()
        content = overridden_content(self._config or {}, self._overrides, self._keys)
        run, merge, publish = (_section(content, key) for key in ("run", "merge", "publish"))
        run.setdefault("path", str(output))
        publish.setdefault("dir", f"{output}-merged")
        if not content.get("evaluation"):
            publish.setdefault("promote", "always")
        if "calibration" not in merge and "preset" not in merge:
            _section(merge, "method").setdefault("operator", "task_arithmetic")
        if "base" not in merge:
            base = _loaded_from(model)
            if base is None:
                raise ConfigError(
                    "nothing says which model the training begins with",
                    where="merge.base",
                    got="a model that was not loaded from a directory or the hub",
                    hint="AttachCallback(merge__base=DIR)",
                )
            merge["base"] = base
        return content

    def _start(self, *overrides: str) -> None:
        assert self.config_file is not None
        assert self.log_file is not None
        package = str(Path(arm_ray.__file__).parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {k: v for k, v in os.environ.items() if k not in _RANKS}
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 -- this Python, and a path of ours
                [*_PROGRAM, str(self.config_file), *overrides],
                # It ends when this is closed.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
                # Ctrl-C is for the trainer, which ends it.
                start_new_session=True,
            )
        atexit.register(self._end)

    def _wait(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            warnings.warn(
                f"attach was not done {self._timeout_s:g} s after the training and is ended; "
                f"arm-ray attach {self.config_file} goes on",
                stacklevel=2,
            )

    def _end(self) -> None:
        """End the child, which leaves what it is doing so that it can go on."""
        process, self._process = self._process, None
        atexit.unregister(self._end)
        if process is None:
            return
        pipe: IO[bytes] | None = process.stdin
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _tell_failure(self) -> None:
        """Warn once of a child that has ended with an error."""
        code = None if self._process is None else self._process.poll()
        if code in (None, 0) or self._is_told:
            return
        self._is_told = True
        assert self.log_file is not None
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = "\n".join(lines[-8:])
        warnings.warn(
            f"attach ended with code {code}; the training goes on. {self.log_file}:\n{told}",
            stacklevel=2,
        )


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the content, which is put there; what is none is refused with the rest."""
    found = content.get(name)
    if found is None:
        found = content[name] = {}
    return found if isinstance(found, dict) else {}


def _loaded_from(model: Any) -> str | None:
    """The directory or id that a model was loaded from; of an adapter, its base's."""
    inner = getattr(model, "get_base_model", None)
    config = getattr(inner() if callable(inner) else model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return str(Path(name).absolute()) if Path(name).exists() else name
