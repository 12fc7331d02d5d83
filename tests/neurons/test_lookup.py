"""Tables of codes against the code itself, over all magnitudes and next to every step."""

import pytest
import torch

from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.phase import Phase
from stages.codings.rate import Rate
from stages.codings.ttfs import Ttfs
from stages.neurons.channels import unscaled
from stages.neurons.lookup import MOST_CODES, lookups
from tests.codings.reference import fitted

CODINGS = [
    Gated("gated", 6, 2),
    Gated("gated", 4, 3, offset=True),
    Gated("gated", 5, 2, radix=4),
    Multigrain("multigrain", 4, 2),
    Las("las"),
    Phase("phase", 6),
    Rate("rate", 15),
    Ttfs("ttfs", 64, None, False),
]


def near(edges):
    """Edges and the float32 values on both sides of them."""
    up, down = torch.full_like(edges, torch.inf), torch.full_like(edges, -torch.inf)
    return torch.cat([edges, edges.nextafter(up), edges.nextafter(down)])


def values(table, seed):
    """Values of all magnitudes and signs, and those next to every edge."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(60 * torch.rand(4000, generator=generator) - 40)
    plain = 8 * torch.randn(4000, generator=generator)
    ends = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38])
    return torch.cat([sizes, -sizes, plain, near(table.edge[:-1]), ends])


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: f"{coding.name}{coding.timesteps}")
def test_a_table_gives_the_bits_of_the_code(coding, fitted_sites):
    params = [unscaled(p) for p in fitted_sites(coding)]
    tables = lookups(coding, params)
    assert all(table is not None for table in tables)
    for seed, (table, p) in enumerate(zip(tables, params, strict=True)):
        x = values(table, seed)
        value, stair = table(x)
        expected, spikes = coding.quantise(x, p)
        assert torch.equal(value, expected)
        assert torch.equal(table.spikes[stair], spikes.float())
        assert len(value.unique()) > 8
        assert bool(table(torch.tensor([torch.nan]))[0].isnan())


def test_half_precision_is_coded_as_its_float32_value(fitted_sites):
    coding = Gated("gated", 6, 2)
    p = unscaled(fitted_sites(coding)[0])
    (table,) = lookups(coding, [p])
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(table(x)[0], coding.quantise(x, p)[0])


def test_codes_of_a_token_and_too_many_codes_have_no_table(fitted_sites):
    p = unscaled(fitted_sites(Gated("gated", 6, 2))[0])
    assert lookups(Gif(), [p, p]) == [None, None]
    many = Gated("gated", 12, 2)
    assert MOST_CODES < 2 * 2**12 and lookups(many, [p]) == [None]


def test_a_code_whose_stairs_lie_between_its_levels_has_no_table(fitted_sites):
    """What samples show to be another code than the levels tell is coded without a table."""

    class Hidden(Gated):
        def quantise(self, x, p):
            value, spikes = super().quantise(x, p)
            ripple = (x.abs() * 4096).floor() % 2  # thousands of stairs that no level shows
            return value * (1 + ripple / 8), spikes

    p = unscaled(fitted_sites(Gated("gated", 6, 2))[0])
    assert lookups(Hidden("gated", 6, 2), [p]) == [None]


@pytest.fixture(scope="module")
def fitted_sites():
    """Parameters of two sites, by the fit of a coding."""

    def fit(coding):
        found = fitted(coding)
        return [site_params(found, index) for index in range(2)]

    return fit
