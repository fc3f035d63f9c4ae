"""Families of models: which are run group by group, and how their tensors are called."""

from pathlib import Path

import pytest
import torch

from arm_ray.model.architecture import architecture_of
from arm_ray.model.gate import tiny_config, tiny_model_config, try_family
from arm_ray.model.layout import model_layout
from tests.builders.families import FAMILIES, REFUSED, config_of, page, row_of

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_says_what_came_of_trying_each_family() -> None:
    """At least 25 families give the same bits run group by group as run whole."""
    rows = [row_of(family) for family in (*FAMILIES, *REFUSED)]
    refused = {row.family for row in rows if row.tried.why_not is not None}
    assert refused == set(REFUSED)
    assert len(FAMILIES) >= 25
    assert page(rows) == PAGE.read_text()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.2}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("cohere2", {"logit_scale": 0.25}),
        ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": True}),
        ("deepseek_v3", {"q_lora_rank": None, "first_k_dense_replace": 1}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0] * 9}),
    ],
)
def test_settings_of_a_family_are_its_own(family: str, change: dict[str, object]) -> None:
    """The small model that is tried keeps every setting but the sizes."""
    config = config_of(family)
    for key, value in change.items():
        setattr(config, key, value)
    tried = try_family(config)
    assert tried.why_not is None
    tiny = tiny_config(config)
    for key, value in change.items():
        found = getattr(tiny, key)
        whole = value[: len(found)] if isinstance(value, list) else value
        assert found == whole


def test_a_family_whose_groups_give_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were its embedding scaled again in each group, the logits would differ."""
    from arm_ray.model.group import GroupRunner

    monkeypatch.setattr(GroupRunner, "_replace_input", lambda _s, _l, args, kwargs: (args, kwargs))
    config = config_of("granite")
    config.embedding_multiplier = 12.0
    assert "differ from the whole model's" in (try_family(config).why_not or "")
    assert try_family(config_of("llama")).why_not is None


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"])
def test_names_in_the_files_are_those_that_transformers_writes(family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    config = tiny_model_config(config_of(family))
    architecture = architecture_of(config)
    model = type(architecture.model)(config)
    model.save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert stored == architecture.written_shapes()
    layout = model_layout(config, 1, stored)
    assert set(layout.shapes) == set(stored)
    assert not layout.unknown
    experts = [name for name in layout.rotated if ".experts." in name]
    assert set(experts) == layout.experts
    assert {len(layout.shapes[name]) for name in experts} == {2}


def test_what_forward_passes_take_is_made_of_what_the_files_hold() -> None:
    """The experts of a layer are put together as transformers does when it loads them."""
    config = tiny_model_config(config_of("qwen3_moe"))
    architecture = architecture_of(config)
    state = {name: torch.randn(shape) for name, shape in architecture.shapes.items()}
    written = architecture.written(state)
    weights, unknown = architecture.weights(written)
    assert not unknown
    made: dict[str, torch.Tensor] = {}
    for weight in weights:
        parts = {name: written[name] for name in weight.stored}
        made |= weight.make(parts) if weight.make else {weight.names[0]: parts[weight.stored[0]]}
    assert made.keys() == state.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in state.items())
