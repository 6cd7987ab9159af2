"""The few questions that a demo asks an engine over HTTP; the embedded engine and vLLM answer them alike.

client = EngineClient("http://127.0.0.1:8000")
if client.is_healthy():
    answer = client.complete(Question("import "), max_tokens=16)
"""

import json
import urllib.error
import urllib.request
from typing import Any

from weightcast.adapters.demo.proof import Answer, Question
from weightcast.sync.errors import EngineError, PeerLost

REQUEST_TIMEOUT_S = 120.0


class EngineClient:
    """One engine at `url`. Every call is one request; none is retried."""

    def __init__(self, url: str) -> None:
        self.url = url
        # A proxy of the environment must not stand between this process and its own children.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_healthy(self) -> bool:
        """Whether the engine answers its health route with 200. False while it starts, and when it is broken."""
        try:
            with self._opener.open(f"{self.url}/health", timeout=5.0) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def weight_version(self) -> str:
        """The label of the weights that the engine serves now: `default`, or `<epoch>.<number>`."""
        return str(self._ask("/weight_info")["weight_version"])

    def model(self) -> str | None:
        """The name under which the engine serves its model; None for an engine that serves one without a name."""
        try:
            return str(self._ask("/v1/models")["data"][0]["id"])
        except EngineError:
            return None

    def complete(self, question: Question, max_tokens: int) -> Answer:
        """Exactly `max_tokens` tokens in answer to `question`, and the weights they were made with.

        Raises EngineError when the engine refuses, or takes new weights between the question and the answer.
        """
        before = self.weight_version()
        body: dict[str, Any] = {
            "prompt": question.prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0 if question.seed is None else 1.0,
            "seed": question.seed,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        model = self.model()
        choice = self._ask("/v1/completions", body if model is None else {"model": model, **body})["choices"][0]
        after = self.weight_version()
        if before != after:
            raise EngineError(f"{self.url} went from weights {before} to {after} while it answered; ask again")
        return Answer(tuple(int(token) for token in choice["token_ids"]), str(choice["text"]), after)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=REQUEST_TIMEOUT_S) as reply:
                answer: dict[str, Any] = json.load(reply)
                return answer
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            raise EngineError(f"{self.url}{path} answered {error.code}: {text}") from error
        except OSError as error:
            raise PeerLost(f"{self.url}{path} gave no answer: {error}") from error
