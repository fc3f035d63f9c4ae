"""Opening a run's output: a directory, or a URL that a local directory is uploaded to."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from arm_ray.checkpoints import states
from arm_ray.config import (
    MergeConfig,
    config_difference,
    parse_merge_config,
    read_yaml,
    scratch_path,
)
from arm_ray.errors import ArmRayError, RunDirectoryError, StorageError
from arm_ray.runtime.output.claim import CONFIG_NAME, claimed_url, refuse_other
from arm_ray.runtime.output.precision import RECORD_NAME
from arm_ray.runtime.output.run_directory import INPUTS_NAME, RunDirectory, open_run
from arm_ray.runtime.output.upload import (
    EVENTS_NAME,
    LAST,
    RunUpload,
    directories,
    is_complete,
)
from arm_ray.runtime.session.reporter import Reporter
from arm_ray.schedule import iterations_needed_after
from arm_ray.storage.room import check_room
from arm_ray.storage.store import Store, StoredFile
from arm_ray.storage.urls import Url, is_url, parse_url

_RUNS = "runs"


def local_directory(url: Url, scratch: Path) -> Path:
    """Where a run whose output is a URL lives meanwhile."""
    digest = hashlib.sha256(str(url).encode()).hexdigest()[:16]
    return scratch.absolute() / _RUNS / digest / url.name


@contextlib.contextmanager
def open_output(
    config: MergeConfig, reporter: Reporter, *, keeps_config: bool = False
) -> Iterator[RunDirectory]:
    """Open a run directory as `open_run`, wherever the output is.

    For a URL, what the run needs to go on is copied here first, and what it finishes is uploaded
    beside it; the context ends when all is up.

    Args:
        config: The configuration.
        reporter: Told what people should know.
        keeps_config: As `open_run`, of a run in a directory.

    Raises:
        RunDirectoryError: As `open_run`, or another machine works on the run.
        StorageError: The URL cannot be written, or not all could be uploaded.
    """
    if not is_url(config.output):
        with open_run(config, keeps_config=keeps_config) as run:
            yield run
        return
    url = parse_url(config.output)
    local = local_directory(url, config.runtime.scratch_path)
    store = Store(url)
    # One claim around both: what is copied here, and the run.
    with claimed_url(store, local, "merge") as held:
        files = store.files(recursive=True)
        published = _pull(config, store, files, local)
        with open_run(config, local) as run:
            run.url, run.published_iteration = str(url), published
            # Of a run that is complete there, its states are not here.
            prunes = config.keep_states != "all" and not published
            upload = RunUpload(store, local, files, prunes, held, reporter)
            upload.start()
            with _uploading(run, upload):
                yield run
            reporter.say(f"the run is at {url}")


@contextlib.contextmanager
def results_at(given: str) -> Iterator[Path]:
    """A local directory for an evaluation whose results belong at a URL.

    What is there is copied here first, and what was written is uploaded at the end, also of an
    evaluation that fails.

    Args:
        given: The URL.

    Raises:
        RunDirectoryError: Something else is there, or another machine works there.
        StorageError: The URL cannot be read or written; the results stay in the local directory.
    """
    url = parse_url(given)
    local = local_directory(url, scratch_path(None))
    store = Store(url)
    with claimed_url(store, local, "evaluation"):
        for name, file in store.files(recursive=True).items():
            if not name.startswith(".") and not (local / name).is_file():
                store.download(name, local / name, file)
        before = {path: _stamp(path) for path in local.rglob("*")}
        try:
            yield local
        finally:
            _upload_results(store, local, before)


def _upload_results(store: Store, local: Path, before: Mapping[Path, tuple[int, int]]) -> None:
    try:
        there = store.files(recursive=True)
        for path in sorted(local.rglob("*")):
            name = path.relative_to(local).as_posix()
            is_new = name not in there or before.get(path) != _stamp(path)
            if path.is_file() and is_new and not path.name.startswith("."):
                store.upload(path, name)
    except StorageError as error:
        raise type(error)(
            f"the results could not be uploaded: {error.what}",
            where=error.where,
            got=error.got,
            expected=error.expected,
            hint=f"they are in {local}; the same command uploads them",
        ) from error


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _uploading(run: RunDirectory, upload: RunUpload) -> Iterator[None]:
    run.events.subscribe(upload.event)
    try:
        yield
    except ArmRayError:
        # What is finished, and the event that says why no more is.
        with contextlib.suppress(StorageError):
            upload.stop()
            upload.sync_once()
        raise
    except BaseException:
        upload.stop()
        raise
    finally:
        run.events.unsubscribe(upload.event)
    upload.finish()


def _pull(config: MergeConfig, store: Store, files: Mapping[str, StoredFile], local: Path) -> int:
    """Copy here what a run needs to go on and what is not here.

    Returns:
        The last iteration of a run whose model is at the URL and not here; else 0.
    """
    if CONFIG_NAME not in files:
        return 0
    finished = {
        int(name.removeprefix("states/"))
        for name in directories(files)
        if name != "model" and is_complete(name, files)
    }
    published = is_complete("model", files)
    _check_config(config, store, files, local, bool(finished) or published, published)
    small = [
        CONFIG_NAME,
        INPUTS_NAME,
        RECORD_NAME,
        *(n for n in files if n.startswith("evaluation/")),
    ]
    wanted = [n for n in small if n in files and not (local / n).is_file()]
    if EVENTS_NAME in files and files[EVENTS_NAME].num_bytes > _size(local / EVENTS_NAME):
        wanted.append(EVENTS_NAME)
    here = states.finished_states(local).keys()
    last = max((*finished, *here), default=0)
    if published:
        wanted_states = set[int]()
    elif config.evaluation is not None:
        # Any of them may still have to be scored, or become the model.
        wanted_states = finished - here
    else:
        needed = iterations_needed_after(config.schedule, len(config.candidates), last)
        wanted_states = (needed & finished) - here
    for iteration in sorted(wanted_states):
        name = states.state_directory(Path(), iteration).as_posix()
        inside = sorted(n for n in files if n.startswith(f"{name}/"))
        late = [f"{name}/{file}" for file in LAST]
        wanted += [n for n in inside if n not in late] + [n for n in late if n in inside]
    local.mkdir(parents=True, exist_ok=True)
    size = sum(files[name].num_bytes for name in wanted)
    hint = "or set runtime.scratch to a larger disk"
    check_room(local, size, "what the run needs to go on", store, hint)
    for name in wanted:
        store.download(name, local / name, files[name])
    return last if published and not (local / "model").is_dir() else 0


def _check_config(
    config: MergeConfig,
    store: Store,
    files: Mapping[str, StoredFile],
    local: Path,
    is_begun: bool,
    published: bool,
) -> None:
    """Refuse a URL that holds a run with another configuration."""
    copy = local.parent / f".{CONFIG_NAME}"
    store.download(CONFIG_NAME, copy, files[CONFIG_NAME])
    try:
        known = parse_merge_config(read_yaml(copy), source=f"{store}/{CONFIG_NAME}")
    except ArmRayError as error:
        raise RunDirectoryError(
            "the output's URL holds something else than a run that this version can go on with",
            where=store,
            got=error.what.splitlines()[0],
            hint="choose another output; nothing there was touched",
        ) from None
    finally:
        copy.unlink(missing_ok=True)
    if is_begun:
        difference = config_difference(known, config, published=published)
        refuse_other(store, difference, "the output's URL holds")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1
