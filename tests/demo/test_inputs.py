"""Wrong input to the demo: one clear line, exit code 2, and nothing started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from weightcast.adapters.demo.inputs import DemoRequest, check_layout, check_request, check_text, find_model
from weightcast.adapters.demo.setup import MARKER, default_ranks, empty_folder, prepare
from weightcast.sync.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a checkpoint with four heads."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 1}))
    (folder / "model.safetensors").touch()
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "sglang"], "unknown engine 'sglang'; choose one of transformers, vllm"),
        (["--model", "/no/such/folder"], "model folder /no/such/folder does not exist"),
        (["--data", "/no/such/file"], "no file /no/such/file"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--tp", "3"], "--tp 3 does not divide the model's num_attention_heads, 4"),
        (["--lr", "-1"], "--lr must be above 0"),
    ],
)
def test_the_command_says_one_line_and_exits_with_2(arguments: list[str], words: str, model: Path) -> None:
    given = arguments if "--model" in arguments else ["--model", str(model), *arguments]
    command = [sys.executable, "-m", "weightcast", "demo", "--out", str(model.parent / "out"), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("weightcast: ") and words in line
    assert not (model.parent / "out" / "logs").exists()


def test_empty_and_binary_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd")
    with pytest.raises(ConfigError, match="is empty"):
        check_text(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="is binary"):
        check_text(tmp_path / "binary.txt")


@pytest.mark.parametrize(
    ("missing", "words"), [("config.json", "no config.json"), ("model.safetensors", "safetensors")]
)
def test_a_folder_that_is_no_checkpoint_is_refused(model: Path, missing: str, words: str) -> None:
    (model / missing).unlink()
    with pytest.raises(ConfigError, match=words):
        find_model(str(model))


@pytest.mark.parametrize(
    ("config", "ranks", "words"),
    [
        ({"num_attention_heads": 6}, 4, "num_attention_heads, 6"),
        ({"num_attention_heads": 6, "intermediate_size": 9}, 2, "intermediate_size, 9"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 4, "num_key_value_heads, 3"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused(config: dict[str, int], ranks: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_layout(config, ranks)


def test_fewer_key_value_heads_than_ranks_are_fine() -> None:
    check_layout({"num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 8}, 4)


def test_a_good_request_passes(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("words")
    check_request(DemoRequest(data=tmp_path / "text.txt"))


def test_only_a_demos_folder_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ConfigError, match="no demo wrote"):
        empty_folder(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"
    (tmp_path / MARKER).touch()
    empty_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MARKER, "events"]


def test_a_model_inside_the_output_folder_is_not_lost(model: Path) -> None:
    (model.parent / MARKER).touch()
    with pytest.raises(ConfigError, match="emptied first"):
        prepare(DemoRequest(model=str(model), out=model.parent))
    assert (model / "config.json").is_file()


@pytest.mark.parametrize(("num_gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_ranks_follow_the_gpus(num_gpus: int, ranks: int) -> None:
    assert default_ranks(num_gpus) == ranks
