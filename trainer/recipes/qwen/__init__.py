"""Recipes of Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE."""
