"""A finetuning method of your own: a trained gain for each output of some linears, as in (IA)3, on a frozen base.

    PYTHONPATH=examples python -m weightcast.trainer.pretrain model.hf_path=path/to/hf peft.scheme=own_adapter:Gains \\
        peft.target_modules=[linear_fc2] train.train_iters=5 checkpoint.export_hf=out/merged

The scheme names a function from `cfg.peft` to the method; here the class itself. Checkpoints hold the gains alone;
engines and exported folders get the weights that `merged_weight` gives. It is for ranks that have their linears to
themselves (any data or pipeline parallelism); what tensor parallelism wants besides says `OwnMethod`.
"""

import torch
from torch import nn

from weightcast.trainer.peft.method import OwnMethod


class Gains(OwnMethod):
    """y = g · W·x, row by row; g starts as ones."""

    def transform(self, module: nn.Module, name: str) -> None:
        """Put a gain on each target."""
        if name.rpartition(".")[2] in self.peft.target_modules:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            module.adapter = nn.ParameterDict({"gain": nn.Parameter(weight.new_ones(weight.shape[0]))})
            module.register_forward_hook(_scale_output)

    def merged_weight(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """The rows of the weight, each times its gain."""
        if name.rpartition(".")[2] not in self.peft.target_modules:
            return None
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        return weight * module.adapter["gain"].view(-1, 1)  # type: ignore[index,operator]


def _scale_output(
    module: nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Megatron's linears give (output, bias that the caller adds)."""
    return output[0] * module.adapter["gain"], output[1]  # type: ignore[index]
