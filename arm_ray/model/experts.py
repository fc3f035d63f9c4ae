"""What goes into each expert of a mixture, seen without changing a family's code.

A family's experts are parameters `[experts, …]` of a module that is no linear module. Its code
takes the tokens that the router sends to an expert, and multiplies them by that expert's part:
`linear(tokens[chosen], weight[expert])`. These products are watched while the layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ExpertInputs(TorchFunctionMode):
    """Means of the inputs of each expert, over the tokens of a sample that are sent to it.

    Args:
        weights: The experts' parameters `[experts, d_out, d_in]`, and for each expert the names of
            the weights in the files that are its part.
        lengths: `[batch]` int64 number of real tokens of each sample.
        tokens: Positions of each sample, with its padding.

    Attributes:
        means: Name of a weight -> mean input `[batch, d_in]` float32; zero without a token.
        seen: Name of a weight -> `[batch]` bool: whether any token of the sample was sent there.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Sequence[tuple[str, ...]]]],
        lengths: Tensor,
        tokens: int,
    ) -> None:
        super().__init__()
        self._weights, self._lengths, self._tokens = weights, lengths, tokens
        self._picked: tuple[Tensor, Tensor] | None = None
        self._rows: Tensor | None = None
        self.means: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        batch = len(lengths)
        for weight, experts in weights:
            empty = torch.zeros(batch, weight.shape[-1], device=weight.device)
            nowhere = torch.zeros(batch, dtype=torch.bool, device=weight.device)
            for names in experts:
                self.means |= dict.fromkeys(names, empty)
                self.seen |= dict.fromkeys(names, nowhere)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            chosen = args[1]
            if isinstance(chosen, Tensor) and chosen.dtype == torch.int64 and chosen.ndim == 1:
                self._picked = (result, chosen)
        elif func is torch.nn.functional.linear and len(args) > 1:
            self._product(args[0], args[1])
        return result

    def _product(self, inputs: Tensor, weight: Tensor) -> None:
        names = self._names_of(weight)
        if not names:
            return
        if self._picked is not None and inputs is self._picked[0]:
            self._rows, self._picked = self._picked[1], None
        if self._rows is None or len(self._rows) != len(inputs):
            return
        mean, seen = self._means(inputs, self._rows)
        self.means |= dict.fromkeys(names, mean)
        self.seen |= dict.fromkeys(names, seen)

    def _names_of(self, weight: Tensor) -> tuple[str, ...]:
        """Of the expert whose part of a parameter this is; empty: of none."""
        place = weight.data_ptr()
        for whole, experts in self._weights:
            size = whole[0].nbytes
            index, rest = divmod(place - whole.data_ptr(), size)
            if rest == 0 and 0 <= index < len(experts) and weight.shape == whole.shape[1:]:
                return experts[index]
        return ()

    def _means(self, inputs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        samples, positions = rows // self._tokens, rows % self._tokens
        real = positions < self._lengths[samples]
        batch = torch.arange(len(self._lengths), device=rows.device)
        # A product and no scattered sum, whose order a GPU leaves open.
        members = ((samples == batch[:, None]) & real).to(torch.float32)
        counts = members.sum(1, keepdim=True)
        return members @ inputs.to(torch.float32) / counts.clamp(min=1.0), counts[:, 0] > 0
