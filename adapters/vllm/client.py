"""The routes of a vLLM server that an update needs, each with a deadline.

The update routes exist only when the server runs with `VLLM_SERVER_DEV_MODE=1`; vLLM's `--api-key` does not guard
them, so such a server belongs on loopback or behind a firewall.

    with VLLMClient("http://127.0.0.1:8000") as client:
        client.pause("wait", timeout_s=30)
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import httpx

from weightcast.adapters.engine import Completion, PauseMode
from weightcast.adapters.vllm import UNTOUCHED
from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, ModelMismatch, PeerLost

_SHORT_S = 10.0  # for routes that answer from memory


class VLLMClient(AbstractContextManager["VLLMClient"]):
    """Blocking HTTP client of one server; calls raise `DeadlineExceeded`, `PeerLost`, or as stated.

    `timeout_s` bounds the routes that load or generate.
    """

    def __init__(self, url: str, *, timeout_s: float = 300.0) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        # vLLM closes the connection after every answer 500, so a connection that is kept alive breaks the next call
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False, limits=limits)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def is_healthy(self) -> bool:
        """Whether the server answers and says that it is well. Raises nothing."""
        try:
            return self._http.get("/health", timeout=_SHORT_S).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def model_name(self) -> str:
        """The name under which the server serves its model."""
        return str(self._call("GET", "/v1/models", _SHORT_S)["data"][0]["id"])

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Let every worker join a publisher. Raises `EngineError` with the worker's reason."""
        self._call("POST", "/init_weight_transfer_engine", self._timeout_s, {"init_info": init_info})

    def pause(self, mode: PauseMode, timeout_s: float) -> None:
        """Stop scheduling and drop cached prefixes; returns when no request runs."""
        self._call("POST", f"/pause?mode={mode}&clear_cache=true", timeout_s)

    def resume(self) -> None:
        """Schedule requests again."""
        self._call("POST", "/resume", _SHORT_S)

    def is_paused(self) -> bool:
        """Whether somebody paused the server."""
        return bool(self._call("GET", "/is_paused", _SHORT_S)["is_paused"])

    def start_weight_update(self) -> None:
        """Have every worker stage and check. Raises `ModelMismatch` when a worker refuses."""
        self._call("POST", "/start_weight_update", self._timeout_s)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load. Raises `ModelMismatch` with engine memory untouched, `EngineError` with undefined weights."""
        self._call("POST", "/update_weights", self._timeout_s, {"update_info": update_info})

    def finish_weight_update(self, weight_version: str) -> None:
        """End the session and publish the label."""
        self._call("POST", "/finish_weight_update", self._timeout_s, {"weight_version": weight_version})

    def weight_version(self) -> str:
        """The label of the weights; `"default"` before the first update."""
        return str(self._call("GET", "/weight_info", _SHORT_S)["weight_version"])

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **fields: Any) -> Completion:
        """Greedy completion of text or token ids; `fields` are more of vLLM's request fields.

        vLLM does not say in its answer which weights made it; the label is then what it serves afterwards.
        """
        body = {
            "model": self.model_name(),
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "return_token_ids": True,
            **fields,
        }
        answer = self._call("POST", "/v1/completions", self._timeout_s, body)
        choice = answer["choices"][0]
        label = answer.get("weight_version") or self.weight_version()
        return Completion(tuple(choice["token_ids"]), label, choice["finish_reason"])

    def _call(self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
        route = path.partition("?")[0]
        try:
            response = self._http.request(method, path, json=body, timeout=timeout_s)
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{self.url}{route} did not answer within {timeout_s} s") from error
        except httpx.HTTPError as error:
            raise PeerLost(f"{self.url}{route}: {error}; is the engine still running?") from error
        if response.status_code == httpx.codes.NOT_FOUND:
            raise ConfigError(f"{self.url} has no route {route}; start vLLM with VLLM_SERVER_DEV_MODE=1")
        if response.is_error:
            kind = ModelMismatch if UNTOUCHED in response.text else EngineError
            raise kind(f"{self.url}{route} answered {response.status_code}: {_reason(response)}")
        answer: dict[str, Any] = response.json()
        return answer


def _reason(response: httpx.Response) -> str:
    """vLLM's error message, without its JSON frame."""
    try:
        error = response.json()["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return response.text[:2000]
