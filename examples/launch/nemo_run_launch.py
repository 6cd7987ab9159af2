"""Training as a NeMo-Run experiment, on this machine or on a Slurm cluster: `pip install nemo_run`.

    python examples/launch/nemo_run_launch.py --nproc 8 recipe=llama32_1b.pretrain
    python examples/launch/nemo_run_launch.py --slurm-account mine --slurm-partition gpu --nodes 4 --nproc 8 \
        recipe=llama3_70b.pretrain checkpoint.save=/shared/run

Words are the trainer's; a job of Slurm runs in a folder of its own, so its paths are absolute ones. `--dryrun` shows
what would be started, the script for sbatch included. For Slurm start it on a node of the cluster that may submit; from
elsewhere `run.SSHTunnel` takes the place of `run.LocalTunnel`. NeMo-Run 0.11 needs `leptonai<0.47` (it asks for no
upper limit, and 0.47 lacks a module that it imports).
"""

import argparse
import os
from pathlib import Path

import nemo_run as run

from weightcast.trainer.run_words import load_run

# A checkpoint is written when Slurm says, 300 s before the end, that time is running out: see slurm.sbatch.
SIGNAL = "USR1@300"
TORCHRUN_SIGNALS = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "PET_SHUTDOWN_TIMEOUT": "280",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="recipe=NAME | section.key=value")
    parser.add_argument("--name", default="weightcast", help="of the experiment")
    parser.add_argument("--nproc", type=int, default=1, help="processes on each node: one a GPU")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--slurm-account", help="run under Slurm, on this account")
    parser.add_argument("--slurm-partition")
    parser.add_argument("--time", default="04:00:00", help="most that a job may take, for Slurm")
    parser.add_argument("--job-dir", type=Path, help="shared folder for Slurm's scripts and logs")
    parser.add_argument("--container-image", help="for Slurm with Pyxis")
    parser.add_argument("--dryrun", action="store_true", help="show what would run")
    options = parser.parse_intermixed_args()
    if options.slurm_account is None and options.nodes > 1:
        parser.error(f"--nodes {options.nodes}: this machine is one node; name --slurm-account for more")
    return options


def make_executor(options: argparse.Namespace) -> run.Executor:
    """Where it runs: torchrun on this machine, or a torchrun on each node of a job of Slurm."""
    if options.slurm_account is None:
        return run.LocalExecutor(ntasks_per_node=options.nproc, launcher=run.Torchrun())
    return run.SlurmExecutor(
        account=options.slurm_account,
        partition=options.slurm_partition,
        nodes=options.nodes,
        ntasks_per_node=1,
        gpus_per_node=options.nproc,
        torchrun_nproc_per_node=options.nproc,
        time=options.time,
        signal=SIGNAL,
        env_vars=TORCHRUN_SIGNALS,
        container_image=options.container_image,
        tunnel=run.LocalTunnel(job_dir=str(options.job_dir or os.getcwd())),
        packager=run.Packager(),  # weightcast is installed there, so nothing is packed
        launcher=run.Torchrun(),
    )


def main() -> None:
    options = parse()
    # A mistake in the words is told before it waits in a queue.
    load_run(options.words, config_file=None, world_size=options.nodes * options.nproc)
    task = run.Script("weightcast.trainer.pretrain", args=options.words, entrypoint="python", m=True)
    with run.Experiment(options.name, executor=make_executor(options)) as experiment:
        experiment.add(task, name="train", tail_logs=options.slurm_account is None)
        if options.dryrun:
            experiment.dryrun(delete_exp_dir=False)
        else:
            experiment.run(detach=options.slurm_account is not None)


if __name__ == "__main__":
    main()
