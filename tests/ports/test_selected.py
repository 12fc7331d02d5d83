"""Attention by the compiled pass against the same attention by softmax, code and product."""

import shutil

import pytest
import torch

from stages.codings.gated import Gated
from stages.codings.multigrain import Multigrain
from stages.compiler import use_compiler
from stages.model.sites import find_sites
from stages.patching import Patching
from stages.ports.counters import Counters
from stages.ports.patched import patched
from stages.ports.tables import Tabulated

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
CODINGS = [Gated("gated", 6, 2), Multigrain("multigrain", 4, 2)]
ROLES = ("attn.probs",)  # so that no other kernel is compiled


@pytest.fixture
def calls(monkeypatch):
    """How often the pass was asked, and how often it had an answer."""
    original, answers = Tabulated.attend, []

    def attend(self, *args):
        answers.append(original(self, *args))
        return answers[-1]

    monkeypatch.setattr(Tabulated, "attend", attend)
    return answers


@torch.inference_mode()
def spiking(model, conversion, ids, mask, compiler):
    """Logits, and spikes of every site."""
    use_compiler(compiler)
    counters = Counters(find_sites(model), "cpu")
    with patched(model, conversion, counters):
        logits = model(ids, attention_mask=mask).logits
    use_compiler(False)
    return logits, counters


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
@pytest.mark.parametrize(
    "pads", [slice(0), slice(37), slice(100, None)], ids=["none", "left", "right"]
)
def test_logits_and_spikes_are_those_of_the_kernels(tiny, tokens, convert, calls, coding, pads):
    """But for codes next to a breakpoint; of all texts, also with pads, and with blocks of queries."""
    model, ids = tiny("llama"), tokens(2, 150)
    conversion = convert(model, coding, ROLES)
    mask = torch.ones_like(ids)
    mask[1, pads] = 0
    expected, eager = spiking(model, conversion, ids, mask, False)
    assert calls and all(answer is None for answer in calls)
    calls.clear()
    logits, counters = spiking(model, conversion, ids, mask, True)
    assert calls and all(answer is not None for answer in calls)
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-3, atol=1e-3)
    spikes, wanted = (each.of(conversion)["spikes"] for each in (counters, eager))
    assert wanted.max() > 100 and (spikes / wanted - 1).abs().max() < 1e-3


def test_errors_are_measured_on_all_probabilities(tiny, tokens, convert, calls):
    model, ids = tiny("llama"), tokens(2, 150)
    conversion = convert(model, CODINGS[0], ROLES)
    use_compiler(True)
    Patching().run(model, ids, conversion, 1)
    assert not calls


def test_a_gradient_is_refused_as_before(tiny, tokens, convert, calls):
    model, ids = tiny("llama"), tokens(1, 200)
    with patched(model, convert(model, CODINGS[0], ROLES)):
        assert model(ids).logits.requires_grad and not calls
