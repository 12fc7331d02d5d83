"""The science: six stages, the codings, and what touches transformers.

    model = stages.convert(model, text, stages.Gated(timesteps=6), tokenizer=tokenizer)

makes a model of transformers spiking, in place. `stages.fit`, `bind`, `restore`, `patched`, `table`,
`measure`, `save` and `load` are functions of `stages.api`; every coding is a class by its name.

Importing it lets transformers read models that `save` wrote: `from_pretrained(folder)` then gives the
spiking model. Nothing heavy is imported for that before transformers itself is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stages.checkpoint.plugin import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

install()

FUNCTIONS = (
    "fit",
    "convert",
    "bind",
    "restore",
    "patched",
    "conversion",
    "table",
    "measure",
    "save",
)


def load(folder: str, **options: Any) -> PreTrainedModel:
    """Load the spiking model that an export wrote to `folder`; `options` go to `from_pretrained`.

    Raises InputError where the folder holds no spiking model, or one that does not fit its config.
    """
    # By name: what a stage imports enters its key, and every stage imports this package.
    model: PreTrainedModel = importlib.import_module("stages.checkpoint.folder").load(
        folder, **options
    )
    return model


def __getattr__(name: str) -> Any:
    """Import the functions of `stages.api` and the classes of the codings when they are asked for."""
    if name in FUNCTIONS:
        return getattr(importlib.import_module("stages.api"), name)
    # Names of submodules and of dunder look-ups are no codings: only a capital letter begins one.
    if name[:1].isupper():
        known: dict[str, Any] = importlib.import_module("stages.registry").registered("coding")
        if name in known:
            return known[name]
        raise AttributeError(f"stages has no coding {name}; it has {', '.join(sorted(known))}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
