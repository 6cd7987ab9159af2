"""weightcast.sync."""
