from __future__ import annotations

import pytest

from arm_ray.calibration.formats import ChatSample, Layout, TextSample, choose_layout, to_sample
from arm_ray.config import CalibrationConfig, DataConfig, validate
from arm_ray.errors import CalibrationError, ConfigError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def layout(columns, **settings):
    if not isinstance(columns, dict):
        columns = dict.fromkeys(columns, True)
    return choose_layout(DataConfig(path="d", **settings), columns, "d")


@pytest.mark.parametrize(
    ("columns", "format_name", "names"),
    [
        (["text", "prompt", "completion", "messages"], "messages", ("messages",)),
        (["text", "prompt", "completion"], "prompt_completion", ("prompt", "completion")),
        (["id", "text", "prompt"], "text", ("text",)),
        (["question", "answer"], "prompt_completion", ("question", "answer")),
        (["instruction", "output"], "prompt_completion", ("instruction", "output")),
        (["instruction", "response"], "prompt_completion", ("instruction", "response")),
        ({"messages": False, "text": True}, "text", ("text",)),
        (
            {"instruction": True, "input": False, "output": True},
            "prompt_completion",
            ("instruction", "output"),
        ),
    ],
)
def test_auto_goes_by_columns(columns, format_name, names):
    assert layout(columns) == Layout(format_name, names)


def test_auto_lists_the_columns_it_found():
    with pytest.raises(CalibrationError, match=r"columns 'body', 'id'") as caught:
        layout(["body", "id"])
    assert "messages" in str(caught.value)
    assert "'instruction' and 'output'" in str(caught.value) or "instruction and output" in str(
        caught.value
    )


def test_instructions_with_input_are_not_guessed_at():
    with pytest.raises(CalibrationError, match="cannot be told"):
        layout(["instruction", "input", "output"])


def test_named_columns():
    assert layout(["body"], format="text", text_column="body").columns == ("body",)
    assert layout(["chat"], messages_column="chat") == Layout("messages", ("chat",))


def test_missing_column_suggests_the_nearest():
    with pytest.raises(CalibrationError, match="Did you mean 'messages'") as caught:
        layout(["messages", "id"], format="messages", messages_column="mesages")
    assert "columns 'messages', 'id'" in str(caught.value)


def test_samples():
    assert to_sample({"text": "a"}, Layout("text", ("text",)), "f") == TextSample("a", False)
    pair = Layout("prompt_completion", ("p", "c"))
    assert to_sample({"p": "a ", "c": "b"}, pair, "f") == TextSample("a b", True)
    assert to_sample({"p": CHAT[:1], "c": CHAT[1:]}, pair, "f") == ChatSample(CHAT)


def test_fields_that_arrow_added_are_taken_out_of_messages():
    row = {
        "m": [
            {"role": "user", "content": "a", "name": None},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "x": None}]},
        ],
        "tools": '[{"name": "f"}]',
    }
    assert to_sample(row, Layout("messages", ("m",)), "f") == ChatSample(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"id": "1"}], "content": None},
        ],
        [{"name": "f"}],
    )


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": 5}, ("text",), "type int"),
        ({"text": None}, ("text",), "null"),
        ({"txt": "a"}, ("text",), "no column 'text'"),
        ({"p": "a", "c": CHAT}, ("p", "c"), "different kinds"),
        ({"p": "a", "c": None}, ("p", "c"), "'c' of a calibration row is not text"),
        ({"m": []}, ("m",), "empty list"),
        ({"m": "hi"}, ("m",), "got:      text"),
        ({"m": ["hi"]}, ("m",), "text as message 0"),
        ({"m": [{"from": "human", "value": "x"}]}, ("m",), "without a role, with 'from', 'value'"),
        ({"m": CHAT, "tools": "{"}, ("m",), "not JSON"),
        ({"m": CHAT, "tools": {"a": 1}}, ("m",), "an object"),
    ],
)
def test_bad_rows_are_named(row, columns, message):
    names = {"text": "text", "p": "prompt_completion", "m": "messages"}
    with pytest.raises(CalibrationError, match=message) as caught:
        to_sample(row, Layout(names[columns[0]], columns), "f.jsonl, line 3")
    assert caught.value.where == "f.jsonl, line 3"


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"max_length": 0}, {"seed": -1}, {"batch_size": True}, {"format": "csv"}],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        validate(CalibrationConfig, {"path": "d", **wrong}, source="test")
