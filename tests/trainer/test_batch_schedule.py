"""Sizes of batches and lengths of runs: against Megatron's own calculator, and as sums of steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)
from weightcast.trainer.batch_schedule import BatchSchedule, RampUp, batch_schedule
from weightcast.trainer.lr_schedule import schedule_lengths
from weightcast.trainer.overrides import load_config

from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator  # isort: skip

# 2, 2, 2, 2, 4, 4, 6, 8, 8, … samples: a rise at each third of the first 20.
RAMP = ["train.global_batch_size=8", "train.rampup_batch_size=[2,2,20]"]
SIZES = [2, 2, 2, 2, 4, 4, 6, 8, 8]
SAMPLES = ["train.train_iters=null", "train.train_samples=40"]


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    start, increment, rises = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    ramp_up = RampUp(start, increment, draw(st.integers(1, 300)))
    return BatchSchedule(start + rises * increment, draw(st.sampled_from([None, ramp_up])), 50, None)


def steps_of(batches: BatchSchedule, num_steps: int) -> list[int]:
    """The sizes of the first steps, one after the other."""
    sizes, consumed = [], 0
    for _ in range(num_steps):
        sizes.append(batches.size_at(consumed))
        consumed += sizes[-1]
    return sizes


@given(schedules().filter(lambda batches: batches.ramp_up is not None))
def test_every_step_is_as_large_as_megatrons(batches: BatchSchedule) -> None:
    ramp = batches.ramp_up
    assert ramp is not None
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        batches.global_batch_size, 1, 1, False, 1, ramp.start, ramp.increment, ramp.samples
    )
    consumed = 0
    for size in steps_of(batches, 60):
        theirs.update(consumed, consistency_check=True)
        assert size == theirs.get_current_global_batch_size()
        assert size in batches.sizes()
        consumed += size


@given(schedules(), st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_lengths_are_sums_of_steps(batches: BatchSchedule, done: int, more: int, rest: int) -> None:
    sizes = steps_of(batches, done + more + 1)
    consumed, to_come = sum(sizes[:done]), sum(sizes[done : done + more])
    assert batches.samples_of(done) == consumed
    assert batches.samples_of(more, consumed) == to_come
    rest = min(rest, sizes[done + more] - 1)
    assert batches.steps_within(consumed + to_come + rest, consumed) == more
    assert batches.steps_within(consumed + to_come + rest) == done + more


def test_a_run_ends_with_its_last_whole_step() -> None:
    batches = batch_schedule(load_config([*RAMP, *SAMPLES]))
    assert steps_of(batches, 9) == SIZES
    assert batches.sizes() == [2, 4, 6, 8]
    assert (batches.last_step(), batches.num_samples()) == (9, 40)  # 38 samples, and 2 that make no step of 8
    assert batches.last_step(5, 12) == 9
    # A resumed run may have another batch size; how much it has still to see stays.
    constant = batch_schedule(load_config(["train.global_batch_size=4", *SAMPLES]))
    assert constant.last_step(5, 12) == 5 + 7
    by_steps = batch_schedule(load_config([*RAMP, "train.train_iters=7"]))
    assert (by_steps.last_step(5, 12), by_steps.num_samples()) == (7, 22)


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        ([*RAMP, *SAMPLES], (0, 40, None, 40)),
        ([*RAMP, "train.train_iters=9"], (0, 38, None, 38)),
        ([*RAMP, *SAMPLES, "scheduler.lr_warmup_iters=5", "scheduler.lr_decay_iters=8"], (12, 30, None, 40)),
        ([*RAMP, *SAMPLES, "scheduler.lr_warmup_samples=5", "scheduler.lr_decay_samples=30"], (5, 30, None, 40)),
        ([*RAMP, *SAMPLES, "scheduler.lr_warmup_fraction=0.1"], (4, 40, None, 40)),
        (
            [*RAMP, "train.train_iters=9", "scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_iters=3"],
            (0, 38, 6 + 8 + 8, 38),
        ),
    ],
)
def test_steps_of_a_schedule_are_those_of_the_run(words: list[str], lengths: tuple[int, int, int | None, int]) -> None:
    found = schedule_lengths(load_config(words))
    assert (
        found.warmup_samples,
        found.decay_samples,
        found.wsd_decay_samples,
        found.weight_decay_samples,
    ) == lengths
