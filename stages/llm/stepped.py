"""Time-stepped execution: the model as a spiking network, layer by layer, every layer T steps.

At every step one operand of every linear and attention product is in {-1, 0, 1}: rows of weights, of
decoded keys or of decoded values are added where there is a spike, and what a step has accumulated is
multiplied by the weight of its phase. The other operand of an attention product enters decoded, as the
charge that earlier spikes have left. What stays real-valued is `REAL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.codings.coding import Coding, ReplacesSoftmax
from stages.codings.neurons import Params
from stages.errors import InputError
from stages.llm.attention import View
from stages.llm.counters import SiteCounter
from stages.llm.kernels import masked_softmax
from stages.llm.planes import Planes, check_ternary, planes
from stages.llm.ports import allowed, real_rows
from stages.llm.sites import Site

EXECUTIONS = ("fast", "stepped")
REAL = (
    "embedding (a look-up)",
    "normalisation, with its scale unless transform=rotate has fused it",
    "rotary position embedding, its angles among it",
    "softmax",
    "activation function",
    "the gate's element-wise product of two decoded values",
    "residual and bias additions",
)


@runtime_checkable
class SteppedSoftmax(Protocol):
    """A coding that replaces the softmax and can tell its probabilities apart by step."""

    def softmax_planes(self, probabilities: Tensor, p: Params) -> Planes: ...


class SteppedPort:
    """Codes a value by its time-stepped neuron and keeps the planes for whoever multiplies it.

    `steps` keeps the first of them only.
    """

    def __init__(
        self,
        coding: Coding,
        params: Params,
        counter: SiteCounter | None = None,
        steps: int | None = None,
    ) -> None:
        self.planes: Planes | None = None
        self._coding, self._params, self._counter = coding, dict(params), counter
        self._steps = steps

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        found, spikes = planes(self._coding, x, self._params)
        if self._counter is not None:
            self._counter.add(x.shape, spikes.sum(-1).float(), real, fanout)
        return self._kept(found).to(x.dtype)

    def softmax(self, scores: Tensor, scaling: float, view: View, fanout: int) -> Tensor:
        coding = self._coding
        if isinstance(coding, ReplacesSoftmax):
            if not isinstance(coding, SteppedSoftmax):
                raise InputError(
                    f"coding={coding.name} has no softmax in steps: use execution=fast"
                )
            probs, spikes = coding.softmax(scores, scaling, view.mask, self._params)
            found = coding.softmax_planes(probs, self._params)
        else:
            probs = masked_softmax(scores, scaling, view.mask)
            found, spikes = planes(coding, probs, self._params)
        if self._counter is not None:
            values = allowed(view, scores.shape[1])
            counted = (spikes * view.mask).sum(-1).float()
            self._counter.add(scores.shape, counted, real_rows(view), fanout, values)
        return self._kept(found).to(scores.dtype)

    def _kept(self, found: Planes) -> Tensor:
        self.planes = found if self._steps is None else found.first(self._steps)
        return self.planes.value()


@contextmanager
def stepping(
    model: PreTrainedModel, sites: Sequence[Site], ports: Mapping[str, Any]
) -> Iterator[None]:
    """Lets every linear module that reads a stepped site add rows of its weight step by step.

    Raises InputError where experts would stay products of real values.
    """
    modules = dict(model.named_modules())
    read = {
        name: ports[site.name]
        for site in sites
        for name in site.consumers
        if isinstance(ports.get(site.name), SteppedPort)
    }
    odd = [name for name in read if not isinstance(modules[name], nn.Linear)]
    if odd:
        raise InputError(
            f"runtime.execution=stepped knows linear modules, not {odd[0]}: use runtime.execution=fast"
        )
    try:
        for name, port in read.items():
            modules[name].__dict__["forward"] = _accumulating(modules[name], port)
        yield
    finally:
        for name in read:
            modules[name].__dict__.pop("forward", None)


def _accumulating(linear: Any, port: SteppedPort) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        found = port.planes
        assert found is not None and found.plane[0].numel() == x.numel()
        total = found.product(linear.weight.t(), lambda plane: plane.reshape(x.shape))
        return total if linear.bias is None else total + linear.bias

    return forward


def stepped_ports(
    coding: Coding,
    parameters: Mapping[str, Params],
    counters: Mapping[str, SiteCounter],
    steps: int | None = None,
) -> dict[str, SteppedPort]:
    """A stepped port for every site that has parameters."""
    check_ternary(coding)
    return {
        name: SteppedPort(coding, own, counters.get(name), steps)
        for name, own in parameters.items()
    }
