"""Addresses of PostgreSQL databases, in the form that names the driver which we install.

Boundary: text; nothing is imported, because settings read it.
"""

from __future__ import annotations

import re

_SCHEMES = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}


def with_driver(url: str) -> str:
    """``postgres://`` and ``postgresql://`` with the driver that we use; any other address as it is."""
    scheme, separator, rest = url.partition("://")
    return f"{_SCHEMES.get(scheme, scheme)}{separator}{rest}"


def without_password(url: str) -> str:
    """`url` as messages may show it."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)
