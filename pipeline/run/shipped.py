"""What `conf/` ships."""

from __future__ import annotations

from pathlib import Path

CONF = Path(__file__).parents[2] / "conf"
NOT_A_TABLE = "published"  # the numbers of other papers, beside the tables that show them


def names(group: str) -> list[str]:
    """The choices of a group."""
    found = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [name for name in found if name != NOT_A_TABLE]
