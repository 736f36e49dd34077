"""Quantized checkpoints: how others store a linear layer's weight, one scheme a file, and what becomes of it here."""
