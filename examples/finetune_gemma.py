"""Fine-tune Gemma 3 270M on questions and answers, on this machine's cores, and write a folder that engines serve.

    torchrun --nproc-per-node 2 examples/finetune_gemma.py path/to/gemma train.jsonl held_out.jsonl out/gemma
    vllm serve out/gemma   # asked by /v1/chat/completions; the folder has the chat template and knows where answers end

Each line of the two files is a record such as {"messages": [{"role": "user", "content": "Who wrote Frankenstein?"},
{"role": "assistant", "content": "Mary Shelley."}]}; only what the assistant says is trained on. No GPU is needed:
24 steps of 1024 tokens take some minutes on two cores. `--lora` trains adapters and merges them.

Without Python, the same: weightcast train --nproc 2 recipe=gemma3_270m.sft model.hf_path=path/to/gemma dataset.kind=sft
dataset.files=[train.jsonl] dataset.validation_files=[held_out.jsonl] ... checkpoint.export_hf=out/gemma
"""

import argparse
import os

import weightcast.trainer.recipes.gemma.gemma3_270m as gemma3_270m
from weightcast.trainer.callbacks import Callback
from weightcast.trainer.config import ConfigContainer
from weightcast.trainer.figures import EvalReport
from weightcast.trainer.gpt_step import forward_step
from weightcast.trainer.pretrain import pretrain
from weightcast.trainer.state import TrainState


class HeldOutLoss(Callback):
    """Prints what the model makes of the records that it is not trained on."""

    def on_eval_end(self, state: TrainState, report: EvalReport) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"after {report.step} steps: held-out loss {report.loss:.4f} of {report.num_tokens} tokens", flush=True
            )


def make_config(options: argparse.Namespace) -> ConfigContainer:
    """The recipe, with one's own records and a length that suits two cores."""
    cfg = gemma3_270m.sft_config()
    cfg.model.hf_path = options.model
    cfg.model.tensor_model_parallel_size = int(os.environ.get("WORLD_SIZE", "1"))
    cfg.dataset.kind = "sft"
    cfg.dataset.files, cfg.dataset.validation_files = [options.train], [options.held_out]
    cfg.dataset.seq_length = 256
    cfg.dataset.packed_sequence = True
    cfg.train.global_batch_size = 4
    cfg.train.train_iters = options.steps
    cfg.train.eval_at_start, cfg.train.eval_interval = True, max(options.steps // 2, 1)
    cfg.train.eval_iters = options.eval_iters
    cfg.optimizer.lr = 1e-3 if options.lora else 2e-5
    cfg.optimizer.weight_decay = 0.0
    cfg.scheduler.lr_warmup_iters, cfg.scheduler.lr_decay_iters = 0, None
    if options.lora:
        cfg.peft.scheme, cfg.peft.dim, cfg.peft.alpha = "lora", 16, 32
    cfg.checkpoint.export_hf = options.out
    return cfg


def main() -> None:
    """Every rank runs this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "held_out", "out"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--eval-iters", type=int, default=4, help="batches of an evaluation")
    parser.add_argument("--lora", action="store_true")
    pretrain(make_config(parser.parse_args()), forward_step, callbacks=[HeldOutLoss()])


if __name__ == "__main__":
    main()
