"""The command under torchrun: train, publish into a real subscriber, export; and what it says to wrong input."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import find_free_port
from tests.sync.parts import TensorSource, bits
from tests.trainer.runs import words_for

from weightcast.sync import WeightSubscriber
from weightcast.sync.quantize_rules import Fp8Scheme
from weightcast.sync.quantized_source import QuantizedSource
from weightcast.sync.report_log import read_reports

STEPS = 3


def start(num_ranks: int, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`torchrun -m weightcast.trainer.pretrain …`, with its output in `log`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(find_free_port())]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*torchrun, "-m", "weightcast.trainer.pretrain", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records of one rank."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def published(
    gemma3_bf16: Path, texts: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, dict[str, torch.Tensor]], Path]:
    """Every version as a subscriber got it, and the folder with the export and the events."""
    folder = tmp_path_factory.mktemp("publish")
    address = f"tcp://127.0.0.1:{find_free_port()}"
    words = [
        *words_for(gemma3_bf16, texts, folder / "cache"),
        "model.tensor_model_parallel_size=2",
        f"train.train_iters={STEPS}",
        f"publish.to={address}",
        "publish.wait_for=1",
        f"checkpoint.export_hf={folder / 'export'}",
        f"logger.events={folder / 'events.jsonl'}",
    ]
    trainer = start(2, words, folder / "log")
    versions: dict[int, dict[str, torch.Tensor]] = {}
    try:
        with WeightSubscriber(address, engine="test-engine") as subscriber:
            for _ in range(STEPS):
                update = subscriber.wait(timeout_s=120)
                versions[update.version.number] = {name: tensor.clone() for name, tensor in update}
                update.commit(pause_s=0.002)
            assert trainer.wait(timeout=60) == 0, (folder / "log").read_text()
    finally:
        trainer.kill()
        trainer.wait()
    return versions, folder


def test_every_step_is_a_version_and_each_differs(
    published: tuple[dict[int, dict[str, torch.Tensor]], Path], gemma3_bf16: Path
) -> None:
    versions, _ = published
    assert list(versions) == [1, 2, 3]
    start_weights = load_file(gemma3_bf16 / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    seen = [start_weights[embedding], *(weights[embedding] for weights in versions.values())]
    assert all(not torch.equal(old, new) for old, new in itertools.pairwise(seen))


def test_the_last_version_is_the_exported_folder_bit_for_bit(
    published: tuple[dict[int, dict[str, torch.Tensor]], Path],
) -> None:
    versions, folder = published
    exported = load_file(folder / "export" / "model.safetensors")
    assert exported.keys() == versions[STEPS].keys()
    for name, tensor in versions[STEPS].items():
        assert tensor.dtype == exported[name].dtype == torch.bfloat16, name
        assert torch.equal(tensor, exported[name]), name


def test_events_tell_of_every_version(published: tuple[dict[int, dict[str, torch.Tensor]], Path]) -> None:
    versions, folder = published
    num_bytes = sum(tensor.nbytes for tensor in versions[1].values())
    records = read_events(folder / "events.jsonl.0")
    rows = [record for record in records if record.get("event") == "version"]
    assert [row["version"] for row in rows] == [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["process"] == "trainer-0"
        assert row["num_bytes"] == num_bytes
        assert row["checksums_checked"] > 0
        assert row["pause_ms"] == pytest.approx(2.0)
        assert row["stall_s"] >= row["stage_s"] > 0
        assert [(engine["engine"], engine["state"]) for engine in row["engines"]] == [("test-engine", "serving")]
    phases = {(record["phase"], record["version"]) for record in records if "phase" in record}
    expected = {"step", "data", "forward_backward", "optimizer", "publish.pack", "publish.stage", "publish.commit"}
    assert phases == {(name, version) for name in expected for version in (1, 2, 3)} | {("export", 3)}


def test_other_ranks_tell_of_their_own_work(published: tuple[dict[int, dict[str, torch.Tensor]], Path]) -> None:
    records = read_events(published[1] / "events.jsonl.1")
    assert {record["process"] for record in records} == {"trainer-1"}
    names = [record["phase"] for record in records if record.get("version") == 2 and "phase" in record]
    assert names == ["data", "forward_backward", "optimizer", "step", "publish.pack"]


def follow_overlapped(model: Path, texts: list[Path], folder: Path, *more: str) -> list[dict[str, torch.Tensor]]:
    """The versions of a run that goes on while they are fetched, by an engine that takes its time."""
    address = f"tcp://127.0.0.1:{find_free_port()}"
    words = [
        *words_for(model, texts, folder / "cache"),
        *(f"train.train_iters={STEPS}", f"publish.to={address}", "publish.wait_for=1"),
        *("publish.overlap=true", "publish.delta=on", f"publish.report_log={folder / 'reports.jsonl'}"),
        *(f"checkpoint.export_hf={folder / 'export'}", f"logger.events={folder / 'events.jsonl'}"),
    ]
    trainer = start(1, [*words, *more], folder / "log")
    versions = []
    try:
        with WeightSubscriber(address, engine="test-engine", transport="zmq") as subscriber:
            for number in range(1, STEPS + 1):
                update = subscriber.wait(timeout_s=120)
                assert update.version.number == number
                versions.append({name: tensor.clone() for name, tensor in update})
                time.sleep(0.3)
                update.commit()
            assert trainer.wait(timeout=60) == 0, (folder / "log").read_text()
    finally:
        trainer.kill()
        trainer.wait()
    return versions


def test_training_goes_on_while_a_version_is_fetched(gemma3_bf16: Path, texts: list[Path], tmp_path: Path) -> None:
    versions = follow_overlapped(gemma3_bf16, texts, tmp_path)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in versions[-1].items())
    reports = list(read_reports(tmp_path / "reports.jsonl"))
    assert [report.version.number for report in reports] == [1, 2, 3]
    assert reports[0].density is None and all(0 < (report.density or 0) <= 1 for report in reports[1:])
    rows = [record for record in read_events(tmp_path / "events.jsonl.0") if record.get("event") == "version"]
    # The first version is begun at once; the others wait for the engine, which takes its time over the one before.
    assert rows[0]["stall_s"] < 0.3 <= rows[0]["stage_s"] + reports[0].phases_s["commit"]
    # Packed while the next step is computed, each version has the same bits.
    (tmp_path / "held").mkdir()
    held = follow_overlapped(gemma3_bf16, texts, tmp_path / "held", "publish.hold_next_step=true")
    for number, (version, wanted) in enumerate(zip(held, versions, strict=True), 1):
        assert version.keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in version.items()), number


@pytest.mark.parametrize("kind", ["fp8_block", "fp8_tensor"])
def test_fp8_from_two_ranks_is_the_exported_model_quantised(
    kind: str, gemma3_bf16: Path, texts: list[Path], tmp_path: Path
) -> None:
    address = f"tcp://127.0.0.1:{find_free_port()}"
    words = [
        *words_for(gemma3_bf16, texts, tmp_path / "cache"),
        "model.tensor_model_parallel_size=2",
        "train.train_iters=2",
        f"publish.to={address}",
        "publish.wait_for=1",
        f"publish.quantize={kind}",
        "publish.modules_to_not_convert=[layers.1.mlp]",
        f"publish.engine_config={tmp_path / 'engine.json'}",
        f"checkpoint.export_hf={tmp_path / 'export'}",
        f"logger.events={tmp_path / 'events.jsonl'}",
    ]
    trainer = start(2, words, tmp_path / "log")
    try:
        with WeightSubscriber(address, engine="test-engine") as subscriber:
            for _ in range(2):
                update = subscriber.wait(timeout_s=120)
                found = {name: tensor.clone() for name, tensor in update}
                update.commit()
            assert trainer.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    finally:
        trainer.kill()
        trainer.wait()
    exported = TensorSource(load_file(tmp_path / "export" / "model.safetensors"))
    whole = QuantizedSource(exported, Fp8Scheme(kind=kind, keep=("layers.1.mlp",)))
    whole.prepare()
    expected = {item.region.name: item.live() for item in whole.held()}
    assert found.keys() == expected.keys()
    assert "model.layers.0.mlp.down_proj.weight" in whole.plan.quantized
    assert "model.layers.1.mlp.down_proj.weight" not in whole.plan.quantized
    for name, tensor in expected.items():
        assert torch.equal(bits(found[name]), bits(tensor)), name
    told = json.loads((tmp_path / "engine.json").read_text())
    assert told == whole.engine_config()
    assert "model.layers.1.mlp.down_proj" in told["quantization_config"]["modules_to_not_convert"]
    assert "publish.quantize" in {record.get("phase") for record in read_events(tmp_path / "events.jsonl.1")}


@pytest.mark.parametrize(
    ("num_ranks", "words", "message"),
    [
        (1, ["train.train_iter=5"], "there is no setting 'train.train_iter'; did you mean 'train.train_iters'?"),
        (2, ["model.tensor_model_parallel_size=4"], "start with `torchrun --nproc-per-node 4`"),
        (2, ["dataset.seq_length=128"], "dataset.seq_length=128 needs at least 129"),
    ],
)
def test_wrong_input_is_one_clear_error(
    num_ranks: int, words: list[str], message: str, qwen3: Path, tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("w5 w6 w7")
    trainer = start(num_ranks, [*words_for(qwen3, [text], tmp_path / "cache"), *words], tmp_path / "log")
    assert trainer.wait(timeout=120) != 0
    log = (tmp_path / "log").read_text()
    errors = {line for line in log.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1, log
    assert message in errors.pop()
    assert "weightcast/trainer" not in log  # no traceback
