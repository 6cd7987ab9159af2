"""`weightcast versions` and `weightcast materialize`, as a user calls them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.sync.disk_parts import QUICK, clone, folder_of, step, take
from tests.sync.parts import TensorSource, assert_same_bits, make_model

from weightcast.sync import DiskPublisher, DiskSubscriber
from weightcast.sync.disk.listing import list_versions
from weightcast.sync.errors import ConfigError


def weightcast(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "weightcast", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        list_versions(tmp_path / "nowhere")


def test_versions_lists_checks_and_names_what_is_damaged(tmp_path: Path) -> None:
    tensors = make_model(1, 200)
    store, third = tmp_path / "versions", tensors
    with (
        DiskPublisher(TensorSource(tensors), store, anchor_every=3) as publisher,
        DiskSubscriber(store, engine="engine-0", report=True, limits=QUICK) as subscriber,
    ):
        for number in range(1, 5):
            publisher.publish(number)
            take(subscriber, tensors, number)
            third = clone(tensors) if number <= 3 else third
            step(tensors, number)
    done = weightcast("versions", "versions", "--json", "list.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "versions: 4 versions" in done.stdout
        and "anchor + delta" in done.stdout
        and "anchor 1 + 2 deltas" in done.stdout
    )
    assert "engine engine-0 serves version 4" in done.stdout
    listed = json.loads((tmp_path / "list.json").read_text())
    assert [row["is_anchor"] for row in listed["versions"]] == [True, False, False, True] and listed["faults"] == []
    done = weightcast("versions", "versions", "--check", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("whole") == 4, done.stdout + done.stderr

    done = weightcast("materialize", "versions", "hf", "--version", 3, cwd=tmp_path)
    assert done.returncode == 0 and "from an anchor and 2 deltas" in done.stdout, done.stderr
    loaded = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same_bits({name: loaded[name] for name in third}, third)

    file = folder_of(store, 2) / "delta-r00000-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    done = weightcast("versions", "versions", "--check", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.count("whole") == 2, done.stdout
    said = " ".join(done.stdout.split())
    assert "delta-r00000-00000.safetensors of version 2" in said and "cut short" in said
    done = weightcast("materialize", "versions", "two", "--version", 2, cwd=tmp_path)
    assert done.returncode == 2 and "cut short" in done.stderr and not (tmp_path / "two").exists()
    index = folder_of(store, 4) / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("embed.weight", "embed.Weight"))
    (fault,) = [fault for fault in list_versions(store, check=True).faults if "version 4" in fault]
    assert "model.safetensors.index.json" in fault and "altered" in fault
    done = weightcast("versions", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "there is no folder nowhere" in done.stderr
    done = weightcast("versions", "versions", "--key-file", "none", cwd=tmp_path)
    assert done.returncode == 2 and "key file none cannot be read" in done.stderr
