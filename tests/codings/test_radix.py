"""Digits of a code in time, worked out by hand and beside bit planes, and what decoding them costs."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from stages.codings.base import Coding, site_params
from stages.codings.gated import Gated
from stages.codings.signed_digit import SignedDigit
from stages.errors import InputError
from stages.neurons.spikes import SpikeTime, decode
from stages.ports.planes import Accumulator, Group, Planes, Sum, planes, summed, timed
from tests.codings.reference import atoms_of, bfloat16_patterns, fitted, heavy_tailed

SIXTEEN = {"scale": torch.tensor([16.0])}  # T=4: a level is 1
RANGES = {"scale": torch.tensor([16.0, 48.0]), "floor": torch.tensor([0.0, 16.0])}  # of 1, of 2


def slots(coding: Coding, x: float, p: dict[str, Tensor]) -> list[int]:
    """The spikes of one value in the order of time."""
    train = coding.encode(torch.tensor([x]), p)
    assert float(decode(train, coding.table(p))) == float(coding.quantise(torch.tensor([x]), p)[0])
    spikes: list[int] = train.train[:, 0].tolist()
    return spikes


def test_digits_of_two_bits_by_hand() -> None:
    """T=4, R=4: the slots are 3 2 1 of the fours, then 3 2 1 of the ones."""
    coding = Gated("gated", 4, 1, radix=4)
    assert slots(coding, 13.0, SIXTEEN) == [1, 0, 0, 0, 0, 1]  # 13 = 3 * 4 + 1
    assert slots(coding, -2.4, SIXTEEN) == [0, 0, 0, 0, 1, 0]  # 2
    assert slots(coding, 3.5, SIXTEEN) == [0, 0, 1, 0, 0, 0]  # halves round up: 4
    assert slots(coding, 0.4, SIXTEEN) == [0] * 6
    assert slots(coding, 99.0, SIXTEEN) == [1, 0, 0, 1, 0, 0]  # 15, the last level


def test_a_shorter_highest_digit_by_hand() -> None:
    """T=4, R=8: one slot of the eights, then 7 … 1 of the ones."""
    coding = Gated("gated", 4, 1, radix=8)
    assert slots(coding, 13.0, SIXTEEN) == [1, 0, 0, 1, 0, 0, 0, 0]  # 13 = 1 * 8 + 5
    assert slots(coding, 7.0, SIXTEEN) == [0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("radix", [16, 64, 2**16])
def test_one_spike_in_time_by_hand(radix: int) -> None:
    """T=4, R=2^T or more: 15 slots, level v in the slot 15 - v."""
    coding = Gated("gated", 4, 1, radix=radix)
    for level in range(16):
        expected = [int(slot == 15 - level) for slot in range(15)]
        assert slots(coding, float(level), SIXTEEN) == expected


def test_the_highest_digit_carries_the_floor_by_hand() -> None:
    """Ranges 0 … 16 by 1 and 16 … 48 by 2; T=4, R=4: the second has a slot 0 behind the fours 3 2 1."""
    coding = Gated("gated", 4, 2, offset=True, radix=4)
    assert slots(coding, 13.0, RANGES) == [1, 0, 0, 0, 0, 1, 0]
    assert slots(coding, 16.0, RANGES) == [0, 0, 0, 1, 0, 0, 0]  # the floor alone
    assert slots(coding, 22.0, RANGES) == [0, 0, 0, 1, 1, 0, 0]  # 16 + 2 * 3
    assert slots(coding, 46.0, RANGES) == [1, 0, 0, 0, 1, 0, 0]  # 16 + 2 * (3 * 4 + 3)
    x = torch.tensor([13.0, 16.0, 22.0, 46.0, -24.0, 0.2])
    assert coding.quantise(x, RANGES)[1].tolist() == [2, 1, 2, 2, 1, 0]
    once = Gated("gated", 4, 2, offset=True, radix=16)
    assert slots(once, 16.0, RANGES) == [0] * 15 + [1]
    assert slots(once, 20.0, RANGES) == [0] * 13 + [1, 0, 0]
    assert once.quantise(x, RANGES)[1].tolist() == [1, 1, 1, 1, 1, 0]


def test_signed_digits_by_hand() -> None:
    """T=4, R=4: slots 4 3 2 1 of the fours, 3 2 1 of the ones, 15 = 4 * 4 - 1."""
    coding = SignedDigit("signed_digit", 4, 1, radix=4)
    assert slots(coding, 15.0, SIXTEEN) == [1, 0, 0, 0, 0, 0, -1]
    assert slots(coding, 3.0, SIXTEEN) == [0, 0, 0, 0, 1, 0, 0]
    assert slots(coding, 7.0, SIXTEEN) == [0, 0, 1, 0, 0, 0, -1]  # as 4 + 3, two spikes
    assert slots(coding, 11.4, SIXTEEN) == [0, 1, 0, 0, 0, 0, -1]  # 3 * 4 - 1


@pytest.mark.parametrize(("timesteps", "bits"), [(4, 2), (5, 2), (6, 2), (6, 3), (7, 3), (5, 5)])
def test_no_signed_code_of_a_level_has_fewer_digits(timesteps: int, bits: int) -> None:
    base, number = 2**bits, -(-timesteps // bits)
    highest = 2 ** (timesteps - bits * (number - 1))
    best: dict[int, int] = {}
    lower = itertools.product(range(1 - base, base), repeat=number - 1)
    for *rest, top in ((*each, top) for each in lower for top in range(highest + 1)):
        digits = [*rest, top]
        level = sum(d * base**k for k, d in enumerate(digits))
        best[level] = min(best.get(level, number), sum(map(bool, digits)))
    coding, levels = SignedDigit("s", timesteps, 1, radix=base), torch.arange(2**timesteps)
    _, count = coding.quantise(levels.float(), {"scale": torch.tensor([2.0**timesteps])})
    assert count.tolist() == [best[int(level)] for level in levels]


@pytest.mark.parametrize("kind", [Gated, SignedDigit])
@pytest.mark.parametrize("offset", [False, True])
def test_the_levels_are_those_of_bit_planes_for_fewer_spikes_and_more_steps(
    kind: type[Gated], offset: bool
) -> None:
    p = fitted(kind("planes", 6, 2, offset), sites=3)
    x = heavy_tailed(3, 2000, seed=3)
    planes_value, spikes = kind("planes", 6, 2, offset).quantise(x, p)
    before, steps = spikes.float().mean(), torch.tensor(6.0)
    for radix in (4, 8, 64):
        coding = kind("digits", 6, 2, offset, radix=radix)
        value, count = coding.quantise(x, p)
        longer = coding.decoding(p).steps
        assert torch.equal(value, planes_value)
        assert count.float().mean() < before and bool((longer > steps).all())
        before, steps = count.float().mean(), longer


@pytest.mark.parametrize("kind", [Gated, SignedDigit])
@pytest.mark.parametrize("offset", [False, True])
def test_a_radix_by_site_is_that_of_the_coding(kind: type[Gated], offset: bool) -> None:
    """Bits of a digit as a parameter, 1 among them, also where sites differ."""
    plain = kind("planes", 6, 2, offset, (1, 0))
    p, x = fitted(plain, sites=4), heavy_tailed(4, 500, seed=3)
    bits = [1, 2, 3, 16]
    together = p | {"radix": torch.tensor(bits, dtype=torch.float32)}
    value, count = plain.quantise(x, together)
    costs = plain.decoding(together)
    for k, each in enumerate(bits):
        own, single = site_params(p, k), kind("digits", 6, 2, offset, (1, 0), radix=2**each)
        expected, spikes = single.quantise(x[k], own)
        assert torch.equal(value[k], expected) and torch.equal(count[k].float(), spikes.float())
        train = plain.encode(x[k], site_params(together, k))
        assert torch.equal(train.train, single.encode(x[k], own).train)
        alone = single.decoding({name: t[None] for name, t in own.items()})
        for name in ("macs", "acs", "comparisons", "steps"):
            assert float(getattr(costs, name)[k]) == float(getattr(alone, name))


def test_bits_given_as_a_parameter_of_two_are_the_bit_planes() -> None:
    coding, p = Gated("gated", 6, 3, True), fitted(Gated("gated", 6, 3, True))
    own, x = site_params(p, 1), bfloat16_patterns()
    given = own | {"radix": torch.tensor(1.0)}
    for one, other in zip(coding.quantise(x, own), coding.quantise(x, given), strict=True):
        assert torch.equal(one.float(), other.float())
    assert torch.equal(coding.encode(x, own).train, coding.encode(x, given).train)


@pytest.mark.parametrize(
    ("coding", "expected"),
    [  # macs, acs, comparisons, steps
        (Gated("g", 6, 2), (2, 0, 1, 6)),
        (Gated("g", 6, 2, True), (3, 0, 1, 6)),  # the floor has an accumulator
        (SignedDigit("s", 6, 3), (3, 0, 2, 6)),
        (Gated("g", 6, 2, radix=4), (2, 2 * 3 * 3, 1, 9)),
        (Gated("g", 5, 1, radix=4), (1, 2 * 3, 0, 1 + 2 * 3)),  # its first digit has one slot
        (Gated("g", 6, 2, True, radix=4), (3, 2 * 3 * 3, 1, 10)),
        (Gated("g", 5, 2, True, radix=4), (3, 6 + 1 + 6, 1, 8)),
        (Gated("g", 6, 2, radix=64), (2, 2 * 63, 1, 63)),
        (Gated("g", 6, 2, grain_steps=(0, 1), radix=8), (2, 14 + 14, 1, 15)),
        (SignedDigit("s", 6, 1, radix=4), (1, 4 + 3 + 3, 0, 10)),
        (SignedDigit("s", 6, 1, radix=64), (1, 63, 0, 63)),
    ],
)
def test_what_decoding_costs_by_hand(coding: Gated, expected: tuple[int, ...]) -> None:
    costs = coding.decoding(coding.fit(atoms_of(heavy_tailed(2, 300))).params)
    for name, number in zip(("macs", "acs", "comparisons", "steps"), expected, strict=True):
        assert getattr(costs, name).tolist() == [number, number]


@pytest.mark.parametrize("radix", [1, 3, 0, -4, True, "4", 4.0, 2**17, None])
def test_what_a_radix_cannot_be_is_refused_in_a_line(radix: object) -> None:
    for kind in (Gated, SignedDigit):
        with pytest.raises(
            InputError, match="coding.radix=.*give a power of two from 2 to 65536"
        ) as said:
            kind("gated", 4, 2, radix=radix)  # type: ignore[arg-type]
        assert "\n" not in str(said.value)


# --- running sums ---------------------------------------------------------------------------------


def arrivals(total: Sum, products: list[float], weights: tuple[float, ...]) -> float:
    for product, weight in zip(products, weights, strict=True):
        total.add(partial(summed, torch.tensor([product])), weight)
    return float(total.value())


def test_gaps_that_are_powers_of_two_are_running_sums() -> None:
    """Levels 7, 3, 2 and 1 times a half lie 4, 1, 1 and 1 apart."""
    gaps = (2, 0, 0, 0)
    accumulator = Accumulator.running([torch.zeros(1)] * 4, [Group(4, gaps)], 0.5)
    assert accumulator.weight == (3.5, 1.5, 1.0, 0.5)
    assert arrivals(Sum.of(accumulator), [1.0, -2.0, 3.0, 10.0], accumulator.weight) == 8.5
    time = torch.tensor([[0, 1], [3, 4]])  # the last is silent
    sign = torch.tensor([[1, -1], [1, 1]], dtype=torch.int8)
    levels = torch.tensor([3.5, 1.5, 1.0, 0.5, 0.0])
    coded = timed(SpikeTime(sign, time, 4), levels)
    assert coded.value().tolist() == [[3.5, -1.5], [0.5, 0.0]]
    assert coded.accumulators[0].weight == accumulator.weight


def test_what_has_arrived_is_worth_what_it_will_be() -> None:
    """13 = 3 * 4 + 1 is 12 after the first slot, and stays it until the last."""
    coding = Gated("gated", 4, 1, radix=4)
    coded, _ = planes(coding, torch.tensor([13.0, -2.0]), SIXTEEN)
    assert coded.steps == 6
    parts = [coded.first(t).value().tolist() for t in range(1, 7)]
    assert parts == [[12, 0], [12, 0], [12, 0], [12, 0], [12, -2], [13, -2]]


def test_a_part_of_the_slots_can_still_be_multiplied() -> None:
    coding = Gated("gated", 4, 2, offset=True, radix=4)
    x = torch.tensor([13.0, -22.0, 46.0])
    coded, _ = planes(coding, x, RANGES)
    part: Planes = coded.first(4)
    total = 0.0
    for accumulator in part.accumulators:
        made = Sum.of(accumulator)
        for plane, weight, _ in accumulator.spikes:
            made.add(partial(summed, plane.float()), weight)
        total = made.value() + total
    assert torch.equal(total, part.value())
    assert part.value().tolist() == [12.0, -16.0, 40.0]
