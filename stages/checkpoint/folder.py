"""Spiking models in folders: what a checkpoint holds of a conversion, and how it is read again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from stages.checkpoint.binding import Neurons, mark, unmark
from stages.checkpoint.config import SpikingConfig
from stages.checkpoint.format import AGAIN, describe, is_spiking
from stages.errors import InputError
from stages.fitted import Conversion
from stages.model.files import unreported
from stages.model.loading import readable
from stages.model.quantised import SPIKING
from stages.ports.attachment import attachment, refuse_spiking
from stages.transforms.transform import Transform


def save(
    model: PreTrainedModel,
    conversion: Conversion,
    transform: Transform,
    prefix: tuple[int, ...],
    folder: Path,
) -> None:
    """Write a model with the neurons of `conversion` as `from_pretrained` reads it.

    `model` is the dense one after its transform; it is left as it was.
    """
    refuse_spiking(model)
    spec = describe(conversion, transform, prefix)
    with _marked(model, spec, Neurons(conversion.neurons.fit.params)):
        model.save_pretrained(folder)


@contextmanager
def _marked(model: Any, spec: SpikingConfig, neurons: Neurons) -> Iterator[None]:
    """The model with its neurons, as transformers saves one that a quantizer made."""
    mark(model, spec, neurons)
    try:
        yield
    finally:
        unmark(model)


def load(folder: str | Path, **options: Any) -> PreTrainedModel:
    """Load the spiking model of a folder; see `stages.load`."""
    path = Path(folder).expanduser()
    if not is_spiking(path):
        raise InputError(
            f"{path} holds no spiking model (no quantization_config of method {SPIKING!r} in a "
            "config.json); write one by export.enabled=true"
        )
    with readable(str(path), AGAIN), unreported():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    model, report = loaded
    faults = {
        "are not in its files": report["missing_keys"],  # transformers has filled them at random
        "have another shape": {name for name, _, _ in report["mismatched_keys"]},
        "have no place": report["unexpected_keys"],
    }
    for what, names in faults.items():
        if names:
            raise InputError(
                f"{path} does not fit its config.json: {len(names)} tensors {what}, the first is "
                f"{min(names)}; {AGAIN}"
            )
    if attachment(model) is None:
        raise InputError(f"{path} came back dense; import stages before transformers loads it")
    spiking: PreTrainedModel = model.eval()
    return spiking
