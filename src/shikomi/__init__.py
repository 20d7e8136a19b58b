"""Shikomi: fine-tune a language model on your own data, on the machine you have, and see whether it was worth it."""

__version__ = "0.1.0"
