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
        (["id", "conversations"], "messages", ("conversations",)),
        (["conversations", "question", "answer"], "messages", ("conversations",)),
        (["conversations", "text"], "text", ("text",)),
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


def test_conversations_of_sharegpt_are_chats():
    said = [
        {"from": "human", "value": "1 + 1?"},
        {"from": "gpt", "value": "2", "weight": None},
        {"role": "user", "content": "and 2?", "from": "human"},
        {"from": "tool", "value": "4"},
    ]
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2?", "from": "human"},
        {"role": "tool", "content": "4"},
    ]
    plain = layout(["conversations"])
    assert to_sample({"conversations": said}, plain, "f") == ChatSample(chat)
    assert to_sample({"conversations": said, "system": "S"}, plain, "f") == ChatSample(chat)
    with_system = layout(["conversations", "system"])
    first = {"role": "system", "content": "S"}
    assert to_sample({"conversations": said, "system": "S"}, with_system, "f") == ChatSample(
        [first, *chat]
    )
    for nothing in ({}, {"system": None}, {"system": ""}):
        assert to_sample({"conversations": said, **nothing}, with_system, "f") == ChatSample(chat)
    own = [{"from": "system", "value": "own"}, *said]
    found = to_sample({"conversations": own, "system": "S"}, with_system, "f")
    assert found == ChatSample([{"role": "system", "content": "own"}, *chat])


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
        ({"m": [{"frm": "human", "value": "x"}]}, ("m",), "without a role, with 'frm', 'value'"),
        ({"m": [{"from": "narrator", "value": "x"}]}, ("m",), "message 0 from 'narrator'"),
        ({"m": [{"from": ["gpt"], "value": "x"}]}, ("m",), "without a role, with 'from', 'value'"),
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
