"""What is trained on, and how text becomes tokens.

cfg.dataset.files = ["a.txt"]
"""

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class DatasetConfig:
    """What is trained on, by `kind`; the fields of other kinds are not looked at."""

    kind: str = "text"
    """`text`: files as one packed stream of tokens (`data/packing.py`). `mock`: made-up tokens that a model can learn
    from (`data/mock.py`), without files or tokenizer, over the ids below `tokenizer.vocab_size` or the model's.
    `sft`: prompts and answers, of which the answers are trained on (`data/sft/`). `indexed`: Megatron's `.bin` and
    `.idx`, as `weightcast preprocess` makes them (`data/indexed/`)."""
    files: list[str] = field(default_factory=list)
    """`text`: files to train on, one document a file, in this order; empty means Python's own standard library.
    `sft`: files of JSON lines, each with `messages`, `conversations`, `prompt` and `completion`, or `input` and
    `output`."""
    seq_length: int = 128
    """Tokens of a sample."""
    split: str | None = None
    """`text`, `indexed`: shares of training, validation and test, such as `9999,8,2`; null trains on everything."""
    data_path: list[str] = field(default_factory=list)
    """`indexed`: datasets by their paths without a suffix, divided by `split`: [a, b] blends them by their samples,
    [0.3, a, 0.7, b] by these weights."""
    train_data_path: list[str] = field(default_factory=list)
    """`indexed`: in place of `data_path`, datasets to train on, whole."""
    valid_data_path: list[str] = field(default_factory=list)
    """`indexed`: with `train_data_path`, datasets to validate on."""
    test_data_path: list[str] = field(default_factory=list)
    """`indexed`: with `train_data_path`, datasets to test on."""
    validation_files: list[str] = field(default_factory=list)
    """`sft`: files of JSON lines to validate on."""
    test_files: list[str] = field(default_factory=list)
    """`sft`: files of JSON lines to test on."""
    val_proportion: float = 0.0
    """`sft`: share of the training records that is taken out for validation, where nothing else names these."""
    test_proportion: float = 0.0
    """`sft`: share of the training records that is taken out for the test, where nothing else names these."""
    dataset_name: str | None = None
    """`sft`: in place of `files`, a data set of the `datasets` library: a hub id, a folder of data files, or what
    `save_to_disk` wrote. Its splits `train`, `validation` and `test` are used as such."""
    dataset_subset: str | None = None
    """`sft`: which configuration of the hub's data set; null for its only one."""
    prompt_template: str = "{input} {output}"
    """`sft`: how `input` and `output` become one text; it ends with {output}."""
    packed_sequence: bool = False
    """`sft`: fill each sample with as many records as fit, which see themselves alone, in place of padding it."""
    too_long: str = "truncate"
    """`sft`: what becomes of a record of more than `seq_length` + 1 tokens: `truncate` cuts its end, `drop` leaves it
    out, both counted and logged; `refuse` is an error."""
    max_bytes: int = 4_000_000
    """Bytes of text that the default (no `files`) takes at most; files that are named are taken whole."""
    cache_dir: str | None = None
    """Folder of tokenized streams, which are made once; null means `~/.cache/weightcast/tokens`."""


@dataclass(slots=True, kw_only=True)
class TokenizerConfig:
    """How text becomes tokens."""

    tokenizer_model: str | None = None
    """Folder (or hub id) of a Hugging Face tokenizer; null means `model.hf_path`."""
    chat_template: str | None = None
    """Jinja template for `messages`, or a file with one; null means the tokenizer's own."""
    vocab_size: int | None = None
    """Entries that the model has room for, when known; a tokenizer with a higher token id is refused."""
