"""oneDNN's products are those of float64 to float tolerance, with any number of threads."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from stages.codings.gated import Gated
from stages.model import products
from stages.model.forward import windows
from stages.ports.patched import patched


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch) -> None:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: True)


def by_onednn(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.inference_mode(), products.products(layer):
        return layer(x)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((3, 24), (2, 5, 24), (0, 24), (24,)))
def test_products_are_those_of_float64(shape, bias):
    layer, x = nn.Linear(24, 7, bias), torch.randn(shape)
    exact = nn.functional.linear(x.double(), *(p.double() for p in layer.parameters()))
    torch.testing.assert_close(by_onednn(layer, x), exact.float())


def test_an_operand_may_be_a_view():
    layer, x = nn.Linear(24, 7), torch.randn(2, 24, 5)
    torch.testing.assert_close(by_onednn(layer, x.transpose(1, 2)), layer(x.transpose(1, 2)))


@pytest.mark.parametrize("rows", (1, 23, 256))
def test_no_number_of_threads_changes_a_bit(rows):
    layer, x, threads = nn.Linear(1100, 520, bias=False), torch.randn(rows, 1100), []
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            threads.append(by_onednn(layer, x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(threads[0], other) for other in threads[1:])


def test_windows_pass_through_them_and_the_model_is_what_it_was(tiny):
    model, ids, seen = tiny("llama"), torch.randint(0, 32, (2, 16)), []
    dense = model(ids).logits
    inside = Mock(
        side_effect=lambda tokens, logits: seen.append("forward" in model.lm_head.__dict__)
    )
    with torch.inference_mode():
        windows(model, ids, 2, "test", consume=inside)
    assert seen == [True] and inside.call_args.args[1].shape == dense.shape
    torch.testing.assert_close(inside.call_args.args[1], dense.detach())
    assert torch.equal(model(ids).logits, dense)


def test_gradients_other_dtypes_and_other_forward_passes_are_left_alone():
    layer, half, other = nn.Linear(4, 3), nn.Linear(4, 3).bfloat16(), nn.Linear(4, 3)
    other.forward = lambda x: x  # type: ignore[method-assign]
    with products.products(nn.ModuleList([layer, half, other])):
        layer(torch.randn(2, 4)).sum().backward()
        x = torch.randn(2, 4)
        assert half(x.bfloat16()).dtype == torch.bfloat16 and other(x) is x
    assert layer.weight.grad is not None and "forward" in other.__dict__


def test_spikes_are_added_by_their_own_products(tiny, convert):
    model, ids, seen = tiny("llama"), torch.randint(0, 32, (2, 16)), []
    conversion = convert(model, Gated("gated", 3, 2))
    with torch.inference_mode(), patched(model, conversion, execution="stepped"):
        windows(model, ids, 2, "test", consume=lambda tokens, logits: seen.append(logits))
        assert torch.equal(seen[0], model(ids).logits)


class Doubled(Tensor):
    """A weight whose products are its own, as those of a quantised one are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result.as_subclass(Tensor) if func is nn.functional.linear else result


def test_operands_that_onednn_reads_wrongly_are_those_of_torch():
    x, whole, nothing = torch.randn(3, 24), nn.Linear(24, 7), nn.Linear(1, 7)
    apart, doubled = nn.Linear(24, 7), nn.Linear(24, 7)
    apart.bias = nn.Parameter(torch.randn(7, 2)[:, 0])
    doubled.weight = nn.Parameter(whole.weight.detach().as_subclass(Doubled))
    nothing.weight = nn.Parameter(torch.empty(7, 0))
    torch.testing.assert_close(by_onednn(apart, x), apart(x).detach())
    torch.testing.assert_close(by_onednn(doubled, x), doubled(x).detach())
    torch.testing.assert_close(by_onednn(nothing, x[:, :0]), nothing(x[:, :0]).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert by_onednn(whole, x).dtype == torch.bfloat16


def test_a_layer_is_called_by_name_and_what_is_not_loaded_is_said():
    layer, x = nn.Linear(24, 7), torch.randn(3, 24)
    with torch.inference_mode(), products.products(layer):
        assert torch.equal(layer(input=x), layer(x))
    with pytest.raises(RuntimeError, match="meta"):
        by_onednn(nn.Linear(24, 7, device="meta"), x)


def test_two_may_open_it_and_what_takes_its_place_stays():
    layer = nn.Linear(4, 3)
    first, second = products.products(layer), products.products(layer)
    with first:
        del layer.__dict__["forward"]  # as another thread that has found it
        with second:
            pass
    assert "forward" not in layer.__dict__
    with products.products(layer):
        layer.forward = other = lambda x: x  # type: ignore[method-assign]
    assert layer.forward is other
