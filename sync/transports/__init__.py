"""Transports: how chunks travel from a source to an engine."""
