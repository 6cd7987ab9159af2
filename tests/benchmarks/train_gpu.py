"""The cases of training on one GPU: a step of ours against transformers with plain PyTorch, and the share of the peak.

The model is that of the recipe for Llama 3.2 1B with random weights, made on the device. Ours is in bf16 with fp32
masters and Megatron's optimizer; transformers' in fp32 under autocast to bf16, which is what its Trainer's `bf16=True`
does, with torch's attention and fused AdamW. Weights, batches, rate and clipping are the same, and the losses compared.

Imports without a GPU; measures only with one.
"""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import take_turns
from records import CaseError, Reading, Settings
from train_step import LR, Contestant, Ours, batches_of, compare_losses, make_adam

from weightcast.bridges.hf_config import config_of_fields
from weightcast.trainer.config import ConfigContainer, ModelConfig
from weightcast.trainer.data.samples import Batch, Batches
from weightcast.trainer.flops import flops_of_sample
from weightcast.trainer.peak import peak_tflops, present_card
from weightcast.trainer.recipes.llama.llama32_1b import pretrain_config
from weightcast.trainer.recipes.proxy import shrink_model

# Numbers that bf16 rounds are off by 2^-9 of themselves at most: a loss of 12 by 0.02 if all tokens' went one way, and
# their mean by far less (0.001 for a small model). A step that was left out or made of other samples shows as 0.1 and
# more, for the loss falls from 12 to 7 in the first steps.
TOLERANCE = 2.0**-9 * 12
# Both models with their optimizers are 42 GB. Of the rest a micro-batch of one sequence takes 20 of theirs, one of four
# 65; of ours, which are 23 GB alone, one of two takes up to 30.
LARGE_GPU_BYTES = 120e9


@dataclass(frozen=True)
class Size:
    """What is trained, and how much of it at once."""

    model: Mapping[str, Any]
    seq_length: int
    micro_batch: int
    global_batch: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.seq_length * self.global_batch

    def config(self) -> ConfigContainer:
        """The recipe, with a rate that stays as it is."""
        config = pretrain_config()
        config.model = ModelConfig(hf_config=dict(self.model))
        config.dataset.seq_length = self.seq_length
        config.train.micro_batch_size, config.train.global_batch_size = self.micro_batch, self.global_batch
        config.train.train_iters, config.scheduler.lr_decay_style = 1_000_000, "constant"
        config.scheduler.lr_warmup_iters, config.scheduler.lr_decay_iters = 0, None
        config.optimizer.lr = config.optimizer.min_lr = LR
        return config

    def batches(self) -> Batches:
        """Tokens of which few are frequent, as in text, so that there is something to learn in the first steps."""
        draw = np.random.default_rng(0).zipf(1.3, 64 * self.seq_length + 1)
        tokens = (draw % self.model["vocab_size"]).astype(np.int32)
        sizes = {"micro_batch": self.micro_batch, "global_batch": self.global_batch}
        return batches_of(tokens, seq_length=self.seq_length, **sizes)


def size_for(settings: Settings, device: str, *, is_alone: bool) -> Size:
    """The size for the GPU's memory: ours alone, or with transformers' model beside it."""
    model = pretrain_config().model
    assert isinstance(model, ModelConfig)
    if settings.quick:
        return Size(shrink_model(model.hf_config), seq_length=64, micro_batch=2, global_batch=4)
    is_large = torch.cuda.get_device_properties(device).total_memory > LARGE_GPU_BYTES
    return Size(model.hf_config, 4096, micro_batch=4 if is_large else 2 if is_alone else 1, global_batch=8)


class Watched:
    """A contestant's steps on a device: tokens/s, and what of the GPU's memory is its own."""

    def __init__(self, size: Size, device: str) -> None:
        self._size, self._device = size, device
        self.resident_bytes = self.peak_bytes = 0
        self._before = _allocated(device)

    def built(self, contestant: Contestant) -> None:
        """What was allocated since the beginning is the contestant's."""
        self._contestant = contestant
        self.resident_bytes = _allocated(self._device) - self._before

    def take_step(self) -> float:
        """Tokens/s of a step, from an idle GPU to an idle GPU."""
        before = _allocated(self._device)
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        start_s = _now(self._device)
        self._contestant.take_steps()
        seconds = _now(self._device) - start_s
        if self._device != "cpu":
            of_others = before - self.resident_bytes
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - of_others)
            self.resident_bytes = _allocated(self._device) - of_others
        return self._size.tokens / seconds


def measure_train_step(settings: Settings, *, device: str = "cuda") -> Reading:
    """Tokens/s of ours and of plain PyTorch, in turns; the rate of a large product in the same rounds."""
    size = size_for(settings, device, is_alone=False)
    watched = {"ours": Watched(size, device)}
    ours = Ours(size.config(), size.batches(), steps_a_round=1)
    watched["ours"].built(ours)
    watched["theirs"] = Watched(size, device)
    theirs = _Plain(size, device, ours)
    watched["theirs"].built(theirs)
    product = Product(device, quick=settings.quick)
    contestants = {name: item.take_step for name, item in watched.items()}
    rates = take_turns({**contestants, "product": product.tflops}, settings.rounds)
    worst = compare_losses(ours.losses, theirs.losses, TOLERANCE)
    tflops = {name: median(rates[name]) * _flops_of_token(ours, size) / 1e12 for name in watched}
    details = {f"{name}_memory_gb": item.peak_bytes / 1e9 for name, item in watched.items()}
    details |= _shares(tflops, median(rates["product"])) | {f"{name}_s": s for name, s in ours.phases_s.items()}
    note = (
        f"{_describe(ours, size)}; theirs eager under autocast to bf16, SDPA, fused AdamW; losses fall from "
        f"{ours.losses[0]:.2f} to {ours.losses[-1]:.2f} and differ by {worst:.1g} at most; model TFLOP/s "
        f"{tflops['ours']:.0f} and {tflops['theirs']:.0f}, a product of two {product} {median(rates['product']):.0f}; "
        f"peak memory {details['ours_memory_gb']:.1f} and {details['theirs_memory_gb']:.1f} GB"
    )
    _close(ours)
    return Reading(rates["ours"], rates["theirs"], "tokens/s", note, details)


def measure_peak_share(settings: Settings, *, device: str = "cuda") -> Reading:
    """Model TFLOP/s of our step, alone on the GPU, next to those of a large product in the same rounds."""
    size = size_for(settings, device, is_alone=True)
    watched = Watched(size, device)
    ours = Ours(size.config(), size.batches(), steps_a_round=1)
    watched.built(ours)
    product = Product(device, quick=settings.quick)
    rates = take_turns({"ours": watched.take_step, "product": product.tflops}, settings.rounds)
    if not ours.losses[-1] < ours.losses[0]:
        raise CaseError(f"the loss does not fall: {ours.losses}")
    values = [rate * _flops_of_token(ours, size) / 1e12 for rate in rates["ours"]]
    details = {"tokens_per_s": median(rates["ours"]), "ours_memory_gb": watched.peak_bytes / 1e9}
    details |= _shares({"ours": median(values)}, median(rates["product"]))
    details |= {f"{name}_s": s for name, s in ours.phases_s.items()}
    peak = peak_tflops(present_card())
    of_sheet = f"{median(values) / peak:.1%} of the data sheet's {peak:g} TFLOP/s" if peak else "no data sheet's figure"
    note = (
        f"{_describe(ours, size)}; {details['tokens_per_s']:.0f} tokens/s, peak memory {details['ours_memory_gb']:.1f} "
        f"GB; {of_sheet}; the step is {', '.join(f'{name} {s:.3f} s' for name, s in ours.phases_s.items())}"
    )
    _close(ours)
    return Reading(values, rates["product"], "TFLOP/s", note, details)


class _Plain(Contestant):
    """Transformers' model with the weights of `ours` as they are now, in fp32 under autocast."""

    def __init__(self, size: Size, device: str, ours: Ours) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__(size.batches(), steps_a_round=1)
        self._size, self._device = size, torch.device(device)
        with self._device:
            self._model = AutoModelForCausalLM.from_config(
                config_of_fields(size.model), dtype=torch.float32, attn_implementation="sdpa"
            )
        self._model.train()
        assert ours.bridge is not None, "the configuration is Hugging Face's"
        weights = dict(ours.bridge.export_hf_weights(ours.state.model, cpu=False, show_progress=False))
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:  # tied to the embedding
            raise CaseError(f"transformers' model lacks {unexpected} and wants {missing}")
        self._optimizer = make_adam(self._model, fused=True)

    def _step(self) -> float:
        size = self._size
        consumed = size.global_batch * len(self.losses)
        batches = self._batches.of_step(consumed_samples=consumed, data_parallel_rank=0, data_parallel_size=1)
        num_tokens = sum(float(batch.loss_mask.sum()) for batch in batches)
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self._device)
        for batch in batches:
            total += self._backward(batch.to(self._device), num_tokens)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return total.item()

    def _backward(self, batch: Batch, num_tokens: float) -> torch.Tensor:
        """This micro-batch's part of the mean loss."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            logits = self._model(batch.tokens, use_cache=False).logits
        rows = logits.float().flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(rows, batch.labels.flatten(), reduction="none")
        loss = (losses * batch.loss_mask.flatten()).sum() / num_tokens
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class Product:
    """A product of two square bf16 matrices: what the card does when nothing is in the way."""

    def __init__(self, device: str, *, quick: bool) -> None:
        self._device, self._size, self._repeats = device, 128 if quick else 8192, 2 if quick else 20
        self._left, self._right = (
            torch.randn(self._size, self._size, device=device, dtype=torch.bfloat16) for _ in range(2)
        )
        self._out = torch.empty_like(self._left)

    def __str__(self) -> str:
        return f"bf16 matrices of {self._size} x {self._size}"

    def tflops(self) -> float:
        """TFLOP/s of a few products one after another."""
        start_s = _now(self._device)
        for _ in range(self._repeats):
            torch.mm(self._left, self._right, out=self._out)
        return self._repeats * 2 * self._size**3 / (_now(self._device) - start_s) / 1e12


def _shares(tflops: Mapping[str, float], product: float) -> dict[str, float]:
    """Of each contestant: model TFLOP/s, as shares of the product's rate and of the data sheet's."""
    peak = peak_tflops(present_card())
    details = {"product_tflops": product}
    for name, value in tflops.items():
        details |= {f"{name}_tflops": value, f"{name}_share_of_product": value / product}
        if peak is not None:
            details[f"{name}_share_of_data_sheet"] = value / peak
    return details


def _flops_of_token(ours: Ours, size: Size) -> float:
    return flops_of_sample(ours.state.provider, size.seq_length) / size.seq_length


def _describe(ours: Ours, size: Size) -> str:
    num_parameters = sum(item.numel() for chunk in ours.state.model for item in chunk.parameters())
    kernels = "compiled" if ours.state.provider.uses_compiled_kernels else "not compiled"
    return (
        f"Llama of {num_parameters / 1e9:.2f} B parameters, {size.global_batch} x {size.seq_length} tokens a step, "
        f"{size.micro_batch} x {size.seq_length} a micro-batch, elementwise kernels {kernels}"
    )


def _close(ours: Ours) -> None:
    """Give the groups and the memory up, so that another case may have them."""
    ours.close()
    ours.state.release()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.memory_allocated()


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()
