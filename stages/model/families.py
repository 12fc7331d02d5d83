"""Which architecture a model has: the file of its family, or the roles that its module names say."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import pkgutil
from typing import TYPE_CHECKING

from stages.errors import InputError
from stages.model.inferred import Unsaid, infer
from stages.model.recurrence import refuse_recurrence
from stages.model.rules import Architecture, multiplying, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "stages.model.architectures"
# Families without a file whose products tests hold against transformers (tests/model/families.py).
TESTED = (
    "bloom", "cohere", "cohere2", "deepseek_v3", "exaone4", "falcon", "gemma", "gemma2", "glm4",
    "gpt2", "gpt_bigcode", "gpt_neo", "gpt_oss", "gptj", "granite", "granitemoe", "llama4_text", "mpt",
    "nemotron",
    "olmo", "olmo2", "olmo3", "olmoe", "phi", "phimoe", "qwen2_moe", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
log = logging.getLogger(__name__)


@functools.cache
def _warn(kind: str) -> None:
    log.warning(
        "roles of model_type=%r are inferred from the names of its modules, and no test has compared its "
        "products: look at `python -m pipeline sites`",
        kind,
    )


def module_name(model_type: str) -> str | None:
    """Return the module of a family's rules, None where there is none."""
    name = f"{PACKAGE}.{model_type.replace('-', '_')}"
    return name if importlib.util.find_spec(name) else None


def known() -> list[str]:
    """List every `model_type` that has rules."""
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def architecture(model: PreTrainedModel) -> Architecture:
    """Return the role rules of a model: those of its family's file, or inferred from module names,
    which is logged where no test has seen the family.

    Raises InputError, with what has no place, where neither says them.
    """
    kind = model.config.model_type
    name = module_name(kind)
    if name is not None:
        rules: Architecture = importlib.import_module(name).ARCHITECTURE
        return rules
    refuse_recurrence(model)
    try:
        inferred = infer(model)
        if kind not in TESTED:
            _warn(kind)
        return inferred
    except Unsaid as missing:
        raise InputError(
            f"no role rules for model_type={kind!r} (known: {', '.join(sorted({*known(), *TESTED}))}), "
            f"and its modules do not say them: {missing}; modules that could not be placed: "
            f"{shortened(multiplying(model))}; rules are one file in {PACKAGE.replace('.', '/')}/"
        ) from missing
