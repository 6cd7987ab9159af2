"""What the tests of fine-tuning share: a tokenizer of single characters, chat templates, and files of records."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

TURN_ENDS = ("<|im_end|>", "<|eot|>", "</s>")
SPECIAL = ("<pad>", "<s>", *TURN_ENDS, "<|im_start|>", "<|head|>")


def character_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token for each byte, and for each special token; `<s>` begins a text and `</s>` ends it."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(alphabet, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast


def write_lines(path: Path, records: Iterable[Mapping[str, Any] | str]) -> Path:
    """A file with a record in each line; text stands as it is."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# In each, what stands between [[ and ]] is what the assistant says; `template` puts Jinja's markers there, or nothing.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}[[{{- message.content }}
{%- for call in message.tool_calls or [] %}{{- '<call>' + call.function | tojson + '</call>' }}{%- endfor %}
{{- '<|im_end|>' }}]]{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
HEADERS = """\
{{- bos_token }}{%- for message in messages %}
{{- '<|head|>' + message.role + '<|head|>\\n\\n' }}
{%- if message.role == 'assistant' %}[[{{- message.content | trim + '<|eot|>' }}]]
{%- else %}{{- message.content | trim + '<|eot|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|head|>\\n\\n' }}{%- endif %}"""
# Refuses what does not alternate, and knows no generation prompt.
INSTRUCT = """\
{{- bos_token }}{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{- ' ' }}[[{{- message.content | trim + '</s>' }}]]{%- endif %}
{%- endfor %}"""
# Drops the reasoning of all turns but the last one, and gives the last one reasoning if it has none.
REWRITING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}[[
{%- set said = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.last %}{{- '<think>\\n' + message.content.split('</think>')[0].split('<think>')[-1].strip('\\n')
  if '</think>' in message.content else '<think>\\n' }}{{- '\\n</think>\\n\\n' }}{%- endif %}
{{- said + '<|im_end|>' }}]]
{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# Its generation prompt begins the reasoning, which no rendered turn has.
REASONING = """\
{{- bos_token }}{%- for message in messages %}
{%- if message.role == 'user' %}{{- '<|head|>' + message.content }}
{%- else %}{{- '<|im_start|>' }}[[{{- message.content.split('</think>')[-1] + '</s>' }}]]{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|><think>\\n' }}{%- endif %}"""
TEMPLATES = {
    "chatml": CHATML, "headers": HEADERS, "instruct": INSTRUCT, "rewriting": REWRITING, "reasoning": REASONING
}  # fmt: skip


def template(name: str, *, marked: bool) -> str:
    """A chat template, with or without `{% generation %}` around what the assistant says."""
    begin, end = ("{%- generation %}", "{%- endgeneration %}") if marked else ("", "")
    return TEMPLATES[name].replace("[[", begin).replace("]]", end)
