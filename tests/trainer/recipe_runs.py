"""What the tests of recipes run on each rank: proxies of recipes, one after the other in one process group."""

import time
from typing import Any

import torch.distributed as dist

from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.pretrain import pretrain
from weightcast.trainer.run_words import load_run


def train_proxies(names: list[str], words: list[str]) -> dict[str, Any]:
    """Losses and layout of each recipe's proxy on the ranks that are there, or the error that it ended with."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    results: dict[str, Any] = {}
    for name in names:
        start_s = time.monotonic()
        config = load_run([f"recipe={name}", "proxy=true", *words], world_size=world_size)
        try:
            losses = [report.loss for report in pretrain(config, forward_step)]
            results[name] = {"losses": losses, "seconds": time.monotonic() - start_s}
        except Exception as error:  # the test shows all of them at once
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        destroy_model_parallel()
    return results
