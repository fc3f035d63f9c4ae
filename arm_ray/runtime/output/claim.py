"""A claim on an output directory or URL: it holds nothing else, and nobody else works in it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from arm_ray.errors import RunDirectoryError
from arm_ray.storage import lease, room
from arm_ray.storage.atomic import remove_abandoned, write_text
from arm_ray.storage.disk import files_told
from arm_ray.storage.store import Store

CONFIG_NAME = "config.yaml"
# What the results of a job are called, where that is not the job's own name.
_RESULTS = {"merge": "run", "training": "training run"}
_PARTIAL = f".{CONFIG_NAME}.partial"


@contextlib.contextmanager
def claimed(path: Path, who: str) -> Iterator[None]:
    """Make a directory if it is not there, and be the only one that works in it meanwhile.

    What killed ones have left in it of files that were not finished is removed.

    Args:
        path: The directory.
        who: What works in it, for the error.

    Raises:
        RunDirectoryError: It cannot be written, another process works in it, or a file within the
            context could not be read or written.
        DiskSpaceError: The disk was full within the context.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(room.locked(path, wait=False))
        except BlockingIOError:
            raise RunDirectoryError(
                f"another {who} is working in the output directory",
                where=path,
                hint="wait for it, or choose another output",
            ) from None
        except OSError as error:
            raise RunDirectoryError(
                "the output directory cannot be written",
                where=path,
                got=error,
                hint="look at its disk and its permissions, or choose another output",
            ) from None
        remove_abandoned(path)
        with files_told(path):
            yield


@contextlib.contextmanager
def claimed_url(store: Store, local: Path, who: str) -> Iterator[lease.Lease]:
    """The same for a URL, and for the local directory where the run lives meanwhile.

    Args:
        store: The URL.
        local: The local directory; its parent is locked.
        who: What works there, for the error.

    Raises:
        RunDirectoryError: Something else is there, or another process or machine works there.
        StorageError: The URL cannot be read or written.
    """
    store.check_writable()
    with claimed(local.parent, who):
        names = [n for n in store.files(recursive=True) if not n.startswith(lease.NAME)]
        if names and CONFIG_NAME not in names:
            raise _something_else("the output's URL", who, store, names)
        with lease.leased(store, who) as held:
            yield held


def holds_earlier(path: Path, who: str, ours: Collection[str] = ()) -> bool:
    """Whether a directory holds an earlier run; it is left as it is.

    Args:
        path: The directory.
        who: What is going to work in it, for the error.
        ours: Names of files that one of ours may leave before its configuration is there.

    Raises:
        RunDirectoryError: It is no directory, cannot be read, or holds something else.
    """
    if not path.exists():
        return False
    if not path.is_dir():
        raise RunDirectoryError("the output is not a directory", where=path)
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise RunDirectoryError(
            "the output directory cannot be read", where=path, got=error
        ) from None
    names = [name for name in names if name not in (room.LOCK_NAME, _PARTIAL, *ours)]
    if not names:
        return False
    if CONFIG_NAME not in names:
        raise _something_else("the output directory", who, path, names)
    return True


def refuse_other(
    where: object,
    differing: Sequence[str],
    what: str = "the output directory holds",
    hint: str = "choose another output, or restore these keys to go on with the run",
) -> None:
    """Refuse to go on with a run whose configuration was another one.

    Args:
        where: The directory or URL.
        differing: Keys that decide the result and differ, a line each; empty: nothing to refuse.
        what: What is there, for the error.
        hint: What to do.

    Raises:
        RunDirectoryError: Lists the keys.
    """
    if differing:
        raise RunDirectoryError(
            f"{what} a run with another configuration",
            where=where,
            got="\n" + "\n".join(f"      {line}" for line in differing),
            hint=hint,
        )


def unusable(path: Path, who: str, problem: str) -> RunDirectoryError:
    """The error for a directory whose configuration this version cannot go on with."""
    names = sorted(p.name for p in path.iterdir() if p.name != room.LOCK_NAME)
    return _something_else("the output directory", who, path, names, problem)


def write_config(path: Path, text: str) -> None:
    """Write the resolved configuration of the run in a directory.

    Raises:
        OSError: The directory cannot be written.
    """
    write_text(path / CONFIG_NAME, text)


def _something_else(
    what: str, who: str, where: object, names: Sequence[str], problem: str | None = None
) -> RunDirectoryError:
    results = _RESULTS.get(who, who)
    article = "an" if results[0] in "aeiou" else "a"
    earlier = f"{article} {results}"
    return RunDirectoryError(
        f"{what} holds something else than {earlier}",
        where=where,
        got=", ".join(names[:6]) + (" …" if len(names) > 6 else ""),
        expected=f"nothing there yet, or {earlier}"
        + ("" if problem is None else f" that this version can go on with ({problem})"),
        hint="choose another output; nothing there was touched",
    )
