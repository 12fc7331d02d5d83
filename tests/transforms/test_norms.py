"""Norms in front of weights: which are known, fused and rotated, and which families allow it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.transforms.orthogonal import Centred, Orthogonal
from stages.transforms.rotation import fuse, rotate
from tests.model.families import FAMILIES, made
from tests.transforms.test_rotation import difference, logits, random_model


class ShiftedNorm(nn.RMSNorm):
    """Multiplies by one more than its weight, as Gemma's."""

    def forward(self, x):
        return super().forward(x) + x / x.square().mean(-1, keepdim=True).sqrt()


class BoundedNorm(nn.RMSNorm):
    """No norm that a rotation passes."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


def with_norm(norm: nn.Module) -> PreTrainedModel:
    """A model with another norm in one place, its parameters random."""
    model = random_model()
    for name, parameter in norm.named_parameters():
        nn.init.normal_(parameter, mean=float(name == "weight"), std=0.2)
    model.model.layers[1].input_layernorm = norm
    return model


@pytest.mark.parametrize("change", [fuse, lambda model: rotate(model, seed=0)])
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(36), nn.LayerNorm(36, bias=False), nn.RMSNorm(36), ShiftedNorm(36)]
)
def test_a_norm_is_known_by_what_it_computes(norm, change):
    model = with_norm(norm)
    before = logits(model)
    change(model)
    assert difference(model, before) < 1e-5


@pytest.mark.parametrize("change", [fuse, lambda model: rotate(model, seed=0)])
def test_a_norm_that_is_none_is_refused_untouched(change):
    model = with_norm(BoundedNorm(36))
    before = logits(model)
    with pytest.raises(
        InputError, match="layers.1.input_layernorm is a BoundedNorm, which is not x / rms"
    ):
        change(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("change", [fuse, lambda model: rotate(model, seed=0)])
def test_scales_of_zero_beside_shifts_are_refused(change):
    model = with_norm(nn.LayerNorm(36))
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = 0
    with pytest.raises(InputError, match="layers.1.input_layernorm has scales of zero"):
        change(model)


@pytest.mark.parametrize("width", [1, 2, 3, 9, 16, 36, 60, 112, 576])
def test_the_rotation_for_layer_norms_is_orthogonal_and_keeps_means(width):
    matrix = Centred(Orthogonal(width, torch.Generator().manual_seed(0), signs=True))
    q = matrix(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(q @ q.t(), torch.eye(width, dtype=torch.float64))
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(matrix(x), x @ q)
    torch.testing.assert_close(matrix(x).mean(-1), x.mean(-1))
    norm = nn.LayerNorm(width, elementwise_affine=False).double()
    torch.testing.assert_close(norm(matrix(x)), matrix(norm(x)))
    if width > 9:  # it mixes: no channel stays by itself
        assert q.abs().amax() < 0.95


BEHIND = "no norm of a layer stands in front|norms beside those of attention and MLP"
EXPERTS = "not defined on experts"
CHANGED = "values are changed between .* and attention"
BOTH = "is read by more than linear modules"
# What of the families cannot be done, and why; all else gives the same logits.
UNFUSED = {"olmo2": BEHIND, "olmo3": BEHIND, "exaone4": BEHIND, "exaone4 2": BEHIND, "bloom": BOTH}
UNFUSED |= {"opt": BOTH, "llama4_text": BOTH, "llama4_text 2": BOTH}  # scaled for its experts
UNROTATED = UNFUSED | dict.fromkeys(("gemma2", "glm4", "bloom 2"), BEHIND)
UNROTATED |= dict.fromkeys(("deepseek_v3", "deepseek_v3 2"), EXPERTS)
UNROTATED |= dict.fromkeys(("llama4_text", "llama4_text 2"), EXPERTS)
UNROTATED |= dict.fromkeys(("olmoe", "phimoe", "granitemoe", "qwen2_moe", "gpt_oss"), EXPERTS)
UNROTATED |= dict.fromkeys(("opt", "opt 2"), "embeddings are projected")
UNROTATED |= {"olmo": CHANGED, "mpt": CHANGED}


@pytest.mark.parametrize("change", [fuse, lambda model: rotate(model, 3)], ids=["fuse", "rotate"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_gives_the_same_logits_or_is_refused_untouched(name, change):
    model, reasons = made(name), UNFUSED if change is fuse else UNROTATED
    before, old = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    if name in reasons:
        with pytest.raises(InputError, match=reasons[name]) as raised:
            change(model)
        assert "\n" not in str(raised.value) and "use transform=none" in str(raised.value)
        assert all(torch.equal(p, old[n]) for n, p in model.named_parameters())
        return
    change(model)
    assert difference(model, before) < 1e-5
    moved = [n for n, p in model.named_parameters() if n in old and not torch.equal(p, old[n])]
    assert moved or name == "olmo"  # whose norms have no scales


def test_values_made_of_a_latent_are_fused_and_not_rotated():
    model = made("deepseek_v3", first_k_dense_replace=2)  # no experts, which are refused before
    before = logits(model)
    with pytest.raises(InputError, match=r"values are made of a latent .*use transform=none"):
        rotate(model, 3)
    fuse(model)
    assert difference(model, before) < 1e-5
