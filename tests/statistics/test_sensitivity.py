"""The curvature of the loss against the divergence that small errors really cause."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from stages.errors import InputError
from stages.fits.sensitivity import CELLS, Sensitivity, cell
from stages.model.sites import find_sites
from stages.ports.hooks import attached
from stages.ports.port import DensePort
from stages.statistics import measuring

SITES = ("self_attn:q", "self_attn:v", "mlp.down_proj:in", "input_layernorm:out")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 64, (48, 24), generator=torch.Generator().manual_seed(1))


class Noise(DensePort):
    """Adds Gaussian noise of one size."""

    def __init__(self, size: float, generator: torch.Generator) -> None:
        super().__init__()
        self.size, self.generator = size, generator

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        return x + self.size * torch.randn(x.shape, generator=self.generator)


@pytest.mark.parametrize("name", SITES)
def test_it_predicts_the_divergence_of_small_errors(model, ids, name: str) -> None:
    sites = find_sites(model)
    site = next(s for s in sites if s.layer == 1 and s.name.endswith(name))
    found = measuring(Sensitivity("sensitivity", len(ids), 0))(model, ids, [site], 4)
    size, repeats, generator = 3e-3, 8, torch.Generator().manual_seed(2)
    predicted = size**2 / 2 * float(found["total"].sum() / found["tokens"][0])
    with torch.inference_mode():
        dense = model(ids).logits.double().log_softmax(-1)
        caused = 0.0
        for _ in range(repeats):
            with attached(model, sites, {site.name: Noise(size, generator)}):
                noisy = model(ids).logits.double().log_softmax(-1)
            every = F.kl_div(noisy, dense, reduction="sum", log_target=True)
            caused += float(every) / ids.numel() / repeats
    assert predicted == pytest.approx(caused, rel=0.15)


def test_every_site_is_counted_and_the_model_is_left_as_it_was(model, ids) -> None:
    sites = find_sites(model)
    before = [p.requires_grad for p in model.parameters()]
    found = measuring(Sensitivity("sensitivity", 2, 0))(model, ids, sites, 1)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    values = {"attn.in": 32, "attn.q": 32, "attn.k": 16, "mlp.down": 48, "head.in": 32}
    for index, site in enumerate(sites):
        if site.role in values:
            assert float(found["count"][index].sum()) == 2 * 24 * values[site.role]
        if site.role == "attn.probs":
            assert float(found["count"][index].sum()) == 2 * 4 * 24 * 25 / 2
        assert float(found["total"][index].sum()) > 0
    down = next(i for i, s in enumerate(sites) if s.role == "mlp.down")
    assert float(found["macs"][down]) == 2 * 24 * 48 * 32


def test_a_cell_is_a_quarter_of_an_octave() -> None:
    x = torch.tensor([0.0, 2.0**-41, 1.0, -1.1, 1.2, 2.0, 2.0**30])
    assert cell(x).tolist() == [0, 0, 160, 160, 161, 164, CELLS - 1]


def test_more_windows_than_there_are_is_refused(model, ids) -> None:
    with pytest.raises(InputError, match="calibration"):
        measuring(Sensitivity("sensitivity", 49, 0))(model, ids, find_sites(model), 1)
