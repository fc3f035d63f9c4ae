"""The fine-tuning job, on a tiny random Llama with a word-level tokenizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from arm_ray.errors import CalibrationError, ConfigError, NotACheckpointError, RunDirectoryError
from jobs import sft

WORDS = ["<pad>", "<eos>", "<unk>", "one", "two", "three", "plus", "is", "what", "four", "five"]
ROWS = [
    {"prompt": "what is one plus two", "completion": "three"},
    {"prompt": "what is two plus two", "completion": "four"},
    {"prompt": "what is two plus three", "completion": "five is two plus three"},
    {"prompt": "one plus three", "completion": "is four"},
    {"prompt": "one plus one is", "completion": "two"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "model": str(base), "output": str(tmp_path / "out"), "data": {"path": str(data)},
        "learning_rate": 1e-2, "warmup_steps": 2, "batch_size": 2, "steps": 6, "save_steps": [3, 6],
        "max_length": 16, "device": "cpu", "save_dtype": "float32",
    }  # fmt: skip
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def weights(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()


def test_only_completion_and_eos_are_labels(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [sft.encode(tokenizer, row["prompt"], row["completion"], 16) for row in ROWS[1:4]]
    batch = sft.collate(rows, pad_id=0)
    labels = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.is_label, strict=True)]
    assert [tokenizer.decode(ids) for ids in labels] == [
        "four <eos>", "five is two plus three <eos>", "is four <eos>",
    ]  # fmt: skip
    assert batch.attention_mask.sum(dim=1).tolist() == [len(row.ids) for row in rows]
    assert not batch.is_label[batch.attention_mask == 0].any()


def test_long_rows_are_cut_on_the_right(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    full = sft.encode(tokenizer, "what is one", "three plus two", 16)
    assert sft.encode(tokenizer, "what is one", "three plus two", 4) == (full.ids[:4], 3)
    assert sft.encode(tokenizer, "what is one", "three", 2) == (full.ids[:2], 2)


def test_loss_equals_that_of_the_full_logits(base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [sft.encode(tokenizer, row["prompt"], row["completion"], 16) for row in ROWS]
    batch = sft.collate(rows, pad_id=0)
    labels = batch.input_ids.masked_fill(~batch.is_label, -100)
    expected = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
    ).loss
    losses = sft.label_losses(model, batch)
    assert losses.shape == (int(batch.is_label.sum()),)
    torch.testing.assert_close(losses.mean(), expected)


def test_checkpoints_load_and_the_model_has_learnt(config_file, base):
    config = sft.load_config(config_file, ["steps=40", "save_steps=20"])
    first, last = sft.train(config)
    for checkpoint, step in ((first, 20), (last, 40)):
        assert checkpoint.name == f"checkpoint-{step}"
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
        assert AutoTokenizer.from_pretrained(checkpoint).chat_template
        assert (checkpoint / "generation_config.json").is_file()
    assert sorted(path.name for path in config.output.iterdir()) == [
        "checkpoint-20", "checkpoint-40", "sft_config.json", "train_log.jsonl",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(last)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(
        weights(first)["model.embed_tokens.weight"], weights(last)["model.embed_tokens.weight"]
    )
    log = [
        json.loads(line) for line in (config.output / "train_log.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in log] == list(range(1, 41))
    assert log[0]["learning_rate"] == pytest.approx(5e-3)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_weights_are_saved_in_the_dtype_asked_for(config_file):
    config = sft.load_config(config_file, ["save_dtype=bfloat16", "precision=bfloat16"])
    for checkpoint in sft.train(config):
        assert {tensor.dtype for tensor in weights(checkpoint).values()} == {torch.bfloat16}
        assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"


def test_same_seed_same_weights_and_other_seed_others(config_file, tmp_path):
    run = [
        weights(sft.train(sft.load_config(config_file, [f"output={tmp_path / name}", seed]))[-1])
        for name, seed in (("a", "seed=1"), ("b", "seed=1"), ("c", "seed=2"))
    ]
    assert all(torch.equal(run[0][key], run[1][key]) for key in run[0])
    assert any(not torch.equal(run[0][key], run[2][key]) for key in run[0])


def test_every_row_is_seen_once_per_epoch(config_file):
    config = sft.load_config(config_file, ["batch_size=3"])
    rows = [sft.Row([i + 2] * (1 + i % 7), 0) for i in range(120)]
    batches = sft._batches(rows, config, pad_id=0)
    seen = sorted(int(ids[0]) for _ in range(40) for ids in next(batches).input_ids)
    assert seen == list(range(2, 122))


def test_second_run_does_nothing(config_file, capsys):
    config = sft.load_config(config_file)
    checkpoints = sft.train(config)
    before = [os.stat(path / "model.safetensors").st_mtime_ns for path in checkpoints]
    capsys.readouterr()
    assert sft.train(config) == checkpoints
    assert "nothing to do" in capsys.readouterr().out
    assert [os.stat(path / "model.safetensors").st_mtime_ns for path in checkpoints] == before


def test_a_missing_checkpoint_comes_back_the_same(config_file):
    config = sft.load_config(config_file)
    last = sft.train(config)[-1]
    expected = weights(last)
    (last / "trainer_state.json").unlink()
    (config.output / ".checkpoint-6.part").mkdir()
    again = weights(sft.train(config)[-1])
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    assert not (config.output / ".checkpoint-6.part").exists()


def test_output_of_another_configuration_is_refused(config_file):
    sft.train(sft.load_config(config_file))
    with pytest.raises(RunDirectoryError, match="another configuration"):
        sft.train(sft.load_config(config_file, ["seed=1"]))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learning_rat=1", "learning_rat"),
        ("data.columm=x", "data.columm"),
        ("batch_size=0", "batch_size"),
        ("save_steps=[3, 7]", "save_steps"),
        ("save_steps=0", "save_steps"),
        ("seed", "key=value"),
        ("seed.x=1", "seed"),
    ],
)
def test_wrong_configuration(config_file, override, named):
    with pytest.raises(ConfigError, match=named):
        sft.load_config(config_file, [override])


def test_missing_files(config_file, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        sft.load_config(tmp_path / "none.yaml")
    with pytest.raises(CalibrationError, match=r"none\.jsonl"):
        sft.train(sft.load_config(config_file, [f"data.path={tmp_path / 'none.jsonl'}"]))
    with pytest.raises(NotACheckpointError, match="holds no model"):
        sft.train(sft.load_config(config_file, [f"model={tmp_path / 'none'}"]))


def test_wrong_data(config_file, tmp_path):
    with pytest.raises(CalibrationError, match=r"column 'question'(?s:.*)completion"):
        sft.train(sft.load_config(config_file, ["data.prompt_column=question"]))
    with pytest.raises(CalibrationError, match="max_length"):
        sft.train(sft.load_config(config_file, ["max_length=2"]))
    data = Path(sft.load_config(config_file).data.path)
    for text, problem in (("", "no rows"), ("{", "no JSON"), ("[1]", "no JSON object")):
        data.write_text(text)
        with pytest.raises(CalibrationError, match=problem):
            sft.train(sft.load_config(config_file))


def test_cosine_falls_to_zero(config_file):
    config = sft.load_config(config_file, ["schedule=cosine"])
    rates = [sft._learning_rate(config, step) / config.learning_rate for step in range(1, 7)]
    assert rates == pytest.approx([0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0], abs=1e-6)


def test_command_line(config_file):
    command = [sys.executable, "-m", "jobs.sft"]
    root = Path(__file__).parents[1]
    bad = subprocess.run(
        [*command, config_file, "stepz=1"], cwd=root, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert bad.stderr.startswith("ConfigError: ")
    assert "stepz" in bad.stderr
