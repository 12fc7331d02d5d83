"""Means and scales of channels: the values of a site about the ones in units of the others, and the
distribution of those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.atoms import Atoms
from stages.neurons.spikes import Params

CHANNEL = "channel"  # the parameter that holds the scales, [*S, C]
CENTRE = "centre"  # the parameter that holds the means, [*S, C]


def per_channel(values: Tensor, x: Tensor, rest: float) -> Tensor:
    """Channel values [>= C or padded with `rest`] in the layout of x [..., C] or [B, H, S, D], where a
    channel is a head's dimension: [C] or [H, 1, D]."""
    heads = x.shape[1] if x.dim() == 4 else 1
    width = heads * x.shape[-1]
    short = max(0, width - len(values))
    padded = functional.pad(values[:width], (0, short), value=rest)
    return padded.view(heads, 1, -1) if x.dim() == 4 else padded


def unit(x: Tensor, p: Params) -> Tensor | None:
    """The scale of every channel of x [..., C] or [B, H, S, D], in its layout; None without any."""
    return per_channel(p[CHANNEL], x, 1.0) if CHANNEL in p else None


def centre(x: Tensor, p: Params) -> Tensor | None:
    """The mean of every channel of x [..., C] or [B, H, S, D], in its layout; None without any."""
    return per_channel(p[CENTRE], x, 0.0) if CENTRE in p else None


def left_out(x: Tensor, p: Params) -> Tensor | None:
    """The means that the code of heads [B, H, S, D] is about and leaves out, [H, 1, D]; None without any.

    Those of k shift all scores of a query alike, which the softmax does not see, and attention adds
    those of v to what it gives, as probabilities sum to one. The code of features has its means in it.
    """
    return centre(x, p) if x.dim() == 4 else None


def unscaled(p: Params) -> dict[str, Tensor]:
    """The parameters of a neuron that sees values as they are."""
    return {name: value for name, value in p.items() if name not in (CHANNEL, CENTRE)}


def scaled_atoms(atoms: Atoms, statistic: Mapping[str, Tensor]) -> Atoms:
    """The distribution of values about the means and in units of the scales of their channels, from what
    `ChannelMean` or `ChannelScale` measures; that of the values themselves at sites without channels."""
    whole = (statistic["channels"] == 0)[:, None]
    size = max(atoms.value.shape[1], statistic["value"].shape[1])
    negative = torch.full_like(atoms.weight, 0.5) if atoms.negative is None else atoms.negative
    given = {
        "value": atoms.value,
        "spread": atoms.spread,
        "weight": atoms.weight,
        "negative": negative,
        "gain": torch.ones_like(atoms.weight),
    }

    def filled(row: Tensor) -> Tensor:
        return functional.pad(row.double(), (0, size - row.shape[1]))

    parts: dict[str, Any] = {
        name: torch.where(whole, filled(row), filled(statistic[name]))
        for name, row in given.items()
    }
    maximum = torch.where(whole[:, 0], atoms.maximum, statistic["maximum"].double())
    parts["value"] = torch.where(parts["weight"] > 0, parts["value"], maximum[:, None])
    return replace(atoms, **parts, maximum=maximum, extremes=None)
