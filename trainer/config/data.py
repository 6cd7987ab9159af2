"""What is trained on, and how text becomes tokens.

cfg.dataset.files = ["a.txt"]
"""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class DatasetConfig:
    """What is trained on, by `kind`; the fields of other kinds are not looked at."""

    kind: str = "text"
    """`text`: files as one packed stream of tokens (`data/packing.py`). `mock`: made-up tokens that a model can learn
    from (`data/mock.py`), without files or tokenizer, over the ids below `tokenizer.vocab_size` or the model's."""
    files: list[str] = field(default_factory=list)
    """Text files to train on, one document a file, in this order; empty means Python's own standard library."""
    seq_length: int = 128
    """Tokens of a sample."""
    max_bytes: int = 4_000_000
    """Bytes of text that the default (no `files`) takes at most; files that are named are taken whole."""
    cache_dir: str | None = None
    """Folder of tokenized streams, which are made once; null means `~/.cache/weightcast/tokens`."""


@dataclass(slots=True, kw_only=True)
class TokenizerConfig:
    """How text becomes tokens."""

    tokenizer_model: str | None = None
    """Folder (or hub id) of a Hugging Face tokenizer; null means `model.hf_path`."""
    vocab_size: int | None = None
    """Entries that the model has room for, when known; a tokenizer with a higher token id is refused."""
