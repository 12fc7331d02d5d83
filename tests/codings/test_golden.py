"""Values of the baseline codings worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.codings.base import Coding
from stages.codings.compander import Compander
from stages.codings.free_steps import FreeSteps
from stages.codings.oat import Oat
from stages.codings.one_spike import OneSpike
from stages.codings.rate import Rate
from stages.codings.ttfs import Ttfs
from stages.codings.two_spike import TwoSpike
from stages.errors import InputError
from stages.neurons.spikes import decode
from tests.codings.reference import atoms_of


def check(coding: Coding, p: dict[str, Tensor], rows: list[tuple[float, float, int]]) -> None:
    """Rows of x, decoded value and spikes, for the fast path and the stepped neuron."""
    x, value, spikes = (torch.tensor(column) for column in zip(*rows, strict=True))
    fast, count = coding.quantise(x, p)
    stepped = coding.encode(x, p)
    torch.testing.assert_close(fast, value)
    torch.testing.assert_close(decode(stepped, coding.table(p)), value)
    assert count.long().tolist() == spikes.tolist() == stepped.count.tolist()


def fitted(coding: Coding, largest: float, others: list[float]) -> dict[str, Tensor]:
    params = coding.fit(atoms_of(torch.tensor([[*others, largest]]))).params
    return {name: value[0].float() for name, value in params.items()}


def test_rate_counts_in_steps_of_a_quarter_of_the_largest_value() -> None:
    """Scale 4, T=4: every spike is worth 1, and half a step rounds."""
    p = fitted(Rate("rate", 4, "half_step"), 4.0, [0.0, 1.0])
    rows = [(0.25, 0.0, 0), (0.5, 1.0, 1), (-2.25, -2.0, 2), (3.75, 4.0, 4), (9.0, 4.0, 4)]
    check(Rate("rate", 4, "half_step"), p, rows)
    check(Rate("rate", 4, "zero"), fitted(Rate("rate", 4, "zero"), 4.0, [0.0]), [(3.75, 3.0, 3)])


def test_two_spikes_are_the_two_leading_bits() -> None:
    """Scale 16, T=4: 13 = 1101b keeps 11, 5 = 0101b is whole, 15 = 1111b loses its last two bits."""
    coding = TwoSpike("two_spike", 4, "zero", 2)
    rows = [(13.0, 12.0, 2), (5.0, 5.0, 2), (-15.0, -12.0, 2), (8.0, 8.0, 1), (0.5, 0.0, 0)]
    check(coding, fitted(coding, 16.0, [1.0]), rows)


def test_outliers_go_to_the_second_range() -> None:
    """Three of four values are 1, so the 75th percentile is 1; the outlier range ends at 16. T=2."""
    coding = Oat("oat", 2, "zero", 75.0)
    p = fitted(coding, 16.0, [1.0, 1.0, 1.0])
    assert p["scale"].tolist() == [1.0, 16.0]
    rows = [(0.6, 0.5, 1), (-0.8, -0.75, 2), (1.0, 0.0, 0), (9.0, 8.0, 1), (40.0, 12.0, 2)]
    check(coding, p, rows)
    assert coding.gate_comparisons == 1 and coding.decode_macs == 2


def test_free_steps_adds_its_own_weights() -> None:
    """v=0.8 fires at 0.5, leaves 0.3, fires at 0.25: 0.6 + 0.3."""
    coding = FreeSteps("free_steps", 2, 2, "zero", False)
    p = {
        "scale": torch.tensor(1.0),
        "v0": torch.tensor(0.0),
        "d": torch.tensor([0.6, 0.3]),
        "h": torch.tensor([0.5, 0.25]),
        "theta": torch.tensor([0.5, 0.25]),
    }
    check(coding, p, [(0.8, 0.9, 2), (0.4, 0.3, 1), (-0.5, -0.6, 1), (0.2, 0.0, 0)])


def test_first_spikes_count_from_the_upper_end() -> None:
    """From -2 to 6 in T=9 levels one apart: the time is 6 - x, rounded, a tie to the earlier one."""
    atoms = replace(atoms_of(torch.tensor([[2.0, 6.0]])), extremes=torch.tensor([[-2.0, 6.0]]))
    coding = Ttfs("ttfs", 9, None, False)
    p = {name: value[0] for name, value in coding.fit(atoms).params.items()}
    rows = [(6.0, 6.0, 1), (2.4, 2.0, 1), (2.5, 3.0, 1), (-0.6, -1.0, 1), (0.3, 0.0, 1)]
    rows += [(9.0, 6.0, 1), (-7.0, -2.0, 1), (-1.5, -1.0, 1)]
    check(coding, p, rows)
    x = torch.tensor([6.0, 2.4, 0.3, -7.0])
    assert coding.encode(x, p).time.tolist() == [0, 4, 6, 8]
    silent = replace(coding, silent_zero=True)
    check(silent, p, [(0.3, 0.0, 0), (-0.4, 0.0, 0), (-0.6, -1.0, 1), (0.5, 1.0, 1)])
    assert silent.encode(x, p).time.tolist() == [0, 4, 9, 8]


def test_one_spike_takes_the_nearest_power() -> None:
    """Base 2 below 8, T=3: levels 8, 4, 2, 0, which begin at 6, 3 and 1.5."""
    coding = OneSpike("one_spike", 3, 2.0)
    p = fitted(coding, 8.0, [1.0])
    rows = [(8.0, 8.0, 1), (6.0, 8.0, 1), (-5.9, -4.0, 1), (3.0, 4.0, 1), (2.9, 2.0, 1)]
    rows += [(-1.5, -2.0, 1), (1.4, 0.0, 0), (0.0, 0.0, 0), (50.0, 8.0, 1)]
    check(coding, p, rows)
    assert coding.encode(torch.tensor([6.0, 3.0, 1.5, 1.4]), p).time.tolist() == [0, 1, 2, 3]


def test_winner_oriented_softmax_halves_a_step() -> None:
    """Base 2: scores ln 2 apart weigh 1, 1/2, 1/4, and the fourth comes too late for T=3."""
    coding = OneSpike("one_spike", 3, 2.0)
    p = fitted(coding, 1.0, [0.5])
    scores = math.log(2) * torch.tensor([5.0, 4.1, 2.9, 1.9, 9.0]).view(1, 1, 1, 5) / 0.25
    mask = torch.tensor([True, True, True, True, False]).view(1, 1, 1, 5)
    probs, spikes = coding.softmax(scores, 0.25, mask, p)
    torch.testing.assert_close(probs.flatten(), torch.tensor([4.0, 2, 1, 0, 0]) / 7)
    assert spikes.flatten().tolist() == [1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("alpha", "levels"),
    [
        (0.0, [0.5, 1.5, 2.5, 3.5]),
        (0.5, [0.25, 0.75, 1.5, 3.0]),  # shares 4, 2, 1, 1 of 8, cut in the middle of every quarter
        (1.0, [11 / 64, 33 / 64, 55 / 64, 29 / 16]),  # shares 16, 4, 1, 1 of 22
    ],
)
def test_companded_levels_have_equal_shares(alpha: float, levels: list[float]) -> None:
    """Densities 16, 4, 1 and 1 between 0, 1, 2, 3 and 4; a fifth of the values is zero, and apart."""
    value = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.5]], dtype=torch.float64)
    weight = torch.tensor([[0.2, *(0.8 / 22 * w for w in (16, 4, 1, 1))]], dtype=torch.float64)
    atoms = Atoms(value, torch.zeros_like(value), weight, torch.tensor([4.0]).double())
    coding = Compander("compander", 2, alpha)
    p = {name: tensor[0] for name, tensor in coding.fit(atoms).params.items()}
    torch.testing.assert_close(p["levels"], torch.tensor(levels))
    assert coding.quantise(torch.tensor([0.0, -4.0]), p)[0].tolist() == [0, -levels[-1]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rate("rate", 6, "learned"),
        lambda: TwoSpike("two_spike", 6, "zero", 0),
        lambda: Oat("oat", 6, "zero", 100.0),
        lambda: FreeSteps("free_steps", 6, 2, "zero", False),
    ],
)
def test_what_a_coding_cannot_be_is_refused(make) -> None:
    with pytest.raises(InputError):
        make()
