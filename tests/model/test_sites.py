"""Sites: the exact list for a small model, and every way in which it cannot be resolved."""

import pytest
from torch import nn
from transformers import AutoConfig

from stages.errors import InputError
from stages.model.families import architecture
from stages.model.inferred import infer
from stages.model.loading import meta_model
from stages.model.sites import ROLES, Site, SiteSelection, find_sites, select
from tests.conftest import FAMILIES

LAYER = [  # role, name in the layer, linear modules it feeds
    (
        "attn.in",
        "input_layernorm:out",
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ),
    ("attn.q", "self_attn:q", []),
    ("attn.k", "self_attn:k", []),
    ("attn.v", "self_attn:v", []),
    ("attn.probs", "self_attn:probs", []),
    ("attn.out", "self_attn.o_proj:in", ["self_attn.o_proj"]),
    ("mlp.in", "post_attention_layernorm:out", ["mlp.gate_proj", "mlp.up_proj"]),
    ("mlp.act", "mlp.act_fn:out", []),
    ("mlp.up", "mlp.up_proj:out", []),
    ("mlp.down", "mlp.down_proj:in", ["mlp.down_proj"]),
]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_sites_of_two_layers_and_the_head_in_forward_order(tiny, kind):
    expected = [
        Site(f"model.layers.{i}.{name}", role, i, tuple(f"model.layers.{i}.{c}" for c in feeds))
        for i in range(2)
        for role, name, feeds in LAYER
    ]
    assert find_sites(tiny(kind)) == [*expected, Site("lm_head:in", "head.in", -1, ("lm_head",))]


def test_every_linear_module_is_fed_by_exactly_one_site(model):
    fed = [consumer for site in find_sites(model) for consumer in site.consumers]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(fed) == sorted(linears)


def test_a_name_is_a_path_and_a_port():
    site = Site("model.layers.1.mlp.down_proj:in", "mlp.down", 1)
    assert (site.path, site.port) == ("model.layers.1.mlp.down_proj", "in")


def test_a_linear_module_that_no_site_feeds_is_refused(model):
    model.model.layers[1].mlp.adapter = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"fed by no site \['model.layers.1.mlp.adapter'\]"):
        find_sites(model)


@pytest.mark.parametrize(
    ("remove", "named"),
    [
        (lambda model: delattr(model.model.layers[1].mlp, "act_fn"), "layers.1.mlp.act_fn:out"),
        (lambda model: delattr(model.model.layers[0].self_attn, "k_proj"), "self_attn.k_proj"),
        (lambda model: delattr(model, "lm_head"), "lm_head:in"),
    ],
)
def test_a_missing_module_is_named(model, remove, named):
    remove(model)
    with pytest.raises(InputError, match=named):
        find_sites(model)


def test_a_model_without_layers_is_refused(model):
    model.model.layers = nn.ModuleList()
    with pytest.raises(InputError, match="0 decoder layers"):
        find_sites(model)


def test_names_that_say_no_roles_are_refused_with_what_is_known(model):
    model.config.model_type = "nix"
    for layer in model.model.layers:
        layer.self_attn.mixed = layer.self_attn._modules.pop("q_proj")
    with pytest.raises(
        InputError, match=r"'nix'.*known: .*llama.*no attention.*layers.\*.self_attn.mixed"
    ):
        find_sites(model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_names_say_what_the_files_of_families_do(tiny, kind):
    model = tiny(kind)
    written, inferred = architecture(model), infer(model)
    assert (inferred.layers, inferred.head) == (written.layers, written.head)
    assert inferred.head_norms == written.head_norms
    for mine, theirs in (
        (inferred.rules | inferred.experts, written.rules | written.experts),
        (inferred.experts, written.experts),
    ):
        assert list(mine) == list(theirs)
        for role, rule in mine.items():
            assert rule.consumers == theirs[role].consumers
            if (
                not rule.consumers
            ):  # the others may be read in front of a norm's readers, or behind it
                assert rule.port == theirs[role].port


def test_a_family_that_no_test_has_seen_is_converted_with_a_warning(model, caplog):
    expected = [(site.role, site.consumers) for site in find_sites(model)]
    assert not caplog.records
    model.config.model_type = "unseen"
    assert [(site.role, site.consumers) for site in find_sites(model)] == expected
    find_sites(model)  # it is said once
    (record,) = caplog.records
    assert "model_type='unseen' are inferred" in record.getMessage()


def test_attention_that_multiplies_by_itself_is_refused(model, monkeypatch):
    model.config.model_type = "nix"

    def forward(self, hidden_states):
        query = self.q_proj(hidden_states)
        return self.o_proj(query @ self.k_proj(hidden_states).mT @ self.v_proj(hidden_states))

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward)
    with pytest.raises(
        InputError, match="self_attn .LlamaAttention. multiplies queries and keys by"
    ):
        find_sites(model)


def test_a_layer_with_a_module_that_names_do_not_say_is_refused(model):
    model.config.model_type = "nix"
    model.model.layers[1].mlp.adapter = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"fed by no site \['model.layers.1.mlp.adapter'\]"):
        find_sites(model)


@pytest.mark.parametrize(
    ("kind", "more", "what"),
    [
        ("mamba", {}, r"backbone.layers.0.mixer is a state-space layer \(MambaMixer\)"),
        ("falcon_h1", {}, r"layers.0.mamba is a state-space layer \(FalconH1Mixer\)"),
        ("jamba", {}, r"layers.0.mamba is a state-space layer \(JambaMambaMixer\)"),
        ("rwkv", {}, r"blocks.0.attention is a linear attention \(RWKV\)"),
        ("qwen3_next", {}, r"linear_attn is a linear attention \(gated delta rule\)"),
        (
            "lfm2",
            {"layer_types": ["full_attention", "conv"]},
            r"is a gated convolution over tokens \(Lfm2ShortConv\)",
        ),
        ("recurrent_gemma", {}, r"is a recurrent layer \(RG-LRU\)"),
    ],
)
def test_a_state_that_goes_from_token_to_token_is_refused_by_name(kind, more, what):
    config = AutoConfig.for_model(kind, num_hidden_layers=2, vocab_size=50, **more)
    with pytest.raises(InputError, match=rf"'{kind}' cannot be converted: .*{what}") as raised:
        find_sites(meta_model(config))
    assert "\n" not in str(raised.value)


def test_a_selection_keeps_its_roles_in_forward_order(model):
    sites = find_sites(model)
    chosen = select(sites, SiteSelection(["head.in", "attn.q"]))
    names = ["model.layers.0.self_attn:q", "model.layers.1.self_attn:q", "lm_head:in"]
    assert [site.name for site in chosen] == names
    assert select(sites, SiteSelection()) == sites
    assert {site.role for site in sites} == set(ROLES)


@pytest.mark.parametrize("roles", [[], ["attn.q", "attn.q"], ["attn.q", "mlp"]])
def test_a_selection_needs_distinct_known_roles(roles):
    with pytest.raises(InputError, match="give distinct roles out of attn.in, attn.q"):
        SiteSelection(roles)


def test_excluded_sites_are_left_out_by_name_or_pattern(model):
    sites = find_sites(model)
    up, head = "model.layers.1.mlp.up_proj:out", "lm_head:in"
    names = [site.name for site in sites]
    kept = [s.name for s in select(sites, SiteSelection(exclude=[up, head]))]
    assert kept == [name for name in names if name not in (up, head)]
    kept = [s.name for s in select(sites, SiteSelection(exclude=["model.layers.0.*"]))]
    assert kept == [name for name in names if ".layers.0." not in name]
    with pytest.raises(
        InputError, match=r"no site model.layer.1.mlp.up_proj:out; did you mean mod"
    ):
        select(sites, SiteSelection(exclude=["model.layer.1.mlp.up_proj:out"]))
    with pytest.raises(InputError, match="leave no site"):
        select(sites, SiteSelection(["head.in"], [head]))


def test_the_number_of_an_expert_is_no_pattern():
    sites = [Site(f"mlp.experts:down[{i}]", "mlp.down", 0) for i in (1, 17)]
    assert select(sites, SiteSelection(exclude=["mlp.experts:down[1]"])) == sites[1:]
    with pytest.raises(InputError, match="leave no site"):
        select(sites, SiteSelection(exclude=["mlp.experts:down[*]"]))


def test_slices_of_a_matrix_that_pass_its_module_by_are_refused():
    """They are added up without the module, whose input no port would see."""
    small = {"hidden_size": 8, "n_head": 2, "n_layer": 2, "vocab_size": 50, "pretraining_tp": 2}
    for exact in (False, True):
        model = meta_model(AutoConfig.for_model("bloom", **small, slow_but_exact=exact))
        if exact:
            with pytest.raises(InputError, match="slices of its matrices with slow_but_exact"):
                find_sites(model)
        else:
            assert find_sites(model)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("gemma3_text", "use_bidirectional_attention"),
        ("llama", "is_causal"),
        ("bloom", "is_causal"),
    ],
)
def test_a_model_whose_tokens_see_those_behind_them_is_refused(kind, option):
    sizes = {"num_hidden_layers": 2, "vocab_size": 50, "hidden_size": 8, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes)
    assert find_sites(meta_model(config))
    setattr(config, option, option != "is_causal")
    with pytest.raises(InputError, match=f"no causal language model: with {option}") as raised:
        find_sites(meta_model(config))
    assert "\n" not in str(raised.value)
