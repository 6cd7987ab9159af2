"""Torch's Adam in one kernel or in many: the state follows, and so do the numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from weightcast.trainer.optimizer_parts import fuse_adams, new_step, set_fused, torch_adams


def make_adam(fused: bool | None = None) -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]
    groups: list[dict[str, Any]] = [{"params": parameters}, {"params": []}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, fused=fused)


def take_steps(adam: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    parameters: list[torch.Tensor] = adam.param_groups[0]["params"]
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = parameter.detach().sin()
        adam.step()
    return [parameter.detach() for parameter in parameters]


def test_a_run_that_changes_the_kernel_goes_on() -> None:
    """As one does that is resumed on a machine of the other kind."""
    wanted = take_steps(make_adam(), 4)
    adam = make_adam()
    take_steps(adam, 2)
    set_fused(adam, adam.param_groups[0], True)
    found = take_steps(adam, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert {float(state["step"]) for state in adam.state.values()} == {4.0}


def test_without_a_gpu_adam_is_left_as_it_is_and_a_checkpoints_kernel_is_not_kept() -> None:
    adam = make_adam(fused=True)
    optimizer = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam), SimpleNamespace(optimizer=None)])
    assert torch_adams(optimizer) == [adam]
    fuse_adams(optimizer)
    assert [group["fused"] for group in adam.param_groups] == [None, None]


@pytest.mark.parametrize("fused", [None, True])
def test_a_new_step_is_like_the_one_that_adam_makes(fused: bool | None) -> None:
    adam = make_adam(fused)
    (parameter, _) = take_steps(adam, 0)
    step = new_step(parameter, adam.param_groups[0])
    take_steps(adam, 1)
    made = next(iter(adam.state.values()))["step"]
    assert (step.shape, step.dtype, step.device, float(step)) == (made.shape, made.dtype, made.device, 0.0)
