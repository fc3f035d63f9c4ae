"""Writing a merged model as a GGUF file, by llama.cpp's own converter where the user has it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from arm_ray.errors import ConfigError, NotACheckpointError, WorkerError
from arm_ray.exports.hub import model_directory
from arm_ray.storage.atomic import put_file
from arm_ray.storage.disk import files_told

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
_MAGIC = b"GGUF"
# Lines of the converter's output that an error shows.
_LAST_LINES = 8


def find_converter(given: Path | None, environment: Mapping[str, str]) -> Path:
    """llama.cpp's converter.

    Args:
        given: The script, or llama.cpp's directory; None: as the environment says.
        environment: `LLAMA_CPP` names either; else it is looked for on `PATH`.

    Raises:
        ConfigError: It is not there; says where it was looked for.
    """
    named = given or (Path(environment[VARIABLE]) if environment.get(VARIABLE) else None)
    if named is not None:
        places = [named.expanduser(), named.expanduser() / SCRIPT]
        found = next((p for p in places if p.is_file()), None)
        looked = str(named)
    else:
        text = shutil.which(SCRIPT, path=environment.get("PATH", ""))
        found, looked = (Path(text) if text else None), "PATH"
    if found is None:
        raise ConfigError(
            f"llama.cpp's {SCRIPT} is not there",
            where=looked,
            expected=f"the script, or llama.cpp's directory with it, in --converter or {VARIABLE}",
            hint="get llama.cpp's source, install its requirements/"
            "requirements-convert_hf_to_gguf.txt into this environment, and name its directory",
        )
    return found.absolute()


def export_gguf(
    path: Path,
    output: Path | None = None,
    *,
    kind: str = "auto",
    converter: Path | None = None,
    force: bool = False,
    say: Callable[[str], object] = lambda _text: None,
) -> Path:
    """Write a model as GGUF; the file appears whole or not at all.

    Args:
        path: Of the model, or of the run that made it.
        output: The file; None: `NAME-KIND.gguf` beside the model's directory.
        kind: The converter's `--outtype`, such as `bf16` or `q8_0`.
        converter: The script, or llama.cpp's directory; None: see `find_converter`.
        force: Whether a file that is there is replaced.
        say: Told what is done, and each line that the converter prints.

    Returns:
        The file.

    Raises:
        ConfigError: There is no converter, or there is such a file.
        NotACheckpointError: The model is not whole, or an adapter.
        WorkerError: The converter failed; shows what it said last.
        DiskSpaceError: The disk is full.
        RunDirectoryError: The file cannot be written.
    """
    directory = model_directory(path)
    if (directory / "adapter_config.json").is_file():
        raise NotACheckpointError(
            "the model is an adapter",
            where=directory,
            expected="a whole model",
            hint="merge with output_format: model, or convert it with llama.cpp's "
            "convert_lora_to_gguf.py",
        )
    script = find_converter(converter, os.environ)
    name = path.name if directory != path else directory.name
    target = (output or directory.parent / f"{name}-{kind}.gguf").absolute()
    if target.exists() and not force:
        raise ConfigError(
            "there is such a file already", where=target, hint="choose another --output, or --force"
        )
    partial = target.with_name(f".{target.name}.partial")
    command = [sys.executable, str(script), str(directory), "--outfile", str(partial)]
    command += ["--outtype", kind]
    say(f"{script}: {directory} to {target}")
    with files_told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _convert(command, partial, target, say)
    return target


def _convert(command: list[str], partial: Path, target: Path, say: Callable[[str], object]) -> None:
    """Run the converter, and give its file the final name once it is whole."""
    try:
        _run(command, say)
        if not _is_gguf(partial):
            raise WorkerError(
                "the converter has written no GGUF file",
                where=command[1],
                expected=f"a file that begins with {_MAGIC.decode()}",
                hint="try it by hand: its own messages are above",
            )
        put_file(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as data:
        return data.read(len(_MAGIC)) == _MAGIC


def _run(command: list[str], say: Callable[[str], object]) -> None:
    lines: list[str] = []
    with subprocess.Popen(  # noqa: S603 -- the user's own script, without a shell
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                say(lines[-1])
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        raise WorkerError(
            f"llama.cpp's converter ended with exit code {process.returncode}",
            where=command[1],
            got="\n".join(lines[-_LAST_LINES:]),
            hint="it may lack a package, or not know this architecture: see its output",
        )
