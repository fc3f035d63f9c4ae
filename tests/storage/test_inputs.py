"""Checkpoints and data at URLs, against the same on disk."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from arm_ray.calibration.files import index_file
from arm_ray.calibration.sources import find_source
from arm_ray.checkpoints.formats import open_given
from arm_ray.checkpoints.fp8 import quantised
from arm_ray.checkpoints.huggingface import Checkpoint, resolve_path
from arm_ray.checkpoints.inspect import inspect_url
from arm_ray.checkpoints.peft import AdaptedCheckpoint
from arm_ray.cli import main
from arm_ray.errors import (
    ArmRayError,
    CalibrationError,
    CorruptCheckpointError,
    EvaluationError,
    NoSuchObjectError,
    NotACheckpointError,
)
from arm_ray.evaluation import data as benchmarks
from arm_ray.runtime.scoring.subject import model_source
from arm_ray.storage.store import Store
from arm_ray.training.data import read_path
from tests.builders.adapters import factors, save_base, write_adapter
from tests.builders.merge_case import MergeCase
from tests.builders.models import write_texts
from tests.doubles.stores import put

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in several weight files."""
    case = MergeCase(tmp_path / "case")
    return case.make("qwen2.5", count=0, max_shard_size="100KB").root / "base"


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert left.tensors.keys() == right.tensors.keys()
    for name in left.tensors:
        assert torch.equal(left.read([name])[name], right.read([name])[name]), name


def test_a_model_is_read_by_range(bucket: str, model: Path, tmp_path: Path) -> None:
    assert len(list(model.glob("*.safetensors"))) > 2
    url = put(model, f"{bucket}/models/base")
    found = open_given(url, scratch=tmp_path / "scratch")
    assert_same(open_given(str(model)), found)
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))
    again = open_given(f"hf:{url}/", scratch=tmp_path / "other")
    assert again.fingerprint == found.fingerprint
    # A copy of it elsewhere is another one, as checkpoints of one run differ in no size.
    other = put(model, f"{bucket}/models/other")
    assert open_given(other, scratch=tmp_path / "scratch").fingerprint != found.fingerprint
    # Engines are given the configuration here and fetch the weights themselves.
    source = model_source(found)
    assert (source.path, source.weights) == (str(found.path), url)
    Store(url).write("config.json", (model / "config.json").read_bytes() + b" ")
    assert open_given(url, scratch=tmp_path / "scratch").fingerprint != found.fingerprint


def test_fp8_is_read_by_range(bucket: str, model: Path, tmp_path: Path) -> None:
    block = (8, 16)
    for file in model.glob("*.safetensors"):
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name], block)
        save_file(tensors, file, {"format": "pt"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    scales = {f"{n}_scale_inv": f for n, f in index["weight_map"].items() if "_proj.weight" in n}
    index["weight_map"] |= scales
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block}
    (model / "config.json").write_text(json.dumps(config))
    url = put(model, f"{bucket}/models/base")
    found = open_given(url, scratch=tmp_path / "scratch")
    here = open_given(str(model))
    assert_same(here, found)
    assert found.read([f"{MODULE}.weight"])[f"{MODULE}.weight"].dtype == torch.bfloat16
    assert inspect_url(url, "auto", tmp_path / "scratch").dtypes["F8_E4M3"] == len(scales)
    with pytest.raises(EvaluationError, match=r"FP8 from a URL(?s:.*)copy"):
        model_source(found)
    assert model_source(here).path == str(model)


def test_a_truncated_weight_file_is_named(bucket: str, model: Path, tmp_path: Path) -> None:
    file = max(model.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    url = put(model, f"{bucket}/base")
    with pytest.raises(CorruptCheckpointError, match="truncated") as caught:
        open_given(url, scratch=tmp_path)
    assert caught.value.where == f"{url}/{file.name}"


def test_what_is_no_model_is_refused(bucket: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(NoSuchObjectError, match="nothing at the URL"):
        open_given(f"{bucket}/none", scratch=tmp_path)
    Store(f"{bucket}/x").write("notes.txt", b"1")
    with pytest.raises(NotACheckpointError, match="there is no model"):
        open_given(f"{bucket}/x", scratch=tmp_path)
    with pytest.raises(NotACheckpointError, match="copy the directory"):
        open_given(f"zero:{bucket}/x", scratch=tmp_path)
    with pytest.raises(NotACheckpointError, match="a URL is not read here"):
        resolve_path(f"{bucket}/x")


def test_an_adapter_is_copied_whole(bucket: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "qwen2.5")
    tensors = factors(base, MODULE, rank=2)
    local = write_adapter(tmp_path / "adapter", tensors, r=2, lora_alpha=4)
    url = put(local, f"{bucket}/adapter")
    scratch = tmp_path / "scratch"
    with pytest.raises(NotACheckpointError, match="no base"):
        open_given(url, scratch=scratch)
    found = open_given(url, base, scratch=scratch)
    assert isinstance(found, AdaptedCheckpoint)
    assert_same(open_given(str(local), base), found)
    # The copy's times are those of the store: a run goes on with another copy.
    shutil.rmtree(scratch)
    assert open_given(url, base, scratch=scratch).fingerprint == found.fingerprint
    # A node that was handed the checkpoint makes its own.
    shutil.rmtree(scratch)
    name = f"{MODULE}.weight"
    assert torch.equal(found.read([name])[name], open_given(str(local), base).read([name])[name])


def test_data_are_read_from_where_they_are(bucket: str, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "a.jsonl", rows=30)
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    store = Store(f"{bucket}/data")
    store.upload(texts, "a.jsonl")
    store.write("b.jsonl.gz", gzip.compress(texts.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    store.upload(tmp_path / "c.parquet", "c.parquet")
    store.write("notes.txt", b"")
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        url = f"{bucket}/data/{name}"
        found, columns = read_path(url)
        assert [row.row for row in found] == rows
        assert columns == {"text": True}
        assert url in found[0].where
        assert benchmarks.read_rows(url) == rows
        assert index_file(url).num_rows == 30
    assert [row.row for row in read_path(f"{bucket}/data")[0]] == rows * 3
    assert benchmarks.find_file(f"{bucket}/data", ["z.jsonl", "a.jsonl"]) == (
        f"{bucket}/data/a.jsonl"
    )


def test_data_that_are_not_there_are_named(bucket: str) -> None:
    Store(f"{bucket}/data").write("a.jsonl", b'{"text": "x"}\n{"te')
    with pytest.raises(NoSuchObjectError):
        find_source(f"{bucket}/none.jsonl")
    with pytest.raises(CalibrationError, match="no file that can be read"):
        find_source(f"{bucket}/none")
    with pytest.raises(CalibrationError, match=f"{bucket}/data/a.jsonl, line 2"):
        index_file(f"{bucket}/data/a.jsonl")
    with pytest.raises((EvaluationError, NoSuchObjectError)):
        benchmarks.read_rows(f"{bucket}/none.jsonl")


def test_commands_take_urls(
    bucket: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = put(model, f"{bucket}/runs/checkpoint-30")
    assert main(["inspect", url, "--json"]) == 0
    at_url = json.loads(capsys.readouterr().out)
    assert main(["inspect", model.as_uri(), "--json"]) == 0
    local = json.loads(capsys.readouterr().out)
    assert at_url["step"] == 30
    same = ("format", "complete", "num_tensors", "num_parameters", "dtypes", "file_bytes")
    assert {key: at_url[key] for key in same} == {key: local[key] for key in same}
    assert main(["inspect", f"{bucket}/none"]) == 1
    assert "nothing at the URL" in capsys.readouterr().err
    plans = []
    for base in (url, str(model)):
        config = tmp_path / "merge.yaml"
        config.write_text(
            f"base: {base}\ncandidates: ['{base}']\noutput: {tmp_path}/out\n"
            "method: {operator: average}\n"
        )
        assert main(["plan", config.as_uri(), "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    assert plans[0] == plans[1]


def test_errors_at_urls_are_ours(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ArmRayError):
        open_given("ftp://host/x", scratch=tmp_path)
