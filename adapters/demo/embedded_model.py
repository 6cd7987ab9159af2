"""The model that `weightcast demo` uses when it is given none.

It is made on the spot from what every Python carries: a byte-level BPE tokenizer learnt from the standard
library's own source, and a Qwen3 of under four million parameters with seeded random weights, saved as an
ordinary Hugging Face folder. So the demo needs no hub, no account and no network, and two runs start from the
same bits.

    folder = make_embedded_model(Path("out/model"))
"""

import sysconfig
from pathlib import Path
from typing import Any

MAX_TEXT_BYTES = 2_000_000
VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"
SEED = 20

# head_dim 64 because vLLM's CPU attention knows only some sizes; 2 key/value heads so that TP=2 divides them.
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def standard_library_files(max_bytes: int = MAX_TEXT_BYTES) -> list[Path]:
    """The standard library's top-level modules, in alphabetical order, up to `max_bytes` together.

    Raises FileNotFoundError where Python was installed without its library's source.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    num_bytes = 0
    for path in sorted(library.glob("[a-z]*.py")):
        num_bytes += path.stat().st_size
        if num_bytes > max_bytes:
            break
        files.append(path)
    if not files:
        raise FileNotFoundError(f"{library} holds no Python source to learn a tokenizer from; pass --model")
    return files


def make_embedded_model(folder: Path) -> Path:
    """Makes the Hugging Face folder (config, bf16 safetensors, tokenizer) in a few seconds."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    tokenizer = _train_tokenizer(standard_library_files())
    end_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = Qwen3Config(**ARCHITECTURE, eos_token_id=end_id, bos_token_id=end_id, dtype="bfloat16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    logging.disable_progress_bar()  # a bar for one small file would break the demo's own display
    try:
        model.save_pretrained(folder)
    finally:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder


def _train_tokenizer(files: list[Path]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in files], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
