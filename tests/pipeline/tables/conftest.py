"""The store that tables of papers are made from is filled once."""

from tests.pipeline.tables.papers import rows, swept

__all__ = ["rows", "swept"]
