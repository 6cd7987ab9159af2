"""What an exported folder needs so that engines ask as the model was trained: the template, and when a turn ends.

Where the run has a chat template of its own (`tokenizer.chat_template`), the base model's folder knows neither it nor
the token that ends its turns; without that one an engine would go on after the answer.

    write_chat_files(Path("out/hf"), template)
"""

import json
from pathlib import Path
from typing import Any

from weightcast.trainer.data.packing import load_tokenizer
from weightcast.trainer.data.sft.encode import Encoder
from weightcast.trainer.data.sft.records import RecordError

TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"


def write_chat_files(folder: Path, template: str) -> None:
    """Put `template` into `folder`, and the end of its turns among the tokens that end an answer.

    `folder` has its tokenizer; without one the template is of no use, and nothing is written.
    """
    if not any(folder.glob("tokenizer*")):
        return
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    tokenizer = load_tokenizer(str(folder))
    ending = end_of_turn(tokenizer, template)
    if ending is None:
        return
    file = folder / GENERATION_FILE
    fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = fields.get("eos_token_id")
    known = tokenizer.eos_token_id if known is None else known
    tokens = [] if known is None else list(known) if isinstance(known, list) else [known]
    if ending not in tokens:
        file.write_text(json.dumps(fields | {"eos_token_id": [*tokens, ending]}, indent=2) + "\n", encoding="utf-8")


def end_of_turn(tokenizer: Any, template: str) -> int | None:
    """The special token that the template puts after what the assistant says; None where it puts none."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoder = Encoder(tokenizer, prompt_template="{input} {output}", chat_template=template)
    try:
        encoded = encoder.encode({"messages": turns})
    except RecordError:
        return None
    last = int(encoded.tokens[encoded.trained][-1])
    added = tokenizer.added_tokens_decoder.get(last)
    return last if added is not None and added.special else None
