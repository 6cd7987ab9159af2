"""The trainer's side of adapter tests: named tensors as a source, and engines under test behind a publisher."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from weightcast.adapters.vllm.client import VLLMClient
from weightcast.sync import FleetPolicy, HeldRegion, TensorSpec, WeightPublisher

DEADLINE_S = 60.0


class TensorSource:
    """Named tensors as a `WeightSource` of one rank, whether or not they make a model."""

    rank = 0
    world_size = 1

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def specs(self) -> Sequence[TensorSpec]:
        return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def held(self) -> Sequence[HeldRegion]:
        return [
            HeldRegion(spec.whole(), partial(torch.Tensor.detach, self._tensors[spec.name])) for spec in self.specs()
        ]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Poll until `condition` holds; fail with `what` at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def publish_once(address: str, tensors: Mapping[str, torch.Tensor], members: int) -> None:
    """A trainer's short life: bind, meet `members` of the fleet (observers included), publish version 1, leave."""
    with WeightPublisher(TensorSource(tensors), address, policy=FleetPolicy.all(minimum=1)) as publisher:
        wait_until(lambda: len(publisher.fleet()) >= members, f"{members} members of the fleet")
        publisher.publish(version=1, timeout_s=DEADLINE_S)


class ServerUnderTest:
    """An engine behind HTTP whose publisher, at `address`, is replaced at every offer.

    `members` is how many subscribers the engine makes known: itself, and a driver where it has one.
    """

    def __init__(self, client: VLLMClient, address: str, members: int) -> None:
        self.client = client
        self.address = address
        self.members = members

    def offer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        publish_once(self.address, tensors, self.members)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        return self.client.complete(prompt_token_ids, max_tokens).token_ids

    def weight_version(self) -> str:
        return self.client.weight_version()
