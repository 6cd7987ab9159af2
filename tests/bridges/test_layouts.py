"""Layouts in real processes: bits, logits and gradients, and how many bytes an import reads.

`make test` runs the cuts that no other test has, for one model of each kind; the whole matrix, families times layouts,
is long and writes `bridges/SUPPORT.md` where WEIGHTCAST_SUPPORT_PAGE is set.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.bridges.drawn_layouts import draw_case
from tests.bridges.layout_tables import EP, ETP, KINDS, PP, TP
from tests.bridges.parity_models import COMMON, DEFAULT_ROPE, MOE
from tests.bridges.support import GRADIENT_TOLERANCE, PAGE, read_page, support_page
from tests.bridges.support_families import FAMILIES, family_of
from tests.bridges.support_job import Reading, take_readings
from tests.bridges.test_bits import build, check_export, check_regions, import_one, weights_of
from tests.ranks import run_ranks
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from weightcast.bridges import AutoBridge
from weightcast.bridges.hf_import import import_weights
from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.checkpoint_files import RegionReader, open_checkpoint
from weightcast.sync.regions import Region, TensorSpec

# Of torch, when a vision tower is saved.
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")

MAX_RANKS = 8
Cell = tuple[str, str]

# One model of each kind, in the cuts that the tests of single families leave out.
THIN: dict[str, tuple[str, ...]] = {
    "llama3-tied-one-kv-head": ("pp4-E|tt|tt|L", "pp2-vpp3-E-and-L-counted", "pp2-first1", "cp2"),
    "qwen3-moe-tied-unnormalised": ("pp4-E|tt|tt|L", "ep2-tp1-etp2", "cp2-ep2"),
    "deepseek-v3": ("pp2-vpp2", "ep2-tp2-sp-etp2", "cp2-ep2"),
    "deepseek-v3-mtp2": ("pp4-E|tt|tt|mL", "cp2-ep2"),
    "gpt-oss": ("pp2-vpp2", "cp2-ep2"),
}


def read_cells(out: Path, world_size: int, cells: Sequence[Cell], timeout_s: float) -> list[Reading]:
    """Write the models of `cells`, run the job in `world_size` processes, and give rank 0's readings."""
    for name in dict.fromkeys(cell[0] for cell in cells):
        if not (out / name).exists():
            family_of(name).models[name](out / name)
    environment = {"CUDA_VISIBLE_DEVICES": ""}  # fp32 on CPU is the reference; a GPU's matmuls are not that exact
    ranks = run_ranks(take_readings, world_size, str(out), cells, timeout_s=timeout_s, env=environment)
    assert all(rank == ranks[0] for rank in ranks)
    readings = [Reading(**reading) for reading in ranks[0]]
    assert sorted((reading.model, reading.layout) for reading in readings) == sorted(cells)
    return readings


def check(reading: Reading) -> None:
    assert reading.num_changed == 0 < reading.num_tensors, reading
    assert reading.logits <= family_of(reading.model).tolerance, reading
    assert reading.gradients is None or reading.gradients <= GRADIENT_TOLERANCE, reading


@pytest.mark.slow
def test_uneven_and_standalone_stages_and_context_parallelism(tmp_path: Path) -> None:
    cells = [(model, layout) for model, layouts in THIN.items() for layout in layouts]
    for reading in read_cells(tmp_path, 4, cells, timeout_s=300):
        check(reading)


def matrix(world_size: int) -> list[Cell]:
    """Every model in four processes, the first of each family in eight, in all layouts of its kind."""
    return [
        (model, layout)
        for family in FAMILIES.values()
        for model in list(family.models)[: None if world_size == 4 else 1]
        for layout in KINDS[family.kind][world_size]
    ]


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_family_in_every_layout(tmp_path: Path) -> None:
    readings = [reading for size in (4, 8) for reading in read_cells(tmp_path, size, matrix(size), timeout_s=6000)]
    for reading in readings:
        check(reading)
    page = support_page(readings)
    if os.environ.get("WEIGHTCAST_SUPPORT_PAGE"):
        PAGE.write_text(page)
    ours, theirs = (
        [(row.title, row.round_trip, row.layouts) for row in read_page(text)] for text in (page, PAGE.read_text())
    )
    assert ours == theirs, "bridges/SUPPORT.md is of other families or layouts; tests/bridges/support.py says how"


@contextmanager
def reads_noted() -> Iterator[list[Region]]:
    """Inside, every region that is read from a file is noted in the list.

    A patch on purpose, as in `no_collectives`: whatever way a file is read, it ends in this method.
    """
    noted: list[Region] = []
    read = RegionReader.read

    def note(self: RegionReader, region: Region) -> torch.Tensor:
        noted.append(region)
        return read(self, region)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RegionReader, "read", note)
        yield noted


def import_every_rank(models: str, cases: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each case reads from the files and what it owns: bytes, and regions as [name, offset, shape].

    An import talks to nobody, so that one process may be the ranks one after the other.
    """
    return {
        name: [
            import_as_rank(rank, case["world_size"], Path(models, case["model"]), case["sizes"])
            for rank in range(case["world_size"])
        ]
        for name, case in cases.items()
    }


def import_as_rank(rank: int, world_size: int, folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    from weightcast.bridges.dry_run_stages import fake_world

    bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
    with fake_world(rank, world_size), reads_noted() as noted:
        model = build(bridge, sizes)
        plan = bridge.plan(model)
        report = import_weights(plan, checkpoint)
    weights = weights_of(model)
    assert not any(weight.isnan().any() for weight in weights)
    padding = sum(view().numel() * view().element_size() for view in plan.padding)
    owned = sum(weight.numel() * weight.element_size() for weight in weights) - padding
    regions = [[region.name, region.offset, region.shape] for region in noted]
    return {"read": report.num_bytes, "owned": owned, "regions": regions}


def count_reads(ranks: Sequence[dict[str, Any]], specs: Sequence[TensorSpec]) -> dict[str, int]:
    """How often each tensor was read by all ranks together; every element of it must have been read equally often."""
    counts = {spec.name: torch.zeros(spec.shape, dtype=torch.int32) for spec in specs}
    for rank in ranks:
        for name, offset, shape in rank["regions"]:
            counts[name][Region(name, tuple(offset), tuple(shape)).slices] += 1
    assert all(count.min() == count.max() for count in counts.values())
    return {name: int(count.flatten()[0]) for name, count in counts.items()}


# How often each tensor is read by all ranks together: as often as Megatron keeps it; the first word in a name says.
READS: dict[str, dict[str, Any]] = {
    # Norms are copied to the tensor parallel ranks, a tied embedding to the first and the last stage.
    "TP4xPP2": {"model": "llama2", "world_size": 8, "sizes": {TP: 4, PP: 2}, "copies": {"norm": 4, "": 1}},
    "TP4xPP2, tied": {
        "model": "llama3.2",
        "world_size": 8,
        "sizes": {TP: 4, PP: 2},
        "copies": {"norm": 4, "embed_tokens": 2, "": 1},
    },
    # Experts alone are cut; the rest is copied to all ranks.
    "EP4": {"model": "mixtral", "world_size": 4, "sizes": {EP: 4}, "copies": {"experts": 1, "": 4}},
}


@pytest.mark.slow
def test_an_import_reads_the_bytes_it_owns_and_each_byte_once_a_copy(tiny_models: Path) -> None:
    (by_case,) = run_ranks(import_every_rank, 1, str(tiny_models), READS, process_group=False)
    for name, case in READS.items():
        ranks, specs = by_case[name], open_checkpoint(tiny_models / case["model"]).specs
        assert [rank["read"] / rank["owned"] for rank in ranks] == [1.0] * case["world_size"], name
        copies = {spec.name: next(n for word, n in case["copies"].items() if word in spec.name) for spec in specs}
        assert count_reads(ranks, specs) == copies, name
        assert sum(rank["read"] for rank in ranks) == sum(spec.num_bytes * copies[spec.name] for spec in specs), name


# Eight heads over four key-value heads: with TP8 two ranks share a key-value head.
EIGHT_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
WIDE: dict[str, tuple[dict[str, Any], ...]] = {
    "llama": ({TP: 8}, {TP: 8, "sequence_parallel": True}),
    "qwen3-moe": ({EP: 8}, {TP: 4, EP: 8, ETP: 1, "sequence_parallel": True}),
}


def read_wide(out: str) -> list[float]:
    """Differences of logits in eight-fold layouts; the bits are checked on the way."""
    from tests.bridges.parity_job import logits_difference, write_expected

    configs: dict[str, Any] = {
        "llama": LlamaConfig(**COMMON | EIGHT_HEADS | {"tie_word_embeddings": True}, rope_parameters=DEFAULT_ROPE),
        "qwen3-moe": Qwen3MoeConfig(**MOE | EIGHT_HEADS, num_experts=8, rope_parameters=DEFAULT_ROPE),
    }
    differences = []
    for name, layouts in WIDE.items():
        folder = Path(out, name)
        if dist.get_rank() == 0:
            folder.mkdir()
            torch.manual_seed(8)
            write_expected(AutoModelForCausalLM.from_config(configs[name], dtype=torch.float32).eval(), folder)
        dist.barrier()
        bridge, checkpoint = AutoBridge.from_hf_pretrained(folder / "model"), open_checkpoint(folder / "model")
        for sizes in layouts:
            model = build(bridge, sizes)
            import_one(bridge, model, checkpoint)
            check_regions(list(bridge.weight_source(model).held()), checkpoint)
            check_export(bridge, model, checkpoint)
            differences.append(logits_difference(folder, [chunk.eval() for chunk in model]))
            destroy_model_parallel()
    return differences


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_eight_fold_tensor_and_expert_parallelism_with_fewer_key_value_heads(tmp_path: Path) -> None:
    ranks = run_ranks(read_wide, 8, str(tmp_path), timeout_s=1000, env={"CUDA_VISIBLE_DEVICES": ""})
    assert all(rank == ranks[0] for rank in ranks)
    assert len(ranks[0]) == 4 and max(ranks[0]) <= 1e-5, ranks[0]


def move_drawn_bits(out: str, seeds: list[int]) -> list[str]:
    """Import, regions and export of drawn models in drawn layouts. Returns what was done."""
    done = []
    for seed in seeds:
        case = draw_case(Random(seed), MAX_RANKS)
        folder = Path(out, str(seed))
        if dist.get_rank() == 0:
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(case.config()).save_pretrained(folder)
        dist.barrier()
        bridge, checkpoint = AutoBridge.from_hf_pretrained(folder), open_checkpoint(folder)
        try:
            model = build(bridge, case.settings | {"make_vocab_size_divisible_by": case.vocab_multiple})
            import_one(bridge, model, checkpoint)
            check_regions(list(bridge.weight_source(model).held()), checkpoint)
            check_export(bridge, model, checkpoint)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}") from error
        destroy_model_parallel()
        done.append(f"{case.kind} {case.settings}")
    return done


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_drawn_models_keep_their_bits_in_drawn_layouts(tmp_path: Path) -> None:
    seeds = [seed for seed in range(60) if draw_case(Random(seed), MAX_RANKS).num_ranks == MAX_RANKS][:12]
    ranks = run_ranks(move_drawn_bits, MAX_RANKS, str(tmp_path), seeds, timeout_s=1000)
    assert len(ranks[0]) == 12 and all(rank == ranks[0] for rank in ranks)
