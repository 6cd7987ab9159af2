"""weightcast.bridges."""
