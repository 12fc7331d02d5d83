"""What passes a site: the dense value, its spike code, or the dense value with the error of its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from stages.codings.base import Coding
from stages.errors import InputError
from stages.neurons.channels import CENTRE, left_out
from stages.ports.counters import SiteCounter
from stages.ports.kernels import masked_softmax, row_kernel, softmax_kernel
from stages.ports.tables import Tables, Tabulated
from stages.ports.visibility import View


class DensePort:
    """Passes the value as it is and counts its multiplications."""

    plain, whole = True, False

    def __init__(self, counter: SiteCounter | None = None) -> None:
        self.counter = counter

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        if self.counter is not None:
            self.counter.add(x.shape, None, real, fanout)
            if isinstance(fanout, int):
                self.counter.add_nonzero(x, real)
        return x

    def constant(self, x: Tensor) -> Tensor | None:
        return None

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        return masked_softmax(scores, scaling, view.mask).to(scores.dtype), None

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        count(self.counter, spikes, view, heads, fanout)


class SpikingPort:
    """Replaces the value by its spike code and counts the spikes."""

    plain = whole = False

    def __init__(
        self,
        coding: Coding,
        params: Mapping[str, Tensor],
        counter: SiteCounter | None = None,
        tables: Tables | None = None,
    ) -> None:
        """`tables`: shared by the sites of a model."""
        self.counter = counter
        self.read(coding, params, tables or Tables())

    def read(self, coding: Coding, params: Mapping[str, Tensor], tables: Tables) -> None:
        """Make the code that parameters say, in the place of the one before."""
        coding, own = coding.at_site(params)
        self.params = dict(own)
        self._device: torch.device | None = None  # where all of them are, once it is known
        self._neuron = coding.neuron
        counted = self.counter is not None and coding.neuron
        self._rows, self._softmax = row_kernel(coding, counted), softmax_kernel(coding, counted)
        self._centred = CENTRE in own
        # Whether the code of a key or a value may stand in a cache in its place.
        self.keeps = not coding.tokenwise and self.counter is None
        self._tabulated = Tabulated(coding, own, counted, tables)

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        p = self._on(x.device)
        made = self._tabulated.rows(x, p)
        value, spikes = self._rows(x, p) if made is None else made
        if self.counter is not None:
            self.counter.add(x.shape, spikes if self._neuron else None, real, fanout)
            if not self._neuron and isinstance(fanout, int):
                self.counter.add_nonzero(value, real)
        return without_gradient(value)

    def keep(self, x: Tensor, first: int) -> None:
        """Put the codes of the tokens of x [B, G, S, D] from `first` on in their place in a cache."""
        new, p = x[:, :, first:], self._on(x.device)
        made = self._tabulated.rows(new, p, new)
        value, _ = self._rows(new, p) if made is None else made
        if value is not new:
            new.copy_(without_gradient(value))

    def constant(self, x: Tensor) -> Tensor | None:
        return left_out(x, self._on(x.device)) if self._centred else None

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        made = self._tabulated.softmax(scores, scaling, view.bias)
        if made is None:
            made = self._softmax(scores, scaling, view.bias, self._on(scores.device))
        value, spikes = made
        counted = self.counter is not None and self._neuron
        return without_gradient(value), spikes if counted else None

    def attend(
        self,
        scores: Tensor,
        scaling: float,
        bias: Tensor | None,
        value: Tensor,
        out: Tensor,
    ) -> tuple[bool, Tensor | None]:
        """Put what the probabilities of scores [B, H, Q, K] give of value [B, G, K, D] into out
        [B, Q, H, D], where one compiled pass does; say so, with the spikes as `softmax` gives them.

        Without a bias query i sees the keys up to K - Q + i; may overwrite the scores.
        """
        fired = self._tabulated.attend(scores, scaling, bias, value, out)
        return fired is not None, fired if self.counter is not None and self._neuron else None

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        count(self.counter, spikes, view, heads, fanout)

    def _on(self, device: torch.device) -> Mapping[str, Tensor]:
        """The parameters where the values are: a model may move after it was patched."""
        if self._device != device:
            self.params = {name: value.to(device) for name, value in self.params.items()}
            self._device = device
        return self.params


class ErrorPort(SpikingPort):
    """Passes the dense value, and adds up what its code would cost: error, power and spikes."""

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        value, mean = super().__call__(x, real, fanout), super().constant(x)
        self._add(x, value if mean is None else value + mean, real)
        return x

    def constant(self, x: Tensor) -> Tensor | None:
        return None  # what passes is the dense value

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        probs = masked_softmax(scores, scaling, view.mask).to(scores.dtype)
        value, spikes = super().softmax(scores, scaling, view)
        self._add(probs, value, real_rows(view))
        return probs, spikes

    def attend(self, *args: Any) -> tuple[bool, Tensor | None]:
        return False, None  # the error is that of all probabilities

    def _add(self, x: Tensor, value: Tensor, real: Tensor | None) -> None:
        assert self.counter is not None
        error = (value.float() - x.float()).square_().sum(-1, dtype=torch.float64)
        power = x.float().square().sum(-1, dtype=torch.float64)
        if real is not None:
            error, power = error * real, power * real
        self.counter.add_error(error.sum(), power.sum())


def without_gradient(value: Tensor) -> Tensor:
    """Return a coded value, through which no gradient passes: its code is a staircase, flat almost
    everywhere, and what was behind it would silently not be trained."""
    if value.requires_grad:
        value.register_hook(_refuse_gradient)
    return value


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    raise InputError(
        "no gradient passes a spiking model, whose codes are staircases: train the dense one "
        "(stages.restore(model)), and convert what is trained"
    )


def count(
    counter: SiteCounter | None, spikes: Tensor | None, view: View, heads: int, fanout: int
) -> None:
    """Count the probabilities of a pass, whose rows have `spikes` [B, H, Q]; None where they are dense."""
    if counter is not None:
        shape = torch.Size((view.seen.shape[0], heads, *view.pairs.shape[-2:]))
        counter.add(shape, spikes, real_rows(view), fanout, allowed(view, heads))


def allowed(view: View, heads: int) -> Tensor:
    """Count the probabilities that real queries of this block compute."""
    seen = view.seen if view.real is None else view.seen * view.real
    return seen.sum() * heads


def real_rows(view: View) -> Tensor | None:
    """Return which query rows are real, [B, 1, Q], or None for all."""
    return None if view.real is None else view.real[:, None]
