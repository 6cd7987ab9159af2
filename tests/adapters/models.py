"""Tiny models with a tokenizer, made offline: a random Qwen3 over bytes."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PROMPT = (72, 101, 108, 108, 111, 44, 32, 119)
NUM_TOKENS = 24
VLLM_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_DIST_IDENT": f"weightcast{os.getpid()}"}
"""For ranks that build vLLM's models (`vllm_models`); a worker sets the second, which names shared memory, itself."""


def make_model(seed: int, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """A random Qwen3 of three layers. Its weights are large enough for greedy tokens to depend on each of them."""
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).to(dtype).eval()


def save_checkpoint(model: PreTrainedModel, folder: Path) -> Path:
    """The model and a byte-level tokenizer as an HF folder."""
    model.save_pretrained(folder)
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under their HF names, tied ones once."""
    return dict(_untied(model))


def _untied(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach().clone()


def greedy_tokens(model: PreTrainedModel, prompt: tuple[int, ...] = PROMPT, num: int = NUM_TOKENS) -> tuple[int, ...]:
    """What transformers itself generates."""
    inputs = torch.tensor([prompt])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=num, do_sample=False)
    return tuple(output[0, len(prompt) :].tolist())
