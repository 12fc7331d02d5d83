"""Every site has the code that costs it least: recomputed choice by choice, and behind every door."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import stages
from stages.atoms import Atoms
from stages.capture import Capture
from stages.codings.base import Coding, site_params
from stages.codings.dense import Dense
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.lloyd_max import LloydMax
from stages.codings.mixed import Mixed
from stages.codings.one_spike import OneSpike
from stages.codings.timed import Timed
from stages.distribution import Distribution
from stages.errors import InputError
from stages.fits.sensitivity import Sensitivity, cell, curvature
from stages.model.sites import Site, find_sites
from stages.neurons.spikes import decode
from stages.statistics import measuring

SENSITIVITY = Sensitivity(windows=2)
TIME, DIGITS, PLANES = Timed(timesteps=24), Gated("gated", 5, 2, radix=4), Gated("planes", 4, 2)
Draws = Callable[..., Tensor]
AC, MAC = 0.9, 4.6  # picojoules


def mixed(*choices: Coding, mu: float = 0.2, nu: float = 0.0, timesteps: int = 128) -> Mixed:
    """The cheapest of some codings at every site."""
    return Mixed("mixed", timesteps, choices, SENSITIVITY, mu, nu)


@pytest.fixture
def ids(tokens: Draws) -> Tensor:
    return tokens(4, 16, seed=1)


@pytest.fixture
def measured(
    tiny: Callable[..., PreTrainedModel], ids: Tensor
) -> Callable[[Coding], tuple[list[Site], Atoms]]:
    """The sites of a tiny model, and their atoms with what a coding asks for."""
    model = tiny()
    sites = find_sites(model)
    atoms = Distribution(atoms=64).run(Capture().run(model, ids, sites, 4)).atoms

    def of(coding: Coding) -> tuple[list[Site], Atoms]:
        rows = {each.name: measuring(each)(model, ids, sites, 4) for each in coding.statistics}
        return sites, replace(atoms, statistics=rows)

    return of


def cost(coding: Coding, atoms: Atoms, mu: float, nu: float) -> list[float]:
    """Predicted loss, mean errors among it, and prices of every site, one site at a time."""
    params = coding.fit(atoms).params
    size = {name: t.tolist() for name, t in atoms.statistics["products"].items()}
    statistic = atoms.statistics["sensitivity"]
    x, weight = atoms.signed_points()
    every = curvature(statistic)
    costs = []
    for site, (macs, sums) in enumerate(zip(size["macs"], size["accumulators"], strict=True)):
        p = {name: value.float() for name, value in site_params(params, site).items()}
        value, count = coding.quantise(x[site].float(), p)
        error, mass = value.double() - x[site], weight[site]
        heavy = every[site][cell(x[site])] / 2 * mass
        values = float(statistic["count"][site].sum() / statistic["tokens"][site])
        loss = float((error**2 * heavy).sum()) * values
        # Atoms weigh with the curvature at their mean, their points with that of their own.
        at = every[site][cell(atoms.value[site])] / 2 * atoms.weight[site]
        width = macs / sums if sums else 0.0
        loss += float(at.sum()) * values * width * float((error * mass).sum()) ** 2
        decoding = coding.decoding({name: t[site][None] for name, t in params.items()})
        additions = float((count.double() * mass).sum()) * macs
        additions += sums * float(decoding.acs + decoding.macs * MAC / AC)
        costs.append(loss + mu * additions / sum(size["macs"]) + nu * float(decoding.steps))
    return costs


@pytest.mark.parametrize(("mu", "nu"), [(0.1, 0.0), (0.5, 0.0), (5.0, 0.0), (0.1, 1e-3)])
def test_every_site_has_its_cheapest_choice(measured, mu: float, nu: float) -> None:
    choices = (TIME, DIGITS, PLANES)
    coding = mixed(*choices, mu=mu, nu=nu)
    sites, atoms = measured(coding)
    params = coding.fit(atoms).params
    costs = torch.tensor([cost(each, atoms, mu, nu) for each in choices])
    assert params["choice"].tolist() == costs.argmin(0).tolist()
    assert len(params["choice"].unique()) > 1
    for number, each in enumerate(choices):
        for name, value in each.fit(atoms).params.items():
            assert torch.equal(params[f"{name}_{number}"], value)


def test_no_site_takes_more_steps_than_it_may(measured) -> None:
    free, bound = mixed(TIME, PLANES, mu=0.0), mixed(TIME, PLANES, mu=0.0, timesteps=20)
    _, atoms = measured(free)
    steps = [coding.decoding(coding.fit(atoms).params).steps for coding in (free, bound)]
    assert float(steps[0].max()) == 24 and float(steps[1].max()) <= 20
    assert bool((steps[1] == 4).any())
    with pytest.raises(
        InputError, match="a site has no choice of at most 3 steps: give more"
    ) as said:
        mixed(PLANES, timesteps=3).fit(atoms)
    assert "\n" not in str(said.value)


def test_a_site_is_what_its_choice_is_alone(measured) -> None:
    """Value, spikes, levels and decoding, for sites by themselves and as one batch."""
    choices = (TIME, DIGITS, Timed(timesteps=9, levels="free"), PLANES)
    coding = mixed(*choices)
    sites, atoms = measured(coding)
    p = {name: value.float() for name, value in coding.fit(atoms).params.items()}
    # Each choice somewhere, whatever it costs.
    p["choice"] = (torch.arange(len(sites)) % len(choices)).float()
    x = torch.randn(len(sites), 200, generator=torch.Generator().manual_seed(0)) * 2
    value, count = coding.quantise(x, p)
    costs = coding.decoding(p)
    for site in range(len(sites)):
        row = site_params(p, site)
        choice, own = coding.at_site(row)
        assert choice is choices[site % len(choices)]
        alone = {name: t[site] for name, t in choice.fit(atoms).params.items()}
        assert own.keys() == alone.keys()
        for made in (coding.quantise(x[site], row), choice.quantise(x[site], own)):
            assert torch.equal(made[0], value[site]) and torch.equal(made[1].float(), count[site])
        assert torch.equal(coding.table(row), choice.table(own))
        spikes = coding.encode(x[site], row)
        assert torch.equal(decode(spikes, coding.table(row)), value[site])
        single = choice.decoding({name: t[None] for name, t in own.items()})
        for name in ("macs", "acs", "comparisons", "steps"):
            assert float(getattr(costs, name)[site]) == float(getattr(single, name))


def test_it_is_saved_with_its_choices_and_read_again(
    model: PreTrainedModel, ids: Tensor, tokens: Draws, tmp_path: Path
) -> None:
    coding = mixed(TIME, DIGITS, Timed(timesteps=9, levels="free"))
    stages.convert(model, ids, coding)
    table = stages.table(model)
    assert {"choice", "levels_2", "scale_0"} <= set(table) and table["nmse"].notna().all()
    with torch.no_grad():
        expected = model(tokens(2, 11)).logits
    stages.save(model, tmp_path / "spiking")
    again = stages.load(str(tmp_path / "spiking"))
    assert stages.conversion(again).coding == coding
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 11)).logits, expected)


def test_what_it_is_called_by() -> None:
    """Names that tables and figures read: where choices agree it is theirs."""
    assert mixed(TIME, PLANES).convention == "mixed"
    assert mixed(PLANES, Gated("other", 3)).convention == "bit_plane"
    assert mixed(Timed(grains=3), PLANES).grains == 3
    assert mixed(TIME, PLANES).bits is None and not mixed(TIME, PLANES).trained
    about = mixed(TIME, PLANES)
    assert {each.name for each in about.statistics} == {"products", "channel_mean", "sensitivity"}
    plain = replace(about, centre="none")
    assert {each.name for each in plain.statistics} == {"products", "sensitivity"}


@pytest.mark.parametrize(
    "choice",
    [
        Dense("dense"),
        LloydMax("lloyd_max", 4),
        Gif("gif", 3, 16, 0.0, "unary", None),
        OneSpike("one_spike", 8, None),
        Gated("gated", 4, 2, granularity="channel"),
        Timed(centre="channel"),
        Mixed("mixed", 8, (PLANES,), SENSITIVITY),
    ],
    ids=lambda coding: coding.name,
)
def test_what_is_no_choice_is_refused_in_a_line(choice: Coding) -> None:
    with pytest.raises(InputError, match=f"has {choice.name}: give codings of single") as said:
        mixed(PLANES, choice)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sensitivity": None}, "give coding.sensitivity (conf/coding/mixed.yaml has one)"),
        ({"timesteps": 0}, "coding.timesteps=0 for mixed: give the steps that a site may take"),
        ({"timesteps": 8.0}, "coding.timesteps=8.0"),
        ({"mu": -0.1}, "coding.mu=-0.1 for mixed: give a finite number, 0 or more"),
        ({"choices": ("foo",)}, "coding.choices=('foo',) for mixed: give a list of codings"),
        ({"choices": TIME}, "coding.choices=Timed"),
        ({"nu": float("nan")}, "coding.nu=nan"),
    ],
)
def test_what_it_cannot_be_is_refused_in_a_line(given: dict, says: str) -> None:
    with pytest.raises(InputError) as said:
        replace(mixed(PLANES), **given)
    assert says in str(said.value) and "\n" not in str(said.value)
