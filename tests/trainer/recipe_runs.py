"""What the tests of recipes share: their names, and what runs on each rank, proxies one after the other."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch.distributed as dist

from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.pretrain import pretrain
from weightcast.trainer.recipes.registry import KINDS, recipe_modules
from weightcast.trainer.run_words import load_run

NAMES = [f"{model}.{kind}" for model in recipe_modules() for kind in KINDS]
# Each family's peculiarities once: tied and grouped; latent attention, groups of experts, prediction; experts; vision.
QUICK = ["llama32_1b.lora", "deepseek_v3.pretrain", "qwen3_30b_a3b.dora", "qwen25_vl_3b.sft"]


def sparing(quick: Callable[[str], bool], names: Iterable[str] = NAMES) -> list[Any]:
    """The names as parameters of a test, which `make test` runs for the quick ones alone."""
    return [pytest.param(name, marks=() if quick(name) else pytest.mark.long) for name in names]


def train_proxies(names: list[str], words: list[str]) -> dict[str, Any]:
    """Losses and layout of each recipe's proxy on the ranks that are there, or the error that it ended with."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    results: dict[str, Any] = {}
    for name in names:
        start_s = time.monotonic()
        config = load_run([f"recipe={name}", "proxy=true", *words], world_size=world_size)
        try:
            reports = pretrain(config, forward_step)
            results[name] = {
                "losses": [report.loss for report in reports],
                "num_tokens": reports[-1].num_tokens,
                "seconds": time.monotonic() - start_s,
            }
        except Exception as error:  # the test shows all of them at once
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        destroy_model_parallel()
    return results
