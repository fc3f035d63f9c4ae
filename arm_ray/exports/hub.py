"""Putting a merged model on the Hugging Face hub, in one commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from arm_ray.checkpoints.inspect import inspect_checkpoint
from arm_ray.checkpoints.naming import is_hub_id
from arm_ray.errors import ConfigError, NotACheckpointError, StorageAccessError, StorageError
from arm_ray.secrets import hidden
from arm_ray.storage.regular import read_text
from arm_ray.storage.yaml_text import front_matter

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD = "README.md"


def model_directory(path: Path) -> Path:
    """The model that a path names: itself, or the one that a run left in it.

    Args:
        path: A model directory, or a run directory.

    Raises:
        NotACheckpointError: It is neither, or its model is not whole.
    """
    of_run = path / "model"
    has_model = any((of_run / name).is_file() for name in ("config.json", "adapter_config.json"))
    directory = of_run if has_model else path
    if not directory.is_dir():
        raise NotACheckpointError(
            "there is no such model directory",
            where=path,
            expected="a directory with weights and config.json, or a run with one",
            hint="name the directory that `arm-ray merge` has printed at its end",
        )
    found = inspect_checkpoint(directory)
    if not found.complete:
        raise NotACheckpointError(
            "the model is not whole",
            where=directory,
            got=found.reason,
            expected="a complete model",
            hint="finish the merge: the same command goes on with it",
        )
    return directory


def check_target(repo: str, *, update: bool, api: HfApi | None = None) -> None:
    """Check that a model can be put on the hub, before hours are spent on making it.

    Args:
        repo: `owner/name`.
        update: Whether there may be a model of that name, which then gets another commit.
        api: The hub's client; None: the one of this machine's settings.

    Raises:
        ConfigError: It is no name of a repository.
        StorageAccessError: There is no token, or the hub does not take it.
        StorageError: There is such a repository already, or the hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not is_hub_id(repo):
        raise ConfigError(
            "no name of a repository on the hub", where="repo", got=repo, expected="owner/name"
        )
    client = _client(api)
    if not (client.token or get_token()):
        raise StorageAccessError(
            "there is no token for the Hugging Face hub",
            where=client.endpoint,
            expected="one that may write",
            hint="set HF_TOKEN, or run `hf auth login`",
        )
    try:
        client.whoami()
        exists = client.repo_exists(repo, repo_type="model")
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status not in (401, 403):
            raise _unreachable(client, error) from None
        raise StorageAccessError(
            "the Hugging Face hub does not take the token",
            where=client.endpoint,
            got=hidden(_line(error)),
            expected="a token that may write",
            hint="make one with write access, and set HF_TOKEN",
        ) from None
    except Exception as error:  # of the network, of many types
        raise _unreachable(client, error) from None
    if exists and not update:
        raise StorageError(
            "there is a repository of that name already",
            where=f"{client.endpoint}/{repo}",
            expected="a new name",
            hint="choose another, or allow another commit there: --update, push_to_hub.update",
        )


def push(
    path: Path,
    repo: str,
    *,
    private: bool = True,
    update: bool = False,
    base_models: Sequence[str] = (),
    message: str | None = None,
    api: HfApi | None = None,
    say: Callable[[str], object] = lambda _text: None,
) -> str:
    """Put a model on the hub in one commit: all of it, or nothing.

    Args:
        path: Of the model, or of the run that made it.
        repo: `owner/name`.
        private: Whether a repository that is made for it is private.
        update: Whether there may be a model of that name, which then gets another commit.
        base_models: Hub ids for the card's `base_model`; empty: those that the card has.
        message: Of the commit.
        api: The hub's client; None: the one of this machine's settings.
        say: Told what is done.

    Returns:
        The URL of the model.

    Raises:
        ArmRayError: As `model_directory` and `check_target`; or the upload failed, and nothing of
            it can be seen.
    """
    from huggingface_hub import CommitOperationAdd

    directory = model_directory(path)
    check_target(repo, update=update, api=api)
    client = _client(api)
    named = list(base_models)
    if not all(map(is_hub_id, named)):
        raise ConfigError(
            "a base model is no id on the hub",
            where="base_models",
            got=named,
            expected="owner/name",
        )
    # Files that were not finished, and the hub's own, begin with a dot.
    files = sorted(
        file
        for file in directory.rglob("*")
        if file.is_file() and not any(p.startswith(".") for p in file.relative_to(directory).parts)
    )
    size = sum(file.stat().st_size for file in files)
    say(f"{directory}: {len(files)} files, {size / 1e9:.2f} GB, to {client.endpoint}/{repo}")
    # Before there is a repository that would stay empty.
    cards = {file: _card(file, named) for file in files if file.name == _CARD and named}
    made = False
    try:
        url = client.create_repo(repo, private=private, repo_type="model", exist_ok=update)
        made = not update
        client.create_commit(
            repo,
            [
                CommitOperationAdd(
                    path_in_repo=file.relative_to(directory).as_posix(),
                    path_or_fileobj=cards.get(file, file),
                )
                for file in files
            ],
            commit_message=message or "Upload a model merged by arm_ray",
            repo_type="model",
        )
    except Exception as error:  # of the hub and of the network, of many types
        empty = " The repository was made, and may be empty: push with --update." if made else ""
        raise StorageError(
            f"the upload to the hub failed.{empty}",
            where=f"{client.endpoint}/{repo}",
            got=hidden(_line(error)),
            hint=f"the model is whole in {directory}: push it again",
        ) from None
    return str(url)


def _card(file: Path, base_models: Sequence[str]) -> bytes:
    """A model card with other base models in its front matter."""
    try:
        front, text = front_matter(read_text(file))
    except (OSError, ValueError) as error:
        raise StorageError(
            "a model card cannot be read",
            where=file,
            got=error,
            expected="a text that begins with YAML between two lines of ---",
            hint="correct the card; nothing was uploaded",
        ) from None
    front = {
        "base_model": list(base_models),
        **{k: v for k, v in front.items() if k != "base_model"},
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{text}".encode()


def _client(api: HfApi | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi() if api is None else api


def _unreachable(client: HfApi, error: Exception) -> StorageError:
    return StorageError(
        "the Hugging Face hub cannot be reached",
        where=client.endpoint,
        got=hidden(_line(error)),
        hint="check the network; behind a proxy, HTTPS_PROXY; for another hub, HF_ENDPOINT",
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
