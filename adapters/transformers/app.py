"""The HTTP face of the embedded engine: completions, pause and resume, and what it serves.

| route | answer |
|---|---|
| POST /v1/completions | OpenAI's shape, with `token_ids` and the `weight_version` that made them |
| GET /v1/models | the one model, under the engine's name |
| POST /pause?mode=abort, wait or keep; POST /resume; GET /is_paused | as vLLM's development routes |
| GET /health | 200, or 503 when the weights are undefined |
| GET /weight_info | `{"weight_version": …}` |
| GET /version | the package's version and where the engine stands |

Blocking work runs in Starlette's thread pool; the gate of the engine keeps updates and requests apart.
"""

import uuid
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

import weightcast
from weightcast.adapters.engine import check_pause_mode
from weightcast.adapters.lifecycle import FollowerState
from weightcast.adapters.transformers.engine import Sampling, TransformersEngine
from weightcast.adapters.transformers.protocol import completion_body, parse_request
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, WeightcastError

_OPERATOR = "an operator"  # who closes the gate by POST /pause
_PAUSE_TIMEOUT_S = 600.0

_STATUS: tuple[tuple[type[WeightcastError], int], ...] = (
    (ConfigError, 400),
    (DeadlineExceeded, 503),
    (EngineError, 503),
)


def make_app(
    engine: TransformersEngine,
    tokenizer: PreTrainedTokenizerBase | None,
    follower_state: Callable[[], FollowerState | None],
) -> Starlette:
    """The application around one engine. `tokenizer` may be `None`: then prompts are token ids only."""
    routes = _Routes(engine, tokenizer, follower_state)
    return Starlette(
        routes=[
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/pause", routes.pause, methods=["POST"]),
            Route("/resume", routes.resume, methods=["POST"]),
            Route("/is_paused", routes.is_paused),
            Route("/health", routes.health),
            Route("/weight_info", routes.weight_info),
            Route("/version", routes.version),
        ],
        exception_handlers={WeightcastError: _error_response},
    )


class _Routes:
    """One method a route; they hold no state of their own."""

    def __init__(
        self,
        engine: TransformersEngine,
        tokenizer: PreTrainedTokenizerBase | None,
        follower_state: Callable[[], FollowerState | None],
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._follower_state = follower_state

    async def completions(self, request: Request) -> Response:
        try:
            body = await request.json()
        except ValueError as error:
            raise ConfigError(f"the body is not JSON: {error}") from error
        return JSONResponse(await run_in_threadpool(self._complete, body))

    def _complete(self, body: Any) -> dict[str, Any]:
        asked = parse_request(body, self._engine.vocab_size, self._engine.name)
        prompt = self._encode(asked.prompt) if isinstance(asked.prompt, str) else asked.prompt
        sampling = Sampling(asked.max_tokens, asked.temperature, asked.seed, asked.ignore_eos)
        completion = self._engine.sample(prompt, sampling)
        text = self._tokenizer.decode(completion.token_ids) if self._tokenizer is not None else ""
        request_id = f"cmpl-{uuid.uuid4().hex}"
        return completion_body(
            completion, request_id=request_id, model=self._engine.name, text=text, num_prompt=len(prompt)
        )

    async def models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self._engine.name, "object": "model"}]})

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise ConfigError("the model's folder has no tokenizer; send the prompt as token ids")
        return tuple(self._tokenizer(text)["input_ids"])

    async def pause(self, request: Request) -> Response:
        mode = check_pause_mode(request.query_params.get("mode", "abort"))
        await run_in_threadpool(self._engine.gate.close, _OPERATOR, mode, _PAUSE_TIMEOUT_S)
        return JSONResponse({"status": "paused"})

    async def resume(self, _request: Request) -> Response:
        self._engine.gate.open(_OPERATOR)
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, _request: Request) -> Response:
        return JSONResponse({"is_paused": self._engine.gate.is_paused})

    async def health(self, _request: Request) -> Response:
        if reason := self._engine.gate.broken:
            raise EngineError(f"{self._engine.name} does not serve: {reason}")
        return JSONResponse({"status": "ok"})

    async def weight_info(self, _request: Request) -> Response:
        return JSONResponse({"weight_version": self._engine.label})

    async def version(self, _request: Request) -> Response:
        state = self._follower_state()
        status = {
            "version": weightcast.__version__,
            "engine": self._engine.name,
            "weight_version": self._engine.label,
            "is_paused": self._engine.gate.is_paused,
            "num_running": self._engine.gate.num_running,
        }
        if state is not None:
            status |= {
                "phase": state.phase,
                "num_updates": state.num_updates,
                "num_refused": state.num_refused,
                "last_error": state.last_error,
            }
        return JSONResponse(status)


async def _error_response(_request: Request, error: Exception) -> Response:
    code = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    return JSONResponse({"error": {"message": str(error), "type": type(error).__name__, "code": code}}, code)
