"""`weightcast preprocess`: JSON lines to a dataset that `dataset.kind=indexed` and Megatron read."""

from pathlib import Path
from typing import Annotated

import typer


def preprocess(
    inputs: Annotated[list[Path], typer.Argument(help="Files of JSON lines.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Prefix of the files: <out>_<key>_document.bin and .idx are written.")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of a Hugging Face tokenizer.")],
    json_keys: Annotated[list[str] | None, typer.Option(help="Key of the text; may be repeated.")] = None,
    append_eod: Annotated[bool, typer.Option(help="Put the end-of-text token behind each document.")] = True,
    workers: Annotated[int, typer.Option(help="Processes that tokenize.", min=1)] = 1,
) -> None:
    """Tokenize JSON lines into Megatron's indexed dataset, in the order of the lines."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from weightcast.trainer.data.indexed.preprocess import PreprocessSettings, preprocess

    settings = PreprocessSettings(tuple(json_keys or ("text",)), append_eod, workers)
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        # The text alone counts, and a file has more than that around it: the bar ends a little before its end.
        task = progress.add_task("", total=sum(path.stat().st_size for path in inputs))
        report = preprocess(inputs, out, tokenizer, settings, lambda count: progress.advance(task, count))
        progress.update(task, completed=progress.tasks[task].total)
    empty = f", {report.num_empty} of them without text" if report.num_empty else ""
    typer.echo(f"{report.num_documents} documents{empty}, {report.num_tokens} tokens")
    for prefix in report.prefixes:
        typer.echo(f"dataset.kind=indexed dataset.data_path=[{prefix}]")
