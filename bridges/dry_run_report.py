"""A dry run as a table for people and as JSON for programs.

Console().print(render(run, link_gbps=400))
print(json.dumps(as_json(run, link_gbps=400)))
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weightcast.bridges.dry_run import DryRun, RankPlan
from weightcast.sync.errors import ConfigError
from weightcast.sync.regions import dtype_name

NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that links alone would take; latency, disks and the engines' own loading come on top."""

    trainer_s: float
    """The rank that serves most, over its link."""
    engine_s: float
    """A whole model over one engine's link."""

    @property
    def publish_s(self) -> float:
        """The slower of the two sides, since they work at the same time."""
        return max(self.trainer_s, self.engine_s)


def estimate(run: DryRun, link_gbps: float) -> Estimate:
    """Times for links of `link_gbps` gigabits a second, one a rank and one an engine."""
    bytes_per_s = link_gbps * 1e9 / 8
    return Estimate(max(plan.served_bytes for plan in run.ranks) / bytes_per_s, run.num_bytes / bytes_per_s)


@dataclass(frozen=True, slots=True)
class Spread:
    """The smallest, the median and the largest of one number over all ranks, and the first ranks that have them."""

    smallest: RankPlan
    median: RankPlan
    largest: RankPlan

    @staticmethod
    def make(ranks: Sequence[RankPlan], key: Callable[[RankPlan], int]) -> "Spread":
        """By `key`; the lower of two medians."""
        ordered = sorted(ranks, key=lambda plan: (key(plan), plan.rank))
        largest = max(ranks, key=lambda plan: (key(plan), -plan.rank))
        return Spread(ordered[0], ordered[(len(ordered) - 1) // 2], largest)


_NUMBERS: dict[str, Callable[[RankPlan], int]] = {
    "holds": lambda plan: plan.held_bytes,
    "serves": lambda plan: plan.served_bytes,
}


def render(run: DryRun, link_gbps: float) -> RenderableType:
    """Tables and lines for a terminal."""
    times = estimate(run, link_gbps)
    ranks = Table("a rank", "least", "median", "most")
    for what, number in _NUMBERS.items():
        spread = Spread.make(run.ranks, number)
        cells = (f"{_size(number(p))} (rank {p.rank})" for p in (spread.smallest, spread.median, spread.largest))
        ranks.add_row(what, *cells)
    stages = Table("stage", "ranks", "held by a rank", "served together")
    for stage in range(run.layout.pipeline):
        mine = [plan for plan in run.ranks if plan.seat.pipeline == stage]
        held = f"{_size(min(p.held_bytes for p in mine))} to {_size(max(p.held_bytes for p in mine))}"
        stages.add_row(
            str(stage), f"{mine[0].rank}-{mine[-1].rank}", held, _size(sum(plan.served_bytes for plan in mine))
        )
    largest = run.largest_tensor
    lines = [
        f"{run.architecture}: {run.num_tensors} tensors, {_size(run.num_bytes)}, on {run.layout.num_ranks} ranks "
        f"({run.num_distinct_plans} distinct plans, {run.seconds:.1f} s)",
        f"largest tensor in flight: {largest.name} {largest.shape}, {_size(largest.num_bytes)}; "
        f"largest region: {_size(run.largest_region_bytes)}",
        f"at {link_gbps:g} Gbit/s a link: {times.publish_s:.2f} s a version "
        f"(busiest rank {times.trainer_s:.2f} s, one engine {times.engine_s:.2f} s)",
    ]
    if run.chosen:
        settings = ", ".join(f"{name}={value}" for name, value in run.chosen.items())
        lines.append(f"the layers do not divide by the stages; a real run needs {settings}")
    return Group(Text(lines[0]), ranks, stages, *(Text(line) for line in [*lines[1:], *fault_lines(run)]))


def render_rank(run: DryRun, rank: int) -> RenderableType:
    """What one rank holds in all and serves, region by region. Raises `ConfigError` for a rank that is none."""
    if not 0 <= rank < len(run.ranks):
        raise ConfigError(
            f"rank {rank} is none of the layout's {len(run.ranks)}; name one from 0 to {len(run.ranks) - 1}"
        )
    plan = run.ranks[rank]
    seat = ", ".join(f"{name} {place}" for name, place in plan.seat._asdict().items())
    served = Table("served tensor", "offset", "shape")
    for region in run.serves.get(rank, ()):
        served.add_row(region.name, str(region.offset), str(region.shape))
    line = (
        f"rank {rank} ({seat}): holds {plan.num_regions} regions, {_size(plan.held_bytes)}; "
        f"serves {len(run.serves.get(rank, ()))}, {_size(plan.served_bytes)}"
    )
    return Group(Text(line), served)


def fault_lines(run: DryRun) -> list[str]:
    """One line a kind of fault, with the first names."""
    said = {
        "unmapped_megatron": "Megatron tensors without a rule",
        "unfilled_hf": "HF tensors that no rule fills",
        "absent_hf": "HF tensors that a rule wants and the model lacks",
        "unmatched_rules": "rules that match nothing",
        "misfits": "shapes that do not fit",
        "incomplete": "not a whole model",
    }
    lines: list[str] = []
    for name, words in said.items():
        found = getattr(run.faults, name)
        if found:
            more = f" (and {len(found) - NAMES_SHOWN} more)" if len(found) > NAMES_SHOWN else ""
            lines.append(f"{words}: {', '.join(found[:NAMES_SHOWN])}{more}")
    return lines


def as_json(run: DryRun, link_gbps: float) -> dict[str, Any]:
    """Everything, every rank, in JSON's types; bytes and seconds."""
    times = estimate(run, link_gbps)
    return {
        "architecture": run.architecture,
        "layout": asdict(run.layout) | {"world_size": run.layout.num_ranks},
        "num_tensors": run.num_tensors,
        "num_bytes": run.num_bytes,
        "num_distinct_plans": run.num_distinct_plans,
        "chosen": dict(run.chosen),
        "largest_tensor": {
            "name": run.largest_tensor.name,
            "shape": list(run.largest_tensor.shape),
            "dtype": dtype_name(run.largest_tensor.dtype),
            "num_bytes": run.largest_tensor.num_bytes,
        },
        "largest_region_bytes": run.largest_region_bytes,
        "link_gbps": link_gbps,
        "estimate_s": asdict(times) | {"publish_s": times.publish_s},
        "faults": {name: list(names) for name, names in asdict(run.faults).items()},
        "ranks": [asdict(plan) | {"seat": plan.seat._asdict()} for plan in run.ranks],
        "seconds": run.seconds,
    }


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"
