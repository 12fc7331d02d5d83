"""Saliency and running maxima against loops over the formulas, and that batches change nothing."""

import pytest
import torch
from torch import Tensor

from stages.errors import InputError
from stages.fits.statistics import RunningMaximum, Saliency
from stages.model.sites import ROLES, SiteSelection, find_sites, select
from stages.ports.hooks import attached
from stages.statistics import measuring
from stages.statistics.watch import Watch
from tests.conftest import FAMILIES
from tests.model.families import made

HEADS, GROUPS, WIDTH, LENGTH = 4, 2, 10, 12


@pytest.fixture
def ids(tokens) -> Tensor:
    return tokens(5, LENGTH)


@pytest.fixture
def seen(model, ids) -> dict[str, Tensor]:
    """Every site's dense values over all windows, [W, ...]."""
    found: dict[str, Tensor] = {}
    sites = find_sites(model)
    watches = {s.name: Watch(lambda x, name=s.name: found.update({name: x})) for s in sites}
    with torch.inference_mode(), attached(model, sites, watches):
        model(ids, use_cache=False)
    return found


def scores(model, ids, batch=2, roles=ROLES) -> dict[str, Tensor]:
    sites = select(find_sites(model), SiteSelection(roles))
    found = measuring(Saliency())(model, ids, sites, batch)
    assert found["score"].shape[0] == found["operand"].shape[0] == len(sites)
    marked = [s.role for s, mark in zip(sites, found["operand"], strict=True) if mark]
    assert set(marked) <= {"attn.k", "attn.v"}
    return {s.name: row[~row.isnan()] for s, row in zip(sites, found["score"], strict=True)}


def matrix(module) -> Tensor:
    """What a linear module multiplies by, [outputs, inputs], from what it makes of unit vectors."""
    with torch.no_grad():
        unit = torch.eye(width(module))
        return (module(unit) - module(torch.zeros_like(unit))).T


def width(module) -> int:
    """The inputs of a linear module, of a Conv1D the other side of its weight."""
    return module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]


def expected(model, site, seen) -> Tensor:
    """Mean over tokens, then windows, of X o (X H), the matrix H of every head or consumer in full."""
    modules = dict(model.named_modules())
    x = seen[site.name].double()
    if site.port not in ("k", "v"):
        w = torch.cat([matrix(modules[name]) for name in site.consumers]).double()
        return torch.stack([(own * (own @ (w.T @ w))).mean(0) for own in x]).mean(0)
    other = seen[f"{site.path}:{'q' if site.port == 'k' else 'probs'}"].double()
    windows = []
    for own, heads in zip(x, other, strict=True):
        parts = []
        for group in range(GROUPS):
            m = own[group]  # [S, D]
            total = torch.zeros_like(m)
            for head in range(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS):
                h = heads[head]
                total += m @ (h.T @ h) if site.port == "k" else h.T @ h @ m
            parts.append((m * total).mean(0))
        windows.append(torch.cat(parts))
    return torch.stack(windows).mean(0)


def test_saliency_is_the_formula(model, ids, seen) -> None:
    found = scores(model, ids)
    scored = {s.role for s in find_sites(model) if len(found[s.name])}
    assert scored == set(ROLES) - {"attn.q", "attn.probs", "mlp.act", "mlp.up"}
    for site in find_sites(model):
        if site.role in scored:
            right = expected(model, site, seen).float()
            torch.testing.assert_close(found[site.name], right, rtol=1e-4, atol=1e-6)
    assert any(bool((score < 0).any()) for score in found.values())  # signed


def test_saliency_does_not_depend_on_the_batch_or_on_other_roles(model, ids) -> None:
    one, all_ = scores(model, ids, 1), scores(model, ids, 5)
    for name, score in one.items():
        torch.testing.assert_close(score, all_[name])
    few = scores(model, ids, roles=("attn.v", "attn.k", "attn.q"))
    for name, score in few.items():
        torch.testing.assert_close(score, one[name])


def test_saliency_finds_a_planted_channel(model, ids) -> None:
    model.model.layers[0].input_layernorm.weight.data[7] *= 30
    assert int(scores(model, ids)["model.layers.0.input_layernorm:out"].argmax()) == 7


def test_running_maximum_is_the_recurrence(model, ids, seen) -> None:
    sites = find_sites(model)
    for batch in (1, 3):
        found = measuring(RunningMaximum(0.9))(model, ids, sites, batch)["maximum"]
        for site, maximum in zip(sites, found, strict=True):
            average = None
            for x in seen[site.name]:
                if site.port == "probs":
                    top = x.amax((1, 2))  # of every head
                elif x.dim() == 3:
                    top = torch.stack([head.abs().amax(0) for head in x]).flatten()
                else:
                    top = x.abs().amax(0)
                average = top if average is None else 0.9 * average + 0.1 * top
            assert float(maximum) == pytest.approx(float(average.max()), rel=1e-5)


def test_running_maximum_over_blocks_of_queries(model, tokens) -> None:
    """A window longer than a block of queries is still one window."""
    ids = tokens(2, 300)
    sites = [s for s in find_sites(model) if s.role == "attn.probs"]
    with torch.inference_mode():
        probs = [model(row[None], output_attentions=True).attentions for row in ids]
    found = measuring(RunningMaximum(0.5))(model, ids, sites, 2)["maximum"]
    for layer, maximum in enumerate(found):
        first, second = (each[layer][0].amax((1, 2)) for each in probs)
        assert float(maximum) == pytest.approx(float((first + second).max() / 2), rel=1e-5)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "phi3", "gpt2"])
def test_of_other_families_against_what_their_modules_are_given(tiny, ids, kind) -> None:
    """OPT gives its MLP the tokens of all windows in one row [B S, C]; GPT-2 keeps weights as [C, O]."""
    model = tiny(kind) if kind in FAMILIES else made(kind)
    modules = dict(model.named_modules())
    sites = [s for s in find_sites(model) if s.role in ("attn.in", "mlp.in", "mlp.down", "head.in")]
    given: dict[str, Tensor] = {}

    def note(name: str):
        def hook(module, args):
            given[name] = args[0].unflatten(0, (-1, LENGTH)) if args[0].dim() == 2 else args[0]

        return hook

    hooks = [modules[s.consumers[0]].register_forward_pre_hook(note(s.name)) for s in sites]
    with torch.inference_mode():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    maxima = measuring(RunningMaximum(0.9))(model, ids, sites, 2)["maximum"]
    found = measuring(Saliency())(model, ids, sites, 2)["score"]
    for site, maximum, score in zip(sites, maxima, found, strict=True):
        average = given[site.name][0].abs().amax(0)
        for x in given[site.name][1:]:
            average = 0.9 * average + 0.1 * x.abs().amax(0)
        assert float(maximum) == pytest.approx(float(average.max()), rel=1e-5)
        right = expected(model, site, given).float()
        torch.testing.assert_close(score[: len(right)], right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_outside_its_range_is_refused(momentum: float) -> None:
    with pytest.raises(InputError, match="momentum"):
        RunningMaximum(momentum)
