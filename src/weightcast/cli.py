"""The `weightcast` command. Each sub-command imports what it needs when it runs, so that `--help` is quick.

weightcast demo --engine vllm --steps 6
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from weightcast import __version__
from weightcast.sync.errors import WeightcastError
from weightcast.trainer.commands import add_commands

app = typer.Typer(name="weightcast", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
add_commands(app)

WRONG_INPUT = 2
FAILED = 1


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"weightcast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Keep inference engines in step with a Megatron-Core trainer."""


@app.command()
def demo(
    engine: Annotated[str, typer.Option(help="The engine to keep in step: transformers or vllm.")] = "transformers",
    model: Annotated[
        str | None, typer.Option(help="Hugging Face folder or hub id; a small one is made if none is given.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text file to train on; Python's standard library if none is given.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps; each publishes a version.")] = 6,
    tp: Annotated[
        int | None, typer.Option(help="Trainer ranks that share each layer; 2, or 1 on a machine with one GPU.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; a suitable one if none is given.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report, logs and exported model.")] = Path("out/demo"),
) -> None:
    """Train with Megatron-Core, stream every version into a running engine, and prove what it holds."""
    from weightcast.adapters.demo.inputs import DemoRequest
    from weightcast.adapters.demo.job import run_demo
    from weightcast.adapters.demo.live import LiveTable

    request = DemoRequest(
        engine=engine, model=model, data=data, steps=steps, tensor_parallel=tp, learning_rate=lr, out=out
    )
    with LiveTable() as table:
        result = run_demo(request, table)
    faults = result.proof.faults()
    for fault in faults:
        typer.echo(f"weightcast: proof failed: {fault}", err=True)
    if not faults:
        typer.echo(
            f"Proved: the engine at version {steps} and a fresh engine on {result.export} give the same tokens, "
            "and other ones than before training."
        )
    typer.echo(f"Report: {result.report}")
    if faults:
        raise typer.Exit(FAILED)


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(help="Hugging Face folder, hub id, config.json, the trainer's YAML file, or a recipe."),
    ],
    tp: Annotated[int | None, typer.Option(help="Tensor parallel size.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline parallel size.")] = None,
    vpp: Annotated[int | None, typer.Option(help="Virtual pipeline stages a rank.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="What stands in each (virtual) stage, as Megatron spells it: 'E|t*2|(t*3|)*2t*2|L'."),
    ] = None,
    cp: Annotated[int | None, typer.Option(help="Context parallel size.")] = None,
    ep: Annotated[int | None, typer.Option(help="Expert parallel size.")] = None,
    etp: Annotated[int | None, typer.Option(help="Tensor parallel size of experts; that of --tp if not given.")] = None,
    world_size: Annotated[int | None, typer.Option(help="All ranks; as few as the sizes allow if not given.")] = None,
    link_gbps: Annotated[float, typer.Option(help="Bandwidth of a link, in gigabits a second.", min=1e-9)] = 100.0,
    rank: Annotated[int | None, typer.Option(help="Also list what this rank serves.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Compute every rank's plan for a layout, on no memory and in one process: bytes, servers, faults, times.

    Sizes that are not given are those of the YAML file, and 1 otherwise.
    """
    import json

    from rich.console import Console

    from weightcast.bridges.dry_run import plan_layout
    from weightcast.bridges.dry_run_layout import Layout
    from weightcast.bridges.dry_run_report import as_json, render, render_rank
    from weightcast.trainer.recipe import open_planned

    sizes = {"tensor": tp, "pipeline": pp, "virtual": vpp, "stages": stages, "context": cp, "expert": ep}
    given = {name: size for name, size in (sizes | {"expert_tensor": etp}).items() if size is not None}
    bridge, said = open_planned(model)
    run = plan_layout(bridge, Layout(**{**said, **given}, world_size=world_size))
    console = Console()
    console.print(render(run, link_gbps))
    if rank is not None:
        console.print(render_rank(run, rank))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(run, link_gbps), indent=1) + "\n")
    if run.faults:
        raise typer.Exit(FAILED)


@app.command("import")
def import_(
    model: Annotated[str, typer.Argument(help="Hugging Face folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the Megatron checkpoint (torch_dist).")],
) -> None:
    """Convert a Hugging Face model to a Megatron checkpoint: one process, no model built, goes on after a kill."""
    from weightcast.bridges.auto import AutoBridge
    from weightcast.bridges.standalone_import import import_checkpoint

    report = import_checkpoint(AutoBridge.from_hf_pretrained(model), out)
    typer.echo(
        f"{out}: {report.num_tensors} tensors, {report.num_bytes} bytes in {report.num_files} files, read back and "
        f"equal ({report.num_resumed} files were there already)"
    )


@app.command("export")
def export_(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron checkpoint (torch_dist), of any layout.")],
    out: Annotated[Path, typer.Argument(help="Folder for the Hugging Face model.")],
    config: Annotated[str, typer.Option(help="Hugging Face folder, hub id, or config.json of the same model.")],
    shard_bytes: Annotated[int, typer.Option(help="Most bytes of tensors in a file.", min=1)] = 5 * 10**9,
) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder: one process, no model built, goes on after a kill."""
    from weightcast.bridges.standalone_export import export_checkpoint
    from weightcast.bridges.standalone_inputs import open_bridge

    report = export_checkpoint(open_bridge(config), checkpoint, out, shard_bytes=shard_bytes)
    typer.echo(
        f"{out}: {report.num_tensors} tensors, {report.num_bytes} bytes in {report.num_files} files, read back and "
        f"equal ({report.num_resumed} files were there already)"
    )
    if report.left_out:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(report.left_out.items()))
        typer.echo(f"no weights, left out: {kinds}")


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Hugging Face folder of the base model.")],
    adapter: Annotated[Path, typer.Argument(help="PEFT folder: LoRA or DoRA.")],
    out: Annotated[Path, typer.Argument(help="Folder for the merged Hugging Face model.")],
    shard_bytes: Annotated[int, typer.Option(help="Most bytes of tensors in a file.", min=1)] = 5 * 10**9,
) -> None:
    """Merge an adapter into its base model, exactly and file by file: no model built, bounded memory."""
    from weightcast.bridges.peft.merge_files import merge_folder

    report = merge_folder(base, adapter, out, shard_bytes=shard_bytes)
    typer.echo(f"{out}: {report.num_tensors} tensors, {report.num_bytes} bytes, {report.num_merged} of them merged")


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder of the model in bf16.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model in FP8.")],
    kind: Annotated[str, typer.Option(help="fp8_block (a scale for each 128 x 128) or fp8_tensor.")] = "fp8_block",
    keep: Annotated[list[str] | None, typer.Option(help="Module to leave as it is; may be repeated.")] = None,
    shard_bytes: Annotated[int, typer.Option(help="Most bytes of tensors in a file.", min=1)] = 5 * 10**9,
) -> None:
    """Write a model as FP8, as `publish.quantize` publishes it: what an engine that will receive FP8 starts on."""
    from weightcast.bridges.quantized_folder import write_quantized_folder
    from weightcast.sync.quantize_rules import Fp8Scheme

    scheme = Fp8Scheme(kind=kind, keep=tuple(keep or ()))
    report = write_quantized_folder(model, out, scheme, shard_bytes=shard_bytes)
    typer.echo(f"{out}: {report.num_tensors} tensors, {report.num_bytes} bytes, {report.num_quantized} of them as FP8")


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="Hugging Face folder or Megatron checkpoint.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    config: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder or config.json: compare two Megatron checkpoints through it."),
    ] = None,
    show: Annotated[int, typer.Option(help="How many differing tensors to name.")] = 10,
) -> None:
    """Compare two checkpoints of any kind, tensor by tensor and bit by bit; exit code 1 when they differ."""
    from weightcast.bridges.standalone_inputs import open_bridge
    from weightcast.bridges.standalone_verify import compare_checkpoints

    found = compare_checkpoints(a, b, config=None if config is None else open_bridge(config))
    for difference in found.differences[:show]:
        typer.echo(f"{difference.name}: {difference.how}")
    cast = f", {found.num_cast} of two dtypes compared by value" if found.num_cast else ""
    verdict = f"{len(found.differences)} tensors differ" if found.differences else "equal"
    typer.echo(f"{verdict}: {found.num_tensors} tensors, {found.num_bytes} bytes compared{cast}")
    if found.differences:
        raise typer.Exit(FAILED)


@app.command("inspect")
def inspect_(
    path: Annotated[Path, typer.Argument(help="Hugging Face folder, Megatron checkpoint or PEFT folder.")],
    names: Annotated[bool, typer.Option("--names", help="List every tensor.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Print what a folder holds: tensors, dtypes, bytes, order, and whether a bridge covers it."""
    import json

    from rich.console import Console

    from weightcast.bridges.inspect_path import as_json, inspect_path, render

    contents = inspect_path(path)
    Console().print(render(contents, names))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(contents), indent=1) + "\n")


@app.command()
def trace(
    events: Annotated[list[Path], typer.Argument(help="Event files and reports of a run, or folders of them.")],
    out: Annotated[Path, typer.Option(help="File for the trace.")] = Path("trace.json"),
) -> None:
    """Draw what every process of a run did when, for Perfetto (ui.perfetto.dev) or chrome://tracing."""
    from weightcast.sync.trace_file import write_trace

    typer.echo("\n".join(write_trace(events, out)))


@app.command()
def versions(
    place: Annotated[str, typer.Argument(help="Folder or URL of a store of versions.")],
    check: Annotated[bool, typer.Option("--check", help="Read every file, assemble and check every version.")] = False,
    key_file: Annotated[Path | None, typer.Option(help="File with the key that versions are sealed with.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """List the versions that a trainer wrote: anchors, deltas, bytes; exit code 1 when something is damaged."""
    import json

    from rich.console import Console

    from weightcast.sync.disk.key_file import read_key
    from weightcast.sync.disk.listing import as_json, list_versions, render

    listing = list_versions(place, check=check, key=read_key(key_file))
    Console().print(render(listing))
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(listing), indent=1) + "\n")
    if listing.faults:
        raise typer.Exit(FAILED)


@app.command("materialize")
def materialize_(
    place: Annotated[str, typer.Argument(help="Folder or URL of a store of versions.")],
    out: Annotated[Path, typer.Argument(help="New folder for the Hugging Face model.")],
    version: Annotated[int | None, typer.Option(help="Number of the version; the newest if none is given.")] = None,
    config: Annotated[Path | None, typer.Option(help="Hugging Face folder whose configuration goes with it.")] = None,
    shard_bytes: Annotated[int, typer.Option(help="Most bytes of tensors in a file.", min=1)] = 5 * 10**9,
    key_file: Annotated[Path | None, typer.Option(help="File with the key that versions are sealed with.")] = None,
) -> None:
    """Write one stored version as a Hugging Face folder: regions put together, deltas applied, every tensor checked."""
    from weightcast.sync.disk.key_file import read_key
    from weightcast.sync.disk.materialize import materialize

    key = read_key(key_file)
    done = materialize(place, out, version=version, config_from=config, file_bytes=shard_bytes, key=key)
    size = f"{done.num_tensors} tensors, {done.num_bytes} bytes in {done.num_files} files"
    typer.echo(f"{out}: version {done.version}, {size}, from an anchor and {len(done.steps) - 1} deltas")


def main() -> None:
    """Run the command line. Exit code 2 for wrong input, 1 for a run that failed, each with one message."""
    try:
        app()
    except WeightcastError as error:
        typer.echo(f"weightcast: {error}", err=True)
        # Errors that the caller can mend by asking for something else are ValueErrors; see weightcast.sync.errors.
        sys.exit(WRONG_INPUT if isinstance(error, ValueError) else FAILED)
