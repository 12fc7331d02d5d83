"""What a worker does that a test kills the driver of."""

import time
from pathlib import Path


def tidies(held: Path) -> None:
    """Hold a file for a minute, and delete it whatever ends that."""
    held.touch()
    try:
        time.sleep(60)
    finally:
        held.unlink()
