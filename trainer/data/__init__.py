"""Text to batches: files, one packed stream of tokens, samples in an order that a seed decides."""
