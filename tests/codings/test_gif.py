"""SpikeLLM's neuron against loops over its definition, published errors, and inside a model."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.atoms import Atoms
from stages.capture import Capture
from stages.codings.gif import Gif
from stages.distribution import Distribution
from stages.errors import InputError
from stages.evaluation import perplexity
from stages.fits.statistics import Saliency
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import find_sites
from stages.patching import Patching
from stages.ports.counters import Counters
from stages.ports.patched import patched
from stages.statistics import measuring

GIF = Gif("gif", 4, 16, 0.25, "unary", None)


def parameters(coding: Gif, channels: list[int], steps: int | None = None) -> dict[str, Tensor]:
    """One site with given salient channels out of 8."""
    salient = torch.zeros(8)
    salient[channels] = 1
    return {"steps": torch.tensor(float(steps or coding.timesteps)), "salient": salient}


def by_hand(coding: Gif, row: list[float], salient: list[int], steps: int) -> list[tuple]:
    """Value, unit spikes and one bits of every channel of a token, increment by increment."""
    result = []
    low, high = min(row), max(row)
    for c, x in enumerate(row):
        number = steps if c in salient else 1
        top = number * (coding.levels - 1)
        scale = (high - low) / top
        zero = round(-low / scale)
        left = code = min(max(round(x / scale) + zero, 0), top)
        units = bits = 0
        for _ in range(number):
            k = min(left, coding.levels - 1)
            left -= k
            units += k
            bits += k.bit_count()
        assert left == 0 and units == code
        result.append(((code - zero) * scale, units, bits))
    return result


@pytest.mark.parametrize(("timesteps", "levels"), [(1, 16), (2, 16), (4, 16), (5, 2), (10, 7)])
def test_equals_the_loop_over_tokens(timesteps: int, levels: int) -> None:
    unary = replace(GIF, timesteps=timesteps, levels=levels)
    p = parameters(unary, [1, 6])
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8) * torch.tensor([1, 9, 1, 1, 2, 1, 0.1, 1]) + 0.3
    value, units = unary.quantise(x, p)
    _, bits = replace(unary, convention="bit_plane").quantise(x, p)
    for b in range(3):
        for s in range(5):
            rows = by_hand(unary, x[b, s].tolist(), [1, 6], timesteps)
            for c, (expected, unit, bit) in enumerate(rows):
                assert float(value[b, s, c]) == pytest.approx(expected, abs=1e-5)
                assert (int(units[b, s, c]), int(bits[b, s, c])) == (unit, bit)


@pytest.mark.parametrize("convention", ["unary", "bit_plane"])
@pytest.mark.parametrize("shape", [(2, 7, 8), (2, 4, 7, 2)])
def test_the_stepped_neuron_gives_the_same(convention: str, shape: tuple[int, ...]) -> None:
    for timesteps in (1, 4, 6, 10):
        coding = replace(GIF, timesteps=timesteps, convention=convention)
        p = parameters(coding, [0, 3, 5])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(timesteps)) ** 3
        spikes = coding.encode(x, p)
        value, count = coding.quantise(x, p)
        assert spikes.train.shape == (timesteps, *shape) and spikes.train.min() == 0
        assert int(spikes.train.max()) == coding.levels - 1
        assert torch.equal(
            (coding.table(p)[spikes.code.long()] - spikes.zero) * spikes.scale, value
        )
        assert torch.equal(spikes.count.float(), count)
        later = spikes.train[1:].sum(0)  # only salient channels go on after the first step
        assert not bool(later[spikes.grain == 0].any())


@pytest.mark.parametrize(
    ("convention", "spikes"), [("unary", [0, 1, 3, 6]), ("bit_plane", [0, 1, 2, 4])]
)
def test_a_token_worked_out_by_hand(convention: str, spikes: list[int]) -> None:
    """-2 0 3 4 with L=4, T=2 and the last channel salient: the range 6 is 3 ordinary steps of 2 above
    the zero point 1, or 6 salient ones of 1 above 2. 3 rounds to 4; 4 is code 6, emitted as 3 and 3."""
    gif = Gif("gif", 2, 4, 0.25, convention, None)
    p = {"steps": torch.tensor(2.0), "salient": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    x = torch.tensor([[-2.0, 0.0, 3.0, 4.0]])
    value, count = gif.quantise(x, p)
    train = gif.encode(x, p)
    assert value.tolist() == [[-2.0, 0.0, 4.0, 4.0]]
    assert train.train[:, 0].T.tolist() == [[0, 0], [1, 0], [3, 0], [3, 3]]
    assert count[0].tolist() == train.count[0].tolist() == spikes


def test_heads_are_tokens_of_their_own_with_their_own_mask() -> None:
    """[B, H, S, D]: channel d of head h is channel h D + d of the mask."""
    p = parameters(GIF, [1, 5, 6])
    x = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    value, _ = GIF.quantise(x, p)
    for head in range(4):
        own = p | {"salient": p["salient"][2 * head : 2 * head + 2]}
        assert torch.equal(GIF.quantise(x[:, head], own)[0], value[:, head])


def test_tokens_do_not_depend_on_their_neighbours_and_ends_are_kept() -> None:
    p = parameters(GIF, [2])
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    value, _ = GIF.quantise(x, p)
    assert torch.equal(GIF.quantise(x[2:3], p)[0], value[2:3])
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert bool(((value - x).abs().amax(-1) <= step).all())


def test_tokens_of_one_value_are_exact() -> None:
    x = torch.tensor([[0.0] * 8, [3.7] * 8, [-0.02] * 8])
    assert torch.equal(GIF.quantise(x, parameters(GIF, [1]))[0], x)


def test_the_published_error_and_spikes() -> None:
    """Magnitudes of 100 000 Gaussian values as one token of 15 T increments, and Laplace ones:
    21.1, 27.2, 33.2 dB at 1.22, 1.69, 2.93 one bits, and 16.5, 22.4, 28.4 dB."""
    torch.manual_seed(0)
    gauss = torch.randn(1, 100_000)
    laplace = torch.distributions.Laplace(0.0, 1.0).sample((1, 100_000))
    published = [(1, 21.1, 16.5, 1.22), (2, 27.2, 22.4, 1.69), (4, 33.2, 28.4, 2.93)]
    for timesteps, gaussian_db, laplace_db, bits in published:
        coding = Gif("gif", timesteps, 16, 1.0, "bit_plane", None)
        p = {"steps": torch.tensor(float(timesteps)), "salient": torch.ones(100_000)}
        for x, decibels in ((gauss.abs(), gaussian_db), (laplace.abs(), laplace_db)):
            value, count = coding.quantise(x, p)
            ratio = 10 * torch.log10(x.square().mean() / (value - x).square().mean())
            assert float(ratio) == pytest.approx(decibels, abs=0.1)
            if decibels == gaussian_db:
                assert float(count.mean()) == pytest.approx(bits, abs=0.01)


# --- fitting --------------------------------------------------------------------------------------


def atoms(score: list[list[float]], operand: list[float]) -> Atoms:
    some = torch.ones(len(score), 4, dtype=torch.float64)
    found = {"score": torch.tensor(score), "operand": torch.tensor(operand)}
    return Atoms(some, 0 * some, some / 4, some[:, -1], statistics={"saliency": found})


def test_the_highest_signed_scores_are_salient() -> None:
    nan = float("nan")
    score = [[1.0, -9.0, 5.0, 2.0], [0.5, 3.0, nan, nan], [nan] * 4]
    p = replace(GIF, salient_fraction=0.5).fit(atoms(score, [0, 1, 0])).params
    assert p["salient"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert p["steps"].tolist() == [4, 2, 4]  # one more bit in k and v
    assert (
        replace(GIF, timesteps=1).statistics == () == replace(GIF, salient_fraction=0.0).statistics
    )
    assert GIF.statistics == (Saliency(),)


def test_what_it_declares() -> None:
    assert GIF.tokenwise and GIF.dense_roles == ("attn.probs",)
    assert GIF.decode_macs == 4 and replace(GIF, salient_fraction=0.0).decode_macs == 2


@pytest.mark.parametrize(
    "change",
    [{"levels": 1}, {"salient_fraction": 1.5}, {"convention": "ternary"}, {"timesteps": 0}],
)
def test_what_it_cannot_be_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(GIF, **change)


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture
def converted(model, tokens) -> Callable[[Gif], Conversion]:
    """Fits a coding to the model on the saliency of 4 windows, as the pipeline does."""
    ids, sites = tokens(4, 16, seed=1), find_sites(model)
    densities = Distribution(atoms=64).run(Capture().run(model, ids, sites, 4))

    def make(coding: Gif) -> Conversion:
        found = {s.name: measuring(s)(model, ids, sites, 2) for s in coding.statistics}
        return Conversion(coding, Fitting("atoms", 1, 0).run(densities, coding, found))

    return make


def test_measured_on_live_values(model, tokens, converted) -> None:
    """More levels, less error, by about the square; probabilities stay dense."""
    ids, errors = tokens(2, 20), []
    for levels in (16, 64):
        conversion = converted(replace(GIF, levels=levels))
        frame = Patching(2).run(model, ids, conversion, 2)
        assert "attn.probs" not in set(frame["role"])
        assert frame["nmse_atoms"].isna().all() and (frame["spikes"] > 0).all()
        errors.append(frame["nmse"])
    assert (errors[0] / errors[1]).between(6, 50).all() and (errors[1] < 1e-2).all()


def test_salient_channels_lower_the_error(model, tokens, converted) -> None:
    ids = tokens(2, 20)
    plain, salient = (
        Patching(2)
        .run(model, ids, converted(replace(GIF, salient_fraction=f)), 2)
        .set_index("role")
        for f in (0.0, 0.5)
    )
    scored = ["attn.in", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.down", "head.in"]
    assert (salient["nmse"] < plain["nmse"])[scored].all()
    for role in ("attn.q", "mlp.act", "mlp.up"):
        assert (salient["nmse"] == plain["nmse"])[role].all()


def test_counted_in_the_converted_model(model, tokens, converted) -> None:
    """Spikes are those of the stepped neuron on the values the spiking model sees."""
    coding = replace(GIF, convention="bit_plane")
    conversion, ids = converted(coding), tokens(2, 20)
    sites = find_sites(model)
    counters = Counters(sites, "cpu")
    with torch.inference_mode(), patched(model, conversion, counters):
        model(ids, use_cache=False)
    frame = counters.frame(set(conversion.neurons.sites)).set_index("site")
    first = sites[0]
    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    p = {k: v[0] for k, v in conversion.neurons.fit.params.items()}
    count = coding.encode(x, p).count.sum()
    assert frame.loc[first.name, "spikes"] == float(count)
    assert frame["acs"].isna().sum() == 2  # the probabilities of two layers


def test_many_levels_are_the_dense_model(model, tokens, converted) -> None:
    ids = tokens(2, 20)
    dense = perplexity(model, ids, None, 2, "tiny").metrics["perplexity"]
    coding = replace(GIF, levels=256, timesteps=8, salient_fraction=1.0)
    fine = perplexity(model, ids, converted(coding), 2, "tiny").metrics["perplexity"]
    coarse = perplexity(model, ids, converted(replace(GIF, levels=4)), 2, "tiny").metrics
    assert fine == pytest.approx(dense, rel=0.05)
    assert abs(coarse["perplexity"] / dense - 1) > 0.05
