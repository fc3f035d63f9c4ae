"""What goes into each expert of a mixture, seen without changing a family's code.

A family's experts are parameters `[experts, …]` of a module that is no linear module. Its code
multiplies the tokens that the router sends to an expert by that expert's part. Three forms of that
product are known, and watched while the layer runs:

- `linear(tokens[chosen], weight[expert])`, of parameters `[experts, d_out, d_in]`;
- `tokens[chosen] @ weight[expert]`, of parameters `[experts, d_in, d_out]`;
- `bmm(tokens, weight)`, of the same, with all tokens for each expert: zeros where one is not sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
_BMMS = (torch.bmm, torch.Tensor.bmm)
_CHUNKS = (torch.chunk, torch.Tensor.chunk)


class ExpertInputs(TorchFunctionMode):
    """Means of the inputs of each expert, over the tokens of a sample that are sent to it.

    Args:
        weights: The experts' parameters, for each expert the names of the weights in the files
            that are its part, and whether the parameter is `[experts, d_in, d_out]`.
        lengths: `[batch]` int64 number of real tokens of each sample.
        tokens: Positions of each sample, with its padding.

    Attributes:
        means: Name of a weight -> mean input `[batch, d_in]` float32; zero without a token.
        seen: Name of a weight -> `[batch]` bool: whether any token of the sample was sent there.
        transposed: Name of a weight that was multiplied by as `[d_in, d_out]` -> whether its
            outputs were then taken apart in two halves: a gate, and what it lets through.
    """

    def __init__(
        self,
        weights: Sequence[tuple[Tensor, Sequence[tuple[str, ...]], bool]],
        lengths: Tensor,
        tokens: int,
    ) -> None:
        super().__init__()
        self._weights, self._lengths, self._tokens = weights, lengths, tokens
        self._picked: tuple[Tensor, Tensor] | None = None
        self._rows: Tensor | None = None
        self.means: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.transposed: dict[str, bool] = {}
        # What the last products gave, and whose they were.
        self._given: tuple[Tensor, list[str]] | None = None
        batch = len(lengths)
        for weight, experts, is_transposed in weights:
            d_in = weight.shape[-2 if is_transposed else -1]
            empty = torch.zeros(batch, d_in, device=weight.device)
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
        elif func in _MATMULS:
            names = self._product(args[0], args[1])
            self._take_transposed(names, result)
        elif func in _BMMS:
            self._take_transposed(self._products(args[0], args[1]), result)
        elif func in _CHUNKS and self._given is not None and args[0] is self._given[0]:
            self.transposed |= dict.fromkeys(self._given[1], True)
        return result

    def _take_transposed(self, names: Sequence[str], result: Tensor) -> None:
        if names:
            self.transposed |= {name: self.transposed.get(name, False) for name in names}
            self._given = (result, list(names))

    def _product(self, inputs: Tensor, weight: Tensor) -> Sequence[str]:
        """One expert's; returns the names of what it is made with."""
        names = self._names_of(weight)
        if not names:
            return ()
        if self._picked is not None and inputs is self._picked[0]:
            self._rows, self._picked = self._picked[1], None
        if self._rows is None or len(self._rows) != len(inputs):
            return ()
        self._keep(names, inputs, self._rows)
        return names

    def _products(self, inputs: Tensor, weight: Tensor) -> Sequence[str]:
        """Those of all experts, `inputs` `[experts, batch * tokens, d_in]`."""
        found = [
            experts
            for whole, experts, _ in self._weights
            if whole.data_ptr() == weight.data_ptr() and whole.shape == weight.shape
        ]
        if not found or inputs.shape[1] != len(self._lengths) * self._tokens:
            return ()
        for names, each in zip(found[0], inputs, strict=True):
            rows = each.ne(0).any(1).nonzero()[:, 0]
            self._keep(names, each[rows], rows)
        return [name for names in found[0] for name in names]

    def _keep(self, names: Sequence[str], inputs: Tensor, rows: Tensor) -> None:
        mean, seen = self._means(inputs, rows)
        self.means |= dict.fromkeys(names, mean)
        self.seen |= dict.fromkeys(names, seen)

    def _names_of(self, weight: Tensor) -> tuple[str, ...]:
        """Of the expert whose part of a parameter this is; empty: of none."""
        place = weight.data_ptr()
        for whole, experts, _ in self._weights:
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
