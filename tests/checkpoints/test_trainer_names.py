"""Checkpoints of torchtitan and Megatron: names, orders of rows and stacked layers undone.

The fixtures follow the formulas of the trainers' sources. No trainer wrote them.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from arm_ray.checkpoints.formats import find_format, missing, open_given, open_source
from arm_ray.checkpoints.huggingface import Checkpoint, open_checkpoint
from arm_ray.checkpoints.inspect import inspect_checkpoint
from arm_ray.checkpoints.sharded import Part, ShardedCheckpoint
from arm_ray.config import parse_merge_config
from arm_ray.errors import (
    ArmRayError,
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
    PickleRefusedError,
)
from arm_ray.following.layouts import RunWatcher
from arm_ray.following.snapshots import take
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.merge import run as module
from arm_ray.runtime.merge.run import merge
from tests.builders.checkpoints import assert_same_bits, load_all
from tests.builders.models import fine_tuned, save, tiny_model
from tests.builders.trainer_names import (
    by_neighbours,
    torchtitan_weights,
    write_megatron,
    write_torchtitan,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FAMILIES = {"llama": "llama3.2", "qwen2": "qwen2.5", "qwen3": "qwen3"}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {family: tiny_model(name, seed=1, num_layers=2) for family, name in FAMILIES.items()}


@pytest.fixture(scope="module")
def bases(
    models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("bases")
    return {f: open_checkpoint(save(model, root / f)) for f, model in models.items()}


def weights_of(model: PreTrainedModel) -> Weights:
    """A state dict as it is saved: without the copy of a tied embedding."""
    tied = model.config.tie_word_embeddings
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {n: t for n, t in state.items() if not (tied and n == "lm_head.weight")}


def assert_read(path: Path, base: Checkpoint, expected: Weights) -> ShardedCheckpoint:
    assert missing(path) is None
    opened = open_source(path, base)
    assert isinstance(opened, ShardedCheckpoint)
    assert opened.tensors.keys() == expected.keys()
    # All at once, and one by one as shards of a merge may read them; after a way to an actor too.
    sent = pickle.loads(pickle.dumps(opened))
    assert sent.fingerprint == opened.fingerprint
    for found in (
        opened.read(sorted(expected)),
        {name: sent.read([name])[name] for name in expected},
    ):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype
            assert opened.tensors[name].shape == tuple(tensor.shape)
            # Nothing of what it was a part of is kept.
            assert found[name].untyped_storage().nbytes() == tensor.nbytes
    return opened


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_torchtitan_is_read(
    models: dict[str, PreTrainedModel],
    bases: dict[str, Checkpoint],
    tmp_path: Path,
    family: str,
    new: bool,
) -> None:
    model, base = models[family], bases[family]
    path = write_torchtitan(tmp_path / "step-3", weights_of(model), model.config, new=new)
    assert find_format(path) == ("torchtitan", ".metadata")
    opened = assert_read(path, base, weights_of(model))
    assert opened.left_out == (() if new else ("model.freqs_cis",))
    told = inspect_checkpoint(path)
    assert (told.format, told.step, told.complete) == ("torchtitan", 3, True)
    shutil.copy(base.path / "config.json", path)
    assert inspect_checkpoint(path).model_type == family


def test_a_last_step_with_the_model_alone_and_a_stored_copy_of_a_tied_head(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = models["llama"]
    weights = {name: tensor.bfloat16() for name, tensor in weights_of(model).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    path = write_torchtitan(tmp_path / "step-9", weights, model.config, optimizer=False)
    assert_read(path, bases["llama"], weights)


def complex_llama(state: Weights, config: Any, ids: Tensor) -> Tensor:
    """torchtitan's Llama in a few lines: queries and keys are rotated as complex numbers."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width, count = config.hidden_size // heads, len(ids)
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return x * scale * state[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], width // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = state["tok_embeddings.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        y = norm(x, f"{name}.attention_norm")
        q, k, v = (
            (y @ state[f"{name}.attention.qkv_linear.w{kind}.weight"].T).view(count, -1, width)
            for kind in "qkv"
        )
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
        )
        x = x + attended.transpose(0, 1).flatten(1) @ state[f"{name}.attention.wo.weight"].T
        y = norm(x, f"{name}.ffn_norm")
        gate, up = (y @ state[f"{name}.feed_forward.w{kind}.weight"].T for kind in (1, 3))
        down = state[f"{name}.feed_forward.w2.weight"].T
        x = x + torch.nn.functional.silu(gate) * up @ down
    return norm(x, "norm") @ state["tok_embeddings.weight"].T


def test_rows_of_llama_change_places_in_the_right_direction(
    bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """What torchtitan computes from its order, transformers computes from the one that is read."""
    model = tiny_model("smollm2", seed=3, num_layers=2)
    base = open_checkpoint(save(model, tmp_path / "base"))
    state = torchtitan_weights(weights_of(model), model.config)
    ids = torch.randint(0, 320, (12,), generator=torch.Generator().manual_seed(0))
    path = write_torchtitan(tmp_path / "step-1", weights_of(model), model.config)
    opened = open_source(path, base)
    again = type(model)(model.config).eval()
    again.load_state_dict(opened.read(opened.tensors), strict=False)
    again.tie_weights()
    with torch.no_grad():
        expected, found = complex_llama(state, model.config, ids), again(ids[None]).logits[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # The test can fail: in the other direction it is another model.
        for layer in range(2):
            for kind, heads in (("wq", 4), ("wk", 2)):
                name = f"layers.{layer}.attention.qkv_linear.{kind}.weight"
                state[name] = by_neighbours(state[name], heads)
        other = complex_llama(state, model.config, ids)
    assert (other - expected).abs().max() > 0.01


@pytest.mark.parametrize("layers", ["stacked", "single", "singleton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_is_read(
    models: dict[str, PreTrainedModel],
    bases: dict[str, Checkpoint],
    tmp_path: Path,
    family: str,
    layers: str,
) -> None:
    model, base = models[family], bases[family]
    path = write_megatron(
        tmp_path / "iter_0000100",
        weights_of(model),
        model.config,
        ranks=2,
        rows=384,
        layers=layers,
        local_norms=layers == "single",
    )
    assert find_format(path) == ("megatron", ".metadata")
    opened = assert_read(path, base, weights_of(model))
    padded = "rows 320 to 383 of embedding.word_embeddings.weight, which pad the vocabulary"
    assert opened.left_out[0] == padded
    states = "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"
    assert states in opened.left_out
    assert not any("optimizer" in name for name in opened.left_out)
    told = inspect_checkpoint(path)
    assert (told.format, told.step, told.complete) == ("megatron", 100, True)
    assert told.details["layers"].startswith("all" if layers == "stacked" else "each")
    # Parts of one stored tensor count by themselves.
    shutil.copy(base.path / "config.json", path)
    told = inspect_checkpoint(path)
    assert told.num_tensors == len(weights_of(model))
    assert told.num_parameters == sum(t.numel() for t in weights_of(model).values())


def test_only_the_pieces_of_a_layer_are_read(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = models["qwen2"]
    path = write_megatron(tmp_path / "iter_0000001", weights_of(model), model.config, ranks=2)
    opened = open_source(path, bases["qwen2"])
    loaded: list[Any] = []
    load = type(opened).load  # type: ignore[attr-defined]

    def counted(self: Any, file: Path, key: Any) -> Any:
        loaded.append(key)
        return load(self, file, key)

    monkeypatch.setattr(type(opened), "load", counted)
    names = [
        f"model.layers.1.self_attn.{kind}_proj.{end}"
        for kind in "qkv"
        for end in ("weight", "bias")
    ]
    assert list(opened.read(names)) == names
    # Two ranks' pieces of the one layer, of weights and biases, once for the three of them.
    assert len(loaded) == 4


def test_where_checkpoints_of_megatron_are_found(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = models["qwen2"]
    given = (weights_of(model), model.config)
    # verl: the configuration beside it.
    verl = tmp_path / "global_step_7" / "actor"
    write_megatron(verl / "dist_ckpt", *given)
    model.config.save_pretrained(verl / "huggingface")
    for path in (verl, verl.parent):
        assert find_format(path) == ("megatron", "dist_ckpt/.metadata")
        assert open_source(path).config_directory == verl / "huggingface"
    # NeMo-RL: below the weights; Megatron: the newest that is complete.
    run = tmp_path / "weights"
    write_megatron(run / "iter_0000000", *given)
    assert find_format(run) == ("megatron", "iter_0000000/.metadata")
    shutil.copytree(run / "iter_0000000", run / "iter_0000020")
    assert find_format(run) == ("hf", "")
    (run / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert find_format(run) == ("megatron", "iter_0000020/.metadata")
    forced = open_given(f"megatron:{run}", bases["qwen2"])
    assert forced.kind == "megatron"
    with pytest.raises(NotACheckpointError, match="no checkpoint of torchtitan"):
        open_given(f"torchtitan:{run}", bases["qwen2"])


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Part(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (Part(None, (8,), 0, 0, 5), [0, 1, 2, 3, 4]),
        (Part(None, (2, 4), 0, 1, 2), [4, 5, 6, 7]),
        (Part(None, (2, 4), 1, 1, 3), [1, 2, 5, 6]),
        (Part(None, (2, 2, 2), 0, 0, 2, (1, 2)), [0, 2, 1, 3, 4, 6, 5, 7]),
    ],
)
def test_which_rows_a_part_is(part: Part, expected: list[int]) -> None:
    rows = torch.arange(8.0)
    for tensor in (rows, rows[:, None].expand(8, 3)):
        found = part.of(tensor)
        assert found.reshape(len(expected), -1)[:, 0].tolist() == expected
        assert tuple(found.shape) == part.shape(tensor.shape)


@pytest.mark.parametrize("trainer", ["torchtitan", "megatron"])
def test_candidates_are_merged_as_their_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str
) -> None:
    monkeypatch.setattr(module, "is_up_or_named", lambda _address: False)
    base = tiny_model("qwen3", seed=1, num_layers=2)
    save(base, tmp_path / "base")
    found = []
    for kind in ("exported", trainer):
        candidates = []
        for seed in (2, 3):
            model, path = fine_tuned(base, seed), tmp_path / kind / f"step-{seed}"
            if kind == "exported":
                save(model, path)
            elif kind == "torchtitan":
                write_torchtitan(path, weights_of(model), model.config)
            else:
                write_megatron(path, weights_of(model), model.config, rows=384)
            candidates.append(str(path))
        content = {
            "base": str(tmp_path / "base"),
            "candidates": candidates,
            "output": str(tmp_path / f"out-{kind}"),
            "method": {"operator": "task_arithmetic"},
        }
        outcome = merge(parse_merge_config(content), console=Console(quiet=True))
        found.append(load_all(outcome.model or Path()))
    assert_same_bits(*found)


def test_padding_is_told(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model, base = models["qwen2"], bases["qwen2"]
    path = write_megatron(tmp_path / "iter_0000001", weights_of(model), model.config, rows=384)
    content = {
        "base": str(base.path),
        "candidates": [str(path)],
        "output": str(tmp_path / "out"),
        "method": {"operator": "task_arithmetic"},
    }
    told = " ".join(open_inputs(parse_merge_config(content)).notes)
    assert "rows 320 to 383 of embedding.word_embeddings.weight" in told


WRITERS: dict[str, Callable[..., Path]] = {
    "torchtitan": write_torchtitan,
    "megatron": write_megatron,
}


@pytest.mark.parametrize("trainer", WRITERS)
@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"model_type": "gemma3_text"}, NotACheckpointError, r"not known how(?s:.*)gemma3_text"),
        ({"num_attention_heads": 2}, MismatchError, r"rows(?s:.*)got:(?s:.*)(wq|linear_qkv)"),
        ({"num_hidden_layers": 1}, MismatchError, "layers? |rows"),
        ({"num_attention_heads": None}, CorruptCheckpointError, "num_attention_heads: None"),
        ({"num_key_value_heads": 3}, CorruptCheckpointError, "cannot be shared out"),
    ],
)
def test_a_configuration_of_another_model(
    models: dict[str, PreTrainedModel],
    bases: dict[str, Checkpoint],
    tmp_path: Path,
    trainer: str,
    settings: dict[str, Any],
    kind: type[ArmRayError],
    message: str,
) -> None:
    model = models["qwen3"]
    path = WRITERS[trainer](tmp_path / "step-1", weights_of(model), model.config)
    config = {**bases["qwen3"].config, **settings}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=message) as caught:
        open_source(path)
    assert caught.value.where == str(path)
    assert caught.value.hint


def test_a_family_that_one_of_them_does_not_have(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Names of torchtitan with the configuration of Qwen2: which order the rows have is unknown."""
    model = models["qwen3"]
    path = write_torchtitan(tmp_path / "step-1", weights_of(model), model.config)
    with pytest.raises(NotACheckpointError, match=r"torchtitan(?s:.*)'qwen2'(?s:.*)llama or qwen3"):
        open_source(path, bases["qwen2"])


def test_a_vocabulary_that_is_too_small(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = models["qwen2"]
    path = write_megatron(tmp_path / "iter_0000001", weights_of(model), model.config)
    config = {**bases["qwen2"].config, "vocab_size": 321}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"word_embeddings(?s:.*)321 rows: the vocabulary"):
        open_source(path)


@pytest.mark.parametrize("trainer", WRITERS)
def test_a_tensor_is_missing_or_of_another_kind(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path, trainer: str
) -> None:
    model, base = models["qwen3"], bases["qwen3"]
    weights = weights_of(model)
    content = {
        "base": str(base.path),
        "candidates": [str(tmp_path / "step-1")],
        "output": str(tmp_path / "out"),
        "method": {"operator": "task_arithmetic"},
    }
    lacking = {n: t for n, t in weights.items() if n != "model.layers.1.mlp.down_proj.weight"}
    if trainer == "megatron":
        WRITERS[trainer](tmp_path / "step-1", lacking, model.config, layers="single")
    else:
        WRITERS[trainer](tmp_path / "step-1", lacking, model.config)
    with pytest.raises(MismatchError, match=r"no model\.layers\.1\.mlp\.down_proj"):
        open_inputs(parse_merge_config(content))
    wide = {n: t[:, :40] if n.endswith("o_proj.weight") else t for n, t in weights.items()}
    shutil.rmtree(tmp_path / "step-1")
    WRITERS[trainer](tmp_path / "step-1", wide, model.config)
    with pytest.raises(MismatchError, match=r"the shape of model\.layers\.0\.self_attn\.o_proj"):
        open_inputs(parse_merge_config(content))


def test_experts_are_told(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = models["qwen3"]
    path = write_megatron(
        tmp_path / "iter_0000001",
        weights_of(model),
        model.config,
        more={"decoder.layers.mlp.router.weight": torch.zeros(2, 4, 48)},
    )
    with pytest.raises(MismatchError, match=r"mlp\.router\.weight(?s:.*)mixtures of experts"):
        open_source(path, bases["qwen3"])


def test_what_megatron_has_not_finished(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model, base = models["qwen2"], bases["qwen2"]
    path = write_megatron(tmp_path / "iter_0000001", weights_of(model), model.config)
    (path / "common.pt").unlink()
    (path / "metadata.json").unlink()
    # It is known by its names.
    assert find_format(path)[0] == "megatron"
    assert missing(path) == "no metadata.json that can be read"
    assert inspect_checkpoint(path).complete is False
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(NotACheckpointError, match=r"zarr(?s:.*)torch_dist"):
        open_source(path, base)
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    whole = (path / ".metadata").read_bytes()
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:900])
    assert "truncated" in (missing(path) or "")
    (path / ".metadata").write_bytes(whole[:200])
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        open_source(path, base)
    (path / ".metadata").unlink()
    with pytest.raises(CorruptCheckpointError, match="no table of its tensors"):
        open_source(path, base)


def test_an_optimizer_alone_is_no_model(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    model = models["qwen2"]
    path = write_megatron(tmp_path / "dist_ckpt", weights_of(model), model.config)
    lacking = {n: t for n, t in weights_of(model).items() if "embed" not in n}
    shutil.rmtree(path)
    write_megatron(path, lacking, model.config)
    with pytest.raises(NotACheckpointError, match=r"no weights of a model(?s:.*)huggingface"):
        open_source(path, bases["qwen2"])


class Harmful:
    """Makes a directory where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("harmed",)


def test_what_is_planted_among_the_plans_of_ranks_does_not_run(
    models: dict[str, PreTrainedModel],
    bases: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    model = models["qwen2"]
    path = write_megatron(tmp_path / "iter_0000001", weights_of(model), model.config)
    content: Any = pickle.loads((path / ".metadata").read_bytes())
    assert content.all_local_plans
    content.all_local_plans = [Harmful()]
    (path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(PickleRefusedError, match=r"posix\.mkdir"):
        open_source(path, bases["qwen2"])
    assert not (tmp_path / "harmed").exists()


def test_an_export_of_torchtitan_takes_the_configuration_of_the_base(
    models: dict[str, PreTrainedModel], bases: dict[str, Checkpoint], tmp_path: Path
) -> None:
    """Its last step, by the writer of torch that it calls, is safetensors without a config.json."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    model, base = models["qwen3"], bases["qwen3"]
    expected = weights_of(model)
    path = tmp_path / "step-20"
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True)
    write(dict(expected), storage_writer=writer, no_dist=True)
    assert sorted(file.name for file in path.iterdir()) == [
        "model-00001-of-00001.safetensors", "model.safetensors.index.json", "sharded",
    ]  # fmt: skip
    assert find_format(path) == ("hf", "model.safetensors.index.json")
    opened = open_source(path, base)
    assert opened.config_directory == base.path
    found = opened.read(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(NotACheckpointError, match=r"not a model directory(?s:.*)config\.json"):
        open_source(path)


@pytest.mark.parametrize(
    ("layout", "folder", "weights"),
    [
        ("torchtitan", "checkpoint/step-20", ""),
        ("megatron", "iter_0000020", ""),
        ("verl", "global_step_20/actor", "dist_ckpt"),
        ("nemo-rl", "step_20/policy/weights", "iter_0000000"),
    ],
)
def test_what_attach_keeps_of_a_step_is_a_checkpoint(
    models: dict[str, PreTrainedModel],
    bases: dict[str, Checkpoint],
    tmp_path: Path,
    layout: str,
    folder: str,
    weights: str,
) -> None:
    model, run = models["qwen3"], tmp_path / "run"
    write = write_torchtitan if layout == "torchtitan" else write_megatron
    write(run / folder / weights, weights_of(model), model.config)
    if layout in ("megatron", "verl"):
        (run / "latest_checkpointed_iteration.txt").write_text("20")
    watcher = RunWatcher(run, missing=missing)
    watcher.scan()
    [found] = watcher.scan()
    assert (watcher.layout, found.step, found.complete, found.reason) == (layout, 20, True, "")
    snapshot, reason = take(found, watcher, tmp_path / "held")
    assert snapshot is not None, reason
    shutil.rmtree(run)
    assert not list(snapshot.path.rglob("common.pt"))
    assert_read(snapshot.path, bases["qwen3"], weights_of(model))


@pytest.mark.parametrize(
    ("trainer", "change", "message"),
    [
        ("megatron", "norm", r"norms(?s:.*)--apply-layernorm-1p"),
        ("megatron", "order", r"rows of the queries(?s:.*)--rotary-interleaved"),
        ("torchtitan", "order", "rows of the queries"),
    ],
)
def test_what_no_name_tells_is_seen_by_the_base(
    bases: dict[str, Checkpoint], tmp_path: Path, trainer: str, change: str, message: str
) -> None:
    base = tiny_model("smollm2", seed=1, num_layers=2)
    save(base, tmp_path / "base")
    model = fine_tuned(base, 2)
    weights = weights_of(model)
    content = {
        "base": str(tmp_path / "base"),
        "candidates": [str(tmp_path / "step-1")],
        "output": str(tmp_path / "out"),
        "method": {"operator": "task_arithmetic"},
    }
    WRITERS[trainer](tmp_path / "step-1", weights, model.config)
    open_inputs(parse_merge_config(content))
    for name, tensor in weights.items():
        if change == "norm" and "norm" in name:
            weights[name] = tensor - 1
        elif change == "order" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weights[name] = by_neighbours(tensor, 4 if "q_proj" in name else 2)
    shutil.rmtree(tmp_path / "step-1")
    WRITERS[trainer](tmp_path / "step-1", weights, model.config)
    with pytest.raises(MismatchError, match=message) as caught:
        open_inputs(parse_merge_config(content))
    assert caught.value.subject == "candidate-1"
