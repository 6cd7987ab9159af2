"""Recipes of Llama 3, 3.1, 3.2 and 3.3."""
