"""How many samples each step takes and how many steps a run has, by batch-size ramp-up and length. Pure.

With `train.rampup_batch_size=[start, increment, samples]` the global batch grows from `start` by `increment` to
`train.global_batch_size`, at equal distances over the first `samples` samples, as Megatron's
`RampupBatchsizeNumMicroBatchesCalculator` has it. The number of samples consumed alone decides the size, so that a
resume in the middle needs nothing else.

    batches = batch_schedule(cfg)
    batches.size_at(consumed_samples=0), batches.last_step()
"""

from dataclasses import dataclass

from weightcast.trainer.config import ConfigContainer, TrainConfig


@dataclass(frozen=True, slots=True)
class RampUp:
    """How the global batch grows."""

    start: int
    """Samples of the first step."""
    increment: int
    """Samples that each rise adds."""
    samples: int
    """Samples over which it rises."""


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """The sizes of a run's global batches, and where it ends: at `train_iters` or `train_samples`, one of them."""

    global_batch_size: int
    """Samples of a step after the ramp-up."""
    ramp_up: RampUp | None
    train_iters: int | None
    train_samples: int | None

    def size_at(self, consumed_samples: int) -> int:
        """Samples of the step that starts after `consumed_samples`."""
        ramp = self.ramp_up
        if ramp is None or consumed_samples > ramp.samples:
            return self.global_batch_size
        # Megatron's own arithmetic, rounding included, so that both have the same steps.
        rises = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + int(consumed_samples / (ramp.samples / rises)) * ramp.increment

    def sizes(self) -> list[int]:
        """All sizes that occur, in their order."""
        ramp = self.ramp_up
        if ramp is None:
            return [self.global_batch_size]
        return list(range(ramp.start, self.global_batch_size + 1, ramp.increment))

    def samples_of(self, steps: int, consumed_samples: int = 0) -> int:
        """Samples that `steps` steps take, the first of which starts after `consumed_samples`."""
        done, consumed = 0, consumed_samples
        while done < steps and self._is_ramping(consumed):
            consumed += self.size_at(consumed)
            done += 1
        return consumed - consumed_samples + (steps - done) * self.global_batch_size

    def steps_within(self, samples: int, consumed_samples: int = 0) -> int:
        """Whole steps that start after `consumed_samples` and end at `samples` or before; a partial one is left out."""
        steps, consumed = 0, consumed_samples
        while self._is_ramping(consumed):
            consumed += self.size_at(consumed)
            if consumed > samples:
                return steps
            steps += 1
        return steps + max(samples - consumed, 0) // self.global_batch_size

    def last_step(self, step: int = 0, consumed_samples: int = 0) -> int:
        """The number of the run's last step, from where it is: after `step` steps, which took `consumed_samples`."""
        if self.train_samples is None:
            assert self.train_iters is not None, "check_layout sees to it"
            return self.train_iters
        return step + self.steps_within(self.train_samples, consumed_samples)

    def num_samples(self) -> int:
        """Samples of the whole run: `train_samples` as they are given, or those of `train_iters` steps."""
        return self.train_samples if self.train_samples is not None else self.samples_of(self.last_step())

    def _is_ramping(self, consumed_samples: int) -> bool:
        return self.ramp_up is not None and consumed_samples <= self.ramp_up.samples


def batch_schedule(config: ConfigContainer) -> BatchSchedule:
    """The schedule that `config.train` asks for; `check_layout` has looked at its numbers."""
    return schedule_of(config.train)


def schedule_of(train: TrainConfig) -> BatchSchedule:
    """As `batch_schedule`, of the section alone."""
    ramp_up = None if train.rampup_batch_size is None else RampUp(*train.rampup_batch_size)
    return BatchSchedule(train.global_batch_size, ramp_up, train.train_iters, train.train_samples)
