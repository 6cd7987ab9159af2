"""weightcast.adapters."""
