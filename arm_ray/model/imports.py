"""Importing what is large: torch, Ray and transformers' model classes take most of a short merge.

Where they are installed, transformers imports scikit-learn for one way of generating and SciPy for
the losses of object detection. Together they take as long to import as all the rest. Of the rest
half are torch's compiler, for decorators that do nothing without it, and its distributed tensors.
arm_ray uses neither, in the processes that it starts for its own work.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

_UNUSED = ("sklearn", "scipy", "deepspeed", "accelerate")
_WRITER = "torch.utils.tensorboard"
_COMPILER, _MASKS = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
_LOCK = threading.Lock()
_own = {"process": False}


def set_own_process() -> None:
    """Say that this process runs nothing but arm_ray; those that it starts are others'."""
    _own["process"] = True


def is_own_process() -> bool:
    """Whether this process runs nothing but arm_ray."""
    return _own["process"]


def import_model_classes() -> None:
    """Import what all model classes of transformers share; afterwards a class takes no time.

    Only in a process of arm_ray's own: transformers keeps for the life of a process which packages
    it has found, and others would miss them.
    """
    with _LOCK:
        if "transformers.modeling_utils" in sys.modules or not _own["process"]:
            return
        before = set(sys.modules)
        with not_installed(_UNUSED), collection_paused():
            try:
                with without_compiler():
                    _import()
            except Exception:
                # A version that needs more of the compiler than its decorators.
                for name in set(sys.modules) - before:
                    if name.partition(".")[0] == "transformers":
                        del sys.modules[name]
                _import()


def import_tensorboard() -> None:
    """Import TensorBoard's writer, without what it needs for directories at Amazon's.

    That is three quarters of it, and a run's directory is local. Like `import_model_classes`.
    """
    if _WRITER in sys.modules or not _own["process"]:
        return
    with _LOCK, not_installed(("boto3", "botocore")), collection_paused():
        importlib.import_module(_WRITER)


def _import() -> None:
    importlib.import_module("transformers.models.auto.modeling_auto")
    importlib.import_module("transformers.modeling_utils")


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Let imports find decorators that change nothing for torch's compiler, and no `DTensor`.

    What is imported meanwhile is not to be compiled, or spread over processes by torch. Nothing is
    changed where the compiler is imported already, and in processes that are not arm_ray's own.
    """
    import torch

    if _COMPILER in sys.modules or not _own["process"]:
        yield
        return
    compiler, masks = _Decorators(_COMPILER), _Decorators(_MASKS)
    compiler.__path__ = []
    vars(masks)["TransformGetItemToIndex"] = _transform_get_item_to_index
    sys.modules |= {_COMPILER: compiler, _MASKS: masks}
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        for name in (_COMPILER, _MASKS):
            sys.modules.pop(name, None)
        if isinstance(vars(torch).get("_dynamo"), _Decorators):
            del torch._dynamo


class _Decorators(types.ModuleType):
    """A module of decorators, with arguments or without, that change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unchanged


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else _unchanged


def _transform_get_item_to_index() -> Any:
    """The real one, for masks that are made with `vmap`: it is needed when they are made."""
    return importlib.import_module(_MASKS).TransformGetItemToIndex()


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Import without looking for garbage, of which imports leave none: a quarter of their time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def not_installed(packages: tuple[str, ...]) -> Iterator[None]:
    """Let imports, and questions whether they are installed, find no such packages.

    Those that are imported already stay.

    Args:
        packages: Their import names.
    """
    hidden = [name for name in packages if name not in sys.modules]
    for name in hidden:
        # Python's own way to say that a module is not there: `find_spec` gives None for it.
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
