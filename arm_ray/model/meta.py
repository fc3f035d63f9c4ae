"""Building a model on the `meta` device, without the numbers that no tensor there can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

# Of `torch.nn.init`, and what its functions call.
_FILLING = frozenset(
    name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")
) | {"erfinv_", "exponential_", "fill_", "random_", "zero_"}

_T = TypeVar("_T")


def on_meta(build: Callable[[], _T]) -> _T:
    """What a function builds on the `meta` device.

    On `torch.device("meta")` torch traces in Python what would fill a tensor with numbers, and how
    rotary frequencies are computed. For that it imports SymPy: a seventh of the time of a short
    merge. Here nothing is filled, and ranges (`torch.arange`) are on the CPU, with what is computed
    from them alone; a model that mixes those with others is built as torch does it.
    """
    try:
        with _Unfilled():
            return build()
    except Exception:
        with torch.device("meta"):
            return build()


class _Unfilled(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        if name in _FILLING and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        if func is torch.arange and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": "cpu"})
        with torch.device("meta"):
            return func(*args, **kwargs)
