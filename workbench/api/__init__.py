"""The OpenAI-compatible API and the probes: strict about what it is asked, light on the event loop.

Boundary: HTTP in, engine requests out. It knows no Streamlit and no model; it reads the engine's public records only.
"""
