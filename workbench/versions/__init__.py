"""Model versions: the registry, fine-tuning, and the bundled demo models. Imports nothing heavy by itself."""
