"""What a model's conversion takes in memory, from its dimensions: weights, sketches, neurons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from stages.analysis.operations import operations
from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.fits.algorithm1 import Algorithm1
from stages.model.families import architecture
from stages.model.offload import OUTSIDE
from stages.model.sites import Site, find_sites
from stages.sketch import Accumulator, Grid

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


_ENTRY = 12  # bytes of a bin and its count, and of the maximum and the squares of a channel


@dataclass(frozen=True)
class Resident:
    """Bytes of all weights, of the largest decoder layer, and of what is in no layer."""

    weights: int
    layer: int
    outside: int


def resident(model: PreTrainedModel, dtype: torch.dtype) -> Resident:
    """Return the sizes of a model, which may be on the meta device, with its weights in `dtype`."""
    rules = architecture(model)
    groups: Counter[int] = Counter()
    for name, weight in model.named_parameters():  # tied ones once
        groups[rules.layer_of(name)[0]] += weight.numel() * dtype.itemsize
    outside = groups.pop(OUTSIDE, 0)
    return Resident(outside + sum(groups.values()), max(groups.values()), outside)


def site_plan(
    model: PreTrainedModel,
    sites: Sequence[Site],
    mantissa_bits: int,
    dtype: torch.dtype,
    tokens: int,
) -> pd.DataFrame:
    """List every site: site, role, layer, values (a token), pairs (values a query-key pair) and
    sketch, the bytes of its histogram while `tokens` are captured.

    An expert has its even part of a layer's values. Its histogram keeps filled bins alone, as many as
    normal values would fill.
    """
    import pandas as pd  # a plan of what is stored does without

    grid = Grid(mantissa_bits)
    exact = dtype == torch.bfloat16 and mantissa_bits >= 7
    plan = operations(model, find_sites(model))
    work = {o.name: o.work for o in plan if o.kind == "gate"}
    shared = Counter(site.operand for site in sites)

    @cache
    def filled(values: float) -> int:
        return _filled(Accumulator(grid, 0, exact, torch.device("meta")).fine, values)

    rows = []
    for site in sites:
        values = work[site.operand].per_token / shared[site.operand]
        if site.expert is None:
            size = _bytes(grid, int(values), exact)
        else:
            size = 2 * torch.int32.itemsize * filled(values * tokens)
        rows.append((site.name, site.role, site.layer, values, work[site.operand].per_pair, size))
    return pd.DataFrame(rows, columns=["site", "role", "layer", "values", "pairs", "sketch"])


def share_bytes(
    model: PreTrainedModel,
    sites: Sequence[Site],
    mantissa_bits: int,
    dtype: torch.dtype,
    tokens: int,
) -> int:
    """Return the bytes that capture leaves of `tokens`: filled bins with their counts, as many as normal
    values would fill, and what it keeps of every channel."""
    frame = site_plan(model, sites, mantissa_bits, dtype, tokens)
    exact = dtype == torch.bfloat16 and mantissa_bits >= 7
    fine = Accumulator(Grid(mantissa_bits), 0, exact, torch.device("meta")).fine
    seen = frame[["values", "pairs"]].max(axis=1) * tokens
    filled = {number: _filled(fine, number) for number in seen.unique()}
    return int(seen.map(filled).sum() + frame["values"].sum()) * _ENTRY


def _filled(grid: Grid, values: float) -> int:
    """Expected number of bins that hold any of so many standard normal values."""
    edges = grid.edges().clamp(max=1e3)
    mass = torch.special.ndtr(edges).diff()  # of either sign
    return round(float(2 * -torch.expm1(values * torch.log1p(-mass)).sum()))


def _bytes(grid: Grid, channels: int, exact: bool) -> int:
    sketch = Accumulator(grid, channels, exact, torch.device("meta"))
    return sum(t.nbytes for t in vars(sketch).values() if isinstance(t, torch.Tensor))


def parameter_bytes(coding: Coding) -> int | None:
    """Return the bytes of one site's neurons, as a fit to some values has them.

    None for a coding that asks statistics of the model, whose sizes follow from those.
    """
    if coding.statistics:
        return None
    value = torch.linspace(0, 1, 128, dtype=torch.float64)[None]
    atoms = Atoms(value, torch.zeros_like(value), torch.full_like(value, 1 / 128), value[:, -1])
    untrained: Any = coding
    if coding.trained:
        untrained = replace(
            untrained, algorithm1=Algorithm1(rounds=0, neuron_steps=0, base_steps=0)
        )
    params: dict[str, torch.Tensor] = untrained.fit(atoms).params
    return sum(t.float().nbytes for t in params.values())
