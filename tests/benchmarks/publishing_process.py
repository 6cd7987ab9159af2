"""A trainer's stand-in for benchmarks: a process that publishes random tensors when a line on stdin says so.

python tests/benchmarks/publishing_process.py ADDRESS [ADDRESS...] [--tiny]

Prints one JSON line with the bound addresses, then one for each command. Commands: `publish INDEX VERSION` publishes
a new version on the address of that index; the answer carries the report's phases, each engine's pause, and a sum over
the tensors' bits, so that the other side can check what it got without trusting weightcast's own checksums. `wait
INDEX COUNT` waits until so many engines have subscribed.
"""

import json
import sys
from functools import partial

import torch
from shapes import TINY, qwen3_specs

from weightcast.sync import HeldRegion, TensorSpec, WeightPublisher

TIMEOUT_S = 120.0


class RandomSource:
    """Every tensor whole, on one rank; `step` changes some of each."""

    def __init__(self, specs: list[TensorSpec]) -> None:
        self.rank = 0
        self.world_size = 1
        self._specs = specs
        generator = torch.Generator().manual_seed(0)
        self._tensors = {
            spec.name: torch.randint(-(2**15), 2**15, spec.shape, dtype=torch.int16, generator=generator)
            for spec in specs
        }

    def specs(self) -> list[TensorSpec]:
        """The model's tensors."""
        return self._specs

    def held(self) -> list[HeldRegion]:
        """All of them."""
        return [
            HeldRegion(spec.whole(), partial(torch.Tensor.view, self._tensors[spec.name], torch.bfloat16))
            for spec in self._specs
        ]

    def step(self) -> int:
        """Change every tensor, and return the sum of all elements' bits."""
        total = 0
        for tensor in self._tensors.values():
            tensor.add_(1)
            total += int(tensor.sum(dtype=torch.int64))
        return total


def main() -> None:
    """Serve commands until stdin ends."""
    torch.set_num_threads(1)
    addresses = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    source = RandomSource(qwen3_specs(**TINY) if "--tiny" in sys.argv else qwen3_specs())
    publishers = [WeightPublisher(source, address) for address in addresses]
    print(json.dumps({"addresses": [publisher.address for publisher in publishers]}), flush=True)
    for line in sys.stdin:
        command, index, number = line.split()
        publisher = publishers[int(index)]
        if command == "wait":
            publisher.wait_for_subscribers(int(number), timeout_s=TIMEOUT_S)
            print(json.dumps({}), flush=True)
            continue
        bits = source.step()
        report = publisher.publish(int(number), timeout_s=TIMEOUT_S)
        pauses_s = {engine.engine: engine.pause_s for engine in report.engines}
        answer = {"bits": bits, "phases_s": report.phases_s, "num_bytes": report.num_bytes, "pauses_s": pauses_s}
        print(json.dumps(answer), flush=True)
    for publisher in publishers:
        publisher.close()


if __name__ == "__main__":
    main()
