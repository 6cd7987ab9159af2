"""What runs on each rank for `mixed_precision` and `comm_overlap`: trainings, and what Megatron's records then held."""

from typing import Any

from tests.trainer.runs import sum_of

from weightcast.bridges.process_groups import destroy_model_parallel
from weightcast.sync.errors import WeightcastError
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.overrides import load_config
from weightcast.trainer.pretrain import run_training
from weightcast.trainer.state import TrainState

from megatron.core.utils import get_model_config  # isort: skip  (after weightcast, which quietens its notices)

OF_DDP = ("grad_reduce_in_fp32", "overlap_grad_reduce", "overlap_param_gather", "align_param_gather", "bucket_size")
OF_MODEL = ("bf16", "fp16", "batch_p2p_comm", "overlap_p2p_comm")
OF_OPTIMIZER = ("fp16", "initial_loss_scale", "hysteresis", "overlap_param_gather_with_optimizer_step")


class Records(Callback):
    """Writes down what Megatron was told."""

    def on_train_start(self, state: TrainState) -> None:
        chunk = state.model[0]
        model, optimizer = get_model_config(chunk), state.optimizer.chained_optimizers[0].config
        self.found = {
            "ddp": {name: getattr(chunk.ddp_config, name) for name in OF_DDP},
            "model": {name: getattr(model, name) for name in OF_MODEL},
            "optimizer": {name: getattr(optimizer, name) for name in OF_OPTIMIZER},
            "weights": str(next(chunk.parameters()).dtype),
            "gradients": str(chunk.buffers[0].grad_data.dtype),
            "buckets": len(chunk.buffers[0].buckets),
            "synchronised together": model.param_sync_func is not None,
        }


def train_with_records(runs: dict[str, list[str]]) -> dict[str, Any]:
    """Each run's figures and records, or the error it ended with."""
    results: dict[str, Any] = {}
    for name, words in runs.items():
        records, config = Records(), load_config(words)
        try:
            reports = run_training(config, forward_step, callbacks=[records]).reports
            results[name] = records.found | {
                "loss": [report.loss for report in reports],
                "grad_norm": [report.grad_norm for report in reports],
                "skipped": [report.skipped for report in reports],
                "exported": sum_of(config.checkpoint.export_hf),
            }
        except WeightcastError as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        destroy_model_parallel()
    return results
