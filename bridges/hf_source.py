"""Where a Hugging Face model comes from: a folder, or a repository of the hub.

A folder is read as it is and nothing else is asked. Only a name that is no folder goes to the hub, the configuration
first and the weights when they are wanted.

    source = HFSource.make("path/to/hf")
    config = source.load_config()
    checkpoint = open_checkpoint(source.folder())
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, StrictDataclassError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from weightcast.bridges.config_quantization import FIELD as QUANTIZATION_FIELD
from weightcast.bridges.config_quantization import unnamed_dtype
from weightcast.bridges.hf_config import read_config
from weightcast.sync.checkpoint_files import INDEX_FILE, SINGLE_FILE, has_weights, open_checkpoint
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import TensorSpec, dtype_name

# What belongs to a model besides its weights and its config.json: tokenizer, generation settings, custom code.
COMPANION_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "generation_config.json",
    "*processor_config.json",
    "*.py",
)
CONFIG_FILE = "config.json"
# What transformers raises for a type that it does not know, and for fields of values that it does not take.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
_PATTERNS = ("*.safetensors", "*.safetensors.index.json", CONFIG_FILE, *COMPANION_FILES)


@dataclass(frozen=True, slots=True)
class HFSource:
    """A folder's path or a hub repository's name, with the settings to reach the hub (`revision`, `token`, ...)."""

    name: str
    hub_options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def make(path: str | Path, **hub_options: Any) -> "HFSource":
        """Raises `ConfigError` for something that is neither a folder nor could be a repository's name."""
        folder = Path(path).expanduser()
        if folder.is_dir():
            return HFSource(str(folder.absolute()), hub_options)
        name = str(path)
        if name.count("/") > 1 or name.startswith((".", "/", "~")) or folder.is_file():
            raise ConfigError(f"{name} is no folder; give a Hugging Face folder (with {CONFIG_FILE}) or a hub name")
        return HFSource(name, hub_options)

    @property
    def is_folder(self) -> bool:
        """True for a folder on this machine."""
        return Path(self.name).is_absolute()

    def load_config(self, *, trust_remote_code: bool = False) -> PretrainedConfig:
        """The model's configuration. Raises `ConfigError` when there is none that the installed transformers can read.

        What the hub answers is passed on as the `OSError` that its client raises; for a gated repository with a remedy.
        """
        if self.is_folder:
            _require_fields(Path(self.name) / CONFIG_FILE)
        try:
            with _remedy_for_gated(self.name):
                return read_config(self.name, trust_remote_code=trust_remote_code, **self.hub_options)
        except _UNREADABLE as error:
            raise ConfigError(
                f"transformers {transformers.__version__} cannot read the {CONFIG_FILE} of {self.name}"
                f"{self._origin()}: {error}; install a newer transformers, pass trust_remote_code=True for "
                "code that comes with the model, or download the file again if a field of it is wrong"
            ) from error

    def tensor_names(self) -> frozenset[str] | None:
        """Names of the tensors in the safetensors files, factors of codes included; `None` where there are no files.

        Of a repository only the index is downloaded, or the only file. Raises `CheckpointMismatch`.
        """
        if self.is_folder:
            folder = Path(self.name)
            return frozenset(open_checkpoint(folder).files) if has_weights(folder) else None
        index = self._download(INDEX_FILE)
        if index is not None:
            return frozenset(json.loads(index.read_text())["weight_map"])
        only = self._download(SINGLE_FILE)
        return None if only is None else frozenset(open_checkpoint(only.parent).files)

    def _download(self, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.name, file, **self.hub_options))
        except EntryNotFoundError:
            return None

    def folder(self) -> Path:
        """A folder with all files, downloaded to the hub's cache where the source is a repository."""
        if self.is_folder:
            return Path(self.name)
        from huggingface_hub import snapshot_download

        with _remedy_for_gated(self.name):
            return Path(snapshot_download(self.name, allow_patterns=list(_PATTERNS), **self.hub_options))

    def _origin(self) -> str:
        """The model type and the version of transformers that a folder's configuration names."""
        try:
            fields = json.loads((Path(self.name) / CONFIG_FILE).read_text())
            return f" (model_type {fields.get('model_type')!r}, written by {fields.get('transformers_version')})"
        except (OSError, ValueError, AttributeError):
            return ""


def _require_fields(path: Path) -> None:
    """Raise `ConfigError` unless `path` is a file of fields in JSON."""
    if not path.is_file():
        raise ConfigError(f"{path.parent} has no {CONFIG_FILE}; give a folder that save_pretrained wrote")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} ({path.stat().st_size} bytes) is no JSON: {error}; download it again") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds a {type(fields).__name__}, not the fields of a model; download it again")


@contextmanager
def _remedy_for_gated(name: str) -> Iterator[None]:
    """Passes errors on; that of a gated repository says where to ask for access, and how to show that it was given."""
    try:
        yield
    except OSError as error:
        if not any(isinstance(one, GatedRepoError) for one in (error, error.__cause__, error.__context__)):
            raise
        raise OSError(
            f"You are trying to access a gated repo: {name}. Make sure to have access to it: ask for it at "
            f"https://huggingface.co/{name}, make a token at https://huggingface.co/settings/tokens, and "
            f"export HF_TOKEN=<your_access_token> or pass token=... ({error})"
        ) from error


def write_companions(config: PretrainedConfig, source: HFSource | None, folder: Path) -> None:
    """Put the configuration and, from `source`, the tokenizer and its like into `folder`, unchanged.

    Only the settings of quantised weights are left out, because exported weights are not quantised; a configuration
    that left the dtype to them names it then.
    """
    if source is None:
        config.save_pretrained(folder)
    else:
        origin = source.folder()
        for path in sorted(origin.iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in (CONFIG_FILE, *COMPANION_FILES)):
                shutil.copyfile(path, folder / path.name)
    written = folder / CONFIG_FILE
    fields = json.loads(written.read_text()) if written.is_file() else {}
    if fields.pop(QUANTIZATION_FIELD, None) is not None:
        if "dtype" not in fields and "torch_dtype" not in fields:
            fields["dtype"] = dtype_name(unnamed_dtype(config))
        written.write_text(json.dumps(fields, indent=2) + "\n")


def specs_of_config(config: PretrainedConfig, dtype: torch.dtype | None = None) -> tuple[TensorSpec, ...]:
    """The tensors that a checkpoint of this configuration has, as transformers writes them; no memory is used.

    Tied tensors are listed once, as checkpoints store them, and experts one by one, although transformers stacks them
    in memory. `dtype` defaults to the configuration's own; buffers keep their own. Raises `ConfigError` for sizes of
    which no model can be built.
    """
    named = dtype if dtype is not None else config.dtype
    wanted = named if isinstance(named, torch.dtype) else unnamed_dtype(config)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    reads = type(config) in AutoModelForCausalLM._model_mapping
    model_class = AutoModelForImageTextToText if sees and not reads else AutoModelForCausalLM
    model = _build(model_class, config)
    state: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            is_weight = isinstance(tensor, torch.nn.Parameter) and tensor.dtype.is_floating_point
            state[name] = tensor.detach().to(wanted) if is_weight else tensor
    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return tuple(TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items())


def _build(model_class: Any, config: PretrainedConfig) -> Any:
    """The model on the meta device."""
    try:
        with torch.device("meta"):
            return model_class.from_config(config)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ConfigError(
            f"transformers {transformers.__version__} cannot build a {config.model_type} model of this configuration: "
            f"{error}; correct the sizes in {CONFIG_FILE}"
        ) from error
