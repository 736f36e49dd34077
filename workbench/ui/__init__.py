"""The Streamlit side of the workbench: pages' shared parts. Services do not import it; it imports services."""
