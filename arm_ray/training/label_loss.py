"""The loss of a causal language model from logits at the label positions alone.

Logits are the largest tensor of fine-tuning (a vocabulary of 150,000 in float32 takes 0.6 MB a
token), and where prompts carry no loss most of them are never used.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from arm_ray.training.data import IGNORED

CHUNK_TOKENS = 2048
"""Label tokens whose logits are held at once."""

# Settings by which a model changes its logits after the lm_head.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def refusal(model: Any) -> str | None:
    """Why a model must keep its own forward pass, or None.

    Args:
        model: A causal language model of transformers.
    """
    config = model.config.get_text_config()
    for name in _AFTER_HEAD:
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"its logits are changed by {name}"
    try:
        decoder, head = model.get_decoder(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        decoder, head = None, None
    if decoder is None or decoder is model or head is None:
        return "it has no decoder and output embedding of its own"
    return None


def patch(model: Any) -> str | None:
    """Let `model(..., labels=...)` compute logits at label positions only, in place.

    The loss is ``sum of -log p(token) over label tokens / num_items_in_batch``, in float32; without
    `num_items_in_batch`, their mean. Without labels, the model's own forward pass runs. It is to be
    called before a trainer wraps the model; of a PEFT model, on the base model.

    Args:
        model: A causal language model of transformers.

    Returns:
        Why the model was left as it is, or None.
    """
    reason = refusal(model)
    if reason is not None:
        return reason
    own = model.forward

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return own(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        kwargs["use_cache"] = False
        hidden = self.get_decoder()(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        ).last_hidden_state
        is_label = labels[:, 1:] != IGNORED
        total = _summed_loss(
            self.get_output_embeddings(), hidden[:, :-1][is_label], labels[:, 1:][is_label]
        )
        count = is_label.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    model.forward = MethodType(forward, model)
    return None


def _summed_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of ``targets [L]`` given ``hidden [L, d]``; a float32."""

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), wanted, reduction="sum")

    if len(targets) <= CHUNK_TOKENS:
        return part(hidden, targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, wanted in zip(
        torch.split(hidden, CHUNK_TOKENS), torch.split(targets, CHUNK_TOKENS), strict=True
    ):
        total = total + checkpoint(part, states, wanted, use_reentrant=False)
    return total
