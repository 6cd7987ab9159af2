"""Random small Qwen2.5-VL models, and batches with images, a video and text alone.

Sizes are picked against accidents: the vocabulary is odd, images are no squares and differ, windows of the vision tower
do not divide them, a third of its blocks sees whole images, and frames of the video are a fractional time apart.

    write_vl_model("qwen2.5-vl", tmp_path)
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SEQUENCE = 56
IMAGE, VIDEO, START, END, PAD = 140, 141, 142, 143, 0
TEXT: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 500.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
    "patch_size": 4,
    "window_size": 16,
    "tokens_per_second": 2,
    "initializer_range": 0.15,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "mrope_section": [2, 3, 3], "factor": 4.0} | {
    "original_max_position_embeddings": 32
}


def _config(text: dict[str, Any] | None = None, *, tied: bool = False) -> PretrainedConfig:
    fields = deepcopy({"text_config": TEXT | (text or {}), "vision_config": VISION})  # the configuration changes them
    return Qwen2_5_VLConfig(**fields, tie_word_embeddings=tied, **TOKENS)


VL_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2.5-vl": _config,
    "qwen2.5-vl-tied-one-kv-head-yarn": lambda: _config({"num_key_value_heads": 1, "rope_parameters": YARN}, tied=True),
}
# What processors leave beside the weights; nothing here reads them, and exports must keep them.
COMPANIONS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


def make_vl_model(name: str) -> PreTrainedModel:
    """The random model in fp32, with nothing left at the constants that a new model starts with."""
    torch.manual_seed(len(name))
    model = Qwen2_5_VLForConditionalGeneration._from_config(VL_MODELS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def _tokens(generator: torch.Generator, parts: list[int | tuple[int, int]], pad_left: int = 0) -> torch.Tensor:
    """One row: so many tokens of text, or (token, count) between a start and an end; filled up with padding."""
    row = [PAD] * pad_left
    for part in parts:
        if isinstance(part, tuple):
            row += [START, *[part[0]] * part[1], END]
        else:
            row += torch.randint(3, 140, (part,), generator=generator).tolist()
    return torch.tensor(row + [PAD] * (SEQUENCE - len(row)))


def batches() -> dict[str, dict[str, torch.Tensor]]:
    """What the HF model is called with, by case: two rows each, in different ways padded.

    Two images of different sizes and one; an image in one row only; a video and an image; text.
    """
    generator = torch.Generator().manual_seed(5)

    def pixels(grids: torch.Tensor) -> torch.Tensor:
        return torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4, generator=generator)

    three, one, video = (
        torch.tensor(grids) for grids in ([[1, 6, 10], [1, 8, 4], [1, 4, 4]], [[1, 10, 6]], [[3, 4, 6]])
    )
    rows = {
        "images": [
            _tokens(generator, [5, (IMAGE, 15), 7, (IMAGE, 8), 17]),
            _tokens(generator, [3, (IMAGE, 4), 36], pad_left=11),
        ],
        "image": [_tokens(generator, [8, (IMAGE, 15), 20]), _tokens(generator, [56])],
        "video": [_tokens(generator, [30]), _tokens(generator, [4, (VIDEO, 18), 6, (IMAGE, 15), 5])],
        "text": [_tokens(generator, [56]), _tokens(generator, [48])],
    }
    cases: dict[str, dict[str, torch.Tensor]] = {}
    for name, row in rows.items():
        tokens = torch.stack(row)
        cases[name] = {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}
    cases["images"] |= {"pixel_values": pixels(three), "image_grid_thw": three}
    for name in ("image", "video"):
        cases[name] |= {"pixel_values": pixels(one), "image_grid_thw": one}
    cases["video"] |= {"pixel_values_videos": pixels(video), "video_grid_thw": video}
    cases["video"]["second_per_grid_ts"] = torch.tensor([1.7])
    return cases


def run_transformers(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits; processors pass the kinds of tokens, without which the model numbers images as if they were text."""
    tokens = batch["input_ids"]
    logits: torch.Tensor = model(**batch, mm_token_type_ids=(tokens == IMAGE) * 1 + (tokens == VIDEO) * 2).logits
    return logits


def labels_and_mask(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next tokens, and which of them count: those of tokens that are followed by one."""
    tokens, seen = batch["input_ids"], batch["attention_mask"].bool()
    follows = torch.zeros_like(seen)
    follows[:, :-1] = seen[:, 1:]
    return tokens.roll(-1, dims=1), seen & follows


def write_vl_model(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the model in `dtype` to `model`; of the fp32 model also what transformers computes from `batches()`.

    Logits by case and the loss go to `expected.safetensors`, gradients to a folder as if they were a model.
    """
    model = make_vl_model(name)
    expected: dict[str, torch.Tensor] = {}
    losses = []
    for case, batch in batches().items():
        logits = run_transformers(model, batch)
        expected[case] = logits.detach().clone()
        labels, mask = labels_and_mask(batch)
        losses.append(cross_entropy(logits[mask], labels[mask]))
    loss = torch.stack(losses).mean()
    torch.autograd.backward(loss)
    save_file(expected | {"loss": loss.detach()}, folder / "expected.safetensors")
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder / "model")
    for companion in COMPANIONS:
        (folder / "model" / companion).write_text(json.dumps({"written_by": companion}))
    for parameter, gradient in gradients.items():
        assert gradient is not None
        parameter.data = gradient
    model.save_pretrained(folder / "gradients")
