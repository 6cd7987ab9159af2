"""Random small checkpoints with layers for multi-token prediction, and what such layers compute.

transformers has the layer inside: a model with more layers than its configuration will say. What is around it is
written out here after the DeepSeek-V3 report (2412.19437, section 2.2): the hidden state of token i and the embedding
of token i + 1, each normed, are joined by a linear, go through the layer and a norm, and the model's own head guesses
token i + 2; the next prediction layer goes on from there. The loss is that of the next token and a tenth of the mean of
the others.

    write_mtp_model("deepseek-v3-mtp", tmp_path, tokens)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests.bridges.tiny_mla import DEFAULT_ROPE, ONE_GROUP, SIZES, V3_GROUPS, YARN_WITHOUT_MSCALE
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, PretrainedConfig

LOSS_SCALE = 0.1  # Megatron's mtp_loss_scaling_factor
Tensors = dict[str, torch.Tensor]


def _v3(num_layers: int, **changes: Any) -> PretrainedConfig:
    changes = {"rope_parameters": DEFAULT_ROPE, "q_lora_rank": 24, "num_nextn_predict_layers": num_layers} | changes
    return DeepseekV3Config(**SIZES | V3_GROUPS | changes)


def _glm(num_layers: int) -> PretrainedConfig:
    sizes = {name: value for name, value in SIZES.items() if "rank" not in name and "_dim" not in name}
    return Glm4MoeConfig(
        **sizes | {"num_key_value_heads": 2, "n_shared_experts": 1},
        **ONE_GROUP,
        head_dim=16,
        use_qk_norm=True,
        attention_bias=True,
        rope_parameters=DEFAULT_ROPE | {"partial_rotary_factor": 0.5},
        num_nextn_predict_layers=num_layers,
    )


MTP_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "deepseek-v3-mtp": lambda: _v3(1, rope_parameters=YARN_WITHOUT_MSCALE),
    "deepseek-v3-mtp2": lambda: _v3(2, q_lora_rank=None),
    "deepseek-v3-mtp-tied": lambda: _v3(1, tie_word_embeddings=True),
    "glm4-moe-mtp": lambda: _glm(1),
}


def _around_layers(config: PretrainedConfig) -> Tensors:
    """The tensors of prediction layers that transformers' layer does not have, copies left out."""
    size, first, tensors = config.hidden_size, config.num_hidden_layers, {}
    for layer in range(first, first + config.num_nextn_predict_layers):
        name = f"model.layers.{layer}."
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{name}{norm}.weight"] = 1 + 0.3 * torch.randn(size)
        tensors[f"{name}eh_proj.weight"] = 0.15 * torch.randn(size, 2 * size)
    return tensors


def _copies(config: PretrainedConfig, tensors: Tensors) -> Tensors:
    """The embedding and the output layer again, for each prediction layer."""
    embedding, first = tensors["model.embed_tokens.weight"], config.num_hidden_layers
    names = [f"model.layers.{first + number}." for number in range(config.num_nextn_predict_layers)]
    head = tensors.get("lm_head.weight", embedding)
    return {f"{name}embed_tokens.weight": embedding.clone() for name in names} | {
        f"{name}shared_head.head.weight": head.clone() for name in names
    }


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight


def _losses(model: Any, config: PretrainedConfig, around: Tensors, tokens: torch.Tensor) -> tuple[Any, list[Any]]:
    """The main model's logits [batch, sequence, vocabulary], and the mean losses of one more token ahead each."""
    count, epsilon, main = config.num_hidden_layers, config.rms_norm_eps, model.model
    inputs = tokens[:, :-1]
    hidden = main(inputs).last_hidden_state
    logits = model.lm_head(hidden)
    losses = [cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())]
    for number in range(config.num_nextn_predict_layers):
        name = f"model.layers.{count + number}."
        embedded = main.embed_tokens(inputs[:, number + 1 :])
        joined = torch.cat(
            [
                _rms_norm(embedded, around[f"{name}enorm.weight"], epsilon),
                _rms_norm(hidden[:, : embedded.shape[1]], around[f"{name}hnorm.weight"], epsilon),
            ],
            dim=-1,
        )
        hidden = linear(joined, around[f"{name}eh_proj.weight"])
        positions = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
        rope = main.rotary_emb(hidden, position_ids=positions)
        hidden = main.layers[count + number](hidden, position_embeddings=rope, position_ids=positions)
        hidden = _rms_norm(hidden, around[f"{name}shared_head.norm.weight"], epsilon)
        guesses, wanted = model.lm_head(hidden), tokens[:, number + 2 :]
        losses.append(cross_entropy(guesses.flatten(0, 1), wanted.flatten()))
    return logits, losses


def write_mtp_model(name: str, folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Save the checkpoint to `folder`/model, as it is published; of the fp32 model also what it computes.

    Logits, the loss of the next token and those of the tokens behind it go to `expected.safetensors`, gradients of
    their sum to a folder of their own as if they were a model.
    """
    torch.manual_seed(len(name))
    config = MTP_MODELS[name]()
    count, more = config.num_hidden_layers, config.num_nextn_predict_layers
    config.num_hidden_layers = count + more
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    config = model.config
    config.num_hidden_layers = count  # of which transformers' model runs as many of its layers
    around = _around_layers(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    for tensor in around.values():
        tensor.requires_grad_()
    logits, losses = _losses(model, config, around, tokens)
    torch.autograd.backward(losses[0] + LOSS_SCALE * sum(losses[1:]) / more)
    expected = {"logits": logits, "loss": losses[0], "prediction_losses": torch.stack(losses[1:])}
    save_file({key: value.detach().contiguous() for key, value in expected.items()}, folder / "expected.safetensors")

    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers keep fp32
    config.dtype = dtype
    _save(model, {key: tensor.detach().to(dtype) for key, tensor in around.items()}, folder / "model")
    for parameter, gradient in gradients.items():
        parameter.data = gradient if gradient is not None else torch.zeros_like(parameter)
    _save(model, {key: tensor.grad for key, tensor in around.items() if tensor.grad is not None}, folder / "gradients")


def _save(model: Any, around: Tensors, folder: Path) -> None:
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | around
    save_file(tensors | _copies(model.config, tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == model.config.num_hidden_layers


def without_prediction(folder: Path, out: Path) -> Path:
    """`folder` as transformers writes it: its configuration still names layers that it leaves out. Returns `out`."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    return out
