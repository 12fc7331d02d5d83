"""Fits of Algorithm 1 that are long enough to be compiled."""

import pytest
import torch

from stages.codings.multigrain import Multigrain
from stages.compiler import compiled, use_compiler
from stages.fits import algorithm1
from stages.fits.algorithm1 import Algorithm1
from tests.codings.reference import atoms_of, heavy_tailed

SHORT = Algorithm1(rounds=3, neuron_steps=4, base_steps=5, neuron_lr=3e-3, base_lr=2e-3, slope=100)


def test_a_long_fit_is_compiled_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = atoms_of(heavy_tailed(2, 300))
    coding = Multigrain("multigrain", 4, 2, algorithm1=SHORT)
    expected = coding.fit(atoms)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(algorithm1, "COMPILED_FROM", 0)
    use_compiler(True)
    found = coding.fit(atoms)
    if not compiled():
        pytest.skip("torch.compile does not work here")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert found.curve is not None and expected.curve is not None
    torch.testing.assert_close(found.curve, expected.curve, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.params, expected.params, rtol=1e-3, atol=1e-4)
