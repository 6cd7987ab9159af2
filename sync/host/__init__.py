"""Processes of one host: memory that they share, and the sockets on which they agree about it."""
