"""A model run group by group is the model run whole, and mean inputs give mean outputs."""

import pytest
import torch
from torch import nn

from arm_ray.model import activations
from arm_ray.model.activations import output_shifts
from arm_ray.model.group import Decoder
from arm_ray.model.layout import model_layout
from tests.builders.models import FAMILIES, tiny_model

CPU = torch.device("cpu")
LENGTHS = torch.tensor([20, 13, 1, 7])


def _inputs() -> torch.Tensor:
    return torch.randint(0, 320, (4, 20), generator=torch.Generator().manual_seed(3))


def _embedded(
    decoder: Decoder, weights: dict[str, torch.Tensor], ids: torch.Tensor
) -> torch.Tensor:
    rows = weights[decoder.architecture.embedding][ids.flatten()]
    return decoder.embed(rows, (ids.shape[0], ids.shape[1]))


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
    decoder = Decoder(layout, CPU, torch.float32)
    hidden = _embedded(decoder, weights, ids)
    for group in layout.groups:
        hidden = decoder.runner(group.index).forward(weights, hidden, LENGTHS).hidden
    assert torch.equal(hidden, whole[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_shifts_are_differences_of_the_masked_means_of_hooked_outputs(family: str) -> None:
    models = [tiny_model(family, seed=seed) for seed in (2, 3, 4)]
    layout = model_layout(models[0].config)
    hooked = [_mean_outputs(model, layout.rotated) for model in models]
    weights = [{name: p.detach() for name, p in model.named_parameters()} for model in models]
    decoder = Decoder(layout, CPU, torch.float32)
    hidden = [_embedded(decoder, each, _inputs()) for each in weights]
    seen = set()
    for group in layout.groups:
        runner = decoder.runner(group.index)
        means = []
        for index, each in enumerate(weights):
            output = runner.forward(each, hidden[index], LENGTHS)
            hidden[index] = output.hidden
            means.append(output.means)
        for name in means[0]:
            bias = name.removesuffix("weight") + "bias"
            shifts = output_shifts(
                [each[name] for each in weights],
                [each.get(bias) for each in weights],
                [mean[name] for mean in means],
            )
            for found, other in zip(shifts, hooked[1:], strict=True):
                expected = other[name] - hooked[0][name]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            seen.add(name)
    assert seen == layout.rotated == set(hooked[0])


def _mean_outputs(model: nn.Module, names: frozenset[str]) -> dict[str, torch.Tensor]:
    mask = torch.arange(20) < LENGTHS[:, None]
    means: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def record(_m, _a, out):
            means[name] = ((out * mask[:, :, None]).sum(1) / LENGTHS[:, None]).T

        return record

    for name, module in model.named_modules():
        if f"{name}.weight" in names:
            module.register_forward_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        model(input_ids=_inputs(), attention_mask=mask.long())
    return means


@pytest.mark.parametrize("batch", [1, 5])
def test_mean_inputs_in_bfloat16_are_summed_in_float32(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an activation is larger than the buffer, and goes through it in parts."""
    model = tiny_model("llama3.2", seed=2).to(torch.bfloat16)
    layout = model_layout(model.config)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    lengths = LENGTHS[:1].repeat(batch) - torch.arange(batch)
    decoder = Decoder(layout, CPU, torch.bfloat16)
    hidden = _embedded(decoder, weights, _inputs()[:1].repeat(batch, 1))
    whole = decoder.runner(0)
    seen: list[torch.Tensor] = []
    for name, module in whole._decoder.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    means = whole.forward(weights, hidden, lengths).means
    monkeypatch.setattr(activations, "_FLOAT32_ELEMENTS", 2000)
    in_parts = whole.forward(weights, hidden, lengths).means
    [name] = [name for name in means if name.endswith("down_proj.weight")]
    for row, length in enumerate(lengths.tolist()):
        expected = seen[0][row, :length].double().mean(0)
        torch.testing.assert_close(means[name][row].double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(in_parts[name][row].double(), expected, rtol=1e-5, atol=1e-7)


def test_rotated_tensors_are_the_linear_weights_of_the_layers() -> None:
    layout = model_layout(tiny_model("qwen2.5", 0).config)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert {name.split(".")[-2] for name in layout.rotated} == set(projections)
    assert len(layout.rotated) == 7 * 3
    assert "lm_head.weight" in layout.groups[-1].tensors
    assert "model.embed_tokens.weight" in layout.groups[0].tensors


def test_a_tied_head_is_one_tensor_with_the_embedding() -> None:
    assert "lm_head.weight" not in model_layout(tiny_model("smollm2", 0).config).shapes
