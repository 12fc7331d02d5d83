"""Values of the baseline codings worked out by hand."""

import pytest
import torch
from reference import atoms_of
from torch import Tensor

from stages.codings import neurons
from stages.codings.coding import Coding
from stages.codings.free_steps import FreeSteps
from stages.codings.oat import Oat
from stages.codings.rate import Rate
from stages.codings.two_spike import TwoSpike
from stages.errors import InputError


def check(coding: Coding, p: dict[str, Tensor], rows: list[tuple[float, float, int]]) -> None:
    """Rows of x, decoded value and spikes, for the fast path and the stepped neuron."""
    x, value, spikes = (torch.tensor(column) for column in zip(*rows, strict=True))
    fast, count = coding.quantise(x, p)
    stepped = coding.encode(x, p)
    torch.testing.assert_close(fast, value)
    torch.testing.assert_close(neurons.decode(stepped, coding.table(p)), value)
    assert count.long().tolist() == spikes.tolist() == stepped.count.tolist()


def fitted(coding: Coding, largest: float, others: list[float]) -> dict[str, Tensor]:
    params = coding.fit(atoms_of(torch.tensor([[*others, largest]])), None).params
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


def test_rate_coding_has_the_published_error() -> None:
    """13.2, 15.7 and 17.6 dB at 1.03, 1.38 and 1.74 spikes: 100 000 Gaussian values, T = 6, 8, 10."""
    torch.manual_seed(0)
    x = torch.randn(100_000)
    for timesteps, decibels, spikes in ((6, 13.2, 1.03), (8, 15.7, 1.38), (10, 17.6, 1.74)):
        coding = Rate("rate", timesteps, "half_step")
        params = coding.fit(atoms_of(x[None]), None).params
        value, count = coding.quantise(x, {k: v[0].float() for k, v in params.items()})
        ratio = 10 * torch.log10(x.square().mean() / (value - x).square().mean())
        assert float(ratio) == pytest.approx(decibels, abs=0.3)
        assert float(count.mean()) == pytest.approx(spikes, abs=0.05)


def test_outlier_aware_thresholds_have_the_published_error() -> None:
    """30.5, 42.4, 54.5 dB at 2.26, 3.25, 4.25 spikes: Gaussian values, percentile 99.9, floored."""
    torch.manual_seed(0)
    x = torch.randn(100_000)
    for timesteps, decibels, spikes in ((6, 30.5, 2.26), (8, 42.4, 3.25), (10, 54.5, 4.25)):
        coding = Oat("oat", timesteps, "zero", 99.9)
        params = coding.fit(atoms_of(x[None]), None).params
        value, count = coding.quantise(x, {k: v[0].float() for k, v in params.items()})
        ratio = 10 * torch.log10(x.square().mean() / (value - x).square().mean())
        assert float(ratio) == pytest.approx(decibels, abs=0.3)
        assert float(count.mean()) == pytest.approx(spikes, abs=0.05)


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
