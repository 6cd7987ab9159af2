"""The benchmark program: its page is of its results, its table is the project's, and what goes wrong is written down.

Figures are not tested here. What is: that a quick run works from end to end, and that a case can fail.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench
import network
import pytest
import results
import train_step
from cases import CPU_CASES, TABLES
from machine import find_lack
from page import render
from peers import Link
from records import Case, CaseError, Reading, Settings, at_least, at_most, make_empty_record, make_record

HERE = Path(__file__).parent
QUICK = Settings(rounds=1, quick=True)
# The names that the project has set; others may be there besides.
NAMES = [
    "shm_vs_memcpy",
    "shm_4_workers",
    "zmq_vs_sockets",
    "collective_buckets",
    "two_sources",
    "vllm_pause_share",
    "delta_bytes_008",
    "delta_bytes_023",
    "delta_bytes_066",
    "delta_bytes_008_z",
    "delta_bytes_023_z",
    "delta_bytes_066_z",
    "delta_encode_gbps",
    "delta_apply_gbps",
    "delta_encode_gbps_numpy",
    "delta_apply_gbps_numpy",
    "delta_1gbit",
    "checksum_share",
    "memory_source",
    "memory_receiver",
    "vs_memcpy",
    "vs_sockets",
    "vs_gloo",
    "vs_zmq_pickle",
    "vs_rpc",
    "vs_ray",
    "vs_mooncake",
    "vs_safetensors",
    "vs_sparse_int32",
    "vs_xor_zstd",
    "vs_checkpoint_engine",
    "gpu_ipc_vs_copy",
    "gpu_delta_encode_gbps",
]
BASELINES = {
    "memcpy": {},
    "sockets": {},
    "sockets, verified": {"verify": True},
    "gloo": {},
    "zmq_pickle": {},
    "rpc": {},
    "safetensors_files": {},
    "sparse_int32": {},
    "xor_zstd": {},
    "ray_store": {},
    "mooncake_tcp": {},
}
LYING_MOVER = """
from baselines.sockets import SocketReceiver, open_sender

class Receiver(SocketReceiver):
    def finish(self):
        self.tensors["model.norm.weight"].view(-1)[7] += 1

def open_receiver(*arguments):
    return Receiver(*arguments)
"""


def run_bench(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_the_page_is_what_the_program_writes_for_the_results() -> None:
    assert bench.check_page(HERE) == []


def test_the_table_has_every_case() -> None:
    names = [case.name for table in TABLES.values() for case in table]
    assert len(set(names)) == len(names)
    assert set(NAMES) <= set(names)
    assert all(case.target for table in TABLES.values() for case in table if case.name in NAMES)


def test_a_quick_run_writes_results_page_and_plots_and_keeps_the_records_of_others(tmp_path: Path) -> None:
    first = run_bench("--quick", "--rounds", "2", "--cases", "zmq_vs_sockets,delta_bytes_008", "--out", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    content = json.loads((tmp_path / "results" / "cpu.json").read_text())
    assert {"cpu", "cores", "memory_gb"} <= content["machine"].keys() and "torch" in content["versions"]
    moved, coded = content["records"]
    assert (moved["case"], moved["status"], moved["unit"], moved["rounds"]) == ("zmq_vs_sockets", "ok", "GB/s", 2)
    assert moved["ratio"] == pytest.approx(moved["value"] / moved["baseline_value"], rel=1e-4)
    assert coded["ratio"] == pytest.approx(coded["baseline_value"] / coded["value"], rel=1e-4)
    assert coded["ratio"] > 100 and coded["details"]["sparse_int32_ratio"] < 50
    assert bench.check_page(tmp_path) == []
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "cpu_speeds.svg", "cpu_reached.svg", "cpu_sizes.svg",
    }  # fmt: skip

    second = run_bench("--quick", "--rounds", "1", "--cases", "delta_bytes_023", "--out", str(tmp_path))
    assert second.returncode == 0, second.stdout + second.stderr
    kept = json.loads((tmp_path / "results" / "cpu.json").read_text())["records"]
    assert kept[:2] == [moved, coded] and kept[2]["case"] == "delta_bytes_023"

    (tmp_path / "README.md").write_text("by hand")
    changed = run_bench("--check", "--out", str(tmp_path))
    assert changed.returncode == 1 and "is not of the results" in changed.stdout


def test_few_rounds_and_unknown_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--rounds", "3"])
    assert "at least 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.parse(["--cases", "shm_vs_memcopy"])
    assert "known are shm_vs_memcpy" in capsys.readouterr().err
    assert [case.name for case in bench.parse(["--cases", "two_sources,vs_ray"]).chosen] == ["two_sources", "vs_ray"]


def failing(error: Exception) -> Case:
    def measure(settings: Settings) -> Reading:
        raise error

    return replace(CPU_CASES[0], measure=measure, needs=())


@pytest.mark.parametrize("error", [CaseError("bits are wrong"), ValueError("bits are wrong")], ids=repr)
def test_a_case_that_fails_is_recorded_and_the_program_fails_at_the_end(error: Exception, tmp_path: Path) -> None:
    good = replace(CPU_CASES[1], measure=lambda settings: Reading([1.0], [1.0], "s"), needs=())
    chosen = [failing(error), good]
    options = argparse.Namespace(gpu=False, out=tmp_path, rounds=1, quick=True, chosen=chosen, commit="c0ffee")
    assert bench.run(options) == 1
    content = json.loads((tmp_path / "results" / "cpu.json").read_text())
    failed, measured = content["records"]
    assert failed["commit"] == measured["commit"] == "c0ffee"
    assert failed["status"] == "failed" and "bits are wrong" in failed["note"] and failed["reached"] is False
    assert measured["status"] == "ok" and measured["reached"] is True
    assert "failed: " in (tmp_path / "README.md").read_text()


def test_a_case_that_this_machine_lacks_something_for_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    record = bench.run_case(replace(failing(ValueError()), needs=("root",)), QUICK, "c0ffee")
    assert (record.status, record.reached) == ("not run", None) and record.note.startswith("needs root")


def test_contestants_that_have_not_done_the_same_are_found() -> None:
    assert train_step.compare_losses([3.0, 2.0], [3.0, 2.01], 0.02) == pytest.approx(0.01)
    for theirs in ([3.0, 2.03], [3.0], [3.0, float("nan")]):
        with pytest.raises(CaseError, match="the two have not"):
            train_step.compare_losses([3.0, 2.0], theirs, 0.02)


def test_targets_and_ratios() -> None:
    assert at_least(2).is_reached(2) and not at_least(2).is_reached(1.9)
    assert at_most(2).is_reached(2) and not at_most(2).is_reached(2.1)
    case = replace(CPU_CASES[0], target=at_most(2), ratio="baseline / value")
    record = make_record(case, Reading([1.0, 4.0, 2.0], [9.0, 1.0, 6.0], "s"), "2026-01-01 00:00", "c0ffee")
    assert (record.value, record.baseline_value, record.ratio, record.reached) == (2.0, 6.0, 3.0, False)


def test_a_renewed_file_keeps_what_was_measured_on_this_machine_only() -> None:
    first, second = CPU_CASES[:2]
    machine: dict[str, str | int | float] = {"cpu": "a", "cores": 2, "memory_gb": 1.0, "system": "Linux"}
    measured = make_record(second, Reading([1.0], [1.0], "s"), "2026-01-01 00:00", "old")
    former = results.Results(machine, {}, [measured])
    skipped = make_empty_record(second, "not run", "needs root", "2026-02-02 00:00", "new")
    failed = make_empty_record(second, "failed", "broke", "2026-02-02 00:00", "new")
    added = make_record(first, Reading([1.0], [1.0], "s"), "2026-02-02 00:00", "new")
    same = results.start_from(former, machine, {})
    assert results.renew(same, skipped, CPU_CASES).records == [measured]
    assert results.renew(same, failed, CPU_CASES).records == [failed]
    both = results.renew(same, added, CPU_CASES)
    assert both.records == [added, measured], "in the table's order"
    assert "2026-01-01 at old" in render({"cpu": both}) and "2026-02-02 at new" in render({"cpu": both})
    assert results.start_from(former, machine | {"cpu": "b"}, {}).records == []


def test_bits_that_are_not_the_sources_end_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lying_mover.py").write_text(LYING_MOVER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with Link("lying_mover", "tiny") as link, pytest.raises(CaseError, match="not the source's"):
        link.move()


def test_a_peer_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaseError, match="No module named 'no_such_mover'"), Link("no_such_mover", "tiny"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_moves_the_bits(name: str) -> None:
    module = name.partition(",")[0]
    if lack := find_lack({"ray_store": ("ray",), "mooncake_tcp": ("mooncake",)}.get(module, ())):
        pytest.skip(lack)
    with Link(f"baselines.{module}", "tiny", {"step": "sparse", "density": 0.01}, BASELINES[name]) as link:
        for _ in range(3):
            assert link.move().seconds > 0  # and `move` compares the bits


def test_links_are_limited_and_removed_also_after_an_error() -> None:
    if find_lack(("root", "links")):
        assert find_lack(("root", "links")).startswith("needs")
        return
    before = network.list_namespaces()
    with pytest.raises(ZeroDivisionError), network.star(["1gbit", "200mbit"]) as net:
        made = set(network.list_namespaces()) - set(before)
        assert made == {net.hub, *(spoke.namespace for spoke in net.spokes)}
        limits = subprocess.run(
            ["tc", "-n", net.spokes[1].namespace, "qdisc"], capture_output=True, text=True, check=True
        ).stdout
        assert "tbf" in limits and "rate 200Mbit" in limits
        reached = ["ip", "netns", "exec", net.spokes[0].namespace, "ip", "route", "get", net.spokes[1].address]
        assert "via 10.77.0.2" in subprocess.run(reached, capture_output=True, text=True, check=True).stdout
        raise ZeroDivisionError
    assert network.list_namespaces() == before

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    subprocess.run(["ip", "netns", "add", f"wc{dead.pid}-hub"], check=True)
    with network.star(["1gbit"]):
        assert f"wc{dead.pid}-hub" not in network.list_namespaces(), "left by a process that was killed"


def test_gpu_cases_import_and_plan_without_a_gpu() -> None:
    importlib.import_module("baselines.checkpoint_engine_ipc")
    planned = run_bench("--gpu", "--plan")
    assert planned.returncode == 0, planned.stderr
    assert all(case.name in planned.stdout for case in TABLES["gpu"])
