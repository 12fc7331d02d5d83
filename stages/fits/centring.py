"""Where values are coded about the means of their channels: at the sites that it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.fits.statistics import CENTRED, ChannelMean

# Without a sensitivity. The first token of a text, which all others attend to, is near zero in most
# channels of attention's input; about their means it is not, and an error of its key costs the model more
# than all others' gain, which no squared error shows. The same holds for k itself.
SAFE = tuple(role for role in CENTRED if role not in ("attn.in", "attn.k"))
PLAIN = "plain_"


def chosen(atoms: Atoms, sensitivity: str, cost: Callable[[Atoms], Tensor]) -> Atoms:
    """The atoms with means at those sites alone where `cost` [sites] is lower with them than without.

    Their statistics are a `ChannelMean` and the `CentredSensitivity` of the name `sensitivity`; at the
    other sites the mean becomes zero and the sensitivity that by magnitude of x.
    """
    about, plain = dict(atoms.statistics[ChannelMean.name]), atoms.statistics[sensitivity]
    names = [name for name in plain if not name.startswith(PLAIN)]
    centred = {name: plain[name] for name in names}
    uncentred = {name: plain.get(PLAIN + name, plain[name]) for name in names}
    never = about | {name: torch.zeros_like(about[name]) for name in ("mean", "channels")}

    def given(means: Mapping[str, Tensor], curvature: Mapping[str, Tensor]) -> Atoms:
        named = {ChannelMean.name: means, sensitivity: curvature}
        return replace(atoms, statistics={**atoms.statistics, **named})

    pays = cost(given(about, centred)) < cost(given(never, uncentred))

    def where(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.where(pays.view(-1, *[1] * (t.dim() - 1)), t, b[n]) for n, t in a.items()}

    return given(where(about, never), where(centred, uncentred))
