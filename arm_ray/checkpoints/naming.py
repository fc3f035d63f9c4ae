"""Names: of a checkpoint as a user gives it, and of tensors as trainers leave them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from arm_ray.errors import MismatchError

Format = Literal["hf", "zero", "universal", "fsdp", "megatron", "torchtitan", "dcp", "peft"]
FORMATS: tuple[Format, ...] = get_args(Format)
# The tensors that have a row for each token.
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
# What PyTorch's wrappers put between the parts of a name.
_WRAPPERS = frozenset(("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"))
FormatOrAuto = Literal["auto"] | Format


def split_source(given: str) -> tuple[FormatOrAuto, str]:
    """Take `FORMAT:PATH` apart.

    Args:
        given: Such as `zero:/runs/x/checkpoint-40`, or a path or hub id without a format. A
            directory whose own name begins like that is named as `./zero:…`.

    Returns:
        The format, `auto` where none is named, and the path or hub id.
    """
    for name in FORMATS:
        # `hf://…` is a URL of the hub, and `hf:` a format.
        if given.startswith(f"{name}:") and not given.startswith(f"{name}://"):
            return name, given[len(name) + 1 :]
    return "auto", given


# What the hub allows: `owner/name`, and neither begins or ends with a dot or dash.
_HUB_ID = re.compile(r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]{0,94}[\w])?")
# Its directory in the hub's cache.
_IN_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")


def hub_id(given: str) -> str | None:
    """The id of a model on the hub, as `owner/name`; None: it is a path or a URL.

    Args:
        given: A checkpoint as a user gives it: an id, or its directory in the hub's cache.
    """
    _, place = split_source(given)
    cached = _IN_CACHE.search(f"{place}/")
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return place if is_hub_id(place) and not Path(place).exists() else None


def is_hub_id(name: str) -> bool:
    """Whether a text has the form of a hub id; there may be a directory of that name, too."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def model_names(
    names: Iterable[str], path: Path, *, others: bool = False, embedding: str = EMBEDDING
) -> dict[str, str]:
    """Name in the files -> the model's name, with what wrappers put around it taken off.

    Args:
        names: In the files.
        path: For messages.
        others: Whether names that do not begin as the model's do are left out.
        embedding: The model's name of its embedding: Hugging Face's, or a trainer's own.

    Raises:
        MismatchError: There are two models, or two tensors of the same name.
    """
    plain = {name: ".".join(p for p in name.split(".") if p not in _WRAPPERS) for name in names}
    prefixes = {
        name.removesuffix(embedding)
        for name in plain.values()
        if name == embedding or name.endswith(f".{embedding}")
    }
    if len(prefixes) > 1:
        raise MismatchError(
            "the checkpoint holds more than one model",
            where=path,
            got=" and ".join(sorted(f"{prefix}{embedding}" for prefix in prefixes)),
            expected="one",
            hint="save the one to merge by itself",
        )
    prefix = prefixes.pop() if prefixes else ""
    if not others and not all(name.startswith(prefix) for name in plain.values()):
        # A part of the model's own names: of its text, beside its vision.
        prefix = ""
    found: dict[str, str] = {}
    for old, name in plain.items():
        if others and not name.startswith(prefix):
            continue
        new = name.removeprefix(prefix)
        if new in found:
            raise MismatchError(
                "two tensors of a checkpoint have the same name",
                where=path,
                got=f"{found[new]} and {old}",
                expected=f"one {new}",
            )
        found[new] = old
    return {old: new for new, old in found.items()}
