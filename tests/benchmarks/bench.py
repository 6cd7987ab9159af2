"""The benchmark program: runs cases, writes the results file and the page.

    make bench        make bench-gpu        or, with options,
    python tests/benchmarks/bench.py [--gpu] [--cases a,b] [--rounds 5] [--quick] [--out FOLDER]
    python tests/benchmarks/bench.py --plan        what would run here, and what is lacking for the rest
    python tests/benchmarks/bench.py --page        the page and the plots again, without measuring
    python tests/benchmarks/bench.py --check       exit code 1 when the page is not of the results

A case that fails is recorded with its error, the others go on, and the exit code is 1 at the end. A case for which
this machine lacks something is recorded as not run.
"""

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from cases import TABLES
from machine import describe_machine, describe_versions, find_lack
from page import render, show
from plots import describe_origin, draw_plots, hash_results, list_plots
from records import Case, CaseError, Record, Settings, make_empty_record, make_record
from results import describe_commit, describe_time, read_results, renew, start_from, write_results
from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).parent
QUICK_FOLDER = Path("out/bench")
MIN_ROUNDS = 5
console = Console(width=150, soft_wrap=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="the cases of one GPU instead of the CPU's")
    parser.add_argument("--cases", default="", help="names, separated by commas; all by default")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="that count; at least 5, but with --quick")
    parser.add_argument("--quick", action="store_true", help="small models: to try the program, not for figures")
    parser.add_argument("--out", type=Path, help="folder of results/, plots/ and README.md; here by default")
    parser.add_argument("--commit", default="", help="what is measured, where the tree came without its history")
    parser.add_argument("--plan", action="store_true", help="say what would run, and measure nothing")
    parser.add_argument("--page", action="store_true", help="write the page again, and measure nothing")
    parser.add_argument("--check", action="store_true", help="compare the page with the results, and change nothing")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.rounds < MIN_ROUNDS and not options.quick):
        parser.error(f"--rounds {options.rounds}: figures are medians of at least {MIN_ROUNDS}; fewer with --quick")
    table = TABLES["gpu" if options.gpu else "cpu"]
    wanted = [name for name in options.cases.split(",") if name]
    if unknown := sorted(set(wanted) - {case.name for case in table}):
        parser.error(f"--cases {', '.join(unknown)} unknown; known are {', '.join(case.name for case in table)}")
    options.chosen = [case for case in table if not wanted or case.name in wanted]
    options.out = options.out or (QUICK_FOLDER if options.quick else HERE)
    if options.quick and options.out.resolve() == HERE:
        parser.error(f"--quick --out {options.out}: figures of small models do not belong there; name another folder")
    return options


def run_case(case: Case, settings: Settings, commit: str) -> Record:
    """Measure one case; whatever goes wrong becomes its record."""
    measured_at = describe_time()
    if lack := find_lack(case.needs):
        return make_empty_record(case, "not run", lack, measured_at, commit)
    try:
        record = make_record(case, case.measure(settings), measured_at, commit)
        return replace(record, note=f"quick, no figure; {record.note}") if settings.quick else record
    except CaseError as error:
        return make_empty_record(case, "failed", str(error), measured_at, commit)
    except Exception as error:
        console.print(escape(traceback.format_exc()))
        return make_empty_record(case, "failed", f"{type(error).__name__}: {error}", measured_at, commit)


def run(options: argparse.Namespace) -> int:
    """All chosen cases; results are written after each, so that a run that is ended keeps what it has."""
    kind = "gpu" if options.gpu else "cpu"
    path = options.out / "results" / f"{kind}.json"
    former, machine = read_results(path), describe_machine()
    results = start_from(former, machine, describe_versions())
    if former is not None and not results.records and former.records:
        console.print(f"the former results are of another machine, {former.machine}: they are left out")
    settings, commit = Settings(options.rounds, options.quick), options.commit or describe_commit()
    ran: list[Record] = []
    for case in options.chosen:
        start_s = time.monotonic()
        record = run_case(case, settings, commit)
        ran.append(record)
        results = renew(results, record, TABLES[kind])
        write_results(path, results)
        console.print(f"{record.case}: {_describe(record)} ({time.monotonic() - start_s:.0f} s)")
    write_page(options.out)
    _show(ran)
    return 1 if any(record.status == "failed" for record in ran) else 0


def _describe(record: Record) -> str:
    if record.value is None or record.baseline_value is None:
        return escape(f"{record.status}: {record.note}")
    return f"{show(record.value, record.unit)}, {record.baseline} {show(record.baseline_value, record.unit)}"


def _show(records: list[Record]) -> None:
    table = Table("case", "value", "baseline", "", "ratio", "to reach", "reached")
    for record in records:
        if record.value is None or record.baseline_value is None or record.ratio is None:
            table.add_row(record.case, record.status, "", record.baseline, "", record.target, "")
            continue
        values = (show(record.value, record.unit), show(record.baseline_value, record.unit), record.baseline)
        reached = {True: "yes", False: "no", None: ""}[record.reached]
        table.add_row(record.case, *values, f"{record.ratio:.3g}", record.target, reached)
    console.print(table)


def write_page(folder: Path) -> None:
    """The page and its plots, from the results files in `folder`."""
    results = {kind: read_results(folder / "results" / f"{kind}.json") for kind in TABLES}
    for kind, found in results.items():
        if found is not None:
            digest = hash_results(folder / "results" / f"{kind}.json")
            draw_plots(kind, found, digest, folder / "plots")
    (folder / "README.md").write_text(render(results))


def check_page(folder: Path) -> list[str]:
    """What is not as the results say; empty when all is."""
    results = {kind: read_results(folder / "results" / f"{kind}.json") for kind in TABLES}
    page = folder / "README.md"
    faults = [] if page.exists() and page.read_text() == render(results) else [f"{page} is not of the results"]
    for kind, found in results.items():
        for name, _ in list_plots(kind, found) if found is not None else ():
            plot = folder / "plots" / name
            origin = describe_origin(hash_results(folder / "results" / f"{kind}.json"))
            if not plot.exists() or origin not in plot.read_text():
                faults.append(f"{plot} is not of the results")
    return faults


def show_plan(cases: Sequence[Case]) -> None:
    """The table, and for each case what this machine lacks."""
    table = Table("case", "figure", "to reach", "baseline", "here")
    for case in cases:
        table.add_row(case.name, case.figure, str(case.target or ""), case.baseline, find_lack(case.needs) or "runs")
    console.print(table)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Do what the command line says; the exit code."""
    options = parse()
    if options.plan:
        show_plan(options.chosen)
        return 0
    if options.page:
        write_page(options.out)
        return 0
    if options.check:
        faults = check_page(options.out)
        console.print("\n".join([*faults, "write it again: python tests/benchmarks/bench.py --page"] if faults else []))
        return 1 if faults else 0
    torch.set_num_threads(1)
    # So that processes and namespaces are ended by whoever made them.
    signal.signal(signal.SIGTERM, _interrupt)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
