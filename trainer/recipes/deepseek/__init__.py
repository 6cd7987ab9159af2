"""Recipes of DeepSeek V2-Lite, V2 and V3."""
