"""The loss at label positions equals that of the full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from arm_ray.training import label_loss
from tests.builders.models import FAMILIES, tiny_model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (4, 17), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [2048, 7])
def test_equals_full_logits(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_loss, "CHUNK_TOKENS", chunk)
    model: Any = tiny_model(family, seed=3, num_layers=2)
    inputs = batch()
    labels = inputs["labels"]
    logits = model(**{**inputs, "labels": None}).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(**inputs).loss, expected)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    assert label_loss.patch(model) is None
    loss = model(**inputs)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    count = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(**inputs, num_items_in_batch=2 * count)["loss"], loss / 2)


def test_without_labels_the_models_own_forward_runs() -> None:
    model: Any = tiny_model("smollm2", seed=3, num_layers=1)
    inputs = {**batch(), "labels": None}
    expected = model(**inputs).logits
    label_loss.patch(model)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_no_label_in_a_part_of_the_batch_is_a_loss_of_zero() -> None:
    model: Any = tiny_model("smollm2", seed=3, num_layers=1)
    label_loss.patch(model)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = model(**inputs, num_items_in_batch=torch.tensor(5))["loss"]
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale"])
def test_models_that_change_their_logits_keep_their_forward(name: str) -> None:
    model: Any = tiny_model("smollm2", seed=3, num_layers=1)
    setattr(model.config, name, 30.0)
    own = model.forward
    assert name in str(label_loss.patch(model))
    assert model.forward == own


def test_of_a_peft_model_the_base_is_patched() -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_model("smollm2", seed=3, num_layers=1)
    expected = model(**batch()).loss
    label_loss.patch(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    loss = wrapped(**batch())["loss"]
    torch.testing.assert_close(loss, expected)
