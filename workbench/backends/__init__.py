"""Backends: one way to ask for completions, whoever answers — an engine here, the running app, any OpenAI endpoint."""
