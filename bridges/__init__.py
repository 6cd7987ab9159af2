"""weightcast.bridges."""

import weightcast.bridges.quiet_megatron  # noqa: F401  (first: Megatron's import-time notices)
