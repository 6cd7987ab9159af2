"""vLLM: a weight-transfer backend that runs in its workers, and what drives a server from outside.

| file | runs in |
|---|---|
| `plugin`, `backend` | the vLLM worker; loaded by vLLM itself through the entry point `vllm.general_plugins` |
| `waiting` | the same: a version from a publisher or a store |
| `recording`, `twin` | the same: which slices the worker's loader reads |
| `reload` | the same: what a load in the pause leaves to be done |
| `preparer`, `spare`, `object_graph` | the same: versions loaded beside the one that serves, and swapped in |
| `client`, `driver` | any process that reaches the server's development routes |
| `server` | any process that wants a vLLM server of its own |
"""

BACKEND = "weightcast"
"""What a user types: `--weight-transfer-config '{"backend": "weightcast"}'`."""

UNTOUCHED = "engine memory is untouched"
"""In the backend's refusals, so that a client that sees only HTTP 500 can tell a refusal from a failed load."""

NOT_STAGED = "the version is not staged yet"
"""In the answer of a worker that follows a store and has not read the version: the driver asks again."""

NOT_CONNECTED = "the worker follows no publisher"
"""In the refusal of a worker that was never initialised, for instance because its server was restarted."""
