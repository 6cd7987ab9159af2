"""The families that come with weightcast, and how a configuration finds its own.

There is nothing to register with: the families are a tuple, and a user's own are passed in front of them.

    find_bridge(hf_config)
    find_bridge(hf_config, (MY_FAMILY, *BUILT_IN))
"""

from collections.abc import Sequence

from transformers import PretrainedConfig

from weightcast.bridges.models.bridge import ModelBridge
from weightcast.bridges.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from weightcast.bridges.models.gemma2 import GEMMA2
from weightcast.bridges.models.gemma3 import GEMMA3
from weightcast.bridges.models.glm4 import GLM, GLM4
from weightcast.bridges.models.glm4_moe import GLM4_MOE
from weightcast.bridges.models.gpt_oss import GPT_OSS
from weightcast.bridges.models.llama import LLAMA
from weightcast.bridges.models.mistral import MISTRAL
from weightcast.bridges.models.mixtral import MIXTRAL
from weightcast.bridges.models.phi3 import PHI3
from weightcast.bridges.models.qwen2 import QWEN2
from weightcast.bridges.models.qwen2_5_vl import QWEN2_5_VL
from weightcast.bridges.models.qwen2_moe import QWEN2_MOE
from weightcast.bridges.models.qwen3 import QWEN3
from weightcast.bridges.models.qwen3_moe import QWEN3_MOE
from weightcast.sync.errors import UnsupportedModel

BUILT_IN: tuple[ModelBridge, ...] = (
    LLAMA,
    QWEN2,
    QWEN3,
    MISTRAL,
    GEMMA2,
    GEMMA3,
    PHI3,
    GLM,
    GLM4,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN2_5_VL,
    GLM4_MOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
)


def supported_architectures(bridges: Sequence[ModelBridge] = BUILT_IN) -> tuple[str, ...]:
    """Names of the HF model classes that have a bridge, sorted."""
    return tuple(sorted({name for bridge in bridges for name in bridge.architectures}))


def find_bridge(hf: PretrainedConfig, bridges: Sequence[ModelBridge] = BUILT_IN) -> ModelBridge:
    """The first of `bridges` that covers the configuration's architecture.

    Raises UnsupportedModel, with the architectures that are supported, when none does or the configuration has none.
    """
    named = getattr(hf, "architectures", None) or []
    if isinstance(named, str):
        named = [named]
    for bridge in bridges:
        if any(name in bridge.architectures for name in named):
            return bridge
    raise UnsupportedModel(
        f"no bridge for the architecture {', '.join(named) or '(none named in the configuration)'}; supported are "
        f"{', '.join(supported_architectures(bridges))}. A family of your own is a ModelBridge given as `bridges`"
    )
