"""Multi-token prediction: layers behind the last one that learn to guess tokens further ahead.

Each joins the embedding of the next token to the hidden state before it, runs one layer like the model's last, and uses
the model's own output layer (DeepSeek-V3 report, section 2.2). They live on the pipeline stage of the output layer,
which therefore has a copy of the embedding. Their losses reach the gradients of training; the model's outputs are those
without them.
"""

import copy
import warnings
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig, multi_token_prediction
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
    roll_tensor,
)
from torch import nn

from weightcast.bridges.runtime import has_transformer_engine

# The layer inside, in global keys; the module itself megatron-core calls so up to 0.16, and from 0.17 on otherwise.
INNER_LAYER = "transformer_layer"
_MODULE_NAMES = (INNER_LAYER, "mtp_model_layer")
INNER_MODULE = next(item.name for item in fields(MultiTokenPredictionLayerSubmodules) if item.name in _MODULE_NAMES)


class PredictionLayer(MultiTokenPredictionLayer):  # type: ignore[misc]
    """Megatron's prediction layer, without its warning of itself that it does not pass the tensor parallel group on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning: tp_group is None", DeprecationWarning)
            super().__init__(*args, **kwargs)


def prediction_block(
    config: TransformerConfig, layer: ModuleSpec, norm: type[nn.Module], vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The prediction layers of this pipeline stage, each around a layer of spec `layer`; None where there are none."""
    count = get_mtp_num_layers_to_build(config, vp_stage=vp_stage) if config.mtp_num_layers else 0
    if count == 0:
        return None
    linear: Any = LocalSpecProvider().column_parallel_linear()
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        linear = TESpecProvider().column_parallel_linear()
    inner = {INNER_MODULE: layer}
    submodules = MultiTokenPredictionLayerSubmodules(enorm=norm, hnorm=norm, eh_proj=linear, layer_norm=norm, **inner)
    spec = ModuleSpec(module=PredictionLayer, submodules=submodules)
    return MultiTokenPredictionBlockSubmodules(layer_specs=[spec] * count)


class PredictingGPTModel(GPTModel):  # type: ignore[misc]
    """A stage of Megatron's model with prediction layers, here or on the stage before, mended in three places."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process and self.mtp_process and self.share_embeddings_and_output_weights:
            # The output layer takes the weight of this stage's embedding. Off the first stage Megatron gives it one of
            # its own as well, which nothing uses and which its sharded_state_dict refuses.
            self.output_layer.weight = None
        self._shares: list[torch.Tensor] = []

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The losses of all tokens; Megatron asks for those of the prediction layers first, in order."""
        losses: torch.Tensor = super().compute_language_model_loss(labels, logits)
        return losses * self._shares.pop(0) if self._shares else losses

    def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
        self._shares = self._shares_of_rank(kwargs) if self.post_process and kwargs["labels"] is not None else []
        return self._postprocess_what_is_asked(*args, **kwargs)

    def _shares_of_rank(self, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """What the losses of each prediction layer are multiplied with under context parallelism.

        Megatron divides a rank's sum by its own number of tokens. The rank that has the end of the sequence has fewer
        for each token further ahead, and the mean over ranks would count its tokens for more than the others'.
        """
        config, group = self.config, self.pg_collection.cp
        rescales = hasattr(multi_token_prediction, "process_mtp_loss")  # from 0.17 on
        if group.size() == 1 or (config.calculate_per_token_loss and not rescales):
            return []
        mask, packed = kwargs.get("loss_mask"), kwargs.get("packed_seq_params")
        mask = torch.ones_like(kwargs["labels"]) if mask is None else mask
        counts = [mask.sum()]
        for _ in range(config.mtp_num_layers):
            mask, count = roll_tensor(mask, shifts=-1, dims=-1, cp_group=group, packed_seq_params=packed)
            counts.append(count)
        here = torch.stack(counts).double()
        mean = here.clone()
        dist.all_reduce(mean, group=group)
        mean /= group.size()
        first, first_mean = (here[0], mean[0]) if config.calculate_per_token_loss else (1, 1)
        return list((here[1:] / first) / (mean[1:] / first_mean).clamp(min=1e-9))

    def _postprocess_what_is_asked(self, *args: Any, **kwargs: Any) -> Any:
        """Logits where there are no labels. Up to 0.16 Megatron copies them unasked; later versions need no mend."""
        if kwargs["labels"] is not None or not self.post_process or hasattr(multi_token_prediction, "process_mtp_loss"):
            return super()._postprocess(*args, **kwargs)
        config: Any = self.config
        if not self.mtp_process:  # the stage before has put what its prediction layers give behind the model's own
            kwargs["hidden_states"] = kwargs["hidden_states"].chunk(1 + config.mtp_num_layers)[0]
        self.config: Any = copy.copy(config)
        self.config.mtp_num_layers = None
        try:
            return super()._postprocess(*args, **kwargs | {"mtp_in_postprocess": False})
        finally:
            self.config = config
