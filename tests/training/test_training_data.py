"""From rows to samples: labels, lengths, order, packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from arm_ray.calibration.tokens import load_tokenizer
from arm_ray.errors import CalibrationError
from arm_ray.training import data as training_data
from arm_ray.training import label_loss
from arm_ray.training.config import DataConfig
from tests.builders.training import make_base, make_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


Encode = Callable[..., tuple[training_data.EncodedRows, training_data.EncodingReport]]


@pytest.fixture
def encode(base: Path, tmp_path: Path) -> Encode:
    def run(rows: list[Any], length: int = 64, too_long: str = "drop", **columns: str) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig.model_validate({"path": str(path), **columns})
        found, names = training_data.read_data(config)
        layout = training_data.layout_of(config, names)
        return training_data.encode_rows(
            load_tokenizer(str(base)), found, layout,
            max_length=length, too_long=too_long, where=path,
        )  # fmt: skip

    return run


def labels_of(base: Path, rows: training_data.EncodedRows) -> list[str]:
    tokenizer = load_tokenizer(str(base))
    parts = zip(rows.starts[:-1], rows.starts[1:], strict=True)
    return [tokenizer.decode(rows.ids[a:b][rows.is_label[a:b]].tolist()) for a, b in parts]


def test_of_prompt_and_completion_the_completion_is_learnt(base: Path, encode: Encode) -> None:
    rows, report = encode([{"prompt": "seven red", "completion": " apples"}])
    assert labels_of(base, rows) == [" apples<|im_end|>"]
    assert (report.rows, report.kept, report.too_long) == (1, 1, 0)
    # Tokenised apart, so that the prompt has the ids that it has at inference.
    prompt = load_tokenizer(str(base))("seven red")["input_ids"]
    assert rows.ids[: len(prompt)].tolist() == prompt


def test_of_text_everything_is_learnt(base: Path, encode: Encode) -> None:
    rows, _ = encode([{"text": "Ann has seven"}])
    # All but the first token, which nothing predicts.
    assert rows.is_label.tolist() == [False] + [True] * (len(rows.ids) - 1)
    assert rows.ids[-1] == load_tokenizer(str(base)).eos_token_id


def test_of_messages_the_assistants_turns_are_learnt(base: Path, encode: Encode) -> None:
    chat = [
        {"role": "system", "content": "count"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "Ann"},
        {"role": "assistant", "content": "left"},
    ]
    rows, _ = encode([{"messages": chat}])
    assert labels_of(base, rows) == ["red<|im_end|>left<|im_end|>"]
    whole = rows.ids.tolist()
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in chat]
    for row in ({"conversations": shared}, {"conversations": shared[1:], "system": "count"}):
        rows, _ = encode([row])
        assert rows.ids.tolist() == whole
        assert labels_of(base, rows) == ["red<|im_end|>left<|im_end|>"]
        assert (
            training_data.question_of(
                row, training_data.layout_of(DataConfig(path=""), dict.fromkeys(row, True))
            )
            == "two"
        )
    rows, _ = encode([{"prompt": chat[:4], "completion": chat[4:]}])
    assert labels_of(base, rows) == ["left<|im_end|>"]
    with pytest.raises(CalibrationError, match=r"no turn of the assistant(?s:.*)line 1"):
        encode([{"messages": chat[:2]}])


def test_templates_that_change_earlier_turns_are_refused(base: Path, encode: Encode) -> None:
    tokenizer = load_tokenizer(str(base))
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{{ messages | length }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    turns = [{"role": role, "content": "red"} for role in ("user", "assistant")]
    try:
        with pytest.raises(CalibrationError, match="changes earlier messages"):
            encode([{"messages": turns}])
    finally:
        tokenizer.chat_template = before


LONG = [
    {"prompt": "seven", "completion": " red apples and two green ones are left"},
    {"prompt": "seven", "completion": " red"},
]


def test_long_rows_by_each_policy(base: Path, encode: Encode) -> None:
    rows, report = encode(LONG, 6)
    assert (report.kept, report.too_long, len(rows)) == (1, 1, 1)
    rows, report = encode(LONG, 6, "cut")
    assert (report.kept, report.too_long) == (2, 1)
    assert rows.lengths.max() == 6
    with pytest.raises(CalibrationError, match=r"line 1(?s:.*)at most 6"):
        encode(LONG, 6, "error")
    with pytest.raises(CalibrationError, match="max_length = 2"):
        encode(LONG, 2)
    # What is cut down to its prompt teaches nothing.
    long_prompt = {"prompt": "red apples and two green ones are left", "completion": " red"}
    _, report = encode([long_prompt, LONG[1]], 6, "cut")
    assert report.without_labels == 1


def test_wrong_data(encode: Encode, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no column 'question'(?s:.*)'completion'"):
        encode(LONG, prompt_column="question")
    with pytest.raises(CalibrationError, match="cannot be told from its columns"):
        encode([{"a": "b"}])
    with pytest.raises(CalibrationError, match="no rows"):
        encode([])
    with pytest.raises(CalibrationError, match=r"line 2(?s:.*)is not text|not text(?s:.*)line 2"):
        encode([LONG[0], {"prompt": "a", "completion": 3}])
    with pytest.raises(CalibrationError, match="not there"):
        training_data.read_data(DataConfig(path=str(tmp_path / "none.jsonl")))


def test_every_row_comes_once_per_epoch() -> None:
    lengths = np.array([1 + i % 7 for i in range(121)])
    batches = training_data.batches_by_length(lengths, 4, seed=3)
    stream = [i for batch in islice(batches, 121) for i in batch]
    for epoch in range(4):
        assert sorted(stream[121 * epoch : 121 * (epoch + 1)]) == list(range(121))
    assert stream[:121] != stream[121:242]
    # Fewer rows than a batch.
    few = [
        i for batch in islice(training_data.batches_by_length(lengths[:3], 8, 0), 3) for i in batch
    ]
    assert all(sorted(few[k : k + 3]) == [0, 1, 2] for k in range(0, 24, 3))


def test_rows_of_a_batch_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=512)
    batches = list(islice(training_data.batches_by_length(lengths, 8, seed=0), 64))
    padding = sum(8 * lengths[batch].max() - lengths[batch].sum() for batch in batches)
    assert padding < 0.1 * lengths.sum()


def encoded(lengths: list[int]) -> training_data.EncodedRows:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.random.default_rng(1).integers(5, 300, size=starts[-1]).astype(np.int32)
    mask = np.random.default_rng(2).random(starts[-1]) < 0.7
    mask[starts[:-1]] = False
    mask[starts[1:] - 1] = True
    return training_data.EncodedRows(ids, mask, starts)


def test_epochs_fill_whole_steps() -> None:
    rows = encoded([3] * 21)
    make = training_data.make_stream
    assert len(make(rows, batch_size=8, seed=0, steps=None, epochs=2)) == 6 * 8
    assert len(make(rows, batch_size=7, seed=0, steps=None, epochs=1)) == 21
    packed = make(rows, batch_size=2, seed=0, steps=None, epochs=2, pack_to=9)
    assert len(packed) == 14
    assert sorted(packed.members.tolist()) == sorted(2 * list(range(21)))
    assert len(make(rows, batch_size=2, seed=0, steps=9, epochs=None, pack_to=9)) == 18


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["smollm2", "qwen3"])
def test_packed_loss_equals_unpacked(attention: str, family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        make_base(tmp_path, family), dtype=torch.float32, attn_implementation=attention
    )
    assert label_loss.patch(model) is None
    rows = encoded([9, 14, 5, 21, 2, 7])
    stream = training_data.make_stream(rows, batch_size=1, seed=0, steps=None, epochs=1, pack_to=32)
    samples = [stream[i] for i in range(len(stream))]
    assert max(len(sample) for sample in samples) > 1
    assert sum(len(sample) for sample in samples) == 6
    count = int(rows.is_label.sum())
    one_by_one = training_data.make_collator(0, packed=True)
    packed = sum(
        model(**one_by_one([sample]), num_items_in_batch=count)["loss"] for sample in samples
    )
    apart = training_data.make_collator(0, packed=False)(samples)
    assert apart["input_ids"].shape == (6, 21)
    plain = model(**apart, num_items_in_batch=count)["loss"]
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-6)


def test_data_from_the_datasets_package_read_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    file = make_rows(tmp_path / "rows.jsonl", 5)
    rows, columns = training_data.read_data(DataConfig(path=str(file)))
    datasets.Dataset.from_list([row for _, row in rows]).save_to_disk(tmp_path / "disk")
    again, same = training_data.read_data(DataConfig(path=str(tmp_path / "disk")))
    assert [row for _, row in again] == [row for _, row in rows]
    assert same == columns
