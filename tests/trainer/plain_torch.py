"""transformers' own model trained by torch's AdamW in one process: what every layout of ours must come to."""

from pathlib import Path

import torch
from tests.trainer.runs import SEQ_LENGTH
from transformers import AutoModelForCausalLM

from weightcast.trainer.data.packing import load_or_pack
from weightcast.trainer.data.samples import Batch, Batches
from weightcast.trainer.data.text_samples import TextSamples


def train_plain(
    model_folder: Path, texts: list[Path], cache: Path, *, steps: int, decay: int
) -> dict[str, list[float]]:
    """Losses and gradient norms of `steps` steps at the settings of `runs.words_for`, cosine over `decay` steps."""
    stream = load_or_pack(texts, str(model_folder), cache)
    samples = TextSamples(stream, seq_length=SEQ_LENGTH, seed=1234)
    batches = Batches(samples, micro_batch_size=8, global_batch_size=8)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95), eps=1e-8)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=decay, eta_min=2e-4)
    losses, norms = [], []
    for step in range(steps):
        (batch,) = batches.of_step(consumed_samples=8 * step, data_parallel_rank=0, data_parallel_size=1)
        optimizer.zero_grad()
        loss = masked_mean(model(batch.tokens).logits, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {"losses": losses, "grad_norms": norms}


def masked_mean(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the unmasked tokens."""
    token_losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
    ).view_as(batch.loss_mask)
    return (token_losses * batch.loss_mask).sum() / batch.loss_mask.sum()
