"""Signed digits against the non-adjacent form of whole numbers, and beside the binary code."""

import itertools

import pytest
import torch

from stages.codings.base import error_and_spikes
from stages.codings.gated import Gated
from stages.codings.signed_digit import SignedDigit
from stages.errors import InputError
from stages.neurons.spikes import decode
from tests.codings.reference import atoms_of, heavy_tailed


def fewest_digits(number: int, places: int) -> int:
    """Least number of digits out of {-1, 0, 1} at `places` binary places that make `number`."""
    best = places + 1
    for digits in itertools.product((-1, 0, 1), repeat=places):
        if sum(d << k for k, d in enumerate(reversed(digits))) == number:
            best = min(best, sum(map(abs, digits)))
    return best


@pytest.mark.parametrize("timesteps", [1, 2, 3, 5, 7])
def test_no_signed_code_of_a_level_has_fewer_spikes(timesteps: int) -> None:
    coding = SignedDigit("signed_digit", timesteps, 1)
    levels = torch.arange(2**timesteps)
    value, count = coding.quantise(levels.float(), {"scale": torch.tensor([2.0**timesteps])})
    assert torch.equal(value, levels.float())
    assert count.tolist() == [fewest_digits(int(level), timesteps) for level in levels]


@pytest.mark.parametrize("timesteps", [12, 16])
def test_the_closed_form_counts_the_spikes_of_every_code(timesteps: int) -> None:
    coding, p = SignedDigit("signed_digit", timesteps, 1), {"scale": torch.tensor([2.0**timesteps])}
    levels = torch.arange(2**timesteps)
    train = coding.encode(levels.float(), p)
    assert torch.equal(train.code, levels)
    assert torch.equal(train.count.float(), coding.quantise(levels.float(), p)[1])


def test_seven_is_eight_less_one() -> None:
    """Scale 16, T=4: 7 = +8 -1, 7.4 rounds to it, 13 = 8 + 4 + 1 has no shorter form below 16."""
    coding, p = SignedDigit("signed_digit", 4, 1), {"scale": torch.tensor([16.0])}
    train = coding.encode(torch.tensor([7.0, -7.4, 13.0, 0.4]), p)
    assert train.train.T.tolist() == [[1, 0, 0, -1], [1, 0, 0, -1], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert decode(train, coding.table(p)).tolist() == [7.0, -7.0, 13.0, 0.0]
    assert train.count.tolist() == [2, 2, 3, 0]


@pytest.mark.parametrize("grains", [1, 2])
def test_the_levels_are_those_of_the_binary_code(grains: int) -> None:
    atoms = atoms_of(heavy_tailed(3, 1500))
    binary, signed = Gated("gated", 6, grains), SignedDigit("signed_digit", 6, grains)
    p = {name: t.float() for name, t in binary.fit(atoms).params.items()}
    error, spikes = error_and_spikes(binary, atoms, p)
    own_error, own_spikes = error_and_spikes(signed, atoms, p)
    torch.testing.assert_close(own_error, error, rtol=1e-4, atol=0)
    assert bool((own_spikes < (1.0, 0.95)[grains - 1] * spikes).all())


def test_one_timestep_more_than_allowed_is_refused() -> None:
    with pytest.raises(InputError, match="coding.timesteps=17"):
        SignedDigit("signed_digit", 17, 1)
