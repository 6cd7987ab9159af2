"""The routes of an SGLang server that an update needs, each with a deadline.

They are open to everybody unless the server has an `--admin-api-key` (or, without one, an `--api-key`): give the same
here, and keep a server without on loopback or behind a firewall.

    with SGLangClient("http://127.0.0.1:30000", admin_key="...") as client:
        client.pause("retract")
        client.begin_weight_update()

An update of SGLang's is: pause, begin, one call a broadcast, end, flush the cache, continue. The version is recorded by
the call that carries it. Its `/update_weight_version` aborts every running request unless told not to.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

import httpx

from weightcast.sync.errors import ConfigError, DeadlineExceeded, EngineError, PeerLost

PauseKind = Literal["abort", "retract", "in_place"]
"""Running requests are stopped with what they have, put back to begin again, or frozen with their old cache."""

_SHORT_S = 10.0  # for routes that answer from memory


class SGLangClient(AbstractContextManager["SGLangClient"]):
    """Blocking HTTP client of one server; for one thread at a time.

    Calls raise `EngineError` when the server refuses, `DeadlineExceeded` and `PeerLost` when it does not answer, and
    `ConfigError` when it lacks the route or the key is wrong. `timeout_s` bounds the routes that load or generate.
    """

    def __init__(self, url: str, *, admin_key: str | None = None, timeout_s: float = 300.0) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        headers = {} if admin_key is None else {"Authorization": f"Bearer {admin_key}"}
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False, headers=headers)

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

    def weight_version(self) -> str:
        """The label of the weights; `"default"` before the first update."""
        return str(self._call("GET", "/model_info", _SHORT_S)["weight_version"])

    def init_group(self, payload: dict[str, Any], timeout_s: float | None = None) -> None:
        """Let every worker join a group; returns when all members have. See `sglang_init_payload`."""
        self._call("POST", "/init_weights_update_group", timeout_s, payload)

    def destroy_group(self, group_name: str) -> None:
        """Let every worker leave the group."""
        self._call("POST", "/destroy_weights_update_group", _SHORT_S, {"group_name": group_name})

    def pause(self, kind: PauseKind, timeout_s: float | None = None) -> None:
        """Stop generating; `abort` returns when no request runs."""
        self._call("POST", "/pause_generation", timeout_s, {"mode": kind})

    def resume(self) -> None:
        """Generate again."""
        self._call("POST", "/continue_generation", self._timeout_s, {"torch_empty_cache": True})

    def begin_weight_update(self, selector: str = "all") -> None:
        """Open a session: weights that were repacked become loadable again. Required since SGLang 0.5.23."""
        self._call("POST", "/begin_weight_update", self._timeout_s, {"selector": selector})

    def update_from_distributed(self, payload: dict[str, Any], timeout_s: float | None = None) -> None:
        """Receive one broadcast and load it; returns when that is done. See `sglang_update_payload`."""
        self._call("POST", "/update_weights_from_distributed", timeout_s, payload)

    def end_weight_update(self) -> None:
        """Close the session: weights are repacked, once."""
        self._call("POST", "/end_weight_update", self._timeout_s, {})

    def flush_cache(self, timeout_s: float) -> None:
        """Drop cached prefixes. Fails while requests run or wait, unless they were retracted."""
        self._call("POST", f"/flush_cache?timeout={timeout_s}", timeout_s + _SHORT_S)

    def update_weight_version(self, label: str, *, abort_all_requests: bool = False) -> None:
        """Change the label alone. SGLang's own default would abort every request."""
        body = {"new_version": label, "abort_all_requests": abort_all_requests}
        self._call("POST", "/update_weight_version", _SHORT_S, body)

    def generate(self, prompt_token_ids: Sequence[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        """Greedy tokens after a prompt; SGLang's answer as it is."""
        parameters = {"temperature": 0.0, "max_new_tokens": max_tokens, **sampling}
        body = {"input_ids": list(prompt_token_ids), "sampling_params": parameters}
        return self._call("POST", "/generate", self._timeout_s, body)

    def _call(
        self, method: str, path: str, timeout_s: float | None = None, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        route = path.partition("?")[0]
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            response = self._http.request(method, path, json=body, timeout=limit_s)
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{self.url}{route} did not answer within {limit_s:.1f} s") from error
        except httpx.HTTPError as error:
            raise PeerLost(f"{self.url}{route}: {error}; is the engine still running?") from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise ConfigError(f"{self.url}{route} refuses the key; give the server's --admin-api-key as admin_key")
        if response.status_code == httpx.codes.NOT_FOUND:
            raise ConfigError(f"{self.url} has no route {route}; weightcast needs SGLang 0.5.23 or newer")
        answer = _read(response)
        if response.is_error or answer.get("success") is False:
            reason = answer.get("message") or answer.get("error") or response.text[:2000]
            raise EngineError(f"{self.url}{route} answered {response.status_code}: {reason}")
        return answer


def _read(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object; empty for routes that answer with text."""
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
