"""Traces of steps by torch's profiler, on the ranks that are asked for."""

import gzip
import json
from pathlib import Path

import pytest
from tests.ranks import run_ranks
from tests.trainer.recipe_runs import train_proxies

from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks import check_config
from weightcast.trainer.run_words import load_run

RECIPE = "llama32_1b.pretrain"


def test_the_steps_are_profiled_on_their_ranks(tmp_path: Path) -> None:
    """Step 2 of three, on rank 1 of two."""
    words = ["train.train_iters=3", "profiling.use_pytorch_profiler=true", f"profiling.folder={tmp_path}"]
    words += [f"profiling.{word}" for word in ("profile_step_start=2", "profile_step_end=2", "profile_ranks=[1]")]
    found = run_ranks(train_proxies, 2, [RECIPE], words, timeout_s=240)[0][RECIPE]
    assert len(found["losses"]) == 3, found
    assert [path.name for path in tmp_path.iterdir()] == ["rank1-steps2-2.json.gz"]
    trace = json.loads(gzip.decompress((tmp_path / "rank1-steps2-2.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    # One lookup of embeddings a micro-batch, four a step.
    assert names.count("aten::embedding") == 4
    assert any("Backward" in name for name in names)


def test_steps_in_the_wrong_order_are_refused() -> None:
    words = ["profiling.use_pytorch_profiler=true", "profiling.profile_step_start=13"]
    with pytest.raises(ConfigError, match=r"profile_step_start=13 must be 1 or more"):
        check_config(load_run([f"recipe={RECIPE}", "proxy=true", *words]), world_size=1)
