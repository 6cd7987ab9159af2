"""How a run on one machine is started: torchrun's command for it.

command = torchrun_command(["recipe=llama32_1b.pretrain"], num_ranks=num_local_ranks())
"""

import sys
from collections.abc import Sequence
from pathlib import Path


def num_local_ranks() -> int:
    """One a GPU of this machine, and one where there is none."""
    import torch

    return max(torch.cuda.device_count(), 1)


def torchrun_command(words: Sequence[str], *, num_ranks: int, config_file: Path | None = None) -> list[str]:
    """The arguments of torchrun for the trainer with these words, on a free port of this machine."""
    config = [] if config_file is None else ["--config", str(config_file)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*launcher, "-m", "weightcast.trainer.pretrain", *config, *words]
