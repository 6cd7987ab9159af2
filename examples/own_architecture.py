"""An architecture of your own: all that weightcast must know of ERNIE 4.5, which does not come with it.

    torchrun --nproc-per-node 2 examples/own_architecture.py path/to/hf path/to/export

A family is its configuration's translation and one table of where its tensors lie. This one is Llama's decoder, but
its rope turns neighbouring pairs of dimensions, and its configuration has one switch for all biases.
"""

import argparse
import os

from transformers import PretrainedConfig

from weightcast.bridges import AutoBridge, FusedQkv, GatedMlp, GPTModelProvider, ModelBridge, Rename, Tied, Vocab
from weightcast.bridges.config import activation, decoder_fields, require_absent, rope_fields, rope_parameters

MEGATRON, HF = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION, HF_ATTENTION = f"{MEGATRON}self_attention.", f"{HF}self_attn."
EMBEDDING, HF_EMBEDDING = "embedding.word_embeddings.weight", "model.embed_tokens.weight"
TABLE = (  # Megatron's tensor, and where its rows lie in the checkpoint; for every layout, in both directions
    Vocab(EMBEDDING, HF_EMBEDDING),
    Rename(f"{ATTENTION}linear_qkv.layer_norm_weight", f"{HF}input_layernorm.weight"),
    FusedQkv(f"{ATTENTION}linear_qkv.weight", *(f"{HF_ATTENTION}{x}_proj.weight" for x in "qkv")),
    Rename(f"{ATTENTION}linear_proj.weight", f"{HF_ATTENTION}o_proj.weight"),
    Rename(f"{MEGATRON}mlp.linear_fc1.layer_norm_weight", f"{HF}post_attention_layernorm.weight"),
    GatedMlp(f"{MEGATRON}mlp.linear_fc1.weight", *(f"{HF}mlp.{x}_proj.weight" for x in ("gate", "up"))),
    Rename(f"{MEGATRON}mlp.linear_fc2.weight", f"{HF}mlp.down_proj.weight"),
    Rename("decoder.final_layernorm.weight", "model.norm.weight"),
)


def rules(hf: PretrainedConfig) -> tuple[Rename | FusedQkv | GatedMlp | Tied | Vocab, ...]:
    """The whole table; a row depends on the configuration where the tensor does."""
    tied = Tied("output_layer.weight", HF_EMBEDDING, copy="lm_head.weight")
    return (*TABLE, tied if hf.tie_word_embeddings else Vocab("output_layer.weight", "lm_head.weight"))


def translate(hf: PretrainedConfig) -> GPTModelProvider:
    """Megatron's settings for the configuration; what is not mapped is refused rather than left out."""
    require_absent(hf, "use_bias", "the table has no biases", (None, False))
    fields = decoder_fields(hf) | rope_fields(hf, rope_parameters(hf))
    return GPTModelProvider(**fields, activation_func=activation(hf), rotary_interleaved=True)


ERNIE = ModelBridge("ernie4_5", ("Ernie4_5ForCausalLM",), rules, translate)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("export", help="folder to write")
    options = parser.parse_args()
    bridge = AutoBridge.from_hf_pretrained(options.model, bridges=[ERNIE])
    provider = bridge.to_megatron_provider()
    provider.tensor_model_parallel_size = int(os.environ.get("WORLD_SIZE", "1"))
    bridge.save_hf_pretrained(provider.provide_distributed_model(wrap_with_ddp=False), options.export)
