"""The entry point through which every vLLM process learns of the backend `weightcast`.

vLLM calls `register` in the API server, the engine core and each worker; the backend itself is imported only in
a worker that uses it.
"""

from weightcast.adapters.vllm import BACKEND


def register() -> None:
    """Make `--weight-transfer-config '{"backend": "weightcast"}'` known. Safe to call again."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "weightcast.adapters.vllm.backend", "WeightcastTransferEngine"
        )
    except ValueError as error:
        if "already registered" not in str(error):
            raise
