"""Stepped execution: its spikes are all there is, and they give what the fast path gives."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from stages.codings.coding import site_params
from stages.codings.free_steps import FreeSteps
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.codings.las import Las
from stages.codings.lloyd_max import LloydMax
from stages.codings.multigrain import Multigrain
from stages.codings.oat import Oat
from stages.codings.one_spike import OneSpike
from stages.codings.rate import Rate
from stages.codings.signed_digit import SignedDigit
from stages.codings.ttfs import Ttfs
from stages.codings.two_spike import TwoSpike
from stages.energy import Convention, Energy, HardwareProfile, account
from stages.errors import InputError
from stages.llm.counters import Counters
from stages.llm.operations import operations
from stages.llm.planes import planes
from stages.llm.sites import ROLES, find_sites
from stages.patching import Conversion, patched

CODINGS = [
    Gated("gated", 4, 2),
    Gated("gated", 4, 3, offset=True, grain_steps=(0, 1, 2)),
    SignedDigit("signed_digit", 5, 2),
    Las("las", 5, "zero"),
    Oat("oat", 5, "half_step", 99.0),
    Multigrain("multigrain", 6, 2, "half_step", False),
    FreeSteps("free_steps", 4, 4, "half_step", False),
    Rate("rate", 5, "zero"),
    TwoSpike("two_spike", 6, "zero", 2),
    OneSpike("one_spike", 8, None),
    Ttfs("ttfs", 16, None, False),
]
PRODUCTS = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "matmul", "linear",
    "einsum", "outer", "ger", "convolution", "_grouped_mm", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip
Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]


class Products(TorchDispatchMode):
    """Every product of a run: where, of what, and whether one operand is in {-1, 0, 1}."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.seen: list[tuple[str, str, bool]] = []
        self.additions: dict[str, float] = defaultdict(float)
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.inside.append(name)

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            operands = [a for a in args if isinstance(a, Tensor)][-2:]
            ternary = [o for o in operands if bool(((o == 0) | (o.abs() == 1)).all())]
            where = self.inside[-1] if self.inside else ""
            self.seen.append((where, name, bool(ternary)))
            if ternary:
                other = next(o for o in operands if o is not ternary[0])
                self.additions[where] += float(ternary[0].abs().sum()) * other.shape[-1]
        return function(*args, **(kwargs or {}))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Products]:
    mode = Products(model)
    try:
        with mode:
            yield mode
    finally:
        mode.close()


def run(model: PreTrainedModel, conversion: Conversion, ids: Tensor, execution: str) -> Any:
    """Logits and counters of one pass."""
    counters = Counters(find_sites(model), "cpu")
    with torch.no_grad(), patched(model, conversion, counters, execution):
        logits = model(ids, use_cache=False).logits
    return logits, counters.sums[:, :4]


def ids_of(coding: Any) -> str:
    return f"{coding.name}-{coding.grains}"


@pytest.mark.parametrize("coding", CODINGS, ids=ids_of)
def test_planes_give_the_values_of_the_fast_path(
    model: PreTrainedModel, convert: Converts, coding: Any
) -> None:
    neurons = convert(model, coding).neurons
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 2
    x[0, :3] = 0
    for index in range(len(neurons.sites)):
        p = site_params(neurons.fit.params, index)
        found, count = planes(coding, x, p)
        value, spikes = coding.quantise(x, p)
        assert set(found.plane.unique().tolist()) <= {-1, 0, 1}
        assert torch.allclose(found.value(), value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
        assert torch.equal(count.float(), spikes)
        other = torch.randn(11, 5)
        assert torch.allclose(found.product(other), value @ other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coding", CODINGS, ids=ids_of)
def test_the_stepped_model_is_the_fast_one_with_the_same_spikes(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Any
) -> None:
    conversion = convert(model, coding)
    fast, stepped = (run(model, conversion, tokens(2, 13), e) for e in ("fast", "stepped"))
    assert torch.allclose(stepped[0], fast[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(stepped[1], fast[1])


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "opt", "gpt_neox"])
def test_every_dense_architecture_can_be_stepped(tiny, tokens, convert, kind: str) -> None:
    model = tiny(kind)
    conversion = convert(model, Gated("gated", 5, 2))
    with watched(model) as seen:
        stepped = run(model, conversion, tokens(2, 9), "stepped")
    fast = run(model, conversion, tokens(2, 9), "fast")
    assert torch.allclose(stepped[0], fast[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(stepped[1], fast[1])
    assert not real_products(seen)


def real_products(seen: Products) -> set[str]:
    """Modules that multiply two real operands; angles of positions are among `stepped.REAL`."""
    return {where for where, _, ternary in seen.seen if not ternary and "rotary" not in where}


@pytest.mark.parametrize("coding", CODINGS, ids=ids_of)
def test_every_product_has_a_ternary_operand(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Any
) -> None:
    conversion = convert(model, coding)
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "stepped")
    assert not real_products(seen)
    modules = {where for where, _, _ in seen.seen}
    linears = {name for site in find_sites(model) for name in site.consumers}
    attention = {site.path for site in find_sites(model) if site.port == "q"}
    assert modules - {"model.rotary_emb"} == linears | attention


def test_the_fast_path_is_caught(model: PreTrainedModel, tokens: Draws, convert: Converts) -> None:
    conversion = convert(model, CODINGS[0])
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "fast")
    assert len(real_products(seen)) == 2 * 8 + 1  # seven linear modules and the attention, the head


@pytest.mark.parametrize("role", [role for role in ROLES if role not in ("attn.k", "attn.v")])
def test_a_dense_product_smuggled_in_is_caught(
    model: PreTrainedModel, tokens: Draws, convert: Converts, role: str
) -> None:
    rest = tuple(each for each in ROLES if each != role)
    conversion = convert(model, CODINGS[0], rest)
    with watched(model) as seen:
        run(model, conversion, tokens(2, 9), "stepped")
    sites = [site for site in find_sites(model) if site.role == role]
    elementwise = role in ("mlp.act", "mlp.up")  # they enter no matrix product
    expected = {name for s in sites for name in s.consumers or (s.path,)}
    assert real_products(seen) == (set() if elementwise else expected)


@pytest.mark.parametrize("coding", [CODINGS[0], CODINGS[2], CODINGS[3]], ids=ids_of)
def test_additions_are_those_that_the_energy_counts(
    model: PreTrainedModel, tokens: Draws, convert: Converts, coding: Any
) -> None:
    conversion, ids = convert(model, coding), tokens(1, 12)
    sites = find_sites(model)
    counters = Counters(sites, "cpu")
    with watched(model) as seen, torch.no_grad(), patched(model, conversion, counters, "stepped"):
        model(ids, use_cache=False)
    frame = counters.frame(set(conversion.neurons.sites))
    causal = OmegaConf.load(Path(__file__).parents[2] / "conf" / "energy" / "45nm.yaml")
    base = instantiate(causal).conventions["causal"]
    one = Convention(**{**vars(base), "operands": "one"})
    cost = account(
        operations(model, sites),
        Energy(None, HardwareProfile("none", 1, 1), {"one": one}),
        12,
        frame,
        coding,
    )
    rows = cost[cost["phase"] == "prefill"]
    for row in rows[rows["kind"] == "linear"].itertuples():
        assert seen.additions[row.op] == pytest.approx(row.acs, rel=1e-12), row.op
    table = frame.set_index("site")
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn"
        # The block multiplies whole rows, masked keys among them: 12 for each query, 6.5 on average.
        blocked = table.loc[f"{path}:q", "spikes"] * 12
        summed = rows[(rows["op"] == f"{path}:pv") & (rows["kind"] == "pv")]["acs"].sum()
        assert seen.additions[path] == pytest.approx(blocked + summed, rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "opt"])
def test_what_stays_real_has_the_elements_that_the_energy_counts(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts, kind: str
) -> None:
    """Norms, activation functions, positions, softmax and gates, op by op, in a stepped run."""
    model, length = tiny(kind), 12
    conversion = convert(model, CODINGS[0])
    sites = find_sites(model)
    plan = operations(model, sites)
    seen: dict[str, int] = {}
    functions = {o.name for o in plan if o.kind in ("norm", "activation")}
    hooks = [
        module.register_forward_hook(lambda _, args, out, n=name: seen.update({n: out.numel()}))
        for name, module in model.named_modules()
        if name in functions
    ]
    counters = Counters(sites, "cpu")
    with torch.no_grad(), patched(model, conversion, counters, "stepped"):
        model(tokens(1, length), use_cache=False)
    for hook in hooks:
        hook.remove()
    values = dict(zip([site.name for site in sites], counters.sums[:, 0].tolist(), strict=True))
    for operation in plan:
        window = operation.window or length
        pairs = sum(min(query + 1, window) for query in range(length))
        work = operation.work.at(length, pairs)
        path = operation.name.rpartition(":")[0]
        if operation.kind in ("norm", "activation"):
            assert seen[operation.name] == work, operation
        elif operation.kind == "gate":
            assert values[operation.name] == work, operation
        elif operation.kind == "softmax":
            assert values[f"{path}:probs"] == work, operation
        elif operation.kind == "rope":
            assert values[f"{path}:q"] + values[f"{path}:k"] == work, operation
        elif operation.kind == "product":
            assert values[f"{path}.act_fn:out"] == work, operation


def test_leaving_it_restores_the_model(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    with torch.no_grad():
        before = model(tokens(2, 9)).logits
        conversion = convert(model, CODINGS[0])
        with (
            pytest.raises(RuntimeError, match="inside"),
            patched(model, conversion, execution="stepped"),
        ):
            raise RuntimeError("inside")
        assert torch.equal(model(tokens(2, 9)).logits, before)


@pytest.mark.parametrize(
    "coding", [LloydMax("lloyd_max", 3), Gif("gif", 3, 16, 0.0, "unary", None)], ids=ids_of
)
def test_codes_that_are_no_ternary_steps_are_refused(
    model: PreTrainedModel, convert: Converts, coding: Any
) -> None:
    conversion = convert(model, coding)
    with (
        pytest.raises(InputError, match="no steps in .-1, 0, 1."),
        patched(model, conversion, execution="stepped"),
    ):
        pass


def test_experts_are_refused(tiny, convert: Converts) -> None:
    model = tiny("mixtral")
    conversion = convert(model, CODINGS[0])
    with (
        pytest.raises(InputError, match="stepped knows linear modules, not"),
        patched(model, conversion, execution="stepped"),
    ):
        pass


def test_more_of_the_steps_are_nearer_and_all_of_them_are_all(
    model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    coding = Gated("gated", 8, 2)
    conversion, ids = convert(model, coding), tokens(2, 13)
    with torch.no_grad():
        dense = model(ids).logits
        errors = []
        for steps in range(1, 9):
            with patched(model, conversion, steps=steps):
                found = model(ids).logits
            errors.append(float((found - dense).square().mean()))
    assert errors[7] < errors[3] < errors[0]
    assert torch.allclose(found, run(model, conversion, ids, "stepped")[0])
