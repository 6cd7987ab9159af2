"""A trainer publishes into a store of versions: from the command under torchrun, and in the loop's own words."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.runs import words_for
from tests.trainer.test_publish import STEPS, read_events, start

import weightcast.bridges  # noqa: F401  (first: it quietens Megatron's import-time notices)
from weightcast.sync import FleetPolicy, ModuleSource, follow
from weightcast.sync.checkpoint_files import open_checkpoint
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.errors import DeadlineExceeded, WeightcastError
from weightcast.sync.report_log import read_reports
from weightcast.trainer.checks.publish import check_publish
from weightcast.trainer.config import ConfigContainer, PublishConfig, parse_policy
from weightcast.trainer.events import EventLog
from weightcast.trainer.figures import StepReport
from weightcast.trainer.publishing import StepPublisher

WAIT_S = 30.0


def make_step(number: int) -> StepReport:
    return StepReport(step=number, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.1)


def test_two_ranks_train_into_a_store_and_an_engine_agrees(
    gemma3_bf16: Path, texts: list[Path], tmp_path: Path
) -> None:
    store, key_file = tmp_path / "versions", tmp_path / "key"
    key_file.write_bytes(os.urandom(32))
    words = [
        *words_for(gemma3_bf16, texts, tmp_path / "cache"),
        "model.tensor_model_parallel_size=2",
        f"train.train_iters={STEPS}",
        f"publish.to={store}",
        f"publish.key_file={key_file}",
        *("publish.policy=all(1)", "publish.wait_for=1", "publish.anchor_every=2", "publish.keep=2"),
        f"publish.report_log={tmp_path / 'reports.jsonl'}",
        f"checkpoint.export_hf={tmp_path / 'export'}",
        f"logger.events={tmp_path / 'events.jsonl'}",
    ]
    trainer = start(2, words, tmp_path / "log")
    key = key_file.read_bytes()
    try:
        with follow(store, engine="test-engine", key=key) as subscriber:
            for number in range(1, STEPS + 1):
                update = subscriber.wait(timeout_s=120)
                assert update.version.number == number
                last = {name: tensor.clone() for name, tensor in update}
                update.commit(pause_s=0.002)
            assert trainer.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    finally:
        trainer.kill()
        trainer.wait()
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert last.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in last.items())
    listing = list_versions(store, check=True, key=key)
    anchors = {row.version.number: row.is_anchor for row in listing.versions}
    assert listing.faults == () and anchors == {1: True, 2: False, 3: True}  # 2 is kept, and needs 1
    last_folder = store / listing.versions[-1].folder
    assert (last_folder / "config.json").read_bytes() == (gemma3_bf16 / "config.json").read_bytes()
    rows = [record for record in read_events(tmp_path / "events.jsonl.0") if record.get("event") == "version"]
    for row, report in zip(rows, read_reports(tmp_path / "reports.jsonl"), strict=True):
        assert [(engine["engine"], engine["state"]) for engine in row["engines"]] == [("test-engine", "serving")]
        assert row["num_bytes"] > 0 and row["pause_ms"] == pytest.approx(2.0)
        assert row["stall_s"] >= row["stage_s"] > 0
        assert report.serving == ("test-engine",) and [source.rank for source in report.sources] == [0, 1]
        assert report.stall_s < row["stall_s"]
    phases = {record["phase"] for record in read_events(tmp_path / "events.jsonl.0") if "phase" in record}
    assert phases >= {"publish.pack", "publish.write", "publish.meet", "publish.stage", "publish.commit"}
    records = [record for record in read_events(tmp_path / "events.jsonl.1") if record.get("version") == 2]
    others = [record["phase"] for record in records if "phase" in record]
    assert others == ["data", "forward_backward", "optimizer", "step", "publish.pack"]


def test_a_store_without_a_policy_is_written_and_nobody_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "weightcast.trainer")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "linear"}')
    publish = PublishConfig(to=f"file://{tmp_path}/versions", timeout_s=WAIT_S, delta="zstd", anchor_every=2, keep=1)
    module = torch.nn.Linear(64, 64)
    with (
        EventLog(str(tmp_path / "events"), rank=0) as events,
        StepPublisher(ModuleSource(module), publish, events, config_from=tmp_path / "hf") as publisher,
    ):
        for number in (1, 2, 3):
            publisher.after_step(make_step(number))
            with torch.no_grad():
                module.weight[number] += 1
    listing = list_versions(tmp_path / "versions", check=True)
    assert listing.faults == () and [row.version.number for row in listing.versions] == [3]
    assert json.loads((tmp_path / "versions" / listing.versions[0].folder / "config.json").read_text())
    assert open_checkpoint(tmp_path / "versions" / listing.versions[0].folder).specs
    lines = [line for line in caplog.messages if line.startswith("version ")]
    kinds = [line.split(" of ")[0] for line in lines[::2]]
    assert kinds == ["version 1: an anchor", "version 2: a delta", "version 3: an anchor"]
    assert all("0 B to 0 engines" in line and "step held up for" in line for line in lines[1::2])
    rows = [record for record in read_events(tmp_path / "events.0") if record.get("event") == "version"]
    assert [(row["version"], row["engines"]) for row in rows] == [(1, []), (2, []), (3, [])]


def test_a_policy_holds_at_an_address_too(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/weights"
    publish = PublishConfig(to=address, policy="all(1)", timeout_s=0.3)
    with (
        StepPublisher(ModuleSource(torch.nn.Linear(4, 4)), publish, EventLog(None, rank=0)) as publisher,
        pytest.raises(DeadlineExceeded, match=r"under the policy all\(1\)"),
    ):
        publisher.after_step(make_step(1))


@pytest.mark.parametrize(
    ("text", "policy"),
    [("all", FleetPolicy.all()), ("all(2)", FleetPolicy.all(2)), ("quorum(3)", FleetPolicy.quorum(3))],
)
def test_policies_are_words(text: str, policy: FleetPolicy) -> None:
    assert parse_policy(text) == policy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "/v", "overlap": True}, "publish.overlap does not apply to /v"),
        ({"to": "/v", "wait_for": 1}, "who follows /v is not known without a policy"),
        ({"to": "/v", "policy": "most"}, "publish.policy='most' is not known; use all"),
        ({"to": "/v", "policy": "quorum"}, "publish.policy='quorum' is not known"),
        ({"to": "/v", "policy": "quorum(0)"}, "no such fleet policy"),
        ({"to": "/v", "keep": 0}, "publish.keep is 0; it must be more than 0"),
        ({"to": "tcp://127.0.0.1:5600", "keep": 3}, "publish.keep is for a store of versions"),
        ({"anchor_every": 3}, "publish.anchor_every is for a store of versions"),
        ({"policy": "all"}, "publish.policy is set and publish.to is not"),
        ({"to": "127.0.0.1:5600"}, "did you mean 'tcp://127.0.0.1:5600'"),
    ],
)
def test_what_does_not_apply_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    config = ConfigContainer(publish=PublishConfig(**settings))  # type: ignore[arg-type]
    with pytest.raises(WeightcastError, match=message):
        check_publish(config, world_size=1)
