"""A text file that others see whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def write(path: Path, text: str) -> None:
    """Write a file, UTF-8 with the text's own ends of lines, whose folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
