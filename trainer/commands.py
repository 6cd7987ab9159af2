"""The trainer's sub-commands of `weightcast`; each imports what it needs when it runs.

weightcast recipes llama
weightcast train recipe=llama32_1b.pretrain proxy=true train.train_iters=3
"""

from pathlib import Path
from typing import Annotated

import typer

from weightcast.trainer.data.preprocess_command import preprocess


def add_commands(app: typer.Typer) -> None:
    """Make them known to the command line."""
    for command in (recipes, train, preprocess, plots):
        app.command()(command)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="A recipe, to print all of it as YAML; or a part of names, to list those."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Plan for this many GPUs; the fewest if not given.", min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plans to this file.")] = None,
) -> None:
    """List the recipes with their parameters, layouts and memory a GPU, planned on no memory; or print one."""
    import json

    from rich.console import Console
    from rich.progress import track

    from weightcast.trainer.recipes.listing import as_json, describe, list_recipes, matching, render

    found = matching(name)
    if name is not None and found == [name]:
        typer.echo(describe(name, num_ranks=gpus), nl=False)
        return
    console = Console()
    planned = track(
        list_recipes(found, num_ranks=gpus),
        "planning",
        total=len(found),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    entries = list(planned)
    console.print(render(entries))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(entries), indent=1) + "\n")


def train(
    words: Annotated[
        list[str] | None, typer.Argument(help="recipe=NAME, proxy=true, section.key=value, +key=value, ~key.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes; one a GPU, or one, if not given.", min=1)] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with sections such as `train:`.")] = None,
) -> None:
    """Train on this machine's processes, under torchrun, from a recipe, a file and words."""
    import os
    import sys

    from weightcast.trainer.launch import num_local_ranks, torchrun_command
    from weightcast.trainer.run_words import load_run

    num_ranks = nproc if nproc is not None else num_local_ranks()
    # A mistake in the words is told once, before there are processes.
    load_run(words or (), config_file=None if config is None else str(config), world_size=num_ranks)
    command = torchrun_command(words or (), num_ranks=num_ranks, config_file=config)
    sys.stdout.flush()
    os.execv(command[0], command)  # torchrun takes this process's place, and its signals


def plots(
    events: Annotated[Path, typer.Argument(help="The trainer's events, as logger.events named them.")],
    out: Annotated[Path, typer.Argument(help="Picture to write, PNG by its suffix.")] = Path("run.png"),
) -> None:
    """Draw a training run: loss and validation, throughput, versions."""
    from weightcast.trainer.plots import draw_run

    run = draw_run(events, out)
    typer.echo(f"{out}: {len(run.steps)} steps, {len(run.evaluations)} evaluations, {len(run.versions)} versions")
