"""What the assistant says is found exactly, with and without generation markers in the chat template."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.sft_files import TEMPLATES, character_tokenizer, template

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.sft.encode import Encoder
from weightcast.trainer.data.sft.records import RecordError


def encoder(name: str, *, marked: bool) -> Encoder:
    return Encoder(character_tokenizer(template(name, marked=marked)), prompt_template="{input} {output}")


ENCODERS = {(name, marked): encoder(name, marked=marked) for name in TEMPLATES for marked in (True, False)}


def trained_text(encoder: Encoder, record: dict[str, Any]) -> list[str]:
    """The text of each run of trained tokens."""
    encoded = encoder.encode(record)
    runs: list[list[int]] = []
    for index, trained in enumerate(encoded.trained):
        if trained and (index == 0 or not encoded.trained[index - 1]):
            runs.append([])
        if trained:
            runs[-1].append(int(encoded.tokens[index]))
    return [character_tokenizer().decode(run) for run in runs]


def chat(*turns: str) -> dict[str, Any]:
    """User and assistant in turn."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]}


THOUGHT = "<think>\nhm\n</think>\n\n"
CASES = [
    ("chatml", chat("hi", "yes", "and?", " no\n"), ["yes<|im_end|>", " no\n<|im_end|>"]),
    ("chatml", chat("a", "a", "a", "a"), ["a<|im_end|>", "a<|im_end|>"]),
    ("chatml", chat("say <|im_end|>", "é…🙂", "", ""), ["é…🙂<|im_end|>", "<|im_end|>"]),
    ("headers", chat("hi", "  yes ", "and?", "no"), ["yes<|eot|>", "no<|eot|>"]),
    ("instruct", chat("hi", "yes", "and?", "no"), ["yes</s>", "no</s>"]),
    (
        "rewriting",
        chat("hi", THOUGHT + "yes", "and?", THOUGHT + "no"),
        ["yes<|im_end|>", "<think>\nhm\n</think>\n\nno<|im_end|>"],
    ),
    ("rewriting", chat("hi", "yes", "and?", "no"), ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]),
    ("reasoning", chat("hi", THOUGHT + "yes", "and?", "no"), ["\n\nyes</s>", "no</s>"]),
]


@pytest.mark.parametrize(("name", "record", "expected"), CASES)
def test_turns_are_what_the_assistant_says_and_the_token_that_ends_it(
    name: str, record: dict[str, Any], expected: list[str]
) -> None:
    assert trained_text(ENCODERS[name, False], record) == expected
    assert trained_text(ENCODERS[name, True], record) == expected


WORDS = st.text(st.sampled_from("ab \n<>/[]thinkINST"), max_size=12)


@settings(deadline=None)
@given(name=st.sampled_from(sorted(TEMPLATES)), turns=st.lists(WORDS, min_size=1, max_size=4))
def test_markers_and_rendering_agree(name: str, turns: list[str]) -> None:
    """On any text the template's own markers and our way of finding turns train on the same tokens."""
    record = chat(*(part for turn in turns for part in (turn, turn + "x")))
    marked, found = (ENCODERS[name, marked].encode(record) for marked in (True, False))
    assert found.tokens.tolist() == marked.tokens.tolist()
    assert found.trained.tolist() == marked.trained.tolist()


def test_tools_and_calls() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2!", "tool_calls": None},
    ]
    expected = ['<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>', "2!<|im_end|>"]
    for marked in (True, False):
        assert trained_text(ENCODERS["chatml", marked], {"messages": messages, "tools": "[]"}) == expected


@pytest.mark.parametrize("marked", [True, False])
def test_a_turn_of_weight_0_is_not_trained_on(marked: bool) -> None:
    record = chat("hi", "yes", "and?", "no")
    record["messages"][1]["weight"] = 0
    assert trained_text(ENCODERS["chatml", marked], record) == ["no<|im_end|>"]


def test_prompt_and_completion_as_messages_train_on_the_completion() -> None:
    turns = chat("hi", "yes", "and?", "no")["messages"]
    record = {"prompt": turns[:3], "completion": turns[3:]}
    assert trained_text(ENCODERS["chatml", False], record) == ["no<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "text", "expected"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "<s>2+2=4</s>", "4</s>"),
        ({"prompt": "", "completion": "4"}, "<s>4</s>", "4</s>"),
        ({"input": "2+2", "output": "4"}, "<s>2+2 4</s>", "4</s>"),
        ({"prompt": "<s>a", "completion": "b</s>"}, "<s>ab</s>", "b</s>"),
    ],
)
def test_two_texts(record: dict[str, Any], text: str, expected: str) -> None:
    assert character_tokenizer().decode(ENCODERS["chatml", False].encode(record).tokens) == text
    assert trained_text(ENCODERS["chatml", False], record) == [expected]


def test_sharegpt_is_chat() -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    record = {"conversations": turns, "system": "be kind"}
    messages = [{"role": "system", "content": "be kind"}, *chat("hi", "yes")["messages"]]
    ours, expected = (ENCODERS["chatml", False].encode(given) for given in (record, {"messages": messages}))
    assert ours.tokens.tolist() == expected.tokens.tolist()
    assert ours.trained.tolist() == expected.trained.tolist()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "the keys are none; known are messages"),
        ({"text": "x"}, "the keys are text"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"content": "x"}]}, "message 0 must have a role"),
        ({"messages": [{"role": "assistant"}]}, "neither content nor tool_calls"),
        (chat("hi"), "no message of the assistant"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "from 'martian'; known are system, human"),
        ({"conversations": [{"from": "human"}]}, "turn 0 must have from and value"),
        ({"prompt": 5, "completion": "x"}, "prompt must be text, and is 5"),
        ({"prompt": "x", "completion": ""}, "the completion is empty"),
        (chat("hi", "yes") | {"tools": "{"}, "tools is not JSON"),
        (chat("hi", "yes") | {"tools": {}}, "tools must be a list"),
    ],
)
def test_records_that_cannot_be_used_say_why(record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        ENCODERS["chatml", False].encode(record)


def test_messages_that_the_template_refuses() -> None:
    twice = {"messages": [{"role": "user", "content": "a"}, *chat("b", "c")["messages"]]}
    with pytest.raises(RecordError, match="the chat template refuses these messages"):
        ENCODERS["instruct", False].encode(twice)


def test_a_template_that_hides_its_turns_is_refused_with_the_remedy() -> None:
    hiding = "{% for message in messages %}{{ message.content | upper | reverse }}|{{ messages | length }}{% endfor %}"
    with pytest.raises(RecordError, match=r"message 1 begins and ends.*\{% generation %\}"):
        Encoder(character_tokenizer(hiding), prompt_template="").encode(chat("hi", "yes", "and?", "no"))


def test_messages_without_a_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"has no chat template.*tokenizer\.chat_template"):
        Encoder(character_tokenizer(), prompt_template="").encode(chat("hi", "yes"))
