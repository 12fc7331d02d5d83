"""The README's table of architectures is what the role rules say."""

import importlib
from pathlib import Path

from stages.model import rules
from stages.model.sites import ROLES

README = Path(__file__).parents[2] / "README.md"
SHOWN = [role for role in ROLES if role not in ("attn.q", "attn.k", "attn.v", "attn.probs")]


def table() -> list[str]:
    """One row a family or families with the same rules: where each role lives, – where it does not."""
    rows: dict[str, list[str]] = {}
    for name in rules.known():
        found = importlib.import_module(f"{rules.PACKAGE}.{name}").ARCHITECTURE
        kinds = [(found.rules, "")] + [(found.rules | found.experts, ", experts")] * bool(
            found.experts
        )
        for own, more in kinds:
            assert {f"attn.{port}" for port in ("q", "k", "v", "probs")} <= set(own)
            every = own | {"head.in": found.head}
            cells = [f"`{every[role].port}`" if role in every else "–" for role in SHOWN]
            rows.setdefault(" | ".join(cells), []).append(f"`{name}`{more}")
    return [f"| {' '.join(names)} | {cells} |" for cells, names in rows.items()]


def test_the_table_of_architectures_is_that_of_the_rules() -> None:
    lines = README.read_text().splitlines()
    start = lines.index(f"| `model_type` | {' | '.join(SHOWN)} |")
    assert lines[start + 2 : start + 2 + len(table())] == table()
    assert not lines[start + 2 + len(table())].startswith("|")
