"""The page of the benchmark, `README.md`: made of the results files, and of nothing else.

text = render({"cpu": cpu, "gpu": None})
"""

from collections.abc import Mapping

from cases import TABLES
from plots import list_plots
from records import Case, Record
from results import Results

HEAD = """\
# The bench

This page and its plots are written by `make bench` and `make bench-gpu` from [`results/`](results), and by nothing
else; `python tests/benchmarks/bench.py --page` writes them again without measuring.

Every case runs in turns with its baseline, a round of each that is not counted first, then at least five; figures are
medians, and a ratio compares within one run only. The trainer and the engine are processes of their own. A model
moves from just before the sender's call to the moment when the receiver has every byte in tensors of its own, for
weightcast and for the baselines alike ([`peer_process.py`](peer_process.py), [`baselines/`](baselines)); weightcast
goes through `WeightPublisher` and `WeightSubscriber`, so its copies are staged, complete and verified by then. After
every move the bits of the source and of every receiver are compared by a hash that is not weightcast's; engines that
generate must give the tokens of the version they serve.

```sh
make bench                                            # all CPU cases
make bench BENCH_ARGS='--cases delta_1gbit,two_sources'   # some; the others' records are kept, with their dates
make bench BENCH_ARGS=--quick                         # small models, to see that it works: into out/bench
make bench-gpu                                        # the cases of one GPU
```
"""
TITLES = {"cpu": "CPU", "gpu": "GPU"}


def render(results: Mapping[str, Results | None]) -> str:
    """The page's text. Pure."""
    parts = [HEAD]
    for kind, table in TABLES.items():
        parts.append(f"## {TITLES[kind]}\n")
        found = results.get(kind)
        parts.append(_describe_absent(table) if found is None else _describe(kind, found, table))
    return "\n".join(parts)


def _describe_absent(table: tuple[Case, ...]) -> str:
    rows = [f"| `{case.name}` | {case.figure} | {case.target or ''} |" for case in table]
    return "\n".join(["Not measured yet.", "", "| case | figure | to reach |", "|---|---|---|", *rows, ""])


def _describe(kind: str, results: Results, table: tuple[Case, ...]) -> str:
    machine, versions = results.machine, results.versions
    gpu = f", {machine['gpu']} ({machine['gpu_memory_gb']} GB)" if "gpu" in machine else ""
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB{gpu}; {machine['system']}."]
    lines += [f"{', '.join(f'{name} {number}' for name, number in versions.items())}.", ""]
    lines += ["| case | figure | value | baseline | ratio | to reach | reached |", "|---|---|---|---|---|---|---|"]
    lines += [_row(case, results.find(case.name)) for case in table]
    lines.append("")
    records = [record for case in table if (record := results.find(case.name))]
    notes = [f"- `{record.case}`: {_note(record)}" for record in records if record.note]
    lines += [*notes, "", _describe_dates(records), ""]
    for name, title in list_plots(kind, results):
        lines += [f"![{title}](plots/{name})", ""]
    return "\n".join(lines)


def _row(case: Case, record: Record | None) -> str:
    head = f"| `{case.name}` | {case.figure} |"
    if record is None:
        return f"{head} | | | {case.target or ''} | not run |"
    if record.value is None or record.baseline_value is None or record.ratio is None:
        return f"{head} | {record.baseline} | | {record.target} | {record.status} |"
    value = show(record.value, record.unit)
    baseline = f"{show(record.baseline_value, record.unit)} ({record.baseline})"
    reached = {True: "yes", False: "**no**", None: ""}[record.reached]
    return f"{head} {value} | {baseline} | {record.ratio:.3g} | {record.target} | {reached} |"


def show(value: float, unit: str) -> str:
    """A figure with its unit, three digits."""
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB"
    return f"{value:.3g} {unit}"


def _note(record: Record) -> str:
    """In one line, without what would end a list item."""
    text = " ".join(record.note.split())
    return f"{record.status}: {text}" if record.status != "ok" else text


def _describe_dates(records: list[Record]) -> str:
    """Which records are of when and of what."""
    rounds = sorted({record.rounds for record in records if record.rounds})
    counted = f" Medians of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds." if rounds else ""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.measured_at.split()[0], record.commit), []).append(record)
    if len(groups) == 1:
        ((date, commit),) = groups
        return f"Measured on {date} (UTC) at commit {commit}.{counted}"
    parts = [
        f"{date} at {commit}: {', '.join(f'`{record.case}`' for record in group)}"
        for (date, commit), group in sorted(groups.items())
    ]
    return "Measured (UTC) on " + "; ".join(parts) + f".{counted}"
