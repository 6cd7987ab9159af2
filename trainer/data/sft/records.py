"""What a record of a fine-tuning set says, whatever its shape. Pure.

| keys | what it is |
| --- | --- |
| `messages` | chat, as Hugging Face and OpenAI write it; `tools`, `tool_calls`; `weight: 0` leaves a turn untrained |
| `conversations` | chat as ShareGPT writes it: `from` and `value`; `system`, `tools` |
| `prompt`, `completion` | two texts, end to end; or two lists of messages |
| `input`, `output` | two texts, put together by `dataset.prompt_template` |

    read_record({"prompt": "2 + 2 =", "completion": " 4"}, "{input} {output}")
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SHAPES = ("messages", "conversations", "prompt and completion", "input and output")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


class RecordError(ValueError):
    """A record that cannot be read; whoever knows its file and line says them."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the tokenizer's chat template."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    """Of each message, whether the model is to learn it: the assistant's alone."""
    tools: list[Any] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A text of which the model is to learn what comes after the prompt."""

    prompt: str
    completion: str


def read_record(record: Mapping[str, Any], prompt_template: str) -> Chat | Completion:
    """What `record` says. Raises `RecordError` for a shape that is not known, or that has nothing to train on."""
    keys = {key for key, value in record.items() if value is not None}
    if "messages" in keys:
        return _chat(_messages_of(record["messages"], "messages"), record)
    if "conversations" in keys:
        return _chat(_from_sharegpt(record["conversations"], record.get("system")), record)
    if {"prompt", "completion"} <= keys:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            first = _messages_of(prompt, "prompt")
            return _chat([*first, *_messages_of(completion, "completion")], record, first_trained=len(first))
        return _completion(_text(prompt, "prompt"), _text(completion, "completion"))
    if {"input", "output"} <= keys:
        before = prompt_template[: -len("{output}")]
        return _completion(
            before.replace("{input}", _text(record["input"], "input")), _text(record["output"], "output")
        )
    raise RecordError(f"the keys are {', '.join(sorted(keys)) or 'none'}; known are {'; '.join(SHAPES)}")


def _completion(prompt: str, completion: str) -> Completion:
    if not completion:
        raise RecordError("the completion is empty, so there is nothing to train on")
    return Completion(prompt, completion)


def _chat(messages: list[dict[str, Any]], record: Mapping[str, Any], first_trained: int = 0) -> Chat:
    trained = [
        message["role"] == "assistant" and index >= first_trained and message.get("weight", 1) != 0
        for index, message in enumerate(messages)
    ]
    if not any(trained):
        raise RecordError("no message of the assistant is to be trained on")
    return Chat(
        [{key: value for key, value in message.items() if key != "weight"} for message in messages],
        trained,
        _json_or(record.get("tools"), list, "tools"),
        _json_or(record.get("chat_template_kwargs"), dict, "chat_template_kwargs") or {},
    )


def _messages_of(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RecordError(f"{key} must be a list of messages, and is {_short(value)}")
    return [_message(item, index) for index, item in enumerate(value)]


def _message(item: Any, index: int) -> dict[str, Any]:
    """One message, its role known to be there; what is null is left out, as if it had not been written."""
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise RecordError(f"message {index} must have a role, and is {_short(item)}")
    message = {key: value for key, value in item.items() if value is not None}
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    if "content" not in message and not calls:
        raise RecordError(f"message {index} ({message['role']}) has neither content nor tool_calls")
    content = message.get("content", "")
    if not isinstance(content, str | list):
        raise RecordError(f"the content of message {index} must be text, or a list of parts, and is {_short(content)}")
    return message | {"content": content}


def _tool_call(call: Any) -> Any:
    """A call whose arguments are a mapping, as templates expect them; OpenAI writes them as a string of JSON."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        function["arguments"] = _json_or(function["arguments"], dict, "arguments of a tool call")
    return dict(call) | {"function": function}


def _from_sharegpt(value: Any, system: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"conversations must be a list of turns, and is {_short(value)}")
    messages = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise RecordError(f"turn {index} must have from and value, and is {_short(turn)}")
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            known = ", ".join(SHAREGPT_ROLES)
            raise RecordError(f"turn {index} is from {turn.get('from')!r}; known are {known}")
        messages.append({"role": role, "content": turn["value"]} | {k: turn[k] for k in ("weight",) if k in turn})
    return messages


def _json_or(value: Any, kind: type, key: str) -> Any:
    """`value`, or what it says where it is a string of JSON; None stays None."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RecordError(f"{key} is not JSON: {error}") from error
    if value is not None and not isinstance(value, kind):
        raise RecordError(f"{key} must be a {kind.__name__}, and is {_short(value)}")
    return value


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{key} must be text, and is {_short(value)}")
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
