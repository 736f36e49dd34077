"""Support tickets: the fine-tuning task of the demo: a customer's message becomes a JSON record."""
