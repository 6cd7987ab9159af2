"""Megatron's indexed datasets: made from JSON lines, and trained on in the order of its `GPTDataset`."""
