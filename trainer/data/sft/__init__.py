"""Supervised fine-tuning: records of several shapes to tokens, of which only what the model is to say is trained on."""
