from __future__ import annotations

import contextlib
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arm_ray.calibration import open_stream
from arm_ray.calibration import stream as stream_module
from arm_ray.config import CalibrationConfig
from arm_ray.errors import CalibrationError, WorkerError
from tests.builders.word_tokenizer import WORDS, save_tokenizer

pytestmark = pytest.mark.usefixtures("local_ray")
BOS, EOS, USER, ASSISTANT = 1, 2, 3, 4


@pytest.fixture(autouse=True)
def by_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """By tasks also where one process would be faster."""
    monkeypatch.setattr(stream_module, "SMALL_BYTES", -1)
    monkeypatch.setattr(stream_module, "_DATASET_ROWS_PER_TASK", 2)


def lines(path: Path, rows) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def texts(count: int, start: int = 0):
    return [{"text": f"w{n} w{n % 7}"} for n in range(start, start + count)]


def word(number: int) -> int:
    return WORDS.index(f"w{number}")


def opened(path, tokenizer_path, needed_batches=None, **settings):
    settings = CalibrationConfig(path=str(path), **{"shuffle": False, **settings})
    return open_stream(settings, tokenizer_path, needed_batches=needed_batches)


def first_words(batch) -> list[int]:
    return [int(ids[1]) - word(0) for ids in batch.token_ids]


def one(stream, row=0) -> list[int]:
    return stream.batch(1).token_ids[row].tolist()


def test_order_over_files_is_file_order(tmp_path, tokenizer_path):
    lines(tmp_path / "b.jsonl", texts(1100, 1500))
    lines(tmp_path / "a.jsonl", ["", *texts(1500), "  "])
    lines(tmp_path / "c.jsonl.gz", texts(30, 2600))
    pq.write_table(pa.Table.from_pylist(texts(70, 2630)), tmp_path / "d.parquet", row_group_size=30)
    (tmp_path / "README.md").write_text("not data")
    stream = opened(tmp_path, tokenizer_path, batch_size=2700)
    assert stream.num_rows == stream.num_used == 2700
    batch = stream.batch(1)
    assert batch.row_indices == list(range(2700))
    assert first_words(batch) == list(range(2700))
    assert all(ids.dtype == np.int32 and ids[0] == BOS for ids in batch.token_ids)

    shuffled = opened(
        tmp_path, tokenizer_path, batch_size=16, shuffle=True, seed=3, needed_batches=4
    )
    order = np.random.Generator(np.random.PCG64(3)).permutation(2700)
    assert shuffled.num_used == 64
    for t in (4, 1, 2, 3):
        batch = shuffled.batch(t)
        assert batch.iteration == t
        assert batch.row_indices == order[(t - 1) * 16 : t * 16].tolist()
        assert first_words(batch) == batch.row_indices
    with pytest.raises(ValueError, match="needed_batches=5"):
        shuffled.batch(5)
    pattern = opened(tmp_path / "[ab].jsonl", tokenizer_path, batch_size=4, needed_batches=1)
    assert pattern.num_rows == 2600


def test_wrap_around(tmp_path, tokenizer_path):
    path = lines(tmp_path / "a.jsonl", texts(5))
    stream = opened(path, tokenizer_path, batch_size=3, needed_batches=2)
    assert stream.batch(2).row_indices == [3, 4, 0]
    assert stream.batch(1000).row_indices == [(999 * 3 + j) % 5 for j in range(3)]
    assert stream.warnings == []
    wide = opened(path, tokenizer_path, batch_size=8)
    assert wide.batch(1).row_indices == [0, 1, 2, 3, 4, 0, 1, 2]
    assert first_words(wide.batch(1)) == [0, 1, 2, 3, 4, 0, 1, 2]
    assert "8 samples" in wide.warnings[0]
    with pytest.raises(ValueError, match="read-only"):
        wide.batch(1).token_ids[0][0] = 9


def test_digest_tells_changes(tmp_path, tokenizer_path):
    path = lines(tmp_path / "a.jsonl", texts(6))
    digest = opened(path, tokenizer_path, batch_size=2).digest
    assert len(digest) == 64
    assert opened(path, tokenizer_path, batch_size=2).digest == digest
    assert opened(path, tokenizer_path, shuffle=True).digest != digest
    assert opened(path, tokenizer_path, max_length=2).digest != digest
    lines(path, [*texts(5), {"text": "w9 w9"}])
    assert opened(path, tokenizer_path, batch_size=2).digest != digest
    # The same tokens, cut into rows elsewhere.
    lines(path, [{"text": "w1"}, {"text": "w1 <bos> w1"}])
    other = lines(tmp_path / "b.jsonl", [{"text": "w1 <bos> w1"}, {"text": "w1"}])
    assert opened(path, tokenizer_path).digest != opened(other, tokenizer_path).digest


def test_truncation_is_counted(tmp_path, tokenizer_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "w1 w2 w3 w4"}, {"text": "w1"}])
    stream = opened(path, tokenizer_path, max_length=3, batch_size=2)
    assert one(stream) == [BOS, word(1), word(2)]
    assert stream.num_truncated == 1
    assert stream.max_token_id == word(2)
    assert "1 of 2" in stream.warnings[0]


CHAT = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
CHAT_IDS = [USER, word(1), ASSISTANT, word(2), EOS]


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ({"text": "w5"}, [BOS, word(5)]),
        ({"prompt": "w5 ", "completion": "w6 "}, [BOS, word(5), word(6), EOS]),
        ({"prompt": "w5 ", "completion": "w6 <eos>"}, [BOS, word(5), word(6), EOS]),
        ({"question": "w5 ", "answer": "w6 "}, [BOS, word(5), word(6), EOS]),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT_IDS),
        ({"messages": CHAT, "text": "w9"}, CHAT_IDS),
    ],
)
def test_formats(tmp_path, tokenizer_path, row, ids):
    path = lines(tmp_path / "a.jsonl", [row])
    assert one(opened(path, tokenizer_path, batch_size=1)) == ids
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert one(opened(tmp_path / "a.parquet", tokenizer_path, batch_size=1)) == ids


def test_columns_of_mixed_types_that_come_late(tmp_path, tokenizer_path):
    rows = [{"messages": CHAT, "meta": None, "n": 1} for _ in range(50)]
    rows += [{"messages": CHAT, "meta": {"a": [1]}, "n": "x", "new": 1.5}]
    rows += [{"messages": [{**CHAT[0], "name": None}, CHAT[1]], "meta": "s" * 2_000_000}]
    path = lines(tmp_path / "a.jsonl", rows)
    stream = opened(path, tokenizer_path, batch_size=52)
    assert all(ids.tolist() == CHAT_IDS for ids in stream.batch(1).token_ids)


def test_parquet_structs_with_nulls_and_byte_order_mark(tmp_path, tokenizer_path):
    rows = [{"messages": CHAT}, {"messages": [{**CHAT[0], "tool": "x"}, CHAT[1]]}]
    table = pa.Table.from_pylist(rows[1:] + rows)
    pq.write_table(table, tmp_path / "a.parquet")
    stream = opened(tmp_path / "a.parquet", tokenizer_path, batch_size=3)
    assert [ids.tolist() for ids in stream.batch(1).token_ids] == [CHAT_IDS] * 3
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf{"text": "w1"}\r\n\r\n{"text": "w2"}')
    assert first_words(opened(tmp_path / "b.json", tokenizer_path, batch_size=2).batch(1)) == [1, 2]


def test_saved_datasets(tmp_path, tokenizer_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{**row, "position": 1} for row in texts(600)])
    data.save_to_disk(tmp_path / "one")
    stream = opened(tmp_path / "one", tokenizer_path, batch_size=600)
    assert first_words(stream.batch(1)) == list(range(600))
    pairs = datasets.DatasetDict({"train": data, "test": data.select([7, 8])})
    pairs.save_to_disk(tmp_path / "many")
    stream = opened(f"{tmp_path / 'many'}:test", tokenizer_path, batch_size=2)
    assert first_words(stream.batch(1)) == [7, 8]
    shuffled = opened(tmp_path / "many", tokenizer_path, 1, batch_size=9, shuffle=True, seed=5)
    order = np.random.Generator(np.random.PCG64(5)).permutation(600)[:9].tolist()
    assert first_words(shuffled.batch(1)) == shuffled.batch(1).row_indices == order
    with pytest.raises(CalibrationError, match=r"splits 'train', 'test'") as caught:
        opened(f"{tmp_path / 'many'}:tset", tokenizer_path)
    assert "many:test" in caught.value.hint
    chats = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": None}])
    chats.save_to_disk(tmp_path / "chats")
    assert one(opened(tmp_path / "chats", tokenizer_path, 1, batch_size=1)) == CHAT_IDS
    with pytest.raises(CalibrationError, match=r"chats, row 2\n  got:      null"):
        opened(tmp_path / "chats", tokenizer_path)


BAD_FILES = {
    "malformed": (
        ["{}", '{"text": "w1"}', '{"text": "w'],
        r"line 3\n  got:      Unterminated string starting at: character 10 of",
    ),
    "unused": ([*texts(3), "nope"], "line 4"),
    "array": (['[{"text": "w1"}]'], "jq -c"),
    "scalar": (['"w1"'], "not an object"),
    "lacking": ([{"text": "w1"}, {"txt": "w1"}], r"no column 'text'.*\n.*line 2"),
    "not text": ([{"text": "w1"}, "", {"text": 3}], r"line 3\n  got:      a value of type int"),
    "empty": ([], "are empty"),
    "blank": (["", " "], "are empty"),
    "no columns": (["{}"], "no columns"),
    "unknown": ([{"body": "x"}], "columns 'body'"),
    "surrogate": ([{"text": "\ud800"}], r"cannot be tokenised"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, tokenizer_path, name):
    rows, message = BAD_FILES[name]
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(CalibrationError, match=message) as caught:
        opened(path, tokenizer_path, batch_size=2, needed_batches=1)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_first_bad_row_of_many_is_reported(tmp_path, tokenizer_path):
    rows = texts(5000)
    rows[4000] = rows[1500] = rows[3000] = {"text": None}
    path = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(CalibrationError, match="line 1501"):
        opened(path, tokenizer_path, shuffle=True)
    for number in (3, 1, 2):
        lines(tmp_path / f"{number}.jsonl", ["{"])
    with pytest.raises(CalibrationError, match=r"1\.jsonl, line 1"):
        opened(tmp_path, tokenizer_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        # Without the time of day: pytest's processes have to name the case alike.
        ("a.jsonl.gz", gzip.compress(b'{"text": "w1"}\n' * 99, mtime=0)[:-12], "cannot be read"),
        ("b.jsonl.gz", b'{"text": "w1"}', "cannot be read"),
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("a.csv", b"text\nw1\n", "unknown kind"),
    ],
)
def test_damaged_files(tmp_path, tokenizer_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        opened(tmp_path / name, tokenizer_path)
    assert name in caught.value.where


def test_paths_that_hold_nothing(tmp_path, tokenizer_path, monkeypatch):
    lines(tmp_path / "train.jsonl", texts(1))
    for path, message in {
        str(tmp_path / "trian.jsonl"): r"Did you mean 'train\.jsonl'",
        str(tmp_path / "*.parquet"): "matches no file",
    }.items():
        with pytest.raises(CalibrationError, match=message):
            opened(path, tokenizer_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.txt").touch()
    with pytest.raises(CalibrationError, match=r"holds no file.*\n.*\n  got:      x\.txt"):
        opened(tmp_path / "sub", tokenizer_path)


def make_splits(root: Path) -> None:
    for number, split in enumerate(("train", "test")):
        for folder in (root / "folders", root / "repository" / "data"):
            folder.mkdir(parents=True, exist_ok=True)
        (root / "folders" / split).mkdir()
        lines(root / "folders" / split / "a.jsonl", texts(2, 10 * number))
        for part in range(2):
            name = f"{split}-0000{part}-of-00002.jsonl"
            lines(root / "repository" / "data" / name, texts(1, 10 * number + part))


@pytest.mark.parametrize("kind", ["folders", "repository", "repository/data"])
def test_a_directory_with_splits(tmp_path, tokenizer_path, kind):
    make_splits(tmp_path)
    path = tmp_path / kind
    for split, first in (("train", 0), ("test", 10)):
        for given in ({"path": path, "split": split}, {"path": f"{path}:{split}"}):
            found = opened(given.pop("path"), tokenizer_path, batch_size=2, **given)
            assert first_words(found.batch(1)) == [first, first + 1]
            assert found.num_rows == 2
    with pytest.raises(CalibrationError, match="several splits") as caught:
        opened(path, tokenizer_path)
    assert caught.value.got == "splits 'test', 'train'"
    with pytest.raises(CalibrationError, match="no split 'tests'") as caught:
        opened(path, tokenizer_path, split="tests")
    assert caught.value.hint == "Did you mean split: test?"
    with pytest.raises(CalibrationError, match="Two different splits"):
        opened(f"{path}:train", tokenizer_path, split="test")


def test_one_split_needs_no_name_and_a_file_has_none(tmp_path, tokenizer_path):
    (tmp_path / "inner").mkdir()
    file = lines(tmp_path / "inner" / "train.jsonl", texts(3))
    assert opened(tmp_path, tokenizer_path).num_rows == 3
    assert opened(tmp_path / "inner", tokenizer_path).num_rows == 3
    for path in (file, tmp_path / "*.jsonl", "https://host/a.jsonl"):
        with pytest.raises(CalibrationError, match="of what has none"):
            opened(path, tokenizer_path, split="train")


def test_hub_datasets(tokenizer_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, *, split, trust_remote_code):
        asked.append((name, config, split, trust_remote_code))
        if name == "gone":
            raise ConnectionError("no route to the hub")
        data = datasets.Dataset.from_list(texts(3))
        return data if split else datasets.DatasetDict({"test": data, "train": data.select([2])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert opened("owner/name/main:test[:3]", tokenizer_path, batch_size=3).num_rows == 3
    assert first_words(opened("owner/name", tokenizer_path, batch_size=1).batch(1)) == [2]
    assert asked == [("owner/name", "main", "test[:3]", False), ("owner/name", None, None, False)]
    with pytest.raises(CalibrationError, match="ConnectionError: no route to the hub"):
        opened("gone", tokenizer_path)
    with pytest.raises(CalibrationError, match="pickles"):
        opened("pandas", tokenizer_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"arm-ray\[datasets\]"):
        opened("owner/name", tokenizer_path)


def test_tokenizer_troubles(tmp_path, tokenizer_path):
    path = lines(tmp_path / "a.jsonl", [{"messages": CHAT}])
    bare = save_tokenizer(tmp_path / "bare", template=None)
    with pytest.raises(CalibrationError, match="no chat template") as caught:
        opened(path, bare)
    assert caught.value.where.endswith("line 1")
    strict = save_tokenizer(tmp_path / "strict", template="{{ raise_exception('not so') }}")
    with pytest.raises(CalibrationError, match="TemplateError: not so"):
        opened(path, strict)
    empty = save_tokenizer(tmp_path / "empty", template="{# nothing #}")
    with pytest.raises(CalibrationError, match="holds no tokens"):
        opened(path, empty)
    (tmp_path / "none").mkdir()
    with pytest.raises(CalibrationError, match="tokenizer cannot be loaded"):
        opened(path, tmp_path / "none")
    with pytest.raises(CalibrationError, match="directory is not there"):
        opened(path, tmp_path / "away")


def test_tokenizer_code_is_never_run(tmp_path):
    path = lines(tmp_path / "a.jsonl", texts(1))
    custom = save_tokenizer(tmp_path / "custom")
    config = json.loads((custom / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Mine"
    config["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]}
    (custom / "tokenizer_config.json").write_text(json.dumps(config))
    (custom / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with contextlib.suppress(CalibrationError):  # versions differ: refused, or read without code
        opened(path, custom)
    assert not (tmp_path / "ran").exists()


def test_file_that_changes_between_index_and_reading(tmp_path, tokenizer_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", texts(5))
    choose = stream_module.choose_layout

    def shrink(*args):
        lines(path, texts(2))
        return choose(*args)

    monkeypatch.setattr(stream_module, "choose_layout", shrink)
    with pytest.raises(CalibrationError, match="changed while it was read"):
        opened(path, tokenizer_path)


@pytest.mark.parametrize("because", ["little", "no ray"])
def test_what_one_process_reads_is_the_same(tmp_path, tokenizer_path, monkeypatch, because):
    lines(tmp_path / "a.jsonl", texts(1500))
    lines(tmp_path / "b.jsonl.gz", texts(30, 1500))
    settings = {"batch_size": 16, "shuffle": True, "seed": 3}
    expected = opened(tmp_path, tokenizer_path, **settings)

    def refuse(*_args, **_kwargs):
        raise AssertionError("Ray Data is asked")

    monkeypatch.setattr("ray.data.from_items", refuse)
    with pytest.raises(AssertionError, match="Ray Data"):
        opened(tmp_path, tokenizer_path, **settings)
    if because == "little":
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        monkeypatch.setattr(stream_module, "SMALL_BYTES", size)
    else:
        monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert opened(tmp_path, tokenizer_path, **settings).digest == expected.digest
    if because == "little":
        monkeypatch.setattr(stream_module, "SMALL_BYTES", size - 1)
        with pytest.raises(AssertionError, match="Ray Data"):
            opened(tmp_path, tokenizer_path, **settings)


def test_ray_data_settings_are_restored(tmp_path, tokenizer_path, capfd):
    from ray.data import DataContext

    context = DataContext.get_current()
    before = context.enable_progress_bars
    handlers = logging.getLogger("ray.data").handlers
    filters = [list(handler.filters) for handler in handlers]
    opened(lines(tmp_path / "a.jsonl", texts(5)), tokenizer_path)
    assert DataContext.get_current() is context
    assert context.enable_progress_bars == before
    assert [handler.filters for handler in handlers] == filters
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")


def test_a_stall_for_want_of_a_slot_is_announced(tmp_path, tokenizer_path, monkeypatch, caplog):
    import ray

    monkeypatch.setattr(ray, "available_resources", lambda: {"memory": 1.0})
    opened(lines(tmp_path / "a.jsonl", texts(1)), tokenizer_path)
    assert "no CPU slot is free" in caplog.text


def test_failing_tasks_are_told_from_bad_input(tmp_path, tokenizer_path, monkeypatch):
    def fail(table):
        raise MemoryError("none left")

    monkeypatch.setattr(stream_module, "index_task", fail)
    with pytest.raises(WorkerError, match="MemoryError: none left"):
        opened(lines(tmp_path / "a.jsonl", texts(1)), tokenizer_path)


def test_needed_batches_below_one(tmp_path, tokenizer_path):
    with pytest.raises(ValueError, match="1 or more"):
        opened(lines(tmp_path / "a.jsonl", texts(1)), tokenizer_path, 0)
