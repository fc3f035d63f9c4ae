"""What goes into each expert of a mixture: means over the tokens that the router sends there."""

from typing import Any

import pytest
import torch

from arm_ray.model.activations import Wanted
from arm_ray.model.architecture import architecture_of
from arm_ray.model.gate import tiny_model_config
from arm_ray.model.group import Decoder
from arm_ray.model.layout import model_layout
from tests.builders.families import config_of

CPU = torch.device("cpu")
LENGTHS = torch.tensor([12, 5, 1])


def _tokens_of_experts(experts: Any, seen: list[tuple[Any, ...]]) -> None:
    experts.register_forward_pre_hook(lambda _module, args: seen.append(args))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "olmoe"])
def test_mean_inputs_of_each_expert_are_those_of_its_tokens(family: str) -> None:
    """Against a plain program over what transformers gives the module of the experts."""
    config = tiny_model_config(config_of(family))
    architecture = architecture_of(config)
    torch.manual_seed(5)
    tensors = {name: 0.2 * torch.randn(shape) for name, shape in architecture.shapes.items()}
    written = architecture.written(tensors)
    layout = model_layout(config, 1, {n: tuple(t.shape) for n, t in written.items()})
    decoder = Decoder(layout, CPU, torch.float32)
    group = next(g for g in layout.groups if layout.experts & set(g.tensors))
    weights = decoder.form(group.tensors, lambda name, dtype: written[name].to(dtype))
    calls: list[tuple[Any, ...]] = []
    for module in decoder.architecture.model.modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            _tokens_of_experts(module, calls)
    hidden = torch.randn(3, 12, config.hidden_size)
    output = decoder.runner(group.index).forward(weights, hidden, LENGTHS, Wanted())
    [(inputs, chosen, _)] = calls
    names = sorted(layout.experts & set(group.tensors))
    assert set(names) == output.seen.keys()
    fused = next(t for n, t in weights.items() if n.endswith("gate_up_proj"))
    found_empty = 0
    for name in names:
        number = int(name.split(".experts.")[1].split(".")[0])
        is_down = layout.shapes[name][0] == config.hidden_size
        for sample, length in enumerate(LENGTHS.tolist()):
            rows = [12 * sample + t for t in range(length)]
            sent = [row for row in rows if number in chosen[row].tolist()]
            assert bool(output.seen[name][sample]) == bool(sent)
            if not sent:
                found_empty += 1
                assert not output.means[name][sample].any()
                continue
            value = inputs[sent].double()
            if is_down:
                gate, up = (value @ fused[number].double().T).chunk(2, dim=-1)
                value = torch.nn.functional.silu(gate) * up
            torch.testing.assert_close(
                output.means[name][sample].double(), value.mean(0), rtol=1e-5, atol=1e-6
            )
    # Some sample sends some expert nothing, and no expert is left to its default.
    assert found_empty
    assert any(output.seen[name].any() for name in names)


def test_routers_are_not_rotated() -> None:
    for family in ("phimoe", "jamba", "llama4_text", "qwen2_moe"):
        layout = model_layout(tiny_model_config(config_of(family)))
        ends = {name.split(".")[-2] for name in layout.rotated}
        assert not ends & {"gate", "router", "shared_expert_gate"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "qwen3"])
def test_a_layer_s_output_is_that_of_its_mlp(family: str) -> None:
    """Also where the experts are parameters of no linear module."""
    config = tiny_model_config(config_of(family))
    layout = model_layout(config, 1)
    generator = torch.Generator().manual_seed(5)
    tensors = {n: 0.2 * torch.randn(s, generator=generator) for n, s in layout.shapes.items()}
    decoder = Decoder(layout, CPU, torch.float32)
    runner, found = decoder.runner(0), list[torch.Tensor]()
    [mlp] = [
        module
        for name, module in decoder.architecture.layer_list[0].named_children()
        if name in ("mlp", "block_sparse_moe")
    ]

    def record(_module: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    mlp.register_forward_hook(record)
    names = [name for name in layout.groups[0].tensors if layout.is_layer_tensor(name)]
    weights = decoder.form(names, lambda name, _dtype: tensors[name])
    hidden = torch.randn(3, 12, config.hidden_size, generator=generator)
    output = runner.forward(weights, hidden, LENGTHS, Wanted(outputs=True))
    [expected] = found
    assert torch.equal(output.outputs[0], expected.reshape(3, 12, -1))
