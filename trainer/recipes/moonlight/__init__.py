"""Recipes of Moonlight."""
