"""Whether the data is there, and its settings fit each other.

check_data(config)
"""

from pathlib import Path

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.common import check_choice, check_positive
from weightcast.trainer.config import ConfigContainer, DatasetConfig
from weightcast.trainer.data.split_shares import parse_split

KINDS = ("text", "mock", "sft", "indexed")
_SFT: tuple[str, ...] = (
    "validation_files",
    "test_files",
    "val_proportion",
    "test_proportion",
    "dataset_name",
    "dataset_subset",
)
_SFT += ("prompt_template", "packed_sequence", "too_long")
_INDEXED = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
# Settings that not all kinds look at, and which do.
KINDS_OF: dict[str, tuple[str, ...]] = {"files": ("text", "sft"), "split": ("text", "indexed")}
KINDS_OF |= dict.fromkeys(_SFT, ("sft",)) | dict.fromkeys(_INDEXED, ("indexed",))
TOO_LONG = ("truncate", "drop", "refuse")


def check_data(config: ConfigContainer) -> None:
    """Files that are named are there, and what one kind alone knows is set for that kind."""
    dataset = config.dataset
    check_choice("dataset.kind", dataset.kind, KINDS)
    check_positive({"dataset.seq_length": dataset.seq_length, "dataset.max_bytes": dataset.max_bytes})
    for setting in ("files", "validation_files", "test_files"):
        for name in dict.fromkeys(getattr(dataset, setting)):
            if not Path(name).is_file():
                raise ConfigError(f"dataset.{setting}: there is no file {name!r}")
    _check_kind(dataset)
    if dataset.split is not None:
        parse_split(dataset.split)
    if dataset.kind == "indexed":
        _check_indexed(dataset)
    if dataset.kind == "sft":
        _check_sft(dataset)
    if dataset.packed_sequence:
        _check_packed(config)


def _check_kind(dataset: DatasetConfig) -> None:
    """What only other kinds look at is not set."""
    default = DatasetConfig()
    for name, kinds in KINDS_OF.items():
        if dataset.kind not in kinds and getattr(dataset, name) != getattr(default, name):
            raise ConfigError(
                f"dataset.{name} is for dataset.kind={' or '.join(kinds)}, and the kind is {dataset.kind!r}: set the "
                "kind, or leave it out"
            )


def _check_indexed(dataset: DatasetConfig) -> None:
    held_out = bool(dataset.valid_data_path or dataset.test_data_path)
    if bool(dataset.data_path) == bool(dataset.train_data_path) or (dataset.data_path and held_out):
        raise ConfigError(
            "dataset.kind=indexed needs either dataset.data_path, or dataset.train_data_path and, with it, "
            "valid_data_path and test_data_path"
        )
    if dataset.split is not None and not dataset.data_path:
        raise ConfigError("dataset.split divides dataset.data_path; with train_data_path name the other splits' own")


def _check_sft(dataset: DatasetConfig) -> None:
    check_choice("dataset.too_long", dataset.too_long, TOO_LONG)
    if bool(dataset.files) == (dataset.dataset_name is not None):
        raise ConfigError("dataset.kind=sft needs either dataset.files or dataset.dataset_name, and not both")
    if not dataset.prompt_template.endswith("{output}") or dataset.prompt_template.count("{output}") != 1:
        raise ConfigError(
            f"dataset.prompt_template={dataset.prompt_template!r} must end with {{output}} and have it once: only what "
            "comes last can be trained on"
        )
    shares = (dataset.val_proportion, dataset.test_proportion)
    if min(shares) < 0 or sum(shares) >= 1:
        raise ConfigError(
            f"dataset.val_proportion={shares[0]} and dataset.test_proportion={shares[1]} must be 0 or more and leave "
            "something to train on"
        )
    for share, files, name in (
        (dataset.val_proportion, dataset.validation_files, "val_proportion"),
        (dataset.test_proportion, dataset.test_files, "test_proportion"),
    ):
        if share and files:
            raise ConfigError(f"dataset.{name} and files for that split are both set: keep one of them")


def _check_packed(config: ConfigContainer) -> None:
    micro_batch_size, context = config.train.micro_batch_size, getattr(config.model, "context_parallel_size", 1)
    if micro_batch_size != 1:
        raise ConfigError(
            f"dataset.packed_sequence needs train.micro_batch_size=1, and it is {micro_batch_size}: raise "
            "dataset.seq_length instead, and as many records go through at once"
        )
    if context != 1:
        raise ConfigError(
            f"dataset.packed_sequence is set and model.context_parallel_size={context}: packed records are not cut "
            "along the sequence; use one of them"
        )


def check_samples_fill_a_batch(config: ConfigContainer, num_samples: int | None) -> None:
    """A step of fine-tuning trains on no record twice. For `num_samples` of an epoch, once the data is open."""
    batch = config.train.global_batch_size
    if config.dataset.kind == "sft" and num_samples is not None and num_samples < batch:
        packed = " (packed; a lower dataset.seq_length makes more of them)" if config.dataset.packed_sequence else ""
        raise ConfigError(
            f"there are {num_samples} samples to train on{packed}, fewer than train.global_batch_size={batch}: a step "
            "would train on some of them twice; lower the batch or add records"
        )
