"""Public packages in a folder of their own, without what they depend on: the project's stays as it is."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def installed(folder: Path, *requirements: str) -> Iterator[None]:
    """Install packages without their dependencies in a folder, which can be imported from inside."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), *requirements], check=True)
    before = set(sys.modules)
    sys.path.append(str(folder))  # last: what is installed already stays what is imported
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
