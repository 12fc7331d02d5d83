"""Perturbations: as large as they say, the same in every batch, gone afterwards."""

import numpy as np
import pytest
import torch

from stages.codings.las import Las
from stages.evaluation import perplexity
from stages.model.perturbation import Perturbation, nudged, perturbed

ONE, OTHER = Perturbation(1), Perturbation(2)


def embedded(model, ids, perturbation):
    with torch.inference_mode(), perturbed(model, perturbation):
        seen = []
        handle = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            model(ids)
        finally:
            handle.remove()
    return seen[0]


def change(model, ids, perturbation):
    plain = embedded(model, ids, None).double()
    return embedded(model, ids, perturbation).double() / plain - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_relative_change_has_the_size_that_is_asked_for(model, tokens, dtype):
    found = change(model.to(dtype), tokens(20, 60), ONE)
    assert found.std().item() == pytest.approx(2e-7, rel=0.05)
    assert abs(found.mean().item()) < 4 * 2e-7 / found[0].numel() ** 0.5  # texts share the noise
    large = change(model, tokens(20, 60), Perturbation(1, 1e-3))
    assert large.std().item() == pytest.approx(1e-3, rel=0.05)


def test_a_coarse_dtype_moves_few_elements_by_a_last_bit():
    torch.manual_seed(0)
    x = torch.randn(400_000).to(torch.bfloat16)
    factor = 1 + 1e-4 * torch.randn(x.shape, dtype=torch.float64)
    found = nudged(x, factor, torch.rand(x.shape))
    assert torch.equal((x.double() * factor).to(x.dtype), x)  # to nearest, nothing would move
    moved = found != x
    assert 0.01 < moved.double().mean() < 0.02  # E|z|·1e-4 over 2^-8 to 2^-7 of a last bit
    bits = found.view(torch.int16).int() - x.view(torch.int16).int()
    assert set(bits.unique().tolist()) == {-1, 0, 1}
    up = nudged(x, torch.full_like(factor, 1 + 1e-4), torch.rand(x.shape)).double()
    assert (up.abs().sum() / x.abs().double().sum() - 1).item() == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_without_noise_every_number_stays(dtype):
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-7, 3.14, -1e-4, 6e4]).to(dtype)
    same = nudged(x, torch.ones(8, dtype=torch.float64), torch.zeros(8))
    assert same.dtype == dtype and torch.equal(same, x)


def test_short_texts_see_the_beginning_of_the_same_noise_in_any_order(model, tokens):
    ids = tokens(3, 40)
    long = change(model, ids, ONE)
    assert torch.equal(change(model, ids[:1, :7], ONE)[0], long[0, :7])
    got = []
    with torch.inference_mode(), perturbed(model, ONE):
        for length in (7, 40, 20):  # it grows
            got.append(model.get_input_embeddings()(ids[:, :length]))
    plain = embedded(model, ids, None).double()
    for each in got:
        assert torch.equal(each.double() / plain[:, : each.shape[1]] - 1, long[:, : each.shape[1]])
    assert not torch.equal(change(model, ids, OTHER), long)
    factors = (long - long.mean()) / long.std()
    assert abs((factors[0, :39] * factors[0, 1:]).mean()) < 0.1  # positions have noise of their own


def test_the_noise_is_numpys(model, tokens):
    normal, _ = np.random.default_rng(1).spawn(2)
    z = normal.standard_normal((30, 24), np.float32)
    found = change(model.double(), tokens(1, 30), ONE)[0]
    assert found.numpy() == pytest.approx(2e-7 * z, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("coding", [None, Las("las", 3, "half_step")], ids=["dense", "las"])
@pytest.mark.parametrize("execution", ["fast", "stepped"])
def test_the_change_of_a_window_depends_on_no_batch(model, tokens, convert, coding, execution):
    model, ids = model.double(), tokens(6, 20)
    conversion = None if coding is None else convert(model, coding)

    def nll(batch, perturbation):
        how = {"execution": execution, "perturbation": perturbation}
        result = perplexity(model, ids, conversion, batch, "text", **how)
        assert ("perturbation" in result.metrics) == (perturbation is not None)
        return result.windows["nll"].to_numpy()

    large = Perturbation(1, 1e-3)  # so that a code jumps
    plain = nll(1, None)
    one, four = nll(1, large) - plain, nll(4, large) - plain
    assert (np.abs(one) > 1e-6).sum() >= 3 and four == pytest.approx(one, rel=1e-3, abs=1e-9)
    assert (nll(4, None) - plain) == pytest.approx(0, abs=1e-4 * np.abs(one).max())  # can fail
    assert not np.allclose(nll(1, Perturbation(2, 1e-3)) - plain, one, rtol=0.1)


def test_the_model_is_as_before_also_after_an_error(model, tokens):
    weights = {name: value.clone() for name, value in model.named_parameters()}
    embedding, ids = model.get_input_embeddings(), tokens(1, 5)
    with pytest.raises(KeyError), perturbed(model, ONE):
        model(ids)
        raise KeyError
    assert not embedding._forward_hooks
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_a_replicate_that_sees_no_noise_is_an_error(model):
    with (
        pytest.raises(RuntimeError, match="did not use its input embedding"),
        perturbed(model, ONE),
    ):
        pass
    with perturbed(model, None):
        pass


def test_every_family_is_perturbed(any_model, tokens):
    ids = tokens(2, 6)
    with torch.inference_mode():
        plain = any_model(ids).logits
        with perturbed(any_model, Perturbation(1, 1e-3)):
            changed = any_model(ids).logits
        assert torch.equal(any_model(ids).logits, plain)
    assert 0 < (changed - plain).abs().max() < plain.abs().max()
