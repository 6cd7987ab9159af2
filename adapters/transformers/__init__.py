"""The embedded engine: a `transformers` model behind a small HTTP server, one process, on a CPU or a GPU."""
