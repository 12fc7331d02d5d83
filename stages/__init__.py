"""The science: six stages, the codings, and what touches transformers.

Importing it lets transformers read models that the export wrote: `from_pretrained(folder)` then gives the
spiking model. Nothing heavy is imported for that before transformers itself is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stages.plugin import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

install()


def load(folder: str, **options: Any) -> PreTrainedModel:
    """The spiking model that an export wrote to `folder`; `options` are those of `from_pretrained`.

    Raises InputError where the folder holds no spiking model, or one that does not fit its config.
    """
    # By name: what a stage imports enters its key, and every stage imports this package.
    found: PreTrainedModel = importlib.import_module("stages.llm.saved").load(folder, **options)
    return found
