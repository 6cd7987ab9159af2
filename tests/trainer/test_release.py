"""What a training leaves behind in its process: nothing."""

import gc
import os

from tests.ranks import run_ranks

from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.pretrain import pretrain
from weightcast.trainer.run_words import load_run

# Gathering put off, which hangs hooks of DDP on every module; experts; two kinds of layer; latent attention, experts
# and recomputation by parts; and the first once more.
MODELS = ("llama32_1b", "qwen3_30b_a3b", "gemma3_270m", "deepseek_v3", "llama32_1b")


def train_in_turn() -> list[tuple[int, int]]:
    """Threads of the process, and models that are alive, after each training and the closing of its groups."""
    found = []
    for name in MODELS:
        pretrain(load_run([f"recipe={name}.pretrain", "proxy=true", "train.train_iters=2"], world_size=2), forward_step)
        destroy_model_parallel()
        gc.collect()
        models = sum(type(item).__name__ in ("GPTModel", "DistributedDataParallel") for item in gc.get_objects())
        found.append((len(os.listdir("/proc/self/task")), models))
    return found


def test_a_training_leaves_no_model_and_no_threads_behind() -> None:
    for found in run_ranks(train_in_turn, 2):
        assert [models for _, models in found] == [0] * len(MODELS), found
        # Megatron's two trackers of auxiliary losses know the last group that they saw: three threads of gloo each.
        assert max(threads for threads, _ in found) - found[0][0] <= 6, found
