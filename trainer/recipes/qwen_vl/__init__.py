"""Recipes of Qwen2.5-VL."""
