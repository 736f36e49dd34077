"""Paged attention: one interface, several backends."""
