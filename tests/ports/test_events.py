"""What the spikes of a plane select is the same, one by one or all at once."""

import pytest
import torch

from stages.ports.coded import coded
from stages.ports.events import FEW, events, few
from stages.ports.planes import Accumulator, Planes


def plane(rows: int, channels: int, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    fired = torch.rand(rows, channels, generator=generator) < share
    sign = torch.randint(0, 2, (rows, channels), generator=generator) * 2 - 1
    return (fired * sign).to(torch.int8)


@pytest.mark.parametrize(("rows", "channels"), [(16, 24), (7, 11), (1, 8)])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_rows_of_a_weight_are_added_where_there_are_spikes(rows, channels, share):
    fired = plane(rows, channels, share)
    weight = torch.randn(channels, 5, generator=torch.Generator().manual_seed(1)).double()
    unit = torch.rand(rows, channels).double() + 0.5
    for own, factor in ((None, torch.ones_like(unit)), (unit, unit)):
        found = events(fired, own, torch.float64)
        assert len(found.sign) == int(fired.count_nonzero())
        expected = (fired.double() * factor) @ weight
        assert torch.allclose(found.selected(weight), expected, rtol=1e-12, atol=1e-12)


def test_spikes_of_a_part_of_a_larger_tensor_are_found():
    whole = plane(40, 9, 0.2)
    part = whole.view(-1)[9:].view(39, 9)  # begins between two words
    assert torch.equal(events(part, None, torch.float32).channel, part.nonzero()[:, 1])


def test_a_product_of_few_spikes_is_that_of_many():
    rare, often = plane(16, 64, 0.5 / FEW), plane(16, 64, 0.4)
    assert few(rare, torch.float32) and not few(often, torch.float32)
    assert not few(rare, torch.bfloat16)  # whose sums would be rounded
    both = Planes(
        (Accumulator((often, rare), (0.5, 0.25), (0, 1)), Accumulator((rare,), (3.0,), (0,)))
    )
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    found = torch.nn.functional.linear(coded(both, torch.float32), weight)
    expected = (0.5 * often.double() + 3.25 * rare.double()) @ weight.t().double()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_value_of_spikes_is_no_number():
    value = coded(Planes((Accumulator((plane(2, 3, 0.5),), (1.0,), (0,)),)), torch.float32)
    assert value.shape == (2, 3) and bool(
        torch.Tensor.as_subclass(value, torch.Tensor).isnan().all()
    )
