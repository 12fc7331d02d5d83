"""Registers the `spiking` quantization method when transformers' list of methods is imported.

That list costs seconds to import, which a command that loads no model need not pay, and there is no
entry point for plug-ins; so an import hook does it, once, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

METHODS = "transformers.quantizers.auto"
PLUGIN = "stages.checkpoint.quantizer"


class _Finder(MetaPathFinder):
    """Finds the module of methods as it is, with a loader that imports the plug-in behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != METHODS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        importlib.import_module(PLUGIN)


def install() -> None:
    """Register at once if transformers' methods are imported already, else as soon as they are."""
    if METHODS in sys.modules:
        importlib.import_module(PLUGIN)
    else:
        sys.meta_path.insert(0, _Finder())
