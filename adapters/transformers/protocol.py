"""What a completion request may say, checked field by field; an unknown field is an error, not a silence.

request = parse_request({"prompt": [2, 651], "max_tokens": 8}, vocab_size=256, model="transformers")
"""

from dataclasses import dataclass
from typing import Any

from weightcast.adapters.engine import Completion
from weightcast.sync.errors import ConfigError

_FIELDS = frozenset({"model", "prompt", "max_tokens", "temperature", "seed", "ignore_eos", "n", "stream"})
_IGNORED = frozenset({"return_token_ids"})  # vLLM's switch for what this engine always does
MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One request: `prompt` is text or token ids, as it came."""

    prompt: str | tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False


def parse_request(body: Any, vocab_size: int, model: str) -> CompletionRequest:
    """A checked request from a decoded JSON body to the engine `model`. Raises `ConfigError` that names the field."""
    if not isinstance(body, dict):
        raise ConfigError(f"the body must be a JSON object, got {type(body).__name__}")
    if unknown := sorted(body.keys() - _FIELDS - _IGNORED):
        raise ConfigError(f"{', '.join(unknown)}: not supported; this engine knows {', '.join(sorted(_FIELDS))}")
    if body.get("model", model) != model:
        raise ConfigError(f"the model served here is {model!r}, asked for {body['model']!r:.80}")
    if body.get("n", 1) != 1 or body.get("stream", False):
        raise ConfigError("n must be 1 and stream false; ask once per answer, or use vLLM")
    temperature = body.get("temperature", 0.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature < 0:
        raise ConfigError(f"temperature must be a number >= 0, got {temperature!r}")
    ignore_eos = body.get("ignore_eos", False)
    if not isinstance(ignore_eos, bool):
        raise ConfigError(f"ignore_eos must be true or false, got {ignore_eos!r}")
    return CompletionRequest(
        prompt=_parse_prompt(body.get("prompt"), vocab_size),
        max_tokens=_parse_int("max_tokens", body.get("max_tokens", 16), 1, MAX_TOKENS),
        temperature=float(temperature),
        seed=None if body.get("seed") is None else _parse_int("seed", body["seed"], 0, 2**63 - 1),
        ignore_eos=ignore_eos,
    )


def _parse_prompt(prompt: Any, vocab_size: int) -> str | tuple[int, ...]:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt:
        return tuple(_parse_int("every id of prompt", token, 0, vocab_size - 1) for token in prompt)
    raise ConfigError(f"prompt must be text or a list of token ids, at least one long, got {prompt!r:.80}")


def _parse_int(field: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{field} must be an integer from {low} to {high}, got {value!r:.80}")
    return value


def completion_body(
    completion: Completion, *, request_id: str, model: str, text: str, num_prompt: int
) -> dict[str, Any]:
    """The answer in OpenAI's shape, with the token ids and the version of the weights beside it."""
    num_generated = len(completion.token_ids)
    choice = {
        "index": 0,
        "text": text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    return {
        "id": request_id,
        "object": "text_completion",
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        },
        "weight_version": completion.weight_version,
    }
