"""A disk that refuses what `weightcast preprocess` writes: one error that says so, and no dataset that looks whole."""

import contextlib
import multiprocessing
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.trainer.sft_files import character_tokenizer, write_lines

from weightcast.cli import main
from weightcast.sync.errors import StorageError
from weightcast.trainer.data.indexed.preprocess import PreprocessSettings, preprocess

# After weightcast, which holds back Megatron's import-time notices.
from megatron.core.datasets.indexed_dataset import IndexedDataset  # isort: skip

NUM_DOCUMENTS = 3000
LONG, SHORT = "abcdé " * 10, "a"  # a document takes 20 bytes of the .idx, and a token 2 of the .bin: either is larger


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron 0.19 warns where neither a process group nor the environment tells it its rank."""
    monkeypatch.setenv("RANK", "0")


@contextlib.contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """A file that grows past that is refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# the record of each line -> bytes that a file may have, workers
REFUSED: dict[str, tuple[dict[str, str], int, int]] = {
    "tokens": ({"text": LONG}, 100_000, 1),
    "tokens, two workers": ({"text": LONG}, 100_000, 2),
    "the last of the tokens": ({"text": SHORT}, 2 * 2 * NUM_DOCUMENTS - 1, 1),
    "the index": ({"text": SHORT}, 30_000, 1),
    "the second key": ({"text": SHORT, "more": LONG}, 100_000, 1),
}


# Workers import torch anew, which takes seconds.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if "workers" in case else case for case in REFUSED]
)
def test_a_full_disk_leaves_what_was_there_before(case: str, tmp_path: Path, tokenizer: str) -> None:
    record, limit_bytes, workers = REFUSED[case]
    out = tmp_path / "out"
    older = write_lines(tmp_path / "older.jsonl", [dict.fromkeys(record, "ab")])
    settings = PreprocessSettings(tuple(record), workers=workers)
    before = preprocess([older], out / "x", tokenizer, PreprocessSettings(tuple(record))).prefixes
    expected = contents(out)
    file = write_lines(tmp_path / "a.jsonl", [record] * NUM_DOCUMENTS)
    with files_up_to(limit_bytes), pytest.raises(StorageError) as caught:
        preprocess([file], out / "x", tokenizer, settings)
    assert re.search(
        r"x could not be written: .*File too large.*make room on the disk.* start again", str(caught.value)
    )
    assert contents(out) == expected
    assert not multiprocessing.active_children()
    assert preprocess([file], out / "x", tokenizer, PreprocessSettings(tuple(record))).prefixes == before
    assert [len(IndexedDataset(str(prefix))) for prefix in before] == [NUM_DOCUMENTS] * len(record)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 100 KiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True) if sys.platform == "linux" else None
    if made is None or made.returncode != 0:
        # Whoever may mount must see the disk fill; anybody else has the limits on files above.
        assert made is None or re.search("denied|not permitted|superuser", made.stderr), made.stderr
        pytest.skip("this process may not mount a disk; the limits on the size of files above stand for a full one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("text", [LONG, SHORT], ids=["tokens", "both files together"])
def test_the_command_on_a_disk_that_is_really_full(
    text: str,
    small_disk: Path,
    tmp_path: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"text": text}] * (2 * NUM_DOCUMENTS))
    command = ["weightcast", "preprocess", str(file), "--tokenizer", tokenizer, "--out", str(small_disk / "x")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 1
    assert re.fullmatch(
        r"weightcast: .*x could not be written: .*No space left on device.*make room on the disk.*", said
    )
    assert not list(small_disk.iterdir())


class Died(BaseException):
    """What a test ends the writing with."""


dies_at: list[str] = []


def _die(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and dies_at and str(arguments[1]).endswith(dies_at[0]):
        raise Died


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_death_between_the_two_names_leaves_no_mixture(suffix: str, tmp_path: Path, tokenizer: str) -> None:
    sys.addaudithook(_die)
    first = write_lines(tmp_path / "a.jsonl", [{"text": "ab"}])
    second = write_lines(tmp_path / "b.jsonl", [{"text": "cdé"}] * 3)
    (prefix,) = preprocess([first], tmp_path / "x", tokenizer, PreprocessSettings()).prefixes
    dies_at[:] = [suffix]
    try:
        with pytest.raises(Died):
            preprocess([second], tmp_path / "x", tokenizer, PreprocessSettings())
    finally:
        dies_at.clear()
    assert Path(f"{prefix}.bin").exists() and not IndexedDataset.exists(str(prefix))
    preprocess([second], tmp_path / "x", tokenizer, PreprocessSettings())
    assert len(IndexedDataset(str(prefix))) == 3
