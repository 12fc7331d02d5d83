"""The energy's operation counts against the operations of a stepped run, op by op."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.run import hardware
from stages.analysis.operations import operations
from stages.analysis.real_valued import real_valued
from stages.codings.gated import Gated
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.codings.timed import Timed
from stages.energy import account
from stages.fitted import Conversion
from stages.model.sites import find_sites
from stages.ports import attention
from stages.ports.counters import Counters
from stages.ports.patched import patched
from stages.transforms.rotation import fuse
from tests.codings.test_mixed import mixed
from tests.ports.products import watched

CODINGS = [
    Gated("gated", 4, 2),
    SignedDigit("signed_digit", 5, 2),
    Gated("digits", 5, 2, radix=4),
    Gated("one_time", 4, 2, radix=16),
    Gated("planes_offset", 5, 3, offset=True, grain_steps=(0, 1, -1)),
    Gated("digits_offset", 4, 3, offset=True, grain_steps=(0, 1, 2), radix=4),
    Gated("one_time_offset", 4, 2, offset=True, radix=2**16),
    SignedDigit("signed_digits", 5, 2, radix=4),
    SignedDigit("signed_digits_offset", 6, 2, offset=True, radix=8),
    Las("las", 5, "zero"),
    Oat("oat", 5, "half_step", 99.0),
    Multigrain("multigrain", 5, 2, "half_step", False),
    Rate("rate", 5, "zero"),
    Timed("timed", 16),
    Timed("timed_windows", 5, 3),
    Timed("timed_slots", 1, 4),  # neurons of one slot each, which sum nothing up
    Timed("timed_priced", 12, 2, mu=0.5, levels="free"),
    mixed(Timed("timed", 6, 2), Gated("gated", 4, 2, radix=4), mu=0.2),
]
LENGTH, HEAD = 7, 10  # tokens and width of a head: what a product's inner dimension tells apart
Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
def test_spikes_and_scalings_are_those_of_the_causal_energy(
    model: PreTrainedModel,
    tokens: Draws,
    convert: Converts,
    coding: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A block of one query reads the keys that it may see and no others.
    monkeypatch.setattr(attention, "QUERY_BLOCK", 1)
    monkeypatch.setattr(attention, "SPIKES", 1)
    conversion, sites = convert(model, coding), find_sites(model)
    if isinstance(coding, Multigrain):  # whose bases the fit may leave at 2, where weights halve
        conversion.neurons.fit.params["d"] *= torch.linspace(1, 1.1, coding.timesteps)
    counters = Counters(sites, "cpu")
    with watched(model) as seen, torch.no_grad(), patched(model, conversion, counters, "stepped"):
        model(tokens(1, LENGTH), use_cache=False)
    frame = counters.of(conversion)
    shipped = hardware.energy(["45nm"])
    causal = replace(shipped, conventions={"causal": shipped.conventions["causal"]})
    rows = account(operations(model, sites), causal, LENGTH, frame, coding)
    rows = rows[rows["phase"] == "prefill"]
    checked = 0
    for row in rows.itertuples():
        name, _, part = row.op.partition(":")
        if row.kind in ("linear", "qk", "pv"):
            inner = {"qk": HEAD}.get(row.kind)
            assert row.macs == 0
            assert amount(seen.additions, name, inner, part) == pytest.approx(row.acs, rel=1e-12)
            checked += 1
        elif row.kind == "decode_scaling":
            inner = {"qk": HEAD}.get(part)
            assert amount(seen.scalings, name, inner, part) == row.macs, row.op
            assert amount(seen.merges, name, inner, part) == row.acs, row.op
            checked += 1
    assert checked == 2 * (2 * (7 + 2) + 1)  # a layer's linear modules and its attention, the head


def amount(counts: dict[tuple[str, int], float], name: str, inner: int | None, part: str) -> float:
    """What a module's products counted: all of them, or those of one of attention's two."""
    own = {width: number for (where, width), number in counts.items() if where == name}
    if part == "pv":
        return sum(number for width, number in own.items() if width <= LENGTH)
    return own.get(inner, 0) if inner else sum(own.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "opt"])
def test_what_stays_real_has_the_elements_that_the_energy_counts(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts, kind: str
) -> None:
    """Norms, activation functions, positions, softmax and gates, op by op, in a stepped run."""
    model, length = tiny(kind), 12
    conversion = convert(model, CODINGS[0])
    sites = find_sites(model)
    plan = operations(model, sites)
    seen: dict[str, int] = {}
    functions = {o.name for o in plan if o.kind in ("norm", "activation")}
    hooks = [
        module.register_forward_hook(lambda _, args, out, n=name: seen.update({n: out.numel()}))
        for name, module in model.named_modules()
        if name in functions
    ]
    counters = Counters(sites, "cpu")
    with torch.no_grad(), patched(model, conversion, counters, "stepped"):
        model(tokens(1, length), use_cache=False)
    for hook in hooks:
        hook.remove()
    values = dict(zip([site.name for site in sites], counters.sums[:, 0].tolist(), strict=True))
    for operation in plan:
        window = operation.window or length
        pairs = sum(min(query + 1, window) for query in range(length))
        work = operation.work.at(length, pairs)
        path = operation.name.rpartition(":")[0]
        if operation.kind in ("norm", "activation"):
            assert seen[operation.name] == work, operation
        elif operation.kind == "gate":
            assert values[operation.name] == work, operation
        elif operation.kind == "softmax":
            assert values[f"{path}:probs"] == work, operation
        elif operation.kind == "rope":
            assert values[f"{path}:q"] + values[f"{path}:k"] == work, operation
        elif operation.kind == "product":
            assert values[f"{path}.act_fn:out"] == work, operation


def test_what_stays_real_is_listed(tiny: Callable[..., PreTrainedModel]) -> None:
    listed = {}
    for kind in ("llama", "opt", "mixtral"):
        model = tiny(kind)
        fuse(model) if kind == "llama" else None
        listed[kind] = set(real_valued(model))
    functions = {"softmax", "activation function", "residual and bias additions"}
    assert listed["llama"] == {*functions, "normalisation", "rotary position embedding"}
    scaled = "normalisation and its scale (transform=fuse puts it into weights)"
    assert listed["opt"] == {*functions, scaled}
    assert listed["mixtral"] - listed["llama"] == {scaled, "weights of the experts' outputs"}
