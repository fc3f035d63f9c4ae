"""A model run group by group is the model run whole, and mean inputs give mean outputs."""

import pytest
import torch
from torch import nn

from arm_ray.model.group import GroupRunner, embed, mean_outputs
from arm_ray.model.layout import model_layout
from tests.conftest import FAMILIES, tiny_model

CPU = torch.device("cpu")
LENGTHS = torch.tensor([20, 13, 1, 7])


def _inputs() -> torch.Tensor:
    return torch.randint(0, 320, (4, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers_per_group", [1, 2])
def test_groups_give_the_hidden_states_of_the_whole_model(
    family: str, layers_per_group: int
) -> None:
    model = tiny_model(family, seed=1, num_layers=5)
    whole: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _m, _a, out: whole.append(out))
    ids = _inputs()
    with torch.no_grad():
        model(input_ids=ids)
    layout = model_layout(model.config, layers_per_group)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    hidden = embed(weights, ids)
    for group in layout.groups:
        runner = GroupRunner(layout, group, CPU, torch.float32)
        hidden, _ = runner.forward(weights, hidden, LENGTHS)
    assert torch.equal(hidden, whole[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_outputs_are_the_masked_means_of_hooked_outputs(family: str) -> None:
    model = tiny_model(family, seed=2)
    ids = _inputs()
    mask = torch.arange(20) < LENGTHS[:, None]
    expected: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def record(_m, _a, out):
            total = (out * mask[:, :, None]).sum(1)
            expected[name] = (total / LENGTHS[:, None]).T

        return record

    layout = model_layout(model.config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in layout.rotated:
            module.register_forward_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask.long())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    hidden = embed(weights, ids)
    seen = set()
    for group in layout.groups:
        runner = GroupRunner(layout, group, CPU, torch.float32)
        hidden, means = runner.forward(weights, hidden, LENGTHS)
        for name, mean in means.items():
            bias = weights.get(name.removesuffix("weight") + "bias")
            found = mean_outputs(weights[name], bias, mean)
            torch.testing.assert_close(found.float(), expected[name], rtol=1e-5, atol=1e-5)
            seen.add(name)
    assert seen == layout.rotated == set(expected)


def test_rotated_tensors_are_the_linear_weights_of_the_layers() -> None:
    layout = model_layout(tiny_model("qwen2.5", 0).config)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {name.split(".")[-2] for name in layout.rotated} == set(projections)
    assert len(layout.rotated) == 7 * 3
    assert "lm_head.weight" in layout.groups[-1].tensors
    assert "model.embed_tokens.weight" in layout.groups[0].tensors


def test_a_tied_head_is_one_tensor_with_the_embedding() -> None:
    assert "lm_head.weight" not in model_layout(tiny_model("smollm2", 0).config).shapes
