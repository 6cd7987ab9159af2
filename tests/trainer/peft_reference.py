"""The same adapters in the `peft` library, on transformers' own model, trained by plain PyTorch.

`peft` has an A for each of q_proj, k_proj and v_proj; where Megatron's fused linear has one, the three are made one
parameter. Experts, which transformers stacks, are adapted by `target_parameters`, one A for gate and up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from weightcast.trainer.data.samples import Batch, Batches

View = Callable[[torch.Tensor], torch.Tensor]
RANK, ALPHA = 4, 6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass
class Reference:
    """A model of `peft`, and where in its parameters each tensor of a PEFT folder lies."""

    model: PeftModel
    places: dict[str, tuple[torch.nn.Parameter, View]] = field(default_factory=dict)

    def set_values(self, adapter: Path) -> None:
        """Take the values of a PEFT folder."""
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert tensors.keys() == self.places.keys()
        with torch.no_grad():
            for name, (parameter, view) in self.places.items():
                view(parameter).copy_(tensors[name])

    def gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Of the mean loss of a batch, by the folder's names."""
        self.model.zero_grad()
        loss(self.model, batch).backward()  # type: ignore[no-untyped-call]
        found: dict[str, torch.Tensor] = {}
        for name, (parameter, view) in self.places.items():
            assert parameter.grad is not None, name
            found[name] = view(parameter.grad).clone()
        return found

    def train(self, batches: Batches, num_steps: int) -> dict[str, list[float]]:
        """Losses and gradient norms of the trainer's settings in `runs.words_for`."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-8)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=2e-4)
        losses, norms = [], []
        for step in range(num_steps):
            (batch,) = batches.of_step(consumed_samples=8 * step, data_parallel_rank=0, data_parallel_size=1)
            optimizer.zero_grad()
            value = loss(self.model, batch)
            value.backward()  # type: ignore[no-untyped-call]
            norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
            optimizer.step()
            schedule.step()
            losses.append(value.item())
        return {"losses": losses, "grad_norms": norms}


def loss(model: Any, batch: Batch) -> torch.Tensor:
    """The mean over the unmasked tokens."""
    logits = model(input_ids=batch.tokens).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    return (each.view_as(batch.loss_mask) * batch.loss_mask).sum() / batch.loss_mask.sum()


def make_reference(base: Path, *, use_dora: bool, shared: tuple[tuple[str, ...], ...]) -> Reference:
    """`peft` on the model of `base`; `shared` are groups of linears that have one A."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    experts = hasattr(model.config, "num_experts")
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=ATTENTION if experts else ATTENTION + MLP,
        target_parameters=EXPERTS if experts else None,
        use_dora=use_dora,
        task_type="CAUSAL_LM",
    )
    reference = Reference(get_peft_model(model, config))
    for path, module in reference.model.named_modules():
        if isinstance(module, ParamWrapper):
            _place_experts(reference, path, module)
        elif hasattr(module, "lora_A") and "default" in module.lora_A:
            _place_linear(reference, path, module)
    _share(reference, shared)
    return reference


def _place_linear(reference: Reference, path: str, module: Any) -> None:
    reference.places[f"{path}.lora_A.weight"] = module.lora_A["default"].weight, torch.Tensor.detach
    reference.places[f"{path}.lora_B.weight"] = module.lora_B["default"].weight, torch.Tensor.detach
    if "default" in module.lora_magnitude_vector:
        magnitude = module.lora_magnitude_vector["default"].weight
        reference.places[f"{path}.lora_magnitude_vector"] = magnitude, torch.Tensor.detach


def _place_experts(reference: Reference, path: str, module: ParamWrapper) -> None:
    """`peft` stacks A's along the rows, [expert, rank], and B's along the columns, [rank, expert]."""
    number, front = module.num_experts, path.partition(".experts")[0] + ".experts"
    factor_in, factor_out = module.lora_A["default"].weight, module.lora_B["default"].weight
    fused = module.parameter_name == "gate_up_proj"
    rows = factor_out.shape[0] // (2 if fused else 1)

    def of_a(expert: int) -> View:
        return lambda tensor: tensor.detach().view(number, RANK, -1)[expert]

    def of_b(expert: int, first: int) -> View:
        return lambda tensor: tensor.detach().view(-1, RANK, number)[first : first + rows, :, expert]

    for expert in range(number):
        for place, name in enumerate(("gate_proj", "up_proj") if fused else ("down_proj",)):
            reference.places[f"{front}.{expert}.{name}.lora_A.weight"] = factor_in, of_a(expert)
            reference.places[f"{front}.{expert}.{name}.lora_B.weight"] = factor_out, of_b(expert, place * rows)


def _share(reference: Reference, groups: tuple[tuple[str, ...], ...]) -> None:
    modules = dict(reference.model.named_modules())
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        for group in groups:
            if name == group[0] and hasattr(module, "lora_A"):
                weight = module.lora_A["default"].weight
                for other in group[1:]:
                    modules[f"{parent}.{other}"].lora_A["default"].weight = weight
                    reference.places[f"{parent}.{other}.lora_A.weight"] = weight, torch.Tensor.detach
