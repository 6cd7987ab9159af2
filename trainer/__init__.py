"""weightcast.trainer."""
