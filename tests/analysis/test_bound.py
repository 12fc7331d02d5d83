"""The bound against enumerated spike trains, closed forms, quadrature, Blahut and Arimoto's algorithm, and
every shipped coding."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

import stages
from stages.analysis.bound import distance_db, least_error, slots, train_bits
from stages.atoms import Atoms
from stages.codings.base import Coding, error_and_spikes
from stages.codings.compander import Compander
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.integer import Integer
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.distribution import Densities, Distribution
from stages.fitting import Fitting
from stages.sketch import Accumulator, Grid, SketchSet
from tests.codings.reference import learning, shipped
from tests.stages.test_fitting import QUICK

LN2 = math.log(2)
# Distribution, differential entropy in bits, where the magnitudes end.
KNOWN: dict[str, tuple[Any, float, float]] = {
    "gaussian": (stats.norm(), 0.5 * math.log2(2 * math.pi * math.e), 8.0),
    "laplace": (stats.laplace(), math.log2(2 * math.e), 30.0),
    "uniform": (stats.uniform(-1, 2), 1.0, 1.0),
    "one_sided": (stats.uniform(0, 1), 0.0, 1.0),
}
VALUES = 400_000


def dense(distribution: Any, top: float, zero: float = 0.0, cells: int = 20_000) -> Atoms:
    """The magnitudes of a distribution as narrow cells, zero itself with probability `zero`."""
    edges = np.linspace(0, top, cells + 1)
    above = np.diff(distribution.cdf(edges))
    below = np.diff(distribution.cdf(-edges[::-1]))[::-1]
    weight = (above + below) / (above + below).sum() * (1 - zero)
    value = np.append(0, (edges[1:] + edges[:-1]) / 2)
    share = below / np.maximum(above + below, 1e-300)
    row = torch.from_numpy(np.stack([value, np.append(zero, weight), np.append(0, share)]))[:, None]
    spread = torch.full_like(row[0], top / cells / math.sqrt(12))
    maximum = torch.tensor([top], dtype=torch.float64)
    return Atoms(row[0], spread, row[1], maximum, row[2])


def at(atoms: Atoms, bits: float) -> float:
    """The bound at so many bits a value, wherever they go."""
    return float(least_error(atoms, torch.tensor([bits], dtype=torch.float64), lambda mean: mean))


def decibel(ratio: float) -> float:
    return 10 * math.log10(ratio)


# --- the bits of spike trains -----------------------------------------------------------------------


def most_bits(spikes: float, places: int) -> float:
    """The largest entropy of all trains of -1, 0 and 1 with at most so many spikes in the mean: every
    train is listed, and has a probability proportional to e^(-price * its spikes)."""
    counts = np.array([sum(map(abs, t)) for t in itertools.product((-1, 0, 1), repeat=places)])

    def law(price: float) -> np.ndarray:
        weight = np.exp(-price * counts)
        return weight / weight.sum()

    price = 0.0
    if law(0) @ counts > spikes:
        price = optimize.brentq(lambda each: law(each) @ counts - spikes, 0, 50)
    return float(stats.entropy(law(price), base=2))


@pytest.mark.parametrize("places", [1, 2, 3, 5])
def test_the_bits_of_a_train_are_the_entropy_of_all_trains(places: int) -> None:
    for spikes in (0.01, 0.3, 0.5, 0.95, 2.0, 3.3, 5.0):
        bits = float(train_bits(torch.tensor([spikes]), torch.tensor([float(places)])))
        assert bits == pytest.approx(most_bits(spikes, places), rel=1e-5)


def test_no_law_of_trains_has_more_bits() -> None:
    draw = np.random.default_rng(0)
    trains = np.array(list(itertools.product((-1, 0, 1), repeat=3)))
    for _ in range(200):
        law = draw.dirichlet(np.full(len(trains), draw.choice([0.05, 0.5, 5.0])))
        spikes = torch.tensor([law @ np.abs(trains).sum(-1)])
        bits = float(train_bits(spikes, torch.tensor([3.0])))
        assert stats.entropy(law, base=2) <= bits + 1e-9


def test_more_spikes_and_more_slots_never_carry_less() -> None:
    spikes, places = torch.linspace(0, 20, 81).double(), torch.arange(1, 13).double()
    bits = train_bits(spikes[:, None], places)
    assert bool((bits.diff(dim=0) >= 0).all() and (bits.diff(dim=1) >= -1e-12).all())
    assert bits[0].abs().max() == 0
    assert torch.allclose(bits[-1], places * math.log2(3))


# --- the error at a rate ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("bits", [0.5, 3.0, 7.0])
def test_shannons_bound_has_its_closed_form(name: str, bits: float) -> None:
    distribution, entropy, top = KNOWN[name]
    expected = 2 ** (2 * entropy - 2 * bits) / (2 * math.pi * math.e)
    assert at(dense(distribution, top), bits) == pytest.approx(expected, rel=2e-3)
    if name == "gaussian":
        assert expected == pytest.approx(2 ** (-2 * bits))  # its distortion-rate function


@pytest.mark.parametrize("spikes", [0.05, 0.3, 2.5])
def test_the_best_border_is_found_where_most_values_are_small(spikes: float) -> None:
    """Quadrature of both sides of every border r, and a scalar search for what each gets of the spikes."""
    places, parts = 6, (0.9, 0.1)
    laws = (stats.norm(scale=0.02), stats.norm())

    def mixed(what: str, x: Any) -> Any:
        return sum(p * getattr(law, what)(x) for p, law in zip(parts, laws, strict=True))

    def side(low: float, high: float) -> Callable[[float], float]:
        """What the values between two magnitudes add to the error, by their part of the spikes."""
        pieces = list(
            itertools.pairwise(sorted({low, high, *(b for b in (0.1, 0.3) if low < b < high)}))
        )

        def surprise(x: float) -> float:
            return float(-mixed("pdf", x) * math.log2(mixed("pdf", x)))

        share = 2 * (mixed("cdf", high) - mixed("cdf", low))
        if share == 0:
            return lambda part: 0.0
        inside = 2 * sum(integrate.quad(surprise, *piece, limit=200)[0] for piece in pieces)
        entropy = inside / share + math.log2(share)

        def error(part: float) -> float:
            bits = most_bits(min(part * spikes / share, places), places) if part else 0.0
            return float(share * 2 ** (2 * entropy - 2 * bits) / (2 * math.pi * math.e))

        return error

    def bound(r: float) -> float:
        small, large = side(0, r), side(r, 8)
        search = optimize.minimize_scalar(
            lambda part: math.log(large(part) + small(1 - part)), bounds=(0, 1), method="bounded"
        )
        return min(math.exp(search.fun), large(1) + small(0), large(0) + small(1))

    class Mixture:
        cdf = staticmethod(lambda x: mixed("cdf", x))

    found = least_error(
        dense(Mixture, 8.0, cells=40_000),
        torch.tensor([spikes], dtype=torch.float64),
        lambda mean: train_bits(mean, torch.tensor(float(places))),
    )
    every = [bound(r) for r in np.linspace(0, 0.24, 25)]
    assert float(found) == pytest.approx(max(every), rel=0.02)
    assert spikes > 0.1 or max(every) > 1.9 * every[0]  # one density for all bounds less


def blahut(x: np.ndarray, law: np.ndarray, slopes: list[float]) -> list[tuple[float, float]]:
    """Bits and squared error on the rate-distortion curve of values x, which are the code's values too
    (Blahut 1972, Arimoto 1972), at every slope."""
    points, out = (x[:, None] - x) ** 2, law.copy()
    curve = []
    for slope in slopes:
        kernel = np.exp(-slope * points)
        for _ in range(400):
            out = out * ((law / (kernel @ out)) @ kernel)
        joint = law[:, None] * kernel * out / (kernel @ out)[:, None]
        error = float((joint * points).sum())
        nats = -slope * error - float(law @ np.log(kernel @ out))
        curve.append((nats / LN2, error))
    return curve


@pytest.mark.parametrize("zero", [0.3, 0.6])
def test_a_value_that_is_often_zero_lies_above_its_bound(zero: float) -> None:
    """And by what telling the zeros costs at a high rate, H(q) / (1 - q) bits of the other values."""
    x = np.linspace(-4, 4, 801)
    law = stats.norm.pdf(x)
    law *= (1 - zero) / law.sum()
    law[400] += zero
    atoms = dense(stats.norm(), 8.0, zero)
    curve = blahut(x, law, [1.0, 12.5, 50.0, 200.0, 800.0])
    known = float(stats.entropy([zero, 1 - zero], base=2))
    told = 20 * math.log10(2) * known / (1 - zero)
    missing = told - np.array([decibel(error / at(atoms, bits)) for bits, error in curve])
    assert missing[0] < told and (missing > 0).all()
    # Values as small as the error are few at a high rate: half as many at every second of these slopes.
    assert (missing[2:] < 0.75 * missing[1:-1]).all() and missing[-1] < 2
    # With these bits taken off the rate it would be no bound.
    bits, error = curve[0]
    assert decibel(error / (1 - zero)) + 20 * math.log10(2) * (bits - known) / (1 - zero) < 0


# --- the distance of a coding -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def densities() -> Densities:
    """Drawn values of every KNOWN distribution, of a heavy tail and of a Gaussian that is often zero."""
    draw = np.random.default_rng(0)
    drawn = [each.rvs(VALUES, random_state=draw) for each, *_ in KNOWN.values()]
    gaussian = draw.standard_normal(VALUES)
    drawn += [stats.t(3).rvs(VALUES, random_state=draw), gaussian * (draw.random(VALUES) < 0.3)]
    accumulators = [Accumulator(Grid(7), 0, False, torch.device("cpu")) for _ in drawn]
    for accumulator, x in zip(accumulators, drawn, strict=True):
        accumulator.add(torch.from_numpy(x).float())
    named = [(f"{k}:in", "mlp.in", k) for k in range(len(drawn))]
    return Distribution().run(SketchSet.collect(named, Grid(7), accumulators))


CODINGS = shipped() | {"lloyd_max": LloydMax(), "compander": Compander()}
CODINGS |= {f"integer{b}": Integer(bits=b, per="tensor") for b in (3, 8)}
CODINGS |= {"gated2_offset": Gated(offset=True), "steps": Gated(grain_steps=(2, -2))}
CODINGS |= {"las2": Las("las", 2), "radix4": Gated(radix=4), "radix64": Gated(radix=64)}
SIZES = {name: torch.ones(len(KNOWN) + 2).double() for name in ("macs", "accumulators")}


@pytest.mark.parametrize("name", CODINGS)
def test_no_coding_lies_below_the_bound(name: str, densities: Densities) -> None:
    neurons = Fitting("atoms", 1, 0).run(
        densities, learning(CODINGS[name], QUICK), {"products": SIZES}
    )
    assert bool((neurons.bound_db > -0.1).all()), neurons.bound_db
    nearer = Fitting("atoms", 1, 0).run(densities, LloydMax(timesteps=8)).bound_db
    assert bool((nearer[:3] < 10).all())  # what stands there can be near


# One sign more is a bit, and zero a level of its own: N + 1 for N = 2^(T + 1).
@pytest.mark.parametrize(
    ("place", "panter_dite"), [(0, math.sqrt(3) * math.pi / 2), (1, 9 / 2), (2, 1 / 3)]
)
def test_an_optimal_quantiser_lies_above_by_what_high_resolution_says(
    place: int, panter_dite: float, densities: Densities
) -> None:
    """Panter and Dite's error over Shannon's bound at the same number of levels, both over 4^-R."""
    _, entropy, _ = list(KNOWN.values())[place]
    power = 2.0 if place == 1 else 1.0
    shannon = 2 ** (2 * entropy) / (2 * math.pi * math.e)
    expected = decibel(panter_dite * power / shannon) + 20 * math.log10(129 / 128)
    found = Fitting("atoms", 1, 0).run(densities, LloydMax(timesteps=6)).bound_db
    assert float(found[place]) == pytest.approx(expected, abs=0.15)
    assert place != 0 or expected == pytest.approx(4.35 + 0.07, abs=0.01)
    assert place != 2 or expected == pytest.approx(1.53 + 0.07, abs=0.01)


def test_a_value_has_the_slots_of_all_its_neurons(densities: Densities) -> None:
    given = {
        Las(timesteps=5): 5,
        Multigrain(timesteps=7, grains=3): 7,  # bases in time of one neuron
        Gated(timesteps=4, grains=3): 12,
        Gated(timesteps=4, grains=3, offset=True): 14,
        Gated(timesteps=4, grains=2, grain_steps=(2, -1)): 12,
        Gated(timesteps=4, grains=1, radix=4): 6,
        Gated(timesteps=4, grains=3, radix=16): 45,
    }
    atoms = densities.atoms.rows(torch.tensor([0, 5]))
    for coding, places in given.items():
        params = learning(coding, QUICK).fit(atoms).params
        assert slots(coding, params).tolist() == [places, places]


def test_the_bound_falls_with_spikes_and_steps(densities: Densities) -> None:
    """The same error counts for more where it took more spikes, or more steps."""
    power = densities.atoms.power()
    spikes = torch.linspace(0.05, 9, 30).double()

    def above(coding: Coding) -> Tensor:
        params = coding.fit(densities.atoms).params
        given: Any = (coding, densities.atoms, params, power * 0.01)
        return torch.stack([distance_db(*given, torch.full_like(power, s)) for s in spikes])

    few, more, two = (
        above(c) for c in (Las("las", 3), Las("las", 8), Gated(timesteps=8, grains=2))
    )
    assert bool((few.diff(dim=0) >= -1e-9).all())
    assert bool((few <= more + 1e-9).all() and (more <= two + 1e-9).all())
    assert bool((few[-1] - few[0] > 10).all())
    las, least = Las("las", 3), spikes[:1].expand_as(power)
    worse = distance_db(las, densities.atoms, las.fit(densities.atoms).params, power * 0.1, least)
    torch.testing.assert_close(worse, few[0] + 10)


def test_a_gaussian_by_hand(densities: Densities) -> None:
    """las_rounded T=6 on a unit Gaussian: D >= 2^(-2 R), R of its spikes in six slots."""
    coding = Las("las_rounded", 6, "half_step")
    atoms = densities.atoms.rows(torch.tensor([0]))
    params = {n: p.float() for n, p in coding.fit(atoms).params.items()}
    error, spikes = error_and_spikes(coding, atoms, params)
    expected = decibel(float(error)) + 20 * math.log10(2) * most_bits(float(spikes), 6)
    found = float(distance_db(coding, atoms, params, error, spikes))
    assert found == pytest.approx(expected, abs=0.1) and 11 < found < 15


def test_what_has_no_bound_has_no_number(densities: Densities) -> None:
    atoms, ones = densities.atoms, torch.ones(6, dtype=torch.float64)
    las = Las().fit(atoms).params
    unknown = torch.full_like(ones, torch.nan)
    token = {"steps": torch.ones(6)}
    assert distance_db(Gif(salient_fraction=0), atoms, token, unknown, unknown).isnan().all()
    gain = torch.ones_like(atoms.weight)
    gain[1, 5] = 2  # a channel with a scale
    found = distance_db(Las(), replace(atoms, gain=gain), las, ones, ones)
    assert found.isnan().tolist() == [False, True, False, False, False, False]
    found = distance_db(Las(), atoms, las, ones * torch.tensor([1.0, 0, 1, 1, 1, 1]), ones)
    assert found.isnan().tolist() == [False, True, False, False, False, False]
    silent = atoms.weight.clone()
    silent[0] *= 1e-4
    silent[0, 0] = 1 - 1e-4
    value = atoms.value.clone()
    value[0, 0] = 0
    found = distance_db(Las(), replace(atoms, weight=silent, value=value), las, ones, ones)
    assert found.isnan().tolist() == [True, False, False, False, False, False]


def test_it_stands_in_every_table_of_sites(model, tokens, convert, tmp_path) -> None:
    conversion = convert(model, Gated(timesteps=4, grains=2))
    neurons = conversion.neurons
    assert neurons.bound_db.isfinite().all()
    neurons.save(tmp_path)
    assert torch.equal(type(neurons).load(tmp_path).bound_db, neurons.bound_db)
    with stages.patched(model, conversion):
        assert list(stages.table(model)["bound_db"]) == neurons.bound_db.tolist()
        assert list(stages.measure(model, tokens(2, 8))["bound_db"]) == neurons.bound_db.tolist()
        model.save_pretrained(tmp_path / "spiking")
    assert stages.table(stages.load(tmp_path / "spiking"))["bound_db"].isna().all()
