"""Checkpoints that are broken, foreign or do not fit are refused, and say what is wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arm_ray import errors
from arm_ray.checkpoints.huggingface import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    open_checkpoint,
    resolve_path,
)
from arm_ray.checkpoints.validation import check_finite, check_zero_padding
from arm_ray.checkpoints.weight_file import (
    DTYPES,
    TensorSpec,
    atomic_file,
    read_header,
    read_tensors,
    write_json,
    write_weight_file,
)
from arm_ray.errors import (
    ArmRayError,
    CorruptCheckpointError,
    MismatchError,
    NotACheckpointError,
    PickleRefusedError,
)
from arm_ray.merging.method import open_method
from arm_ray.model.checks import base_dtype, check_layout, layout_of
from arm_ray.model.layout import ModelLayout, model_layout
from arm_ray.runtime.inputs import open_inputs
from arm_ray.runtime.shards.layer_shard import LayerShard, ShardSpec
from arm_ray.storage import regular
from tests.builders.merge_case import MergeCase
from tests.builders.models import FAMILIES, save, tiny_model

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


# ---- weight files


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for code, dtype in DTYPES.items():
        for label, shape in (("matrix", (5, 3)), ("vector", (7,)), ("scalar", ())):
            tensors[f"{code}.{label}"] = torch.randn(shape, generator=generator).to(dtype)
        tensors[f"{code}.empty"] = torch.empty((0, 4), dtype=dtype)
    return tensors


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors, path = tensors_of_all_kinds(), tmp_path / "w.safetensors"
    num_bytes = write_weight_file(path, specs_of(tensors), iter(tensors.values()))
    assert num_bytes == path.stat().st_size
    assert_same(load_file(path), tensors)
    assert_same(read_tensors(path, list(tensors)), tensors)


def test_the_header_of_what_the_library_writes(tmp_path: Path) -> None:
    tensors, path = tensors_of_all_kinds(), tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    table = read_header(path)
    data = path.read_bytes()
    assert table.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = table[name]
        assert (entry.name, entry.file, entry.shape) == (name, path, tuple(tensor.shape))
        assert DTYPES[entry.code] == tensor.dtype
        assert entry.num_bytes == tensor.nbytes
        flat = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert data[entry.begin : entry.end] == flat


def test_a_written_header_reads_back(tmp_path: Path) -> None:
    tensors, path = tensors_of_all_kinds(), tmp_path / "w.safetensors"
    write_weight_file(path, specs_of(tensors), tensors.values())
    table = read_header(path)
    assert list(table) == list(tensors)
    assert all(table[name].num_bytes == tensor.nbytes for name, tensor in tensors.items())


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weight_file(path, [], [])
    assert read_header(path) == {}
    assert load_file(path) == {}


def test_names_that_json_escapes(tmp_path: Path) -> None:
    tensors, path = {'a "b"\\é': torch.ones(2)}, tmp_path / "w.safetensors"
    write_weight_file(path, specs_of(tensors), tensors.values())
    assert_same(load_file(path), tensors)
    assert list(read_header(path)) == list(tensors)


def test_tensors_are_cast_and_laid_out_when_written(tmp_path: Path) -> None:
    tensor, path = torch.randn(3, 4).T, tmp_path / "w.safetensors"
    write_weight_file(path, [TensorSpec("a", torch.bfloat16, (4, 3))], [tensor])
    assert torch.equal(load_file(path)["a"], tensor.to(torch.bfloat16))


def weight_file(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"a": torch.arange(1.0, 9.0), "b": torch.ones(2, 2)}, path)
    return path


def raw_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("missing", [1, 16, 47])
def test_a_truncated_file_names_both_sizes(tmp_path: Path, missing: int) -> None:
    path = weight_file(tmp_path / "w.safetensors")
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(CorruptCheckpointError, match="is truncated") as caught:
        read_header(path)
    assert caught.value.where == str(path)
    assert (caught.value.got, caught.value.expected) == (
        f"{whole - missing} bytes",
        f"{whole} bytes, from its header",
    )


def test_a_padded_file_is_too_long(tmp_path: Path) -> None:
    path = weight_file(tmp_path / "w.safetensors")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CorruptCheckpointError, match="is too long"):
        read_header(path)


def table(**row: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **row}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 64,  # reserved, never written
        b"\xff" * 64,
        b"<html>not found</html>" * 4,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (1).to_bytes(8, "little") + b"5",
        (4).to_bytes(8, "little") + b'"ab"',
        (4).to_bytes(8, "little") + b"\xff\xfe\xff\xfe",
    ],
    ids=lambda content: content[:12].hex() or "empty",
)
def test_a_file_that_is_no_weight_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="no readable safetensors file") as caught:
        read_header(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": 5}',
        b'{"a": {}}',
        b'{"a": null}',
        table(data_offsets=[0]),
        table(data_offsets=[0, 4, 8]),
        table(data_offsets="04"[:1]),
        table(data_offsets=None),
        table(data_offsets=[0, "x"]),
        table(data_offsets=[0, 4]).replace(b"4]", b"1e999]"),
        table(shape=None),
        table(shape=["x"]),
        b"[" * 100_000,
    ],
    ids=lambda header: header[:60].decode(),
)
def test_a_header_that_makes_no_sense(tmp_path: Path, header: bytes) -> None:
    path = raw_file(tmp_path / "w.safetensors", header, b"\0" * 4)
    with pytest.raises(CorruptCheckpointError):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [table(shape=[9]), table(shape=[-1]), table(dtype="BF16"), table(data_offsets=[2, 4])],
    ids=["shape", "negative", "dtype", "offset"],
)
def test_a_header_that_contradicts_itself_is_refused_at_the_latest_when_read(
    tmp_path: Path, header: bytes
) -> None:
    path = raw_file(tmp_path / "w.safetensors", header, b"\0" * 4)

    def read() -> None:
        read_header(path)
        read_tensors(path, ["a"])

    with pytest.raises(CorruptCheckpointError):
        read()


def test_a_tensor_that_a_file_lacks(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="cannot be read"):
        read_tensors(weight_file(tmp_path / "w.safetensors"), ["missing"])


# ---- atomic writes


def failing(*tensors: torch.Tensor):
    yield from tensors
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("older", [True, False])
def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, older: bool) -> None:
    path = tmp_path / "w.safetensors"
    if older:
        path.write_bytes(b"older")
    specs = [TensorSpec("a", torch.float32, (2,)), TensorSpec("b", torch.float32, (2,))]
    with pytest.raises(OSError, match="No space left"):
        write_weight_file(path, specs, failing(torch.ones(2)))
    with pytest.raises(ValueError, match=r"b: got shape \[3\], expected \[2\]"):
        write_weight_file(path, specs, [torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match="shorter"):
        write_weight_file(path, specs, [torch.ones(2)])
    assert [p.name for p in tmp_path.iterdir()] == (["w.safetensors"] if older else [])
    assert not older or path.read_bytes() == b"older"


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_under_its_name_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with atomic_file(path) as file:
        file.write(b"{}")
        assert not path.exists()
    assert path.read_bytes() == b"{}"
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_bytes() == b"{}"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


# ---- directories


def base_model(family: str = "smollm2") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`config.json` and tensors of a tiny model of three layers."""
    model = tiny_model(family, seed=1)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    return json.loads(model.config.to_json_string()), tensors


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    return {family: base_model(family) for family in FAMILIES}


@pytest.fixture
def write(tmp_path: Path, models) -> Callable[..., Path]:
    """Write a checkpoint directory: configuration and tensors, some replaced or left out."""

    def write(
        name: str = "checkpoint",
        family: str = "smollm2",
        settings: dict[str, Any] | None = None,
        tensors: dict[str, torch.Tensor | None] | None = None,
    ) -> Path:
        config, weights = models[family]
        path = tmp_path / name
        path.mkdir()
        changed = {**config, **(settings or {})}
        (path / "config.json").write_text(json.dumps(changed))
        merged = {**weights, **(tensors or {})}
        save_file({k: t for k, t in merged.items() if t is not None}, path / SINGLE_NAME)
        return path

    return write


def shard(path: Path, count: int = 2) -> dict[str, Any]:
    """Cut a checkpoint's weight file into `count`; returns its index."""
    tensors = load_file(path / SINGLE_NAME)
    (path / SINGLE_NAME).unlink()
    weight_map = {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        own = sorted(tensors)[i::count]
        save_file({key: tensors[key] for key in own}, path / name)
        weight_map.update(dict.fromkeys(own, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / INDEX_NAME).write_text(json.dumps(index))
    return index


def test_a_whole_and_a_sharded_checkpoint_read_the_same(write) -> None:
    whole, cut = open_checkpoint(write("whole")), write("cut")
    shard(cut, 3)
    sharded = open_checkpoint(cut)
    assert whole.tensors.keys() == sharded.tensors.keys()
    assert len({entry.file for entry in sharded.tensors.values()}) == 3
    names = sorted(whole.tensors)
    assert_same(sharded.read(names), whole.read(names))
    assert whole.config["model_type"] == "llama"


def test_the_hugging_face_library_s_own_checkpoints(tmp_path: Path) -> None:
    model = tiny_model("qwen3", seed=1)
    path = save(model, tmp_path / "model", torch.bfloat16, max_shard_size="60KB")
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint)
    check_layout(layout, checkpoint, "base")
    assert base_dtype(layout, checkpoint) == torch.bfloat16
    name = next(iter(layout.rotated))
    expected = model.get_parameter(name).detach().to(torch.bfloat16)
    assert torch.equal(checkpoint.read([name])[name], expected)


def refused(path: Path, kind: type[ArmRayError], match: str) -> ArmRayError:
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(path)
    assert type(caught.value) is kind
    return caught.value


def test_a_missing_directory_and_a_file_instead(tmp_path: Path) -> None:
    error = refused(tmp_path / "missing", NotACheckpointError, "is not a directory")
    assert error.got == "nothing there"
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file", NotACheckpointError, "is not a directory").got == "a file"


def test_a_directory_that_is_no_model_directory(tmp_path: Path) -> None:
    assert "empty" in (refused(tmp_path, NotACheckpointError, "not a model directory").got or "")
    for step in range(10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    error = refused(tmp_path, NotACheckpointError, "not a model directory")
    assert error.got is not None
    assert error.got.startswith("checkpoint-0, checkpoint-1")
    assert error.got.endswith("…")
    assert "checkpoint-40" in (error.hint or "")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\x00"])
def test_a_malformed_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    error = refused(tmp_path, CorruptCheckpointError, "JSON file")
    assert error.where == str(tmp_path / "config.json")


def test_a_directory_that_cannot_be_read(write, monkeypatch) -> None:
    path = write()

    def denied(*_args: Any, **_options: Any) -> str:
        raise PermissionError(13, "Permission denied")

    # Root may read everything.
    monkeypatch.setattr(regular, "open_regular", denied)
    error = refused(path, NotACheckpointError, "cannot be read")
    assert "Permission denied" in (error.got or "")


def test_a_directory_where_a_file_should_be(write) -> None:
    path = write()
    (path / SINGLE_NAME).unlink()
    (path / SINGLE_NAME).mkdir()
    refused(path, NotACheckpointError, "cannot be read")


def test_no_weights(write) -> None:
    path = write()
    (path / SINGLE_NAME).unlink()
    refused(path, NotACheckpointError, "holds no weights")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.pth", "a.ckpt"]
)
def test_pickles_are_refused_and_never_opened(write, name: str) -> None:
    path = write()
    (path / SINGLE_NAME).unlink()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (path / "executed",))

    (path / name).write_bytes(pickle.dumps(Trap()))
    error = refused(path, PickleRefusedError, "pickles")
    assert error.got == name
    assert "save_pretrained" in (error.hint or "")
    assert not (path / "executed").exists()


def test_a_pickle_beside_safetensors_does_not_matter(write) -> None:
    path = write()
    (path / "optimizer.pt").write_bytes(b"")
    assert open_checkpoint(path).tensors


def test_weight_files_without_an_index(write) -> None:
    path = write()
    shard(path)
    (path / INDEX_NAME).unlink()
    error = refused(path, CorruptCheckpointError, "no index")
    assert "model-00001-of-00002.safetensors" in (error.got or "")


def test_an_index_that_names_a_missing_file(write) -> None:
    path = write()
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    error = refused(path, CorruptCheckpointError, "does not exist")
    assert error.got == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""]
)
def test_an_index_that_points_outside(write, name: str) -> None:
    path = write()
    index = shard(path)
    (path.parent / "other.safetensors").write_bytes(b"")
    index["weight_map"][Q_PROJ] = name
    (path / INDEX_NAME).write_text(json.dumps(index))
    assert refused(path, CorruptCheckpointError, "outside its directory").got == name


def test_an_index_that_names_the_wrong_file(write) -> None:
    path = write()
    index = shard(path)
    names = set(index["weight_map"].values())
    [other] = names - {index["weight_map"][Q_PROJ]}
    index["weight_map"][Q_PROJ] = other
    (path / INDEX_NAME).write_text(json.dumps(index))
    assert Q_PROJ in refused(path, CorruptCheckpointError, "in a file that lacks it").what


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]", "{"])
def test_an_index_without_a_map(write, index: str) -> None:
    path = write()
    (path / SINGLE_NAME).unlink()
    (path / INDEX_NAME).write_text(index)
    error = refused(path, CorruptCheckpointError, "JSON file|has no weight_map")
    assert error.where == str(path / INDEX_NAME)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int64])
def test_number_formats_that_are_not_merged(write, dtype: torch.dtype) -> None:
    path = write(tensors={Q_PROJ: torch.ones(48, 48).to(dtype)})
    checkpoint = open_checkpoint(path)
    with pytest.raises(NotACheckpointError, match=Q_PROJ) as caught:
        check_layout(layout_of(checkpoint), checkpoint, "base")
    assert caught.value.expected == ", ".join(DTYPES)
    assert "dequantise" in (caught.value.hint or "")


def test_a_truncated_weight_file_of_a_sharded_checkpoint_is_named(write) -> None:
    path = write()
    shard(path)
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(path, CorruptCheckpointError, "truncated").where == str(file)


def test_a_fingerprint_changes_with_the_files(write) -> None:
    path = write()
    first = open_checkpoint(path).fingerprint
    assert first == open_checkpoint(path).fingerprint
    tensors = load_file(path / SINGLE_NAME)
    tensors[Q_PROJ] += 1.0
    save_file(tensors, path / SINGLE_NAME)
    assert open_checkpoint(path).fingerprint != first
    assert open_checkpoint(write("other", family="qwen3")).fingerprint != first


# ---- paths and hub ids


@pytest.fixture
def hub(monkeypatch, tmp_path: Path) -> list[str]:
    """A hub that has `org/model` alone; what it was asked for."""
    asked: list[str] = []

    def snapshot_download(name: str, **_options: Any) -> str:
        asked.append(name)
        if name != "org/model":
            raise ConnectionError("the hub\n  cannot be reached")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_directory_is_taken_before_the_hub(hub: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_path("org/model") == tmp_path / "org" / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/org/../org/model") == tmp_path / "org" / "model"
    assert hub == []


def test_a_hub_id_is_downloaded(hub: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("org/model") == tmp_path / "snapshot"
    assert hub == ["org/model"]


def test_what_is_neither_says_both(hub: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotACheckpointError, match="not a local directory") as caught:
        resolve_path("org/modle")
    assert caught.value.where == "org/modle"
    assert caught.value.got == "ConnectionError: the hub cannot be reached"
    assert hub == ["org/modle"]


@pytest.mark.parametrize(
    "path",
    ["/missing/x", "./missing", "../missing", "~/missing/x", "a/b/c", "a/b/", "~nobody-here/x"],
)
def test_what_can_only_be_a_path_never_asks_the_hub(
    hub: list[str], tmp_path: Path, monkeypatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotACheckpointError, match=r"does not exist|cannot be read") as caught:
        resolve_path(path)
    assert caught.value.where == path
    assert hub == []


def test_a_name_that_is_too_long_for_a_path(hub: list[str]) -> None:
    with pytest.raises(NotACheckpointError):
        resolve_path("/" + "x" * 5000)


# ---- layouts


@pytest.fixture(scope="module")
def layouts() -> dict[str, ModelLayout]:
    return {family: model_layout(tiny_model(family, 0).config) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_fits_its_own_layout(write, layouts, family: str) -> None:
    checkpoint = open_checkpoint(write(family=family))
    check_layout(layouts[family], checkpoint, "base")
    assert set(layouts[family].shapes) == set(checkpoint.tensors)
    assert {e.shape for e in checkpoint.tensors.values()} >= {
        layouts[family].shapes[n] for n in layouts[family].rotated
    }


def test_a_configuration_that_names_no_family(write) -> None:
    with pytest.raises(NotACheckpointError, match="names no family") as caught:
        layout_of(open_checkpoint(write(settings={"model_type": None})))
    assert caught.value.got == "model_type None"


def test_a_quantised_checkpoint(write) -> None:
    path = write(settings={"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(NotACheckpointError, match="quantised"):
        layout_of(open_checkpoint(path))


@pytest.mark.parametrize(
    ("family", "settings", "what", "got"),
    [
        ("smollm2", {"hidden_size": 52}, "hidden_size differs", "52"),
        ("smollm2", {"vocab_size": 321}, "vocab_size differs", "321"),
        ("smollm2", {"num_hidden_layers": 4}, "num_hidden_layers differs", "4"),
        ("smollm2", {"intermediate_size": 96}, "intermediate_size differs", "96"),
        ("smollm2", {"num_attention_heads": 2}, "num_attention_heads differs", "2"),
        ("smollm2", {"num_key_value_heads": 4}, "num_key_value_heads differs", "4"),
        ("smollm2", {"rms_norm_eps": 1e-6}, "rms_norm_eps differs", "1e-06"),
        ("smollm2", {"hidden_act": "gelu"}, "hidden_act differs", "gelu"),
        ("qwen3", {"head_dim": 8}, "head_dim differs", "8"),
        ("mistral", {"sliding_window": 16}, "sliding_window differs", "16"),
        ("mistral", {"sliding_window": None}, "sliding_window differs", "None"),
    ],
)
def test_a_setting_that_differs_is_named(
    write, layouts, family: str, settings: dict[str, Any], what: str, got: str
) -> None:
    checkpoint = open_checkpoint(write(family=family, settings=settings))
    with pytest.raises(MismatchError, match=what) as caught:
        check_layout(layouts[family], checkpoint, "candidate-2")
    assert caught.value.got == got
    assert (caught.value.where or "").startswith("candidate-2: ")


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 5e5}, {"rope_theta": 123.0, "rope_type": "default"}]
)
def test_another_rope_is_a_mismatch(write, layouts, models, changes: dict[str, Any]) -> None:
    rope = {**models["smollm2"][0]["rope_parameters"], **changes}
    checkpoint = open_checkpoint(write(settings={"rope_parameters": rope}))
    with pytest.raises(MismatchError, match="rope_parameters differs"):
        check_layout(layouts["smollm2"], checkpoint, "base")
    # The spelling of older versions.
    config = {"rope_parameters": None, "rope_theta": changes["rope_theta"]}
    checkpoint = open_checkpoint(write("old", settings=config))
    with pytest.raises(MismatchError, match="rope"):
        check_layout(layouts["smollm2"], checkpoint, "base")


def test_another_family_is_a_mismatch(write, layouts) -> None:
    checkpoint = open_checkpoint(write(family="qwen3"))
    with pytest.raises(MismatchError, match="architecture differs") as caught:
        check_layout(layouts["smollm2"], checkpoint, "candidate-1")
    assert (caught.value.got, caught.value.expected) == ("qwen3", "llama")


@pytest.mark.parametrize(
    ("tensors", "what", "got"),
    [
        ({Q_PROJ: None}, "a tensor is missing", f"no {Q_PROJ}"),
        ({Q_PROJ: torch.ones(48, 47)}, f"the shape of {Q_PROJ} differs", "[48, 47]"),
        ({Q_PROJ: torch.ones(48 * 48)}, f"the shape of {Q_PROJ} differs", "[2304]"),
        ({EMBEDDING: torch.ones(321, 48)}, f"the shape of {EMBEDDING} differs", "[321, 48]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(write, layouts, tensors, what: str, got: str) -> None:
    checkpoint = open_checkpoint(write(tensors=tensors))
    with pytest.raises(MismatchError, match=what) as caught:
        check_layout(layouts["smollm2"], checkpoint, "base")
    assert (caught.value.got or "").startswith(got)


def test_a_copy_of_a_tied_head_and_rotary_buffers_are_tolerated(write, layouts, models) -> None:
    tensors = {
        "lm_head.weight": models["smollm2"][1][EMBEDDING].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.rotary_emb.inv_freq": torch.ones(6),
    }
    checkpoint = open_checkpoint(write(tensors=tensors))
    check_layout(layouts["smollm2"], checkpoint, "base")
    assert "lm_head.weight" in checkpoint.tensors


def test_a_head_is_either_tied_in_all_checkpoints_or_in_none(write, layouts, models) -> None:
    head = {"lm_head.weight": models["smollm2"][1][EMBEDDING].clone()}
    untied = open_checkpoint(write(settings={"tie_word_embeddings": False}, tensors=head))
    with pytest.raises(MismatchError):
        check_layout(layouts["smollm2"], untied, "candidate-1")
    tied = write("tied", "qwen2.5", {"tie_word_embeddings": True}, {"lm_head.weight": None})
    with pytest.raises(MismatchError):
        check_layout(layouts["qwen2.5"], open_checkpoint(tied), "candidate-1")


def test_the_dtype_of_most_of_the_rotated_weights(write, layouts, models) -> None:
    weights = models["smollm2"][1]
    halves = {n: t.bfloat16() for n, t in weights.items() if n in layouts["smollm2"].rotated}
    checkpoint = open_checkpoint(write(tensors={**halves, Q_PROJ: weights[Q_PROJ]}))
    assert base_dtype(layouts["smollm2"], checkpoint) == torch.bfloat16


# ---- the data itself


def checkpoint_with(path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path.mkdir()
    file = path / SINGLE_NAME
    write_weight_file(file, specs_of(tensors), tensors.values())
    return Checkpoint(path, {}, read_header(file))


def test_a_file_that_ends_in_zeros_was_still_being_written(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(9000), "b": torch.ones(9000)}
    good = checkpoint_with(tmp_path / "good", tensors)
    unfinished = checkpoint_with(tmp_path / "bad", tensors)
    file = unfinished.tensors["b"].file
    half = len(file.read_bytes()) // 2
    file.write_bytes(file.read_bytes()[:half].ljust(half * 2, b"\0"))
    check_zero_padding({"base": good, "candidate-1": good})
    for labels in (("base", "candidate-1"), ("candidate-1", "base")):
        with pytest.raises(CorruptCheckpointError, match="ends in zeros") as caught:
            check_zero_padding(dict(zip(labels, (good, unfinished), strict=True)))
        assert caught.value.where == f"{labels[1]}: {file}"
        assert caught.value.got == "zeros at the end of b"


def test_a_tail_that_is_zero_in_all_checkpoints_is_a_real_one(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(9000), "b": torch.zeros(9000)}
    checkpoints = {
        label: checkpoint_with(tmp_path / label, tensors) for label in ("base", "candidate-1")
    }
    check_zero_padding(checkpoints)
    # Only the last bytes count, and a bias may begin as zeros.
    for name in ("base", "candidate-1"):
        trained = torch.ones(9000) if name == "base" else torch.zeros(9000)
        tensors = {"a": torch.zeros(9000), "b": torch.ones(9000), "c.bias": trained}
        checkpoints[name] = checkpoint_with(tmp_path / f"{name}-bias", tensors)
    check_zero_padding(checkpoints)


def test_every_weight_file_s_own_tail_is_looked_at(write) -> None:
    good, bad = write("good"), write("bad")
    shard(good)
    shard(bad)
    file = sorted(bad.glob("*.safetensors"))[0]
    data = file.read_bytes()
    file.write_bytes(data[:-6000] + bytes(6000))
    with pytest.raises(CorruptCheckpointError) as caught:
        check_zero_padding({"base": open_checkpoint(good), "candidate-1": open_checkpoint(bad)})
    assert str(file) in (caught.value.where or "")


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_found_and_placed(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(5, 4, dtype=dtype)
    check_finite(tensor, "w", "here")
    tensor[3, 1] = bad
    tensor[4, 0] = -bad  # two infinities of opposite sign
    with pytest.raises(CorruptCheckpointError, match="w holds NaN or infinity") as caught:
        check_finite(tensor, "w", "here")
    assert caught.value.where == "here"
    assert caught.value.got == f"{bad} at [3, 1], and 1 more"


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_huge_numbers_are_finite_although_their_sum_overflows(dtype: torch.dtype) -> None:
    check_finite(torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype), "w", "here")
    check_finite(torch.full((3, 5), torch.finfo(dtype).min, dtype=dtype), "w", "here")


def test_scalars_and_empty_tensors_are_looked_at() -> None:
    check_finite(torch.empty(0, 3), "w", "here")
    check_finite(torch.tensor(2.0), "w", "here")
    with pytest.raises(CorruptCheckpointError, match="w holds NaN"):
        check_finite(torch.tensor(float("nan")), "w", "here")


def layer_shard(case: MergeCase, groups: range) -> LayerShard:
    config = case.config("method.operator=task_arithmetic")
    inputs = open_inputs(config)
    spec = ShardSpec(
        layout=inputs.layout,
        groups=groups,
        checkpoints=inputs.checkpoints,
        run=case.root / "run",
        schedule=config.schedule,
        method=open_method(config.method, 2),
        device="cpu",
        compute_dtype=torch.float32,
        threads=torch.get_num_threads(),
    )
    return LayerShard(spec)


def spoil(path: Path, name: str) -> None:
    tensors = load_file(path / SINGLE_NAME)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, path / SINGLE_NAME, metadata={"format": "pt"})


def test_nan_in_a_candidate_is_found_by_the_shard_that_owns_it(case: MergeCase) -> None:
    case.make(dtype=torch.bfloat16)
    assert layer_shard(case, range(3)).on("files", "check_weights") > 0
    spoil(case.candidates[1], Q_PROJ)
    for groups in (range(3), range(1, 2)):
        with pytest.raises(CorruptCheckpointError, match=f"the tensor {Q_PROJ} holds") as caught:
            layer_shard(case, groups).on("files", "check_weights")
        expected = f"candidate-2: {case.candidates[1] / SINGLE_NAME}"
        assert caught.value.where == expected
    layer_shard(case, range(2, 3)).on("files", "check_weights")


def test_the_inputs_say_which_checkpoint_is_meant(case: MergeCase) -> None:
    case.make()
    (case.candidates[1] / SINGLE_NAME).write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=r"^candidate-2: a weight file is no readable"):
        open_inputs(case.config())
    (case.root / "base" / "config.json").unlink()
    with pytest.raises(NotACheckpointError, match=r"^base: the directory is not a model directory"):
        open_inputs(case.config())


def test_a_configuration_that_its_family_refuses_is_the_checkpoint_s_fault(write) -> None:
    path = write(settings={"num_attention_heads": "four"})
    with pytest.raises(errors.CheckpointError):
        layout_of(open_checkpoint(path))


# ---- errors


def every_error(cls: type[ArmRayError] = ArmRayError) -> list[type[ArmRayError]]:
    return [cls, *(e for child in cls.__subclasses__() for e in every_error(child))]


@pytest.mark.parametrize("cls", every_error())
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_every_error_survives_pickling(cls: type[ArmRayError], protocol: int) -> None:
    error = cls("what", where=Path("/x"), got=3, expected="more\nlines", hint="do it")
    found = pickle.loads(pickle.dumps(error, protocol))
    assert type(found) is cls
    assert vars(found) == vars(error)
    assert (found.where, found.got) == ("/x", "3")
    assert str(found) == str(error)
    bare = pickle.loads(pickle.dumps(cls("what"), protocol))
    # Where an error says nothing else, its kind says what to do.
    told = [] if cls.advice is None else [f"  to do:    {cls.advice}"]
    assert str(bare).splitlines() == ["what", *told]
    assert (bare.where, bare.got, bare.expected, bare.hint) == (None, None, None, None)


def test_the_drawing_of_the_errors_is_complete() -> None:
    drawing = errors.__doc__ or ""
    assert len(every_error()) >= 13
    for cls in every_error():
        assert f"{cls.__name__}" in drawing


def test_an_error_shows_what_it_knows_line_by_line() -> None:
    error = errors.ConfigError("what", where="here", got=0, hint="do it")
    assert str(error) == "what\n  where:    here\n  got:      0\n  to do:    do it"
