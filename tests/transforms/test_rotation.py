"""A rotated model is the same function with other activations, whatever its widths and biases."""

from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stages.analysis.operations import operations
from stages.errors import InputError
from stages.model.loading import meta_model
from stages.model.sites import find_sites
from stages.ports.hooks import attached
from stages.ports.port import DensePort
from stages.transforms import rotation
from stages.transforms.rotation import OnlineRotation, Orthogonal, fuse, online_rotation, rotate
from tests.conftest import FAMILIES

# hidden, inner, heads, key heads, head width: no power of two, an odd inner width, one key head
SHAPES = [(36, 60, 4, 2, 14), (24, 45, 4, 2, 10), (32, 64, 4, 1, 8)]
REFUSED = {
    "gemma3_text": "norms beside those of attention and MLP",
    "mixtral": "not defined on experts",
    "qwen3_moe": "not defined on experts",
}
KINDS = {"llama": {"attention_bias": True, "mlp_bias": True}, "mistral": {}, "qwen2": {}}


def random_model(kind: str = "llama", shape=SHAPES[0], tied: bool = True) -> PreTrainedModel:
    """Weights, norm scales and biases all random, so that none of them can be forgotten."""
    torch.manual_seed(0)
    hidden, inner, heads, groups, width = shape
    config = AutoConfig.for_model(
        kind,
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=width,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        **KINDS[kind],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def ids(rows: int = 2, length: int = 20) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


def difference(model: PreTrainedModel, before: Tensor) -> float:
    return float((logits(model) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rotated_model_gives_the_same_logits(kind, shape, tied):
    model = random_model(kind, shape, tied)
    before = logits(model)
    old = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rotate(model, seed=3)
    assert difference(model, before) < 1e-5
    moved = {n for n, p in model.named_parameters() if n not in old or not torch.equal(p, old[n])}
    rotated = [n for n in old if not n.endswith(("q_proj.bias", "k_proj.bias"))]
    rotated = [n for n in rotated if not n.endswith(("gate_proj.bias", "up_proj.bias"))]
    assert moved == {*rotated, "lm_head.weight"}  # biases of what is no reader of the stream
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in REFUSED])
def test_every_family_that_is_not_refused_gives_the_same_logits(tiny, kind):
    model = tiny(kind)
    before = logits(model)
    rotate(model, seed=3)
    assert online_rotation(model) is not None
    assert difference(model, before) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in REFUSED])
def test_fused_scales_give_the_same_logits(tiny, kind):
    model = tiny(kind)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(len(name)))
    before = logits(model)
    fuse(model)
    assert difference(model, before) < 1e-5
    assert online_rotation(model) is None
    scales = [
        w
        for n, w in model.named_parameters()
        if n.endswith(("layernorm.weight", "layer_norm.weight"))
    ]
    assert scales and all(bool((scale == 1).all()) for scale in scales)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_other_families_are_refused_untouched_in_one_line(tiny, kind):
    model = tiny(kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=REFUSED[kind]) as raised:
        rotate(model, seed=3)
    assert "\n" not in str(raised.value) and "use transform=none" in str(raised.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_queries_and_keys_of_one_projection_with_the_values_stay(tiny):
    model = tiny("phi3")
    projection = model.model.layers[0].self_attn.qkv_proj
    values = 2 * 6  # key heads of this width
    seen: list[Tensor] = []
    projection.register_forward_hook(lambda _, args, x: seen.append(x))
    logits(model)
    before = seen.pop()
    rotate(model, seed=3)
    logits(model)
    after = seen.pop()
    torch.testing.assert_close(after[..., :-values], before[..., :-values], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after[..., -values:], before[..., -values:], atol=1e-1)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.v_proj.bias",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.bias",
        "model.layers.1.post_attention_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_the_comparison_sees_a_sign_that_is_wrong_in_one_factor(name):
    model = random_model()
    before = logits(model)
    rotate(model, seed=3)
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter[..., 2].neg_() if parameter.dim() == 2 else parameter[2].neg_()
    assert difference(model, before) > 1e-3


def test_the_comparison_sees_a_missing_online_rotation(monkeypatch):
    monkeypatch.setattr(rotation, "_online", lambda _: lambda module, args: args)
    model = random_model()
    before = logits(model)
    with pytest.raises(
        InputError, match="a rotation changed the logits of .*'llama'.*load it again"
    ):
        rotate(model, seed=3)
    assert difference(model, before) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rotated_model_of_few_bits_differs_by_their_rounding(dtype):
    model = random_model()
    exact = logits(model)
    plain = difference(model.to(dtype), exact)
    rotate(model, seed=3)
    assert model.lm_head.weight.dtype == dtype
    assert 0 < difference(model, exact) < 4 * plain


@pytest.mark.parametrize("width", [1, 2, 3, 9, 16, 36, 45, 60, 96, 112, 512, 576])
def test_the_fast_transform_is_the_matrix(width):
    transform = Orthogonal(width, torch.Generator().manual_seed(0))
    block, rest = width & -width, width // (width & -width)
    mixing = transform(torch.eye(width, dtype=torch.float64))[:rest, :rest] * block**0.5
    matrix = torch.kron(torch.tensor(hadamard(block)).double() / block**0.5, mixing)
    x = torch.randn(4, 5, width, dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ matrix, rtol=1e-12, atol=1e-12)
    identity = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), identity, rtol=1e-12, atol=1e-12)


def test_signs_and_factors_are_drawn_from_the_seed():
    def matrix(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return Orthogonal(36, generator, signs=True)(torch.eye(36, dtype=torch.float64))

    assert torch.equal(matrix(0), matrix(0)) and not torch.equal(matrix(0), matrix(1))
    torch.testing.assert_close(matrix(0) @ matrix(0).t(), torch.eye(36, dtype=torch.float64))


def kurtosis(x: Tensor) -> float:
    centred = x.double() - x.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2)


class Keep(DensePort):
    """Keeps what passes a site."""

    def __call__(self, x, real, fanout):
        self.seen = x
        return x


def test_rotation_spreads_planted_outlier_channels_at_every_kind_of_site():
    model = random_model(shape=(32, 64, 4, 2, 8))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 30
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7] *= 30
            layer.self_attn.v_proj.weight[3] *= 30

    measured_roles = ("attn.in", "mlp.down", "attn.v", "attn.out")
    sites = [site for site in find_sites(model) if site.role != "attn.probs"]

    def kurtoses() -> dict[str, float]:
        ports = {site.name: Keep() for site in sites}
        with torch.no_grad(), attached(model, find_sites(model), ports):
            model(ids(4, 32))
        return {s.role: kurtosis(ports[s.name].seen) for s in sites if s.layer == 0}

    before = kurtoses()
    rotate(model, seed=0)
    after = kurtoses()
    for role in measured_roles:
        assert after[role] < before[role] / 2 and after[role] < 8, (role, before, after)


def test_a_port_sees_the_rotated_value_and_leaves_no_trace():
    model = random_model()
    rotate(model, seed=3)
    before = logits(model)
    sites = find_sites(model)
    port = Keep()
    name = "model.layers.0.mlp.down_proj:in"
    with torch.no_grad(), attached(model, sites, {name: port}):
        model(ids())
    with torch.no_grad():
        mlp, inputs = model.model.layers[0].mlp, []
        mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        assert torch.equal(logits(model), before)
        product = mlp.act_fn(mlp.gate_proj(inputs[0])) * mlp.up_proj(inputs[0])
    assert not torch.allclose(port.seen, product, atol=1e-3)
    torch.testing.assert_close(port.seen.norm(dim=-1), product.norm(dim=-1))  # it is orthogonal


@pytest.mark.parametrize(
    ("width", "additions", "multiplications"),
    [(1536, 1536 * 9, 1536 * 3), (11008, 11008 * 8, 11008 * 43), (512, 512 * 9, 0), (9, 0, 81)],
)
def test_the_operations_of_a_rotation_are_those_of_the_fast_transform(
    width, additions, multiplications
):
    online = OnlineRotation(width)
    assert (online.additions, online.multiplications) == (additions, multiplications)


def test_the_plan_of_a_rotated_model_has_its_rotations_and_nothing_else_more():
    model = random_model()  # inner 60 = 4 x 15
    plain = operations(model, find_sites(model))
    rotate(model, seed=3)
    rotated = operations(model, find_sites(model))
    more = {(op.kind, op.layer, op.work.per_token) for op in rotated if op not in plain}
    assert more == {(k, n, w) for n in (0, 1) for k, w in (("hadamard", 120), ("mixing", 900))}
    assert [op for op in rotated if op in plain] == plain


# What cannot be rotated


def test_a_model_is_rotated_once():
    model = random_model()
    assert online_rotation(model) is None
    rotate(model, seed=3)
    with pytest.raises(ValueError, match="already"):
        rotate(model, seed=3)


def test_an_unknown_architecture_is_refused():
    config = AutoConfig.for_model("bert", num_hidden_layers=1, is_decoder=True)
    with pytest.raises(InputError, match="bert"):
        rotate(AutoModelForCausalLM.from_config(config), seed=0)


def test_a_model_in_training_stays_in_training():
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    model = AutoModelForCausalLM.from_config(config)
    rotate(model, seed=0)  # dropout and all
    assert model.training and all(module.training for module in model.modules())


def test_weights_that_are_absent_or_quantised_are_refused_untouched():
    dims = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    dims |= {"intermediate_size": 8, "num_attention_heads": 2}
    with pytest.raises(InputError, match="not in memory"):
        rotate(meta_model(dims), seed=0)
    model = random_model()
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(InputError, match="quantised .*layers.1.mlp.down_proj"):
        rotate(model, seed=0)
    assert torch.equal(model.model.embed_tokens.weight, before)
