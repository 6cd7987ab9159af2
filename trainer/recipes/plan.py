"""What a recipe needs before anybody owns the machines: parameters, ranks, and bytes of memory on each rank.

Megatron is asked for the parameters of every pipeline stage on meta tensors, in one process without memory. Counted
are weights, gradients and the optimizer's state, which the distributed optimizer shares out over the ranks that hold
the same weights; of a frozen base, the weights alone, and of its adapters all three. Activations are not counted: they
depend on kernels and recomputation.

    plan = plan_recipe(load_recipe("deepseek_v3.pretrain"))
    print(plan.num_parameters, plan.num_ranks, plan.largest.total_bytes)
"""

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run_stages import fake_world
from weightcast.bridges.process_groups import initialize_model_parallel
from weightcast.bridges.runtime import ensure_runtime
from weightcast.sync.errors import ConfigError
from weightcast.trainer.checks.model import check_provider
from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.data_parallel import reduces_in_fp32
from weightcast.trainer.mixed_precision import set_dtype
from weightcast.trainer.model_source import open_planned_model
from weightcast.trainer.peft.method import PeftMethod
from weightcast.trainer.peft.prepare import freeze_settings
from weightcast.trainer.peft.schemes import make_method

GIB = 2**30


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on a rank of one pipeline stage."""

    stage: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    """Adam's two moments and, with 16-bit weights, their fp32 copies: this rank's share."""

    @property
    def total_bytes(self) -> int:
        """All three."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class RecipePlan:
    """A recipe in numbers."""

    architecture: str
    num_parameters: int
    """Of the Hugging Face model, without layers for multi-token prediction; tied ones once."""
    num_ranks: int
    layout: str
    """Sizes of the groups, as in `TP2 PP16 EP64 ETP1 SP`."""
    stages: tuple[RankMemory, ...]

    @property
    def largest(self) -> RankMemory:
        """The stage whose ranks need most."""
        return max(self.stages, key=lambda memory: memory.total_bytes)


class _Count(NamedTuple):
    """Parameters on a rank."""

    held: int
    trained_dense: int
    trained_expert: int

    def go_on(self, after: "_Count", steps: int) -> "_Count":
        """Where a line through this count and the one `after` it comes to."""
        return _Count(*(one + (two - one) * steps for one, two in zip(self, after, strict=True)))


def least_ranks(model: ModelConfig) -> int:
    """As few ranks as the sizes of the groups allow."""
    dense = model.tensor_model_parallel_size * model.context_parallel_size
    matrices = model.expert_tensor_parallel_size or model.tensor_model_parallel_size
    return model.pipeline_model_parallel_size * math.lcm(dense, matrices * model.expert_model_parallel_size)


def plan_recipe(config: ConfigContainer, *, num_ranks: int | None = None) -> RecipePlan:
    """The plan on `num_ranks` ranks, by default the fewest; no weights are read or made.

    Needs a process without a process group. Raises `ConfigError` for a layout that the model cannot have.
    """
    model = config.model
    least = least_ranks(model)
    num_ranks = least if num_ranks is None else num_ranks
    if num_ranks < 1 or num_ranks % least:
        raise ConfigError(f"{spell_layout(model)} needs a multiple of {least} ranks, and {num_ranks} are given")
    bridge, provider = open_planned_model(model)
    # Context parallelism copies weights, so that it counts as data parallelism, and needs no Transformer Engine here.
    provider.context_parallel_size = 1
    set_dtype(config.mixed_precision, provider)
    check_provider(config, provider)
    freeze_settings(config, provider)
    unfinished = copy.copy(provider)
    provider.finalize()
    method = make_method(config.peft, provider)
    counts = _count_stages(unfinished, num_ranks, method)
    stages = tuple(_memory(config, provider, stage, count, num_ranks) for stage, count in enumerate(counts))
    architecture = ", ".join(bridge.hf_config.architectures or ())
    return RecipePlan(architecture, _count_all(bridge), num_ranks, spell_layout(model), stages)


def spell_layout(model: ModelConfig) -> str:
    """The sizes that are not 1, in the usual letters."""
    sizes = {
        "TP": model.tensor_model_parallel_size,
        "PP": model.pipeline_model_parallel_size,
        "VPP": model.virtual_pipeline_model_parallel_size,
        "CP": model.context_parallel_size,
        "EP": model.expert_model_parallel_size,
    }
    words = [f"{name}{size}" for name, size in sizes.items() if size not in (None, 1)]
    if model.expert_tensor_parallel_size not in (None, model.tensor_model_parallel_size):
        words.append(f"ETP{model.expert_tensor_parallel_size}")
    return " ".join([*(words or ["TP1"]), *(["SP"] if model.sequence_parallel else [])])


def _count_all(bridge: AutoBridge) -> int:
    return sum(math.prod(spec.shape) for spec in bridge.with_prediction_layers(0).specs_of_config())


def _count_stages(unfinished: Any, num_ranks: int, method: PeftMethod | None) -> list[_Count]:
    """The parameters on a rank of each stage; all ranks of a stage have equally many. `method` freezes and adapts.

    Each expert, with what adapts it and its row of the router, adds equally many parameters: with one and with two
    experts a rank is counted what hundreds would have, in a fraction of the time.
    """
    if unfinished.num_moe_experts is None:
        return list(_build_stages(unfinished, num_ranks, method))
    experts_here = unfinished.num_moe_experts // unfinished.expert_model_parallel_size
    one, two = (list(_build_stages(_with_experts(unfinished, number), num_ranks, method)) for number in (1, 2))
    return [first.go_on(second, experts_here - 1) for first, second in zip(one, two, strict=True)]


def _with_experts(unfinished: Any, experts_here: int) -> Any:
    """The provider with that many experts a rank, and a router that is content with them."""
    small = copy.copy(unfinished)
    small.num_moe_experts = experts_here * small.expert_model_parallel_size
    small.moe_router_topk, small.moe_router_pre_softmax = 1, True
    small.moe_router_num_groups = small.moe_router_group_topk = None
    return small


def _build_stages(unfinished: Any, num_ranks: int, method: PeftMethod | None) -> Iterator[_Count]:
    ensure_runtime()
    provider = copy.copy(unfinished)
    provider.finalize()
    stages, virtual = provider.pipeline_model_parallel_size, provider.virtual_pipeline_model_parallel_size
    for stage in range(stages):
        with fake_world(stage * (num_ranks // stages), num_ranks), torch.device("meta"), warnings.catch_warnings():
            # Nothing is computed here; experts and latent attention say these one by one.
            for message in ("`sequence_parallel` is set to `True`", "Warning: tp_group is None"):
                warnings.filterwarnings("ignore", message=message)
            initialize_model_parallel(provider)
            chunks = [provider.provide(vp_stage=number) for number in ([None] if virtual is None else range(virtual))]
            if method is not None:
                method.apply(chunks)
            yield _count(chunks)


def _count(chunks: list[Any]) -> _Count:
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # Megatron marks the parameters of experts so, whose gradients only ranks of the same experts share.
    expert = [parameter for parameter in trained if not getattr(parameter, "allreduce", True)]
    numbers = [sum(parameter.numel() for parameter in chosen) for chosen in (parameters, trained, expert)]
    return _Count(numbers[0], numbers[1] - numbers[2], numbers[2])


def _memory(config: ConfigContainer, provider: Any, stage: int, count: _Count, num_ranks: int) -> RankMemory:
    tensor, pipeline = provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size
    expert_ranks = (provider.expert_tensor_parallel_size or tensor) * provider.expert_model_parallel_size
    weight_bytes = provider.params_dtype.itemsize
    gradient_bytes = 4 if reduces_in_fp32(config) else weight_bytes
    state_bytes = 8 if weight_bytes == 4 else 12
    shared = config.ddp.use_distributed_optimizer
    replicas = num_ranks // (tensor * pipeline) if shared else 1
    expert_replicas = num_ranks // (expert_ranks * pipeline) if shared else 1
    return RankMemory(
        stage=stage,
        weights_bytes=count.held * weight_bytes,
        gradients_bytes=(count.trained_dense + count.trained_expert) * gradient_bytes,
        optimizer_bytes=state_bytes * count.trained_dense // replicas
        + state_bytes * count.trained_expert // expert_replicas,
    )
