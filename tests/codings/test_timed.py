"""One spike in time, worked out by hand: slots, windows, silence, decoding, and what is refused."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import stages
from stages.codings.base import error_and_spikes
from stages.codings.timed import Timed
from stages.errors import InputError
from stages.fits.sensitivity import Sensitivity
from stages.neurons.spikes import decode
from stages.ports.planes import Accumulator, Sum, planes, summed
from tests.codings.reference import atoms_of, heavy_tailed

# Levels 1, 2, 4 and 8 times a half: gaps 1, 1, 2, 4. Silent below 0.75 of it, or 3/8.
DOUBLING = {
    "scale": torch.tensor(0.5),
    "start": torch.tensor([0.75, 3.0, 6.0]),
    "base": torch.tensor([0.0, 2.0, 4.0]),
    "gap": torch.tensor([1.0, 2.0, 4.0]),
    "end": torch.tensor([2.0, 4.0, 8.0]),
}
# Levels 5, 6 and 8: the lowest one lies 1 above a floor of 4, and is sent from 3.5 on.
ABOVE = {
    "scale": torch.tensor(1.0),
    "start": torch.tensor([3.5, 7.0, torch.inf]),
    "base": torch.tensor([4.0, 6.0, 6.0]),
    "gap": torch.tensor([1.0, 2.0, 2.0]),
    "end": torch.tensor([6.0, 8.0, 8.0]),
}
FREE = {
    "levels": torch.tensor([0.0, 0.3, 1.1, 5.0, 5.0]),
    "thresholds": torch.tensor([0.25, 0.7, 3.0, torch.inf]),
}


def check(coding: Timed, p: dict[str, Tensor], rows: list[tuple[float, float, int]]) -> None:
    """Rows of x, value and slot from the highest level on, of which the number of levels is silence."""
    x, value, time = (torch.tensor(column) for column in zip(*rows, strict=True))
    fast, count = coding.quantise(x, p)
    spikes = coding.encode(x, p)
    torch.testing.assert_close(fast, value)
    torch.testing.assert_close(decode(spikes, coding.table(p)), value)
    assert spikes.time.tolist() == time.tolist()
    assert count.tolist() == spikes.count.tolist() == [int(t < spikes.timesteps) for t in time]
    coded, _ = planes(coding, x, p)
    torch.testing.assert_close(coded.value(), value)
    torch.testing.assert_close(accumulated(coded.accumulators), value)


def accumulated(accumulators: tuple[Accumulator, ...]) -> Tensor:
    """The values as running sums, or products, make them."""
    total = torch.zeros(())
    for accumulator in accumulators:
        made = Sum.of(accumulator)
        for plane, weight, _ in accumulator.spikes:
            made.add(partial(summed, plane.float()), weight)
        total = total + made.value()
    return total


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7])
def test_gaps_of_1_1_2_4_by_hand(slots: int) -> None:
    """Whatever the windows, the threshold falls over 3, 1.5, 0.75 and 0.375."""
    coding = Timed(timesteps=slots, grains=4)
    rows = [(4.0, 4.0, 0), (3.0, 4.0, 0), (-2.99, -2.0, 1), (1.5, 2.0, 1), (1.49, 1.0, 2)]
    rows += [(0.75, 1.0, 2), (-0.74, -0.5, 3), (0.375, 0.5, 3), (0.374, 0.0, 4), (0.0, 0.0, 4)]
    check(coding, DOUBLING, [*rows, (100.0, 4.0, 0), (-torch.inf, -4.0, 0)])


def test_two_windows_run_at_the_same_time() -> None:
    """The lower one sends 1/2 and 1 by gaps 1 1, the higher one 2 and 4 by gaps 4 2 above a floor of 1."""
    coding = Timed(timesteps=2, grains=2)
    coded, _ = planes(coding, torch.tensor([4.0, 2.0, 1.0, 0.5, 0.1]), DOUBLING)
    low, high = coded.accumulators
    assert coded.steps == 2 and low.step == high.step == (0, 1)
    assert low.weight == (1.0, 0.5) and high.weight == (4.0, 2.0)
    assert [plane.tolist() for plane in high.plane] == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert [plane.tolist() for plane in low.plane] == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert (low.groups[0].gaps, low.groups[0].floor) == ((0, 0), 0.0)
    assert (high.groups[0].gaps, high.groups[0].floor) == ((2, 1), 1.0)


def test_levels_above_a_floor_and_a_silent_zone_that_ends_below_it() -> None:
    rows = [(3.49, 0.0, 3), (-3.5, -5.0, 2), (5.49, 5.0, 2), (5.5, 6.0, 1), (-6.99, -6.0, 1)]
    for slots in (1, 2, 3):
        check(Timed(timesteps=slots, grains=3), ABOVE, [*rows, (7.0, 8.0, 0), (50.0, 8.0, 0)])


def test_free_levels_by_hand() -> None:
    rows = [(0.24, 0.0, 3), (0.25, 0.3, 2), (-0.69, -0.3, 2), (0.7, 1.1, 1), (3.0, 5.0, 0)]
    for slots in (1, 2, 3):
        check(Timed(timesteps=slots, grains=3, levels="free"), FREE, [*rows, (torch.inf, 5.0, 0)])


@pytest.mark.parametrize(
    ("slots", "p", "free", "expected"),
    [  # macs, acs, comparisons, steps
        (4, DOUBLING, False, (1, 4, 0, 4)),
        (2, DOUBLING, False, (3, 4, 1, 2)),  # a unit each, and the floor of the second
        (3, DOUBLING, False, (3, 3, 1, 3)),  # a window of one slot needs no running sum
        (1, DOUBLING, False, (7, 0, 3, 1)),
        (8, ABOVE, False, (2, 3, 0, 3)),
        (2, ABOVE, False, (4, 2, 1, 2)),
        (4, FREE, True, (3, 0, 0, 3)),
        (2, FREE, True, (3, 0, 1, 2)),
    ],
)
def test_what_decoding_costs_by_hand(
    slots: int, p: dict[str, Tensor], free: bool, expected: tuple[int, ...]
) -> None:
    coding = Timed(timesteps=slots, grains=4, levels="free" if free else "shifts")
    costs = coding.decoding({name: value[None] for name, value in p.items()})
    for name, number in zip(("macs", "acs", "comparisons", "steps"), expected, strict=True):
        assert getattr(costs, name).tolist() == [number]


@pytest.mark.parametrize("levels", ["shifts", "free"])
def test_what_diverges_is_not_taken_for_silence(levels: str) -> None:
    p = FREE if levels == "free" else DOUBLING
    value, _ = Timed(levels=levels).quantise(torch.tensor([torch.nan, 1.0]), p)
    assert value.isnan().tolist() == [True, False]


@pytest.mark.parametrize("levels", ["shifts", "free"])
def test_a_site_of_zeros_is_silent_and_zero_never_spikes(levels: str) -> None:
    """Also where no error weighs anything, so that silence and spikes cost the same."""
    x = torch.cat([torch.zeros(1, 50), heavy_tailed(1, 50), heavy_tailed(1, 50)])
    x[1:, :20] = 0
    atoms = atoms_of(x)
    atoms = replace(atoms, gain=torch.ones_like(atoms.value), square=torch.ones(3).double())
    assert atoms.gain is not None
    atoms.gain[2] = 0
    coding = Timed(timesteps=16, levels=levels)
    p = {name: value.float() for name, value in coding.fit(atoms).params.items()}
    assert not any(bool(value.isnan().any()) for value in p.values())
    value, count = coding.quantise(torch.tensor([[0.0, -0.0]] * 3), p)
    assert not bool(value.any()) and not bool(count.any())
    error, spikes = error_and_spikes(coding, atoms, p)
    assert float(error[0]) == float(spikes[0]) == 0 and 0 < float(spikes[1]) < 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"timesteps": 0}, "coding.timesteps=0 for timed: give a whole number from 1 to 1024"),
        ({"timesteps": 1025}, "coding.timesteps=1025"),
        ({"timesteps": 6.0}, "coding.timesteps=6.0"),
        ({"timesteps": True}, "coding.timesteps=True"),
        ({"grains": 0}, "coding.grains=0 for timed: give a whole number of neurons from 1 to 32"),
        ({"grains": 33}, "from 1 to 32, with coding.timesteps=128"),
        ({"grains": 2.0}, "coding.grains=2.0"),
        ({"mu": -1.0}, "coding.mu=-1.0 for timed: give a finite number, 0 or more"),
        ({"mu": float("nan")}, "coding.mu=nan for timed: give a finite number, 0 or more"),
        ({"mu": None}, "coding.mu=None for timed: give a finite number, 0 or more"),
        ({"nu": -1.0}, "coding.nu=-1.0"),
        ({"mu": float("nan")}, "coding.mu=nan"),
        ({"nu": float("inf")}, "coding.nu=inf"),
        ({"levels": "powers"}, "coding.levels='powers' for timed: choose shifts or free"),
        ({"quantile": 0.9}, "for timed, whose levels are searched"),
        ({"granularity": "row"}, "choose site or channel"),
        ({"centre": "mean"}, "coding.centre='mean' for timed"),
        ({"granularity": "channel", "sensitivity": Sensitivity()}, "coding.sensitivity=null"),
    ],
)
def test_what_it_cannot_be_is_refused_in_a_line(given: dict, says: str) -> None:
    with pytest.raises(InputError) as said:
        Timed(**given)
    assert says in str(said.value) and "\n" not in str(said.value)


def test_a_code_of_so_many_levels_has_the_bits_of_their_logarithm() -> None:
    assert Timed(timesteps=127).bits == 7 and Timed(timesteps=5, grains=3).bits == 4


# --- in a model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["shifts", "free"])
def test_it_works_in_bfloat16(tiny: Any, tokens: Any, levels: str) -> None:
    """The same code as of the values in float32, on values that are bfloat16."""
    model = tiny().to(torch.bfloat16)
    ids = tokens(4, 16, seed=1)
    stages.convert(model, ids, Timed(timesteps=64, levels=levels))
    with torch.no_grad():
        spiking = model(tokens(2, 13)).logits
        stages.restore(model)
        dense = model(tokens(2, 13)).logits
    assert spiking.dtype == torch.bfloat16 and spiking.isfinite().all()
    far = float((spiking - dense).float().norm() / dense.float().norm())
    assert 0 < far < 0.2


@pytest.mark.parametrize("levels", ["shifts", "free"])
@pytest.mark.parametrize("sensitivity", [None, Sensitivity(windows=4)])
def test_about_the_means_of_channels(
    tiny: Any, tokens: Any, levels: str, sensitivity: Sensitivity | None
) -> None:
    """On and off by what it predicts; a fine code about means is as near to the dense model."""
    model, ids, other = tiny(), tokens(4, 16, seed=1), tokens(2, 13)
    with torch.no_grad():
        dense = model(other).logits
    far = {}
    for centre in ("none", "channel"):
        coding = Timed(timesteps=48, levels=levels, centre=centre, sensitivity=sensitivity)
        fitted = stages.fit(model, ids, coding)
        with stages.patched(model, fitted), torch.no_grad():
            far[centre] = float((model(other).logits - dense).norm() / dense.norm())
    if sensitivity is None:  # else where it pays
        assert bool(fitted.neurons.fit.params["centre"].any())
    assert far["channel"] < 1.5 * far["none"]


def test_channels_may_have_scales(tiny: Any, tokens: Any) -> None:
    model = tiny()
    coding = Timed(timesteps=64, granularity="channel")
    stages.convert(model, tokens(4, 16, seed=1), coding)
    table = stages.table(model)
    assert float(table["nmse"].max()) < 0.01 and float(table["spikes"].max()) <= 1
