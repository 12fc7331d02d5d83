"""One linear layer as integers: the spike trains that reach it in a stepped run, and rounded weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stages.errors import InputError, nearest
from stages.fitted import Conversion
from stages.model.sites import Site, linear, rows
from stages.ports.coded import Coded
from stages.ports.patched import patched
from stages.ports.planes import Planes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 127  # magnitude of a symmetric 8-bit weight
ROUNDING = (
    "8-bit integers, symmetric, one scale for the matrix, rounded to the nearest, ties to even"
)


@dataclass(frozen=True)
class SpikingLayer:
    """Tokens that reach a linear layer as base-2 spike trains, the highest bit first.

    trains int8 [tokens, T, inputs] in {-1, 0, 1}; weights int8 [outputs, inputs], real weights in units of
    `step`; unit: what a spike of the last step is worth.
    """

    trains: Tensor
    weights: Tensor
    step: float
    unit: float

    @property
    def tokens(self) -> int:
        return len(self.trains)

    @property
    def steps(self) -> int:
        """T; the last spikes arrive one step later."""
        return self.trains.shape[1]

    @property
    def inputs(self) -> int:
        return self.weights.shape[1]

    @property
    def outputs(self) -> int:
        return self.weights.shape[0]

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs that spikes have: a group of inputs each, the second with negated weights."""
        return (1, -1) if bool((self.trains < 0).any()) else (1,)

    @property
    def spikes(self) -> int:
        return int(self.trains.count_nonzero())

    @property
    def codes(self) -> Tensor:
        """The whole numbers that the trains stand for, [tokens, inputs] int64."""
        place = 2 ** torch.arange(self.steps - 1, -1, -1)
        return torch.einsum("nti,t->ni", self.trains.long(), place)

    def sums(self) -> Tensor:
        """The product of integer weights and codes, [tokens, outputs] int64."""
        return self.codes @ self.weights.long().T

    def potentials(self) -> Tensor:
        """V(t) = 2 V(t-1) + W s(t), [tokens, T, outputs] int64; the last are the `sums`."""
        current = self.trains.long() @ self.weights.long().T
        total, steps = torch.zeros_like(current[:, 0]), []
        for t in range(self.steps):
            total = 2 * total + current[:, t]
            steps.append(total)
        return torch.stack(steps, 1)

    def updates(self) -> int:
        """Steps, summed over outputs and tokens, at which an input arrives or the potential is not 0."""
        before = self.potentials()[:, :-1] != 0
        arrives = self.trains.any(-1)[:, :, None].expand(-1, -1, self.outputs)
        held = torch.cat([torch.zeros_like(arrives[:, :1]), before], 1)
        return int((arrives | held).sum())

    def rounding_error(self, weights: Tensor) -> float:
        """Norm of what rounding the real `weights` [outputs, inputs] moves the products by, over that of
        the products; 0 where no token has a spike."""
        real = self.codes.double() @ weights.detach().double().T
        moved = torch.linalg.norm(self.sums() * self.step - real)
        return float(moved / torch.linalg.norm(real).clamp(min=torch.finfo(torch.double).tiny))


def integer_weights(weight: Tensor) -> tuple[Tensor, float]:
    """Round a matrix to `ROUNDING`: int8 of its shape, and what 1 stands for.

    The largest magnitude becomes 127. Raises InputError for a matrix of zeros.
    """
    real = weight.detach().double().cpu()
    step = float(real.abs().max()) / LARGEST
    if not step:
        raise InputError("the matrix of this layer is zero: there is nothing to simulate")
    return (real / step).round().to(torch.int8), step


def base2_trains(planes: Planes, name: str) -> tuple[Tensor, float]:
    """The trains [tokens, T, inputs] of planes [..., tokens, inputs], and what the last step is worth.

    Raises InputError unless a value is one neuron whose steps halve in weight; `name` is the coding's.
    """
    allowed = "las, las_rounded, or gated and signed_digit with coding.grains=1"
    accumulators = planes.accumulators
    if len(accumulators) != 1:
        raise InputError(
            f"coding={name} has {len(accumulators)} neurons or floors a value here; simulate takes one "
            f"neuron in base 2: {allowed}"
        )
    (accumulator,) = accumulators
    halving = accumulator.shift == 1 or len(accumulator.plane) == 1
    if accumulator.groups or not halving:
        raise InputError(
            f"coding={name} has steps whose weights do not halve; simulate takes base 2: {allowed}"
        )
    if not (planes.row is None and planes.unit is None and planes.centre is None):
        raise InputError(
            f"coding={name} has scales of rows or channels, or means, at this site, which are no spikes; "
            "simulate takes coding.granularity=site coding.centre=none"
        )
    trains = torch.stack([plane.flatten(0, -2) for plane in accumulator.plane], 1)
    return trains.to(torch.int8).cpu(), accumulator.weight[-1]


def consumer_of(
    model: PreTrainedModel, sites: Sequence[Site], name: str, chosen: str
) -> tuple[str, list[str]]:
    """The linear module that reads the site `name`, the `chosen` one by its path or the last word of it,
    else the first; and the others.

    Raises InputError where there is no such site or module, or none that is linear.
    """
    known = {site.name: site for site in sites}
    if name not in known:
        near = nearest(name, known)
        raise InputError(
            f"site={name}: the model has no such site; {near or 'sites are ' + _some(known)}"
        )
    modules = dict(model.named_modules())
    readers = [c for c in known[name].consumers if linear(modules[c])]
    if not readers or known[name].expert is not None:
        those = {n for n, site in known.items() if site.consumers and site.expert is None}
        raise InputError(
            f"site={name} enters no linear layer of its own; give one that does, as {_some(those)}"
        )
    for reader in readers:
        if chosen in ("", reader, reader.rpartition(".")[2]):
            return reader, [each for each in readers if each != reader]
    words = [reader.rpartition(".")[2] for reader in readers]
    raise InputError(f"consumer={chosen}: {name} is read by {', '.join(words)}; choose one of them")


def _some(names: Sequence[str] | set[str] | dict[str, Site]) -> str:
    shown = list(names) if not isinstance(names, set) else sorted(names)
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")


def spiking_layer(
    model: PreTrainedModel, conversion: Conversion, site: str, consumer: str, ids: Tensor
) -> SpikingLayer:
    """The spike trains with which a dense model, coded by `conversion` and run step by step on ids
    [1, tokens], reaches the module `consumer` from a site, and the module's weights as integers.

    Raises InputError where the site stays dense, and for a coding that is none of `base2_trains`.
    """
    if site not in conversion.neurons.sites:
        raise InputError(f"site={site} has no neurons in this model; choose one that is converted")
    module = model.get_submodule(consumer)
    arrived: list[Planes] = []

    def watch(_: nn.Module, arguments: tuple[Coded, ...]) -> None:
        arrived.append(arguments[0].planes)

    with torch.inference_mode(), patched(model, conversion, execution="stepped"):
        watching = module.register_forward_pre_hook(watch)  # behind the hooks that code the values
        try:
            model(ids, use_cache=False)
        finally:
            watching.remove()
    (planes,) = arrived
    trains, unit = base2_trains(planes, conversion.coding.name)
    weights, step = integer_weights(rows(module))
    return SpikingLayer(trains, weights, step, unit)
