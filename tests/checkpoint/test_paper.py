"""The neurons of the paper's files: a file of its format becomes the same neurons here, or is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.capture import Capture
from stages.checkpoint.paper import HEAD, ROLES, PaperNeurons, read
from stages.codings.base import site_params
from stages.codings.las import Las
from stages.codings.multigrain import Multigrain
from stages.codings.phase import Phase
from stages.distribution import Densities, Distribution
from stages.errors import InputError
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import SiteSelection, find_sites, select
from stages.ports.patched import patched
from tests.codings.reference import heavy_tailed

Entry = tuple[Any, ...]
GENOTYPES = ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1])
PAPER = SiteSelection((*ROLES.values(), "head.in"))


def entry(index: int, learned: bool) -> Entry:
    """The tuple of one site, of two grains at T=6."""
    generator = torch.Generator().manual_seed(index)
    d, h, theta = 2 + 0.05 * torch.randn(3, 2, generator=generator)
    tau = 0.5 + 4 * float(torch.rand((), generator=generator))
    whole = (2, GENOTYPES[index % 2], d, tau, h, theta)
    return (*whole, torch.tensor(0.013 * tau)) if learned else whole


def entries(layers: int = 2) -> dict[str, Entry]:
    """What a file of a model of so many layers holds, in its order: the head first."""
    keys = [HEAD, *(f"model.layers.{i}.{site}" for i in range(layers) for site in ROLES)]
    return {k: entry(i, "softmax" in k or "silu" in k) for i, k in enumerate(keys)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-T-6-grains-2" / "retrain.pth"
    path.parent.mkdir()
    torch.save(entries(), path)
    return path


@pytest.fixture
def densities(model: PreTrainedModel, tokens: Callable[..., Tensor]) -> Densities:
    sites = select(find_sites(model), PAPER)
    return Distribution(atoms=64).run(Capture().run(model, tokens(4, 16, seed=1), sites, 4))


def their_neuron(x: Tensor, given: Entry, timesteps: int, v0: float) -> Tensor:
    """The neuron of the released code, from its description: a threshold is passed at >."""
    _, genotype, d, tau, h, theta = given[:6]
    v, y = x.double().abs() + v0, torch.zeros_like(x).double()
    for t in range(timesteps):
        g = genotype[t]
        spike = (v - tau * theta[g].double() ** -(t + 1) > 0).double()
        v = v - spike * tau * h[g].double() ** -(t + 1)
        y = y + spike * tau * d[g].double() ** -(t + 1)
    return x.sign() * y


@pytest.mark.parametrize("v0", ["half_step", "learned"])
def test_every_imported_neuron_is_the_one_of_the_file(
    file: Path, densities: Densities, v0: str
) -> None:
    neurons = read(file, v0)
    coding = Multigrain("multigrain", 6, 2, "half_step" if v0 == "half_step" else "zero")
    fitted = Fitting.imported(densities, coding, neurons)
    assert len(fitted.sites) == 2 * 9 + 1 and fitted.sites == densities.sites
    names = {(role, i): f"model.layers.{i}.{site}" for site, role in ROLES.items() for i in (0, 1)}
    names["head.in", -1] = HEAD
    given, x = entries(), heavy_tailed(1, 4000)[0]
    for index, place in enumerate(zip(fitted.roles, fitted.layers, strict=True)):
        own, p = given[names[place]], site_params(fitted.fit.params, index)
        assert p["grain"].tolist() == own[1] and float(p["scale"]) == np.float32(own[3])
        for name, base in zip(("d", "h", "theta"), (own[2], own[4], own[5]), strict=True):
            assert torch.equal(p[f"base_{name}"], base)
            steps = [base[g] ** -torch.tensor(t + 1.0) for t, g in enumerate(own[1])]
            torch.testing.assert_close(p[name], torch.stack(steps), rtol=1e-6, atol=0)
        learned = float(own[6]) if len(own) == 7 else 0.0
        start = own[3] * 2.0**-7 if v0 == "half_step" else learned
        assert float(p["v0"] * p["scale"]) == pytest.approx(start, rel=1e-6)
        value = coding.quantise(x, p)[0].double()
        same = (value - their_neuron(x, own, 6, start)).abs() < 1e-5 * own[3]
        assert float(same.float().mean()) > 0.999  # in float32 a value may lie beyond a threshold
    assert bool(fitted.nmse.isfinite().all()) and fitted.fit.curve is None


def test_two_sites_swapped_are_other_neurons(file: Path, densities: Densities) -> None:
    whole = entries()
    q, k = (f"model.layers.1.self_attn.{name}_Identity.input" for name in "qk")
    whole[q], whole[k] = whole[k], whole[q]
    coding, neurons = Multigrain("multigrain", 6, 2), read(file)
    torch.save(whole, file)
    one, other = (Fitting.imported(densities, coding, n).fit.params for n in (neurons, read(file)))
    differ = (one["base_d"] != other["base_d"]).any(-1)
    places = list(zip(densities.roles, densities.layers, strict=True))
    assert {places[i] for i in differ.nonzero().flatten().tolist()} == {
        ("attn.q", 1),
        ("attn.k", 1),
    }


def test_they_run_in_the_model(
    model: PreTrainedModel, tokens: Callable[..., Tensor], file: Path, densities: Densities
) -> None:
    coding = Multigrain("multigrain", 6, 2)
    conversion = Conversion(coding, Fitting.imported(densities, coding, read(file)))
    ids = tokens(2, 9)
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, conversion) as number:
            spiking = model(ids).logits
    assert number == 19 and bool(spiking.isfinite().all()) and not torch.equal(spiking, dense)


def test_a_folder_keeps_them(file: Path, tmp_path: Path) -> None:
    neurons = read(file)
    neurons.save(tmp_path / "kept")
    again = PaperNeurons.load(tmp_path / "kept")
    assert (again.roles, again.layers, again.v0) == (neurons.roles, neurons.layers, "half_step")
    assert (again.timesteps, again.grains) == (6, 2)
    assert all(torch.equal(again.params[n], value) for n, value in neurons.params.items())
    with pytest.raises(InputError, match="is not an empty folder"):
        neurons.save(tmp_path / "kept")


def test_what_the_code_searches_and_does_not_use_is_left_out(file: Path) -> None:
    torch.save({**entries(), "model.layers.0.mlp.up_proj.output": entry(3, False)}, file)
    assert len(read(file).roles) == 19


def changed(key: str, **places: Any) -> dict[str, Entry]:
    """The entries with some numbers of one tuple replaced, by their index."""
    whole = entries()
    numbers = {int(name[1:]): value for name, value in places.items()}
    whole[key] = tuple(numbers.get(i, old) for i, old in enumerate(whole[key]))
    return whole


Q = "model.layers.1.self_attn.q_Identity.input"
WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], "holds a list"),
    "nothing": ({}, "holds a dict"),
    "a model": (
        {"model.embed_tokens.weight": torch.ones(2)},
        "'model.embed_tokens.weight' is no site",
    ),
    "a site less": ({k: v for k, v in entries().items() if k != Q}, "1 of 19.*attn.q of layer 1"),
    "no head": ({k: v for k, v in entries().items() if k != HEAD}, "1 of 19.*head.in"),
    "the head alone": ({HEAD: entry(0, False)}, "sites are missing"),
    "a short tuple": ({**entries(), Q: entry(1, False)[:5]}, "got 5, and a tuple of 6"),
    "no v0": (
        {**entries(), "model.layers.0.mlp.silu_Identity.input": entry(1, False)},
        "got 6, and a tuple of 7",
    ),
    "other T": (changed(Q, _1=[0, 0, 1, 1]), "T=4 and n=2, .* T=6"),
    "grains that fall": (changed(Q, _1=[0, 1, 0, 1, 1, 1]), "do not count up"),
    "grains as text": (changed(Q, _1="[0, 0, 0, 1, 1, 1]"), "no numbers"),
    "a base of one": (changed(Q, _2=torch.tensor([2.0, 1.0])), "above 1 are wanted"),
    "a base too many": (changed(Q, _4=torch.tensor([2.0, 2.0, 2.0])), "2 above 1 are wanted"),
    "a number of grains as text": (changed(Q, _0="two"), "no numbers"),
    "no number of grains": (changed(Q, _0=None), "no numbers"),
    "more grains than memory": (changed(Q, _0=10**12), "do not count up"),
    "more layers than memory": (
        {**entries(), "model.layers.999999999999.mlp.down_proj.input": entry(1, False)},
        "sites are missing",
    ),
    "no tau": (changed(Q, _3=0.0), "tau=0.0"),
    "a tau by channel": (changed(Q, _3=torch.ones(4)), "no numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_another_file_is_refused_in_one_line(file: Path, name: str) -> None:
    whole, match = WRONG[name]
    torch.save(whole, file)
    with pytest.raises(InputError, match=match) as caught:
        read(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("the file was executed",))


def test_no_file_is_executed(file: Path, tmp_path: Path) -> None:
    torch.save({HEAD: Trap()}, file)
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    for wrong in (file, tmp_path / "text"):
        with pytest.raises(InputError, match="no file of tensors") as caught:
            read(wrong)
        assert "\n" not in str(caught.value)
    for wrong, match in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "pickle", "import-paper"),
    ):
        with pytest.raises(InputError, match=match):
            read(wrong)
    with pytest.raises(InputError, match="v0='none'"):
        read(file, "none")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"e", b"1 2 3", b'{"a": 1}', pickle.dumps(pytest.fail)],
    ids=["nothing", "words", "one letter", "numbers", "json", "code"],
)
def test_a_damaged_file_is_refused_without_the_advice_to_load_it_without_care(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(InputError, match="damaged or no file of tensors") as caught:
        read(tmp_path / "other")
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_cut_short_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in (1, len(whole) // 3, len(whole) - 10):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="damaged"):
            read(file)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("coding", "match"),
    [
        (Multigrain("multigrain", 8, 2), "timesteps=8 but .* have 6: give timesteps=6"),
        (Multigrain("multigrain", 6, 3), "give coding.grains=2"),
        (Multigrain("multigrain", 6, 2, "zero"), "give coding.v0=half_step"),
        (Multigrain("multigrain", 6, 2, tied=True), "give coding.tied=False"),
        (Multigrain("multigrain", 6, 2, granularity="channel"), "granularity=site"),
        (Las("las", 6), "coding=las with fitting.neurons"),
        (Phase("phase", 6), "coding=phase with fitting.neurons"),
    ],
)
def test_another_coding_is_refused(
    file: Path, densities: Densities, coding: Any, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        Fitting.imported(densities, coding, read(file))


def test_other_sites_are_refused(file: Path, densities: Densities) -> None:
    coding = Multigrain("multigrain", 6, 2)
    torch.save(entries(3), file)
    with pytest.raises(InputError, match="9 sites differ, .* of layer 2 is no site.*sites=paper"):
        Fitting.imported(densities, coding, read(file))
    torch.save(entries(1), file)
    with pytest.raises(InputError, match="9 sites differ, .* of layer 1 has no neuron"):
        Fitting.imported(densities, coding, read(file))
