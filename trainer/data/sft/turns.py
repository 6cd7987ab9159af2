"""Where in a rendered conversation the assistant's turns are, whatever the chat template does.

Trained on is what the model would have to say after the generation prompt: the turn with its reasoning and tool calls,
up to and with the token that ends it. Templates that mark this with `{% generation %}` are taken at their word
(`encode.py`). For all others it is found by rendering, never by looking for words:

- a turn begins where the conversation up to it, rendered with the generation prompt, ends;
- it ends where the conversation through it, rendered, ends.

Both must be beginnings of the whole. They are not where a template rewrites earlier turns (Qwen3 and DeepSeek-R1 drop
their reasoning); there the turn's content is replaced with a character that occurs nowhere, and what stands before and
after that character in the rendering is what does not belong to the content. Where neither way gives an answer, or
the two ends do not fit, the record is refused.

    text, spans = assistant_turns(chat, render, special_tokens=["<|im_end|>"], has_generation_prompt=True)
"""

from collections.abc import Callable, Sequence
from typing import Any

from weightcast.trainer.data.sft.records import Chat, RecordError

Render = Callable[[list[dict[str, Any]], bool], str | None]
"""Messages and whether to add the generation prompt, to text; None where the template refuses these messages."""
Span = tuple[int, int]


def assistant_turns(
    chat: Chat, render: Render, *, special_tokens: Sequence[str], has_generation_prompt: bool
) -> tuple[str, list[Span]]:
    """The rendered conversation, and from where to where each trained turn goes, in characters.

    `has_generation_prompt`: whether the template knows `add_generation_prompt`. Raises `RecordError`.
    """
    whole = render(chat.messages, False)
    if whole is None:
        raise RecordError("the chat template refuses these messages")
    spans: list[Span] = []
    for index in (index for index, trained in enumerate(chat.trained) if trained):
        turn = _Turn(chat.messages, index, whole, render)
        start = turn.start(has_generation_prompt)
        end = None if start is None else turn.end(start, special_tokens)
        if start is None or end is None or not (spans[-1][1] if spans else 0) <= start < end:
            raise RecordError(
                f"the chat template does not show where message {index} begins and ends: mark what the assistant says "
                "with {% generation %} and {% endgeneration %}, in a template of your own (tokenizer.chat_template)"
            )
        spans.append((start, end))
    return whole, spans


class _Turn:
    """One turn of the assistant, at `index`, in the rendering of the whole."""

    def __init__(self, messages: list[dict[str, Any]], index: int, whole: str, render: Render) -> None:
        self._messages = messages
        self._index = index
        self._whole = whole
        self._render = render
        self._marker = unused_character(whole)

    def start(self, has_generation_prompt: bool) -> int | None:
        """Where what the model says begins."""
        if has_generation_prompt and self._index > 0:
            prompt = self._render(self._messages[: self._index], True)
            if prompt is not None and self._whole.startswith(prompt):
                return len(prompt)
        around = self._around_marker(self._messages[self._index + 1 :])
        return len(around[0]) if around is not None and self._whole.startswith(around[0]) else None

    def end(self, start: int, special_tokens: Sequence[str]) -> int | None:
        """Where it ends, the end-of-turn token included, white space after that token excluded."""
        through = self._render(self._messages[: self._index + 1], False)
        if through is not None and self._whole.startswith(through) and len(through) > start:
            return start + _without_trailing_space(through[start:], special_tokens)
        around, alone = self._around_marker(self._messages[self._index + 1 :]), self._around_marker([])
        if around is None or alone is None or not self._whole.endswith(around[1]):
            return None
        content_end = len(self._whole) - len(around[1])
        ending = alone[1][: _without_trailing_space(alone[1], special_tokens)]
        return content_end + len(ending) if self._whole.startswith(ending, content_end) else None

    def _around_marker(self, following: list[dict[str, Any]]) -> tuple[str, str] | None:
        """What stands before and after the turn's content."""
        marked = {"role": "assistant", "content": self._marker}
        text = self._render([*self._messages[: self._index], marked, *following], False)
        if text is None or text.count(self._marker) != 1:
            return None
        before, _, after = text.partition(self._marker)
        return before, after


def unused_character(text: str) -> str:
    """A character of Unicode's private use that `text` has not."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _without_trailing_space(text: str, special_tokens: Sequence[str]) -> int:
    """The length of `text` without white space after a special token at its end."""
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(tuple(special_tokens)) else len(text)
