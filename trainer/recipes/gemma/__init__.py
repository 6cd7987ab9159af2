"""Recipes of Gemma 3."""
