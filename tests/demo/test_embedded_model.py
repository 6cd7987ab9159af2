"""The embedded model: the same bits every time, an ordinary Hugging Face folder, a tokenizer that loses nothing."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from weightcast.adapters.demo.embedded_model import ARCHITECTURE, make_embedded_model, standard_library_files
from weightcast.adapters.demo.inputs import check_layout, find_model, read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_embedded_model(tmp_path_factory.mktemp("embedded"))


def test_two_runs_make_the_same_bits(folder: Path, tmp_path: Path) -> None:
    again = make_embedded_model(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert "model.safetensors" in names and "tokenizer.json" in names
    assert names == sorted(path.name for path in again.iterdir())
    assert [name for name in names if (folder / name).read_bytes() != (again / name).read_bytes()] == []


def test_it_is_a_small_bf16_qwen3_that_two_ranks_can_share(folder: Path) -> None:
    config = read_config(find_model(str(folder)))
    check_layout(config, tensor_parallel=2)
    assert (config["architectures"], config["dtype"]) == (["Qwen3ForCausalLM"], "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000


def test_its_tokenizer_gives_every_text_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def main(argv=None):\n\treturn 'ünïcode ☃ \x00'"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < ARCHITECTURE["vocab_size"]
    assert len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) == ARCHITECTURE["vocab_size"]


def test_the_standard_library_is_taken_in_order_up_to_the_limit() -> None:
    files = standard_library_files(max_bytes=100_000)
    assert files == sorted(files) and 0 < sum(path.stat().st_size for path in files) <= 100_000
