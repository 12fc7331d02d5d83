"""What `import stages` offers to Python users, without Hydra and without a store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.capture import Capture
from stages.checkpoint import binding
from stages.checkpoint.format import describe
from stages.codings.base import Coding
from stages.distribution import Distribution
from stages.errors import InputError
from stages.fitted import ON_ATOMS, Conversion
from stages.fitting import Fitting
from stages.model import limits
from stages.model.prefix import prefix_ids, prefix_length
from stages.model.sites import SiteSelection, find_sites, select
from stages.patching import Patching
from stages.ports.attachment import Attachment, attachment, refuse_spiking
from stages.statistics import measuring
from stages.text import corpus
from stages.text.tokenising import tokenise
from stages.transforms.transform import applied

if TYPE_CHECKING:
    from stages.model.sites import Site

JOIN = "\n\n"  # between the documents of a text


def fit(
    model: PreTrainedModel,
    text: Tensor | str | Sequence[str],
    coding: Coding,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 512,
    batch: int = 4,
    sites: SiteSelection | None = None,
    capture: Capture | None = None,
    distribution: Distribution | None = None,
    fitting: Fitting | None = None,
) -> Conversion:
    """Fit a coding to every site of a dense model on calibration text; the model stays dense.

    `text`: token ids [windows, length], ids [N] that are cut into windows, or one or several texts
    for `tokenizer`. Runs `batch` windows at a time. What is not given is what `python -m pipeline` uses.
    Raises InputError where the text has no whole window, or one that the model cannot read, for a
    spiking model, and for a model whose sites cannot be resolved.
    """
    model = _plain(model)
    refuse_spiking(model)
    if not coding.converts:
        raise InputError(f"coding={coding.name} leaves a model as it is: choose another coding")
    ids = _windows(model, text, tokenizer, length)
    model.eval()
    selected = select(find_sites(model), sites or SiteSelection())
    sketches = (capture or Capture()).run(model, ids, selected, batch)
    densities = (distribution or Distribution()).run(sketches)
    statistics = _statistics(model, ids, coding, selected, batch)
    neurons = (fitting or Fitting()).for_coding(coding).run(densities, coding, statistics)
    return Conversion(coding, neurons)


def convert(
    model: PreTrainedModel,
    text: Tensor | str | Sequence[str],
    coding: Coding,
    **options: Any,
) -> PreTrainedModel:
    """Turn a dense model into a spiking one, in place and without touching its weights.

    Returns the same model: `generate`, `forward` and `save_pretrained` are those of the spiking model
    until `restore`. `text` and `options` are those of `fit`.
    """
    return bind(model, fit(model, text, coding, **options))


def bind(model: PreTrainedModel, conversion: Conversion) -> PreTrainedModel:
    """Put fitted neurons on a dense model until `restore`; returns the model.

    Raises InputError for a spiking model, and where a site is not one of this model's.
    """
    # A spiking model that was restored still rotates, and has its prefix.
    plain = _plain(model)
    spec = describe(conversion, applied(plain), prefix_ids(plain))
    binding.bind(plain, conversion, spec)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take the neurons off; returns the model, which is the dense one again, bit for bit.

    Raises InputError for a model that has none.
    """
    _attached(model).close()
    return model


@contextmanager
def patched(model: PreTrainedModel, conversion: Conversion) -> Iterator[PreTrainedModel]:
    """Make the model spiking inside a `with` block; after it the model is dense again."""
    bind(model, conversion)
    try:
        yield model
    finally:
        restore(model)


def conversion(model: PreTrainedModel) -> Conversion:
    """Return the coding and the neurons of a spiking model, with the parameters that it has by now."""
    return binding.held(_plain(model), _attached(model).conversion)


def table(model: PreTrainedModel) -> pd.DataFrame:
    """Return one row a site of a spiking model: site, role, layer, nmse, spikes, bound_db, parameters.

    nmse = sum (SN(x) - x)^2 / sum x^2 and mean spikes of one value, both over the estimated
    distribution of calibration, and how many dB that error lies above the least of any code of so
    many spikes (`stages.analysis.bound`); NaN for a model that was read from a folder, and for codings
    that depend on the whole token. `measure` has error and spikes on other text.
    """
    neurons = conversion(model).neurons
    columns = {"site": neurons.sites, "role": neurons.roles, "layer": neurons.layers}
    frame = pd.DataFrame(columns | {name: getattr(neurons, name) for name in ON_ATOMS})
    for name, value in neurons.fit.params.items():
        frame[name] = value.tolist()
    return frame


def measure(
    model: PreTrainedModel,
    text: Tensor | str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 512,
    batch: int = 4,
) -> pd.DataFrame:
    """Measure error and spikes of every neuron on the dense model's values over text it was not fitted on.

    Columns: those of `stages.patching.Patching.run`. `text` is that of `fit`; the model is dense while
    it is measured, and spiking again afterwards.
    """
    model = _plain(model)
    fitted, ids = conversion(model), _windows(model, text, tokenizer, length)
    spec: Any = model.config.quantization_config
    restore(model)
    try:
        return Patching(len(ids)).run(model, ids, fitted, batch)
    finally:
        binding.bind(model, fitted, spec)


def save(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write a spiking model as a folder that `load` and transformers' `from_pretrained` read.

    Raises InputError for a dense model, and where the folder is not empty or cannot be written.
    """
    _attached(model)
    place = Path(folder).expanduser()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"stages.save: {place} is not an empty folder; give another one")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"stages.save: {place} cannot be made ({error.strerror}); give another folder"
        ) from error
    _plain(model).save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(place)


def _attached(model: PreTrainedModel) -> Attachment:
    present = attachment(_plain(model))
    if present is None:
        raise InputError("the model has no neurons: stages.convert gives it some")
    return present


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model that torch.compile has wrapped, which is converted and compiled again with its neurons."""
    plain: PreTrainedModel = getattr(model, "_orig_mod", model)
    return plain


def _windows(
    model: PreTrainedModel,
    text: Tensor | str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
) -> Tensor:
    """Ids [windows, length] of what a user gave as text.

    Raises InputError for what the model cannot read, before it fails with less to say.
    """
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.is_complex() or text.dtype == torch.bool:
            raise InputError(f"token ids are whole numbers: got a tensor of {text.dtype}")
        if text.numel() and int(text.min()) < 0:
            raise InputError(f"token ids are 0 or more: got {int(text.min())}")
    if isinstance(text, Tensor) and text.dim() == 2 and len(text):
        ids = text
    elif not isinstance(text, Tensor) and tokenizer is None:
        raise InputError("a text needs a tokenizer: give tokenizer=…, or token ids as a tensor")
    else:
        read = text.flatten() if isinstance(text, Tensor) else _tokenised(text, tokenizer)
        ids = corpus.windows(read, max(1, len(read) // length), length, name="the text")
    limits.check_window(model.config, ids.shape[1], type(model).__name__, prefix_length(model))
    embedding: Any = model.get_input_embeddings()
    limits.check_tokens(ids, embedding.num_embeddings, "the text", tokenizer)
    return ids


def _tokenised(text: str | Sequence[str], tokenizer: Any) -> Tensor:
    return tokenise([text] if isinstance(text, str) else text, JOIN, tokenizer)


def _statistics(
    model: PreTrainedModel, ids: Tensor, coding: Coding, sites: Sequence[Site], batch: int
) -> dict[str, dict[str, Tensor]]:
    """What the coding needs beyond the distribution."""
    return {each.name: measuring(each)(model, ids, sites, batch) for each in coding.statistics}
