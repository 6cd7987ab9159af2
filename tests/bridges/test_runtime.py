"""The CPU runtime: what it changes, when, and that it does not depend on who enters it or how often."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without a GPU")


def run_python(program: str, **environment: str) -> str:
    """Run a program in a fresh interpreter, warnings as errors, and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@cpu_only
def test_nothing_happens_on_import_and_everything_on_the_first_call() -> None:
    printed = run_python(
        """
        import torch
        from weightcast.bridges import runtime
        before = torch.cuda.current_device
        print(before.__module__, len(torch.overrides._get_current_function_mode_stack()))
        runtime.ensure_runtime()
        after = (torch.cuda.current_device, torch.distributed.all_to_all_single)
        runtime.ensure_runtime()
        print(torch.cuda.current_device(), len(torch.overrides._get_current_function_mode_stack()))
        print(after == (torch.cuda.current_device, torch.distributed.all_to_all_single))
        for mend in runtime.MENDS:
            assert mend.why, mend.target
        """
    )
    assert printed.split("\n")[:3] == ["torch.cuda 0", "cpu 1", "True"]


@cpu_only
def test_requests_for_cuda_are_answered_by_the_cpu() -> None:
    printed = run_python(
        """
        import torch
        from weightcast.bridges.runtime import ensure_runtime
        ensure_runtime()
        tensors = [
            torch.zeros(2, device="cuda"), torch.zeros(2, device=0), torch.zeros(2).cuda(), torch.zeros(2).to("cuda:0"),
            torch.zeros(2).to(device=torch.device("cuda", 1)), torch.zeros(2, pin_memory=True),
            torch.nn.Linear(2, 2).cuda().weight, torch.tensor([1.0], device=torch.cuda.current_device()),
        ]
        assert all(tensor.device.type == "cpu" for tensor in tensors)
        assert torch.zeros(2).to(torch.bfloat16).dtype == torch.bfloat16
        print(torch.zeros(1).type(), torch.zeros(1).type(torch.float16).dtype)
        """
    )
    assert printed.strip() == "torch.cuda.FloatTensor torch.float16"


@cpu_only
def test_it_survives_the_contexts_in_which_it_is_entered() -> None:
    run_python(
        """
        import threading
        import torch
        from torch.overrides import BaseTorchFunctionMode
        from weightcast.bridges.runtime import ensure_runtime

        class Other(BaseTorchFunctionMode):
            pass

        torch.set_default_device("cpu")
        with torch.device("meta"), Other():
            ensure_runtime()
            assert torch.empty(1).device.type == "meta"
        assert len(torch.overrides._get_current_function_mode_stack()) == 2
        torch.set_default_device(None)
        with torch.device("meta"):
            assert torch.empty(1).device.type == "meta"
        assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1, device="cuda").device.type == "cpu"

        seen = []
        def other_thread():
            ensure_runtime()
            seen.append(torch.empty(1, device="cuda").device.type)
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        assert seen == ["cpu"]
        """
    )


@cpu_only
def test_random_states_are_named_and_repeat() -> None:
    run_python(
        """
        import torch
        from weightcast.bridges.process_groups import initialize_distributed, initialize_model_parallel
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        initialize_distributed()
        initialize_model_parallel(ModelParallelConfig(), seed=5)
        outer = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            first = torch.rand(3)
        assert torch.equal(outer, torch.get_rng_state())
        with get_cuda_rng_tracker().fork():
            assert not torch.equal(first, torch.rand(3))
        """
    )


@cpu_only
def test_a_lone_process_becomes_a_group_of_one() -> None:
    printed = run_python(
        """
        import torch
        import torch.distributed as dist
        from weightcast.bridges import process_groups
        from weightcast.bridges.cuda_stand_ins import with_nothing_for_one
        from megatron.core import parallel_state
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.model_parallel_config import ModelParallelConfig
        from weightcast.sync.errors import ConfigError

        process_groups.initialize_distributed()
        process_groups.initialize_distributed()
        print(dist.get_backend(), dist.get_world_size())
        try:
            process_groups.initialize_model_parallel(ModelParallelConfig(tensor_model_parallel_size=2))
        except ConfigError as error:
            print(error)
        process_groups.initialize_model_parallel(ModelParallelConfig())
        process_groups.initialize_model_parallel(ModelParallelConfig())
        try:
            process_groups.initialize_model_parallel(ModelParallelConfig(tensor_model_parallel_size=2))
        except ConfigError as error:
            print(error)

        # What DDP scatters and gathers in place is not copied onto itself.
        buffers = param_and_grad_buffer
        for collective in (buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func):
            assert collective.__code__.co_name == "unless_alone"
        calls = []
        def count(output, source, group=None):
            calls.append(group)
            dist.reduce_scatter(output, [source], group=group)
        scatter, buffer, other = with_nothing_for_one(count), torch.arange(6.0), torch.zeros(6)
        scatter(buffer[:], buffer)
        assert not calls and torch.equal(buffer, torch.arange(6.0))
        scatter(other, buffer, group=dist.group.WORLD)
        assert len(calls) == 1 and torch.equal(other, buffer)

        process_groups.destroy_distributed()
        assert not parallel_state.model_parallel_is_initialized() and not dist.is_initialized()
        """
    ).split("\n")
    assert printed[0] == "gloo 1"
    assert "tensor x pipeline x context = 2 does not divide the 1 running process" in printed[1]
    assert "exist with other sizes: tensor_model_parallel_size=2 (now 1)" in printed[2]


def test_half_of_torchruns_variables_is_refused_by_name() -> None:
    printed = run_python(
        """
        from weightcast.bridges.process_groups import initialize_distributed
        from weightcast.sync.errors import ConfigError
        try:
            initialize_distributed()
        except ConfigError as error:
            print(error)
        """,
        RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
    )
    assert "lacks WORLD_SIZE" in printed and "torchrun" in printed


@cpu_only
def test_a_gpu_without_transformer_engine_gets_its_kernels_once() -> None:
    """As far as can be told without one: which names are replaced, and that torch's own stay."""
    run_python(
        """
        import torch
        from weightcast.bridges import cuda_kernels, runtime
        from megatron.core.optimizer import clip_grads
        from megatron.core.transformer import attention
        of_torch, of_megatron = torch.cuda.synchronize, attention.apply_rotary_pos_emb
        runtime.has_cuda = lambda: True
        assert not runtime._mended()
        for _ in range(2):
            runtime.ensure_runtime()
            assert runtime._mended()
            assert clip_grads.l2_norm_impl is cuda_kernels.norm_of_all
            assert clip_grads.multi_tensor_scale_impl is cuda_kernels.scale_of_all
            assert attention.apply_rotary_pos_emb.__wrapped__ is of_megatron
            assert torch.cuda.synchronize is of_torch
        """
    )
