"""Full disks and ranks that die: every rank is told, nothing that looks whole is left, and an older export stays."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from tests.ranks import run_ranks

from weightcast.bridges import AutoBridge
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.errors import CheckpointMismatch, WeightcastError


def save(kind: str, source: str, out: str) -> None:
    """Save the model of `source` over all ranks, split in its tensors."""
    bridge = AutoBridge.from_hf_pretrained(source)
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = int(os.environ["WORLD_SIZE"])
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    if kind == "megatron":
        bridge.save_megatron_model(model, out)
    else:
        bridge.save_hf_pretrained(model, out, show_progress=False, shard_bytes=60_000)


def save_on_a_full_disk(kind: str, source: str, out: str, limits: list[int | None]) -> str:
    """`limits` are the bytes that a file of each rank may have; gives what the error says."""
    limit = limits[int(os.environ["RANK"])]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        limit_files(limit)
    try:
        save(kind, source, out)
    except WeightcastError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


def limit_files(num_bytes: int) -> None:
    """No file of this process may have more bytes from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk(folder: Path) -> None:
    """Write to `folder` until its disk takes no byte more."""
    block = 4096
    with (folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while block := file.write(bytes(block)):
            pass


def save_while_the_disk_fills(source: str, out: str, file: str, how: str) -> str:
    """A Megatron checkpoint, for which rank 0 finds no room just when it opens the file of that name to write it."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and Path(str(arguments[0])).name == file and arguments[1] not in (None, "r", "rb"):
            if how == "limit":
                limit_files(16)
            elif not Path(out).with_name("filler").exists():
                fill_disk(Path(out).parent)

    if os.environ["RANK"] == "0":
        sys.addaudithook(watch)
    return save_on_a_full_disk("megatron", source, out, [None, None])


def looks_whole(folder: Path) -> bool:
    """Whether any loader would take `folder`."""
    from weightcast.bridges.megatron_checkpoint import require_checkpoint

    for look in (require_checkpoint, open_checkpoint):
        with contextlib.suppress(CheckpointMismatch):
            look(folder)
            return True
    return False


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}


def write_older(kind: str, tiny_models: Path, out: Path) -> dict[str, bytes]:
    """An older export of another model in `out`, which a new one replaces; Megatron checkpoints replace none."""
    if kind == "hf":
        shutil.copytree(tiny_models / "llama2", out)
    return contents(out)


WRITES, SPARED = "could not be written", "another rank, whose disk refused it; its own message says why"
FULL: dict[str, tuple[str, list[int | None], list[str]]] = {
    "hf, alone, weights": ("hf", [20_000], [WRITES]),
    "hf, alone, its smallest file": ("hf", [100], [WRITES]),
    "hf, first of two": ("hf", [20_000, None], [WRITES, SPARED]),
    "hf, second of two": ("hf", [None, 20_000], [SPARED, WRITES]),
    "megatron, first of two": ("megatron", [100, None], [WRITES, SPARED]),
    "megatron, second of two": ("megatron", [None, 20_000], [WRITES, WRITES]),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_is_named_on_every_rank_and_leaves_nothing_whole(
    case: str, tiny_models: Path, tmp_path: Path
) -> None:
    kind, limits, expected = FULL[case]
    source, out = tiny_models / "qwen3", tmp_path / "out"
    older = write_older(kind, tiny_models, out)
    said = run_ranks(save_on_a_full_disk, len(limits), kind, str(source), str(out), limits, process_group=False)
    for text, part in zip(said, expected, strict=True):
        assert part in text and text.startswith("StorageError: ") and "make room on the disk" in text, said
    assert contents(out) == older
    for folder in tmp_path.iterdir():
        assert folder == out or not looks_whole(folder), folder
    run_ranks(save, 1, kind, str(source), str(out), process_group=False)
    assert looks_whole(out) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 100 KiB, or of the parameter's size, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", getattr(request, "param", "size=100k"), "none", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True) if sys.platform == "linux" else None
    if made is None or made.returncode != 0:
        # Whoever may mount must see the disk fill; anybody else has the limits on files above.
        assert made is None or re.search("denied|not permitted|superuser", made.stderr), made.stderr
        pytest.skip("this process may not mount a disk; the limits on the size of files above stand for a full one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_disk_that_is_really_full(kind: str, tiny_models: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    said = run_ranks(
        save_on_a_full_disk, 2, kind, str(tiny_models / "qwen3"), str(out), [None, None], process_group=False
    )
    assert all(text.startswith("StorageError: ") and "make room on the disk" in text for text in said), said
    # megatron-core 0.19 tells of its writers' errors no more than their types.
    assert any(re.search("No space left on device|caught while starting worker.*OSError", text) for text in said), said
    assert not out.exists() and not any(looks_whole(folder) for folder in small_disk.iterdir())


SMALL_FILES = (".metadata.tmp", "metadata.json")


def check_small_file(source: Path, out: Path, file: str, how: str, why: str) -> None:
    said = run_ranks(save_while_the_disk_fills, 2, str(source), str(out), file, how, process_group=False)
    assert all(text.startswith("StorageError: ") and "make room on the disk" in text for text in said), said
    assert why in said[0] and SPARED in said[1], said
    assert not out.exists() and not looks_whole(out.with_name(".out.partial"))


@pytest.mark.parametrize("file", SMALL_FILES)
def test_every_rank_learns_that_a_small_file_of_rank_0_is_not_written(
    file: str, tiny_models: Path, tmp_path: Path
) -> None:
    check_small_file(tiny_models / "qwen3", tmp_path / "out", file, "limit", "File too large")


@pytest.mark.parametrize("small_disk", ["size=2m"], indirect=True)
@pytest.mark.parametrize("file", SMALL_FILES)
def test_a_disk_that_fills_before_a_small_file_of_rank_0(file: str, tiny_models: Path, small_disk: Path) -> None:
    check_small_file(tiny_models / "qwen3", small_disk / "out", file, "disk", "No space left on device")


def die_while_saving(kind: str, source: str, out: str, rank: int, file: str) -> None:
    """Ends `rank` by SIGKILL when it opens the file of that name to write it, in a process of its own or not."""
    process = os.getpid()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(file) and arguments[1] not in (None, "r", "rb"):
            os.kill(process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ["RANK"]) == rank:
        sys.addaudithook(watch)
    save(kind, source, out)
    dist.barrier()


@contextlib.contextmanager
def ended_helpers(mark: str) -> Iterator[dict[str, str]]:
    """Variables for ranks; processes that Megatron started in them outlive a rank that is killed, and end here."""
    yield {"STARTED_FOR": mark}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("STARTED_FOR") == mark:
                process.kill()


@pytest.mark.parametrize(
    ("kind", "rank", "file", "earlier"),
    [
        ("hf", 0, "model.safetensors.index.json", "model-00001-of-00004.safetensors"),
        ("hf", 0, "tokenizer.json", "config.json"),
        pytest.param("megatron", 1, "__1_0.distcp", "", marks=pytest.mark.long),
        pytest.param("megatron", 0, ".metadata.tmp", "__1_0.distcp", marks=pytest.mark.long),
        ("megatron", 0, "metadata.json", ".metadata"),
    ],
)
def test_a_rank_that_is_killed_leaves_nothing_whole(
    kind: str, rank: int, file: str, earlier: str, tiny_models: Path, tmp_path: Path
) -> None:
    source, out, partial = tiny_models / "qwen3", tmp_path / "out", tmp_path / ".out.partial"
    older = write_older(kind, tiny_models, out)
    with ended_helpers(str(tmp_path)) as env, pytest.raises(AssertionError, match=f"--- rank {rank} ---"):
        run_ranks(die_while_saving, 2, kind, str(source), str(out), rank, file, process_group=False, env=env)
    assert (partial / earlier).exists() and not (partial / file).exists()
    assert contents(out) == older
    if kind == "hf":
        run_ranks(save, 1, kind, str(source), str(out), process_group=False)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        stored = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
        assert stored.keys() == {spec.name for spec in open_checkpoint(source).specs}
