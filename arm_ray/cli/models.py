"""Commands for a finished model: is it whole, make it again, to the hub, to GGUF."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from arm_ray.cli.options import Commands, add_command
from arm_ray.storage.urls import is_url, plain_path

_VERIFY = (
    "arm-ray verify runs/merge",
    "arm-ray verify runs/merge/model --json",
    "arm-ray verify --repair runs/merge",
)
_REPRODUCE = (
    "arm-ray reproduce runs/merge/model --output runs/again",
    "arm-ray reproduce model --output runs/again base=/models/base",
)
_PUSH = (
    "arm-ray push runs/merge my-name/my-model",
    "arm-ray push runs/merge my-name/my-model --public --base-model Qwen/Qwen2.5-7B",
)
_GGUF = (
    "arm-ray gguf runs/merge --converter /src/llama.cpp",
    "arm-ray gguf runs/merge --type q8_0 --output model.gguf",
)

# Of a list of tensors, so many are printed.
_SHOWN = 20


def local(given: str) -> Path:
    """An argument that is a directory of this machine."""
    if is_url(given):
        raise argparse.ArgumentTypeError("a URL is not taken here; copy it to a directory first")
    return Path(plain_path(given)).expanduser().absolute()


def add_to(commands: Commands) -> None:
    """Add the commands."""
    verify = add_command(
        commands, "verify", _verify, "is every byte of a model as it was written", _VERIFY
    )
    verify.add_argument("path", metavar="RUN_DIR | MODEL_DIR", type=local)
    verify.add_argument(
        "--repair", action="store_true", help="of a run: make what is damaged again"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.add_argument("--address", help="of a Ray cluster, for --repair; as for a merge")
    reproduce = add_command(
        commands, "reproduce", _reproduce, "make a model again, and compare the bits", _REPRODUCE
    )
    reproduce.add_argument("path", metavar="MODEL_DIR", type=local)
    reproduce.add_argument("--output", metavar="DIR", type=local, required=True, help="a new run")
    reproduce.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for files that have moved"
    )
    reproduce.add_argument("--address", help="of a Ray cluster, as for a merge")
    push = add_command(commands, "push", _push, "put a model on the Hugging Face hub", _PUSH)
    push.add_argument("path", metavar="MODEL_DIR | RUN_DIR", type=local)
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--public", action="store_true", help="for all to see; default: private")
    push.add_argument("--update", action="store_true", help="there may be a model of that name")
    push.add_argument(
        "--base-model",
        action="append",
        default=[],
        metavar="OWNER/NAME",
        help="what the card names; may be repeated; default: the ids that were merged",
    )
    push.add_argument("--message", help="of the commit")
    gguf = add_command(
        commands, "gguf", _gguf, "write a model as GGUF, by llama.cpp's converter", _GGUF
    )
    gguf.add_argument("path", metavar="MODEL_DIR | RUN_DIR", type=local)
    gguf.add_argument("--output", metavar="FILE", type=Path, help="default: beside the model")
    gguf.add_argument("--type", default="auto", help="the converter's --outtype; default: auto")
    gguf.add_argument(
        "--converter",
        metavar="PATH",
        type=Path,
        help="convert_hf_to_gguf.py, or llama.cpp's directory; default: LLAMA_CPP, then PATH",
    )
    gguf.add_argument("--force", action="store_true", help="replace a file that is there")


def _verify(options: argparse.Namespace) -> int:
    """Compare every byte of a model with what was written, or what a run left with its records.

    Of weight files, damage is told by the tensor. The exit code is 1 where something is damaged.
    """
    from arm_ray.runtime.verify import repair, verify

    path = options.path
    same: bool | None = None
    if options.repair:
        found, same = repair(path, address=options.address)
    else:
        found = verify(path)
    if options.json:
        damage = [asdict(each) for each in found.damage]
        content = {"path": str(path), "whole": found.is_whole, "damage": damage}
        print(json.dumps({**content, "looked_at": found.looked_at, "same_bits": same}, indent=2))
        return 0 if found.is_whole else 1
    for line in found.looked_at:
        print(line)
    for each in found.damage[:_SHOWN]:
        print(f"{'changed' if each.is_text else 'DAMAGED'}  {each.what} {each.how}")
    if len(found.damage) > _SHOWN:
        print(f"and {len(found.damage) - _SHOWN} more")
    if same is not None:
        print("made again: " + ("the same bits as before" if same else "other bits than before"))
    print("whole" if found.is_whole else f"damaged; to do: {found.to_do}")
    return 0 if found.is_whole else 1


def _reproduce(options: argparse.Namespace) -> int:
    """Make a model again as `arm_ray.json` beside it says, and compare the two bit for bit.

    The exit code is 1 where they differ. What of the software or the machine is not as it was is
    told: the same versions and kind of machine give the same bits.
    """
    from arm_ray.runtime.verify import reproduce

    found = reproduce(
        options.path,
        options.output,
        options.overrides,
        address=options.address,
    )
    for line in found.changed:
        print(f"not as it was: {line}")
    for name in found.differing[:_SHOWN]:
        print(f"differs: {name}")
    if found.differing:
        print(f"{len(found.differing)} of {found.num_tensors} tensors differ: {found.model}")
        return 1
    print(f"the same bits in all {found.num_tensors} tensors: {found.model}")
    return 0


def _push(options: argparse.Namespace) -> int:
    """Put a merged model on the Hugging Face hub, with its card, in one commit.

    The token is that of HF_TOKEN, or of `hf auth login`.
    """
    from arm_ray.exports.hub import push

    url = push(
        options.path,
        options.repo,
        private=not options.public,
        update=options.update,
        base_models=options.base_model,
        message=options.message,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(url)
    return 0


def _gguf(options: argparse.Namespace) -> int:
    """Write a merged model as a GGUF file, by llama.cpp's own converter where you have it."""
    from arm_ray.exports.gguf import export_gguf

    made = export_gguf(
        options.path,
        options.output,
        kind=options.type,
        converter=options.converter,
        force=options.force,
        say=lambda text: print(text, file=sys.stderr),
    )
    print(made)
    return 0
