"""x"""
from __future__ import annotations
def enforceable(schema: str) -> str:
    return schema
