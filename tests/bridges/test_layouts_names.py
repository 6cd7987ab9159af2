"""Every family's table maps the names that Transformer Engine's layers have, with the shards of any rank.

Nothing of Transformer Engine runs here: its names and shapes are `engine_names`, cut into synthetic shards. That the
layers which run here have the same keys and shapes is checked beside it.
"""

from collections.abc import Iterator

import pytest
import torch
from tests.bridges.engine_names import EngineTensor, engine_tensors
from tests.bridges.parity_models import MODELS, MOE_MODELS
from tests.bridges.support_families import FAMILIES
from tests.bridges.tiny_dense import DENSE_MODELS
from tests.bridges.tiny_gpt_oss import GPT_OSS_MODELS
from tests.bridges.tiny_mla import ALL_MLA_MODELS
from tests.bridges.tiny_mtp import MTP_MODELS
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from weightcast.bridges import AutoBridge
from weightcast.bridges.dry_run_layout import Layout
from weightcast.bridges.dry_run_stages import apply_layout, read_seats
from weightcast.bridges.plan import Stages, lay_table
from weightcast.bridges.rule_table import RuleTable
from weightcast.bridges.shards import ParameterView, Shard
from weightcast.bridges.standalone_mapped import dimensions_of
from weightcast.sync.regions import Region, find_tiling_fault

# Megatron's own call, for latent attention without a latent of queries.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

CONFIGURATIONS = MODELS | MOE_MODELS | DENSE_MODELS | ALL_MLA_MODELS | GPT_OSS_MODELS | MTP_MODELS
COMPARED = [name for family in FAMILIES.values() for name in family.models if name in CONFIGURATIONS]


def read_config(model: str) -> PretrainedConfig:
    config = CONFIGURATIONS[model]()
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def cut(tensor: EngineTensor, rank: int, size: int) -> Iterator[Shard]:
    """The shards of one rank of `size`; experts are cut whole and their rows or columns are not."""
    parts = 2 if tensor.halves else 1
    axis = 0 if tensor.experts else tensor.axis
    if tensor.experts or tensor.axis is None:
        parts = 1
    for part in range(parts):
        offset, shape = [0] * len(tensor.shape), list(tensor.shape)
        if axis is not None:
            shape[axis] = tensor.shape[axis] // parts // size
            offset[axis] = (part * size + rank) * shape[axis]
        parameter = torch.empty(shape, device="meta")
        view = ParameterView(parameter, tuple(shape), parameter.stride(), 0)
        yield Shard(tensor.key, tensor.shape, tuple(offset), view)


@pytest.mark.parametrize("model", COMPARED)
def test_the_table_maps_the_names_of_transformer_engine(model: str) -> None:
    bridge = AutoBridge.from_hf_config(read_config(model))
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.finalize()
    tensors, ranks = engine_tensors(provider), 2
    table = RuleTable.make(bridge.family.rules(bridge.hf_config), dimensions_of(provider), bridge.hf_specs())
    regions: dict[str, set[Region]] = {}
    for rank in range(ranks):
        shards = [shard for tensor in tensors for shard in cut(tensor, rank, ranks)]
        for held in lay_table(table, shards, Stages(first=True, last=True)).regions:
            regions.setdefault(held.region.name, set()).add(held.region)
    for spec in table.specs.values():
        assert find_tiling_fault(spec, list(regions[spec.name])) is None, spec


@pytest.mark.parametrize("model", COMPARED)
def test_layers_without_transformer_engine_have_its_names(model: str) -> None:
    provider = AutoBridge.from_hf_config(read_config(model)).to_megatron_provider(load_weights=False)
    apply_layout(provider, Layout())
    ((_, boxes),) = read_seats(provider, Layout())
    ours = {(box.key, box.global_shape) for box in boxes}
    assert ours == {(tensor.key, tensor.shape) for tensor in engine_tensors(provider)}
