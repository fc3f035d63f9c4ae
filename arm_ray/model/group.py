"""A layer group as a function of its weights, which also returns its modules' mean inputs.

The architecture is Hugging Face's own: the decoder is built once on the `meta` device with as many
layers as the group has, and called with the group's tensors. No decoder is written by hand.

**Activations.** ARM needs, for each linear module, the mean over a sample's tokens of the
module's output. A linear module's mean output is its output at the mean input:
`mean_t(W x_t + b) = W mean_t(x_t) + b`. So only mean inputs are collected while the forward
pass runs, once for modules that share an input (q/k/v; gate/up), and the outputs follow with one
small product per weight (`mean_outputs`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from arm_ray.model.layout import EMBEDDING, LayerGroup, ModelLayout

# Elements of a weight that are in float64 at once.
_FLOAT64_ELEMENTS = 1 << 20


class GroupRunner:
    """Runs the decoder layers of groups of one shape.

    Args:
        layout: The model.
        group: The group.
        device: Where the forward pass runs.
        dtype: Of weights and hidden states in the forward pass.
    """

    def __init__(
        self, layout: ModelLayout, group: LayerGroup, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.group = group
        self._decoder = _meta_decoder(layout, group, device, dtype)
        self._local_names = {
            name: name.replace(f"model.layers.{layer}.", f"layers.{layer - group.first_layer}.")
            for layer in range(group.first_layer, group.end_layer)
            for name in group.tensors
            if name.startswith(f"model.layers.{layer}.")
        }
        self._inputs: dict[str, Tensor] = {}
        self._token_weights: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        global_names = {local: name for name, local in self._local_names.items()}
        for local, module in self._decoder.named_modules():
            name = global_names.get(f"{local}.weight")
            if name in layout.rotated:
                module.register_forward_pre_hook(self._hook(name))

    @torch.no_grad()
    def forward(
        self, weights: Mapping[str, Tensor], hidden: Tensor, lengths: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the group on one micro-batch.

        Args:
            weights: The group's tensors, in the compute dtype, on the device.
            hidden: `[batch, tokens, hidden]` hidden states; right-padded.
            lengths: `[batch]` int64 number of real tokens of each sample.

        Returns:
            The hidden states after the group, of the shape of `hidden`; and for each rotated
            weight, by its name, the mean input `[batch, d_in]` float32 over the real tokens.
        """
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        real = (positions < lengths[:, None]).to(torch.float32)
        self._token_weights = real / lengths[:, None]
        self._inputs, self._last = {}, None
        local = {self._local_names[n]: weights[n] for n in self._local_names}
        # Padding is on the right and attention is causal: no real token sees it, so no mask.
        output = torch.func.functional_call(
            self._decoder, local, kwargs={"inputs_embeds": hidden, "use_cache": False}, strict=False
        )
        inputs, self._inputs, self._last = self._inputs, {}, None
        return output.last_hidden_state, inputs

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0]
            # q/k/v, and gate and up, are given one and the same tensor.
            if self._last is None or self._last[0] is not value:
                assert self._token_weights is not None
                mean = torch.bmm(self._token_weights[:, None, :], value.to(torch.float32))
                self._last = (value, mean[:, 0, :])
            self._inputs[name] = self._last[1]

        return record


def embed(weights: Mapping[str, Tensor], input_ids: Tensor) -> Tensor:
    """First hidden states `[batch, tokens, hidden]` of token ids `[batch, tokens]`."""
    return nn.functional.embedding(input_ids, weights[EMBEDDING])


def mean_outputs(weight: Tensor, bias: Tensor | None, mean_input: Tensor) -> Tensor:
    """`A = W X̄ (+ b)`, `[d_out, N]` float64.

    The shift between two models is far smaller than `A` itself: rounding `A` to float32 would give
    a low-rank shift a full set of small singular values, and so turn noise into rotation.

    Args:
        weight: `[d_out, d_in]`, as the forward pass used it.
        bias: `[d_out]` or None.
        mean_input: `X̄ᵀ` `[N, d_in]` float32.
    """
    inputs = mean_input.T.to(torch.float64)
    # By rows, so that no float64 copy of the whole weight is made.
    step = max(1, _FLOAT64_ELEMENTS // weight.shape[1])
    outputs = torch.cat([rows.to(torch.float64) @ inputs for rows in torch.split(weight, step)])
    return outputs if bias is None else outputs + bias.to(torch.float64)[:, None]


def _meta_decoder(
    layout: ModelLayout, group: LayerGroup, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    config = copy.deepcopy(layout.config)
    config.num_hidden_layers = group.end_layer - group.first_layer
    layer_types = getattr(layout.config, "layer_types", None)
    if layer_types is not None:
        config.layer_types = layer_types[group.first_layer : group.end_layer]
    config.use_cache = False
    with torch.device("meta"):
        decoder: nn.Module = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa")
    decoder.norm = nn.Identity()
    decoder.embed_tokens = nn.Identity()
    # Rotary frequencies are no parameters: they are made anew where the pass runs.
    rotary: Any = type(decoder.rotary_emb)
    with torch.device(device):
        decoder.rotary_emb = rotary(config=config)
    return decoder.eval()
