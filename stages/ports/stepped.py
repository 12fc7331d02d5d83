"""Time-stepped execution: the model as a spiking network, layer by layer, every layer T steps.

At every step one operand of every linear, attention and gate product is in {-1, 0, 1}: what spikes
select is added up (times the scales of channels, where a coding has those), and the sums are multiplied
by the weights of the phases. Means of channels enter a linear product as a bias. What stays real-valued
is listed by `stages.analysis.real_valued`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stages.codings.base import Coding
from stages.errors import InputError
from stages.neurons.channels import left_out, unscaled
from stages.neurons.spikes import Params
from stages.ports.coded import coded
from stages.ports.counters import SiteCounter
from stages.ports.kernels import masked_softmax
from stages.ports.planes import Planes, check_ternary, planes, timed
from stages.ports.port import count
from stages.ports.visibility import View


class SteppedPort:
    """Codes a value by its time-stepped neuron and passes its spikes on to what multiplies it.

    With `steps` it passes, decoded, what has arrived after so many of them.
    """

    plain = whole = False

    def __init__(
        self,
        coding: Coding,
        params: Params,
        counter: SiteCounter | None = None,
        steps: int | None = None,
    ) -> None:
        coding, params = coding.at_site(params)
        self._coding, self._params, self._counter = coding, dict(params), counter
        self._steps = steps

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        coded_x, spikes = planes(self._coding, x.contiguous(), self._params)
        if self._counter is not None:
            self._counter.add(x.shape, spikes.sum(-1).float(), real, fanout)
        return self._passed(coded_x, x)

    def constant(self, x: Tensor) -> Tensor | None:
        return left_out(x, self._params)

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        coding = self._coding
        if coding.replaces_softmax:
            fired, weight, row = coding.softmax_spikes(scores, scaling, view.mask, self._params)
            probs, spikes = timed(fired, weight, row), fired.count
        else:
            dense = masked_softmax(scores, scaling, view.mask)
            probs, spikes = planes(coding, dense, unscaled(self._params))
        counted = None if self._counter is None else (spikes * view.mask).sum(-1).float()
        return self._passed(probs, scores), counted

    def tally(self, spikes: Tensor | None, view: View, heads: int, fanout: int) -> None:
        count(self._counter, spikes, view, heads, fanout)

    def _passed(self, value: Planes, x: Tensor) -> Tensor:
        if self._steps is None:
            return coded(value, x.dtype)
        return value.first(self._steps).value().to(x.dtype)


def check_steps(coding: Coding) -> None:
    """Raise InputError for a coding that has no step-by-step form."""
    check_ternary(coding)
    if coding.replaces_softmax and not coding.softmax_in_steps:
        raise InputError(f"coding={coding.name} has no softmax in steps: use execution=fast")


def stepped_ports(
    coding: Coding,
    parameters: Mapping[str, Params],
    counters: Mapping[str, SiteCounter],
    steps: int | None = None,
) -> dict[str, SteppedPort]:
    """Return a stepped port for every site that has parameters."""
    check_steps(coding)
    return {
        name: SteppedPort(coding, params, counters.get(name), steps)
        for name, params in parameters.items()
    }
