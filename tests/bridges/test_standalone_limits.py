"""Conversion without a model at its limits: memory far below the model's size, a disk that fills up, kills anywhere."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.bridges.test_standalone import equal, to_hf, to_megatron
from tests.ranks import ROOT, run_ranks
from transformers import Qwen3Config

from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.hf_folder import plan_files, write_index
from weightcast.bridges.standalone_blocks import split_region
from weightcast.bridges.standalone_safetensors import SafetensorsWriter
from weightcast.sync.errors import StorageError

TIMEOUT_S = 300
MIB = 2**20


def start(code: str, **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def write_large_model(folder: Path) -> int:
    """A Qwen3 of 16-bit noise, block by block; gives its bytes, about 500 MB."""
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=8,
        hidden_size=1024,
        intermediate_size=3072,
        vocab_size=80_000,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    specs = AutoBridge.from_hf_config(config).hf_specs()
    files = plan_files(specs, 100 * MIB, 1)
    noise = torch.randn(9 * MIB, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number, file in enumerate(files):
        with SafetensorsWriter(folder / file.name, file.specs) as writer:
            for region in (region for spec in file.specs for region in split_region(spec)):
                writer.write(region, noise[number : number + region.numel].view(region.shape))
    write_index(files, folder)
    return sum(spec.num_bytes for spec in specs)


MEASURED = """
import resource
from pathlib import Path
from weightcast.bridges.auto import AutoBridge
from weightcast.bridges.standalone_export import export_checkpoint
from weightcast.bridges.standalone_import import import_checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

source, folder = Path({source!r}), Path({folder!r})
bridge = AutoBridge.from_hf_pretrained(source)
before = peak()
{call}
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_stays_far_below_the_models_size(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    num_bytes = write_large_model(source)
    assert num_bytes > 480 * MIB
    calls = {
        "megatron": f"import_checkpoint(bridge, folder, show_progress=False, file_bytes={32 * MIB})",
        "hf": f"export_checkpoint(bridge, Path({str(tmp_path / 'megatron')!r}), folder, show_progress=False)",
    }
    for name, call in calls.items():
        done = start(MEASURED.format(source=str(source), folder=str(tmp_path / name), call=call))
        said, _ = done.communicate(timeout=TIMEOUT_S)
        assert done.returncode == 0, said
        assert int(said.splitlines()[-1]) < num_bytes / 2, (name, said)
    assert equal(source, tmp_path / "hf")


def convert_on_a_full_disk(way: str, source: str, checkpoint: str, out: str, limit: int) -> str:
    """A file that grows past `limit` bytes is refused, as on a full disk; gives what the error says."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        if way == "import":
            to_megatron(Path(source), Path(out))
        else:
            to_hf(Path(source), Path(checkpoint), Path(out))
    except StorageError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    return "no error"


@pytest.mark.parametrize(("way", "limit"), [("import", 20_000), ("import", 3_000), ("export", 20_000), ("export", 500)])
def test_a_full_disk_is_named_and_leaves_nothing_that_looks_whole(
    way: str, limit: int, tiny_models: Path, tmp_path: Path
) -> None:
    source, out, checkpoint = tiny_models / "llama3.1", tmp_path / "out", tmp_path / "checkpoint"
    if way == "export":
        to_megatron(source, checkpoint)
    paths = (str(source), str(checkpoint), str(out))
    (said,) = run_ranks(convert_on_a_full_disk, 1, way, *paths, limit, process_group=False)
    assert "could not be written" in said and "make room" in said
    assert not out.exists()
    result = to_megatron(source, out) if way == "import" else to_hf(source, checkpoint, out)
    assert equal(source, result)


KILLED_ANYWHERE = """
from pathlib import Path
import time
import weightcast.bridges.standalone_import as standalone
from tests.bridges.test_standalone import to_megatron

write = standalone._Import.write_file
def write_slowly(job, number):
    record = write(job, number)
    print("wrote", job.file_name(number), flush=True)
    time.sleep(0.2)  # the file is there, its line in the journal is not
    return record
standalone._Import.write_file = write_slowly
to_megatron(Path({source!r}), Path({out!r}))
"""


def test_what_was_done_before_a_kill_is_not_written_again(tiny_models: Path, tmp_path: Path) -> None:
    source, out = tiny_models / "llama3.1", tmp_path / "out"
    running = start(KILLED_ANYWHERE.format(source=str(source), out=str(out)))
    assert running.stdout is not None
    wrote = (line.split()[1] for line in running.stdout if line.startswith("wrote "))  # other lines are Megatron's
    written = [next(wrote), next(wrote)]
    time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=TIMEOUT_S)
    partial = tmp_path / ".out.partial"
    before = (partial / written[0]).stat().st_mtime_ns
    assert not out.exists()
    to_megatron(source, out)
    assert (out / written[0]).stat().st_mtime_ns == before
    assert equal(source, out)
