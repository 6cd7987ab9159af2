"""A record as tokens, and which of them are trained on.

Text is tokenized whole, as an engine would read it; a token is trained on if any of its characters is. So nothing is
cut at a boundary where the tokenizer would not cut.

    encoder = Encoder(load_tokenizer("path/to/hf"), prompt_template="{input} {output}")
    encoder.encode({"prompt": "2 + 2 =", "completion": " 4"}).trained
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightcast.sync.errors import ConfigError
from weightcast.trainer.data.sft.records import Chat, Completion, RecordError, read_record
from weightcast.trainer.data.sft.turns import Span, assistant_turns

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One record; both arrays are [tokens]."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]


class Encoder:
    """Turns records into tokens. Raises `ConfigError` for a tokenizer that does not say where its tokens come from."""

    def __init__(self, tokenizer: Any, *, prompt_template: str, chat_template: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say which text a token came from: fine-tuning needs a "
                "tokenizer.json beside the model"
            )
        self._tokenizer = tokenizer
        self._prompt_template = prompt_template
        self._template = chat_template if chat_template is not None else tokenizer.chat_template
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._refusal = ""  # what the template last said to messages that it refused
        self._special_tokens = sorted({*tokenizer.all_special_tokens, *added})

    def encode(self, record: Mapping[str, Any]) -> Encoded:
        """The tokens of `record`. Raises `RecordError` for one that cannot be read, or whose turns cannot be found."""
        said = read_record(record, self._prompt_template)
        encoded = self._completion(said) if isinstance(said, Completion) else self._chat(said)
        if not encoded.trained[1:].any():
            raise RecordError("none of its tokens is to be trained on")
        return encoded

    def _completion(self, said: Completion) -> Encoded:
        """`[bos] prompt completion [eos]`, as far as the tokenizer has them and the text does not."""
        text = said.prompt + said.completion
        body = self._text(text, [(len(said.prompt), len(text))])
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        before = [] if bos is None or body.tokens[0] == bos else [bos]
        after = [] if eos is None or body.tokens[-1] == eos else [eos]
        tokens = np.concatenate([before, body.tokens, after]).astype(np.int32)
        return Encoded(tokens, np.concatenate([np.zeros(len(before)), body.trained, np.ones(len(after))]).astype(bool))

    def _chat(self, chat: Chat) -> Encoded:
        if not isinstance(self._template, str):
            have = "several chat templates" if self._template else "no chat template"
            raise ConfigError(
                f"the tokenizer has {have}, and the data has messages: name one with tokenizer.chat_template"
            )
        assistant = [message["role"] == "assistant" for message in chat.messages]
        if _GENERATION_MARKER.search(self._template) and assistant == chat.trained:
            return self._marked(chat)
        self._refusal = ""
        try:
            text, spans = assistant_turns(
                chat,
                lambda messages, prompt: self._render(chat, messages, prompt),
                special_tokens=self._special_tokens,
                has_generation_prompt="add_generation_prompt" in self._template,
            )
        except RecordError as error:
            raise RecordError(f"{error}{self._refusal}") from error
        return self._text(text, spans)

    def _marked(self, chat: Chat) -> Encoded:
        """By the template's own `{% generation %}`."""
        found = self._tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            chat_template=self._template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **chat.template_arguments,
        )
        return Encoded(np.array(found["input_ids"], dtype=np.int32), np.array(found["assistant_masks"], dtype=bool))

    def _render(self, chat: Chat, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str | None:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=chat.tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **chat.template_arguments,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no Jinja: line {error.lineno}: {error.message}") from error
        except (TemplateError, TypeError, IndexError) as error:  # what templates raise, or run into, and so refuse
            self._refusal = f" ({error})"
            return None
        return text

    def _text(self, text: str, spans: Sequence[Span]) -> Encoded:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = np.array(found["input_ids"], dtype=np.int32)
        offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        if not len(tokens):
            raise RecordError("it has no text")
        trained = np.zeros(len(tokens), dtype=bool)
        for start, end in spans:
            trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        return Encoded(tokens, trained)
