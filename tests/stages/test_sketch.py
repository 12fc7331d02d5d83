"""The sketch against numpy: every bin by its definition, every moment computed directly."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from stages import sketch
from stages.compiler import use_compiler
from stages.errors import InputError
from stages.sketch import CHUNK, Accumulator, Grid, SketchSet

CPU = torch.device("cpu")


def values(size: int, seed: int = 0) -> Tensor:
    """Signed values over about 90 binades, with subnormal ones, both zeros and huge ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    x = x * 2.0 ** torch.randint(-45, 20, (size,), generator=generator)
    special = [0.0, -0.0, 1e-45, -1e-40, 2.0**-40, -(2.0**-40), 2.0**24 * (1 - 2**-24), -1.5, 1.5]
    x[: len(special)] = torch.tensor(special)
    return x


def collected(grid: Grid, *sites: Tensor, exact: bool = False) -> SketchSet:
    accumulators = []
    for x in sites:
        accumulators.append(Accumulator(grid, x.shape[-1], exact, CPU))
        accumulators[-1].add(x)
    named = [(f"site{k}:in", "mlp.in", k) for k in range(len(sites))]
    return SketchSet.collect(named, grid, accumulators)


def bins_of(x: Tensor, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude bin and place inside it, from exponent and mantissa in float64."""
    magnitude = x.double().abs().numpy()
    mantissa, exponent = np.frexp(magnitude)  # mantissa in [0.5, 1)
    steps = (2 * mantissa - 1) * 2**mantissa_bits
    index = (exponent - 1 + 40) * 2**mantissa_bits + np.floor(steps).astype(int) + 1
    index = np.where(magnitude < 2.0**-40, 0, np.minimum(index, 64 * 2**mantissa_bits + 1))
    return index, steps - np.floor(steps)


@pytest.mark.parametrize("mantissa_bits", [1, 4, 7, 10])
def test_every_value_falls_into_its_bin(mantissa_bits: int) -> None:
    grid, x = Grid(mantissa_bits), values(20_000)
    found = collected(grid, x[:, None]).tensors
    index, _ = bins_of(x, mantissa_bits)
    code = index + grid.magnitudes * np.signbit(x.numpy())
    bins, counts = np.unique(code, return_counts=True)
    assert found["code"].tolist() == bins.tolist()
    assert found["count"].tolist() == counts.tolist()
    assert found["count"].dtype == torch.int64
    edges = grid.edges().numpy()
    assert len(edges) == grid.magnitudes + 1
    magnitude = x.double().abs().numpy()
    assert (edges[index] <= magnitude).all() and (magnitude < edges[index + 1]).all()


def test_the_bin_check_fails_on_a_shifted_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(2_000)
    index, _ = bins_of(x, 7)
    right = Grid(7).codes(x)
    assert torch.equal(right % Grid(7).magnitudes, torch.from_numpy(index).int())
    octave = 2**7
    places = tuple((shift, base + octave, bins) for shift, base, bins in sketch._PLACES)
    monkeypatch.setattr(sketch, "_PLACES", places)
    wrong = Grid(7).codes(x)
    assert not torch.equal(wrong % Grid(7).magnitudes, torch.from_numpy(index).int())


@pytest.mark.parametrize("mantissa_bits", [2, 7])
def test_means_and_variances_inside_the_bins(mantissa_bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50_000, generator=generator) * torch.exp(
        2 * torch.randn(50_000, generator=generator)
    )
    grid = Grid(mantissa_bits)
    count, mean, variance, _ = (t[0].numpy() for t in collected(grid, x[:, None]).magnitudes())
    index, _ = bins_of(x, mantissa_bits)
    magnitude, width = x.double().abs().numpy(), grid.edges().diff().numpy()
    total = np.bincount(index, minlength=grid.magnitudes)
    assert (count == total).all() and count.sum() == len(x)
    filled = total > 0
    expected = np.bincount(index, magnitude, grid.magnitudes)[filled] / total[filled]
    # A value is known to a sub-bin, an eighth of a bin; bins of many values are known far better.
    eighth = width[filled] / 8
    assert (np.abs(mean[filled] - expected) <= eighth / 2 * (1 + 1e-6)).all()
    crowded = total[filled] > 30
    assert crowded.any()
    assert (np.abs(mean[filled] - expected) < 0.25 * eighth)[crowded].all()
    centred = np.zeros(grid.magnitudes)
    centred[filled] = expected
    second = np.bincount(index, (magnitude - centred[index]) ** 2, grid.magnitudes)
    off = np.abs(variance[filled] - second[filled] / total[filled])
    assert (off <= width[filled] ** 2 / 8).all()
    assert (off < 2e-2 * width[filled] ** 2)[crowded].all()


def test_a_crowded_bin_keeps_its_moments() -> None:
    """Sums of a million values are float32: the worst case, all of them in one bin, stays close."""
    x = 1 + torch.rand(2 * CHUNK, generator=torch.Generator().manual_seed(5)) / 2**7
    count, mean, variance, _ = (t[0] for t in collected(Grid(7), x[:, None]).magnitudes())
    bin_ = int(count.argmax())
    assert count[bin_] > 0.99 * len(x)
    inside = x.double()[x < 1 + 2**-7]
    assert abs(mean[bin_] - inside.mean()) < 1e-4 * 2**-7
    assert abs(variance[bin_] - inside.var(correction=0)) < 5e-4 * 2**-14


def test_signed_moments_are_those_of_the_values() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40_000, generator=generator) ** 3 + 0.5
    count, mean, second, fourth = collected(Grid(7), x[:, None]).signed_moments()[0].tolist()
    v = x.double()
    assert count == len(x)
    assert mean == pytest.approx(float(v.mean()), rel=1e-6)
    # Central moments are taken at the bin means: a bin is 2^-7 of its value wide.
    assert second == pytest.approx(float((v - v.mean()).pow(2).mean()), rel=1e-4)
    assert fourth == pytest.approx(float((v - v.mean()).pow(4).mean()), rel=1e-3)


def test_bfloat16_is_exact_with_seven_mantissa_bits() -> None:
    x = values(30_000).bfloat16()
    x = x[x.float().abs() < 2**24]
    rounded = collected(Grid(7), x[:, None], exact=True)
    measured = collected(Grid(7), x[:, None], exact=False)
    for name in rounded.tensors.keys() - {"first", "second"}:
        assert torch.equal(rounded.tensors[name], measured.tensors[name]), name
    assert not rounded.tensors["first"].any()  # no remainder to record
    count, mean, variance, _ = (t[0] for t in rounded.magnitudes())
    magnitude = x.double().abs()
    magnitude[magnitude < 2.0**-40] = 0  # they share bin 0
    for value, times in zip(*np.unique(magnitude.numpy(), return_counts=True), strict=True):
        bin_ = int(((mean == value) & (count > 0)).nonzero())
        assert count[bin_] == times
    assert variance.abs().max() == 0


def test_chunks_add_up() -> None:
    x = values(5_000).view(-1, 10)
    whole = Accumulator(Grid(7), 10, False, CPU)
    whole.add(x)
    generator = torch.Generator().manual_seed(3)
    parts = Accumulator(Grid(7), 10, False, CPU)
    sizes = torch.randint(1, 60, (40,), generator=generator).cumsum(0).tolist()
    for rows in x[torch.randperm(len(x), generator=generator)].tensor_split(
        [s for s in sizes if s < len(x)]
    ):
        parts.add(rows)
    assert torch.equal(parts.count, whole.count)
    assert torch.equal(parts.range, whole.range) and torch.equal(parts.absmax, whole.absmax)
    torch.testing.assert_close(parts.bins()[3], whole.bins()[3], rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.square, whole.square, rtol=1e-5, atol=0)


def test_sketches_of_two_sites_merge_by_addition() -> None:
    first, second = values(4_000, 1), values(3_000, 2)
    both = collected(Grid(7), torch.cat([first, second])[:, None]).magnitudes()[0]
    apart = collected(Grid(7), first[:, None], second[:, None]).magnitudes()[0]
    assert torch.equal(apart.sum(0, keepdim=True), both)


def test_extremes_and_channels() -> None:
    x = values(6_000).view(20, 30, 10)
    found = collected(Grid(7), x).tensors
    assert found["range"].tolist() == [[float(x.min()), float(x.max())]]
    rows = x.view(-1, 10)
    assert torch.equal(found["absmax"], rows.abs().amax(0))
    torch.testing.assert_close(found["square"], rows.double().square().sum(0), rtol=1e-5, atol=0)
    assert found["channel_offsets"].tolist() == [0, 10]


def test_surplus_zeros_are_taken_off() -> None:
    x = torch.rand(8, 8)
    x[x < 0.2] = 0
    zeros = int((x == 0).sum())
    masked = torch.ones(8, 8).tril().bool()
    kept = Accumulator(Grid(7), 0, False, CPU)
    kept.add(x[masked][:, None])
    counted = Accumulator(Grid(7), 0, False, CPU)
    counted.add(x * masked, surplus_zeros=int((~masked).sum()))
    assert torch.equal(counted.count, kept.count)
    assert torch.equal(counted.bins()[2], kept.bins()[2])
    assert 0 < counted.count[0] <= zeros
    as_tensor = Accumulator(Grid(7), 0, False, CPU)
    as_tensor.add(x * masked, surplus_zeros=(~masked).sum())
    assert torch.equal(as_tensor.count, kept.count)


@pytest.mark.parametrize("compiled", [False, True])
def test_masked_zeros_do_not_count_as_the_lowest_value(compiled: bool) -> None:
    use_compiler(compiled)
    x, masked = 0.1 + torch.rand(8, 9), torch.ones(8, 9).tril().bool()
    x *= masked
    for lowest in (float(x[masked].min()), 0.0):  # in the second round a zero that is not masked
        found = Accumulator(Grid(7), 0, False, CPU)
        found.add(x, surplus_zeros=int((~masked).sum()))
        assert found.range.tolist() == [lowest, float(x.max())]
        x[7, 0] = 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**25, -(2.0**25)])
def test_a_value_that_is_not_finite_is_an_error_with_its_site(bad: float) -> None:
    good, broken = torch.rand(50, 1), torch.rand(50, 1)
    broken[7] = bad
    collected(Grid(7), good, good).check_finite()
    with pytest.raises(InputError, match=r"site site1:in holds 1 values that are nan, inf or"):
        collected(Grid(7), good, broken, good).check_finite()


def test_a_split_set_is_the_sets_of_its_sites() -> None:
    x = [values(600).view(-1, 3), values(400, 1).view(-1, 2), values(90, 2).view(-1, 1)]
    parts = list(collected(Grid(5), *x).split(2))
    assert [part.sites for part in parts] == [("site0:in", "site1:in"), ("site2:in",)]
    for part, own in zip(parts, (x[:2], x[2:]), strict=True):
        alone = collected(Grid(5), *own)
        assert part.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(part.tensors[name], t) for name, t in alone.tensors.items())


def test_saved_and_loaded(tmp_path: Path) -> None:
    before = collected(Grid(5), values(900).view(-1, 3), values(400, 1).view(-1, 2))
    before.save(tmp_path)
    after = SketchSet.load(tmp_path)
    assert replace(after, tensors={}) == replace(before, tensors={})
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        assert (
            torch.equal(after.tensors[name], tensor) and after.tensors[name].dtype == tensor.dtype
        )
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_the_compiled_codes_are_the_eager_ones() -> None:
    x = values(5_000)
    use_compiler(True)
    for found, expected in [(sketch._codes(Grid(7), x), Grid(7).codes(x))]:
        assert torch.equal(found, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (37, 10), (16, 256), (3, 2017), (70, 300), (5_003, 1)])
def test_values_are_added_where_they_stand(
    shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = torch.tensor([1e-45, -0.0, 0.0, -1e-45, 2.0**24, -(2.0**24), torch.inf, -torch.inf])
    x = values(shape[0] * shape[1] + 9)[9:].clone()
    x[-8:] = ends[: len(x)]
    x = x.view(shape)
    use_compiler(True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found, flat = Accumulator(Grid(7), shape[1], False, CPU), Accumulator(Grid(7), 0, False, CPU)
    for _ in range(2):
        found.add(x)
        flat.add(x)
    index, _ = bins_of(torch.where(x.isinf(), 2.0**30 * x.sign(), x), 10)
    code = index + Grid(10).magnitudes * np.signbit(x.numpy())
    expected = 2 * np.bincount(code.ravel(), minlength=2 * Grid(10).magnitudes)
    for each in (found, flat):
        assert np.array_equal(each.count.numpy(), expected)
        assert each.range.tolist() == [x.min(), x.max()]
    assert torch.equal(found.absmax, x.abs().amax(0))
    square = 2 * x.double().square().sum(0)
    torch.testing.assert_close(found.square, square, rtol=1e-6, atol=1e-30)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_no_number_is_counted_and_one_value_many_times() -> None:
    use_compiler(True)
    x = torch.full((700, 300), -1.5)
    x[3, 7], x[4, 8] = torch.nan, -torch.nan
    found = Accumulator(Grid(7), 300, False, CPU)
    found.add(x)
    edge = found.fine.magnitudes
    code, count = found.count.nonzero().squeeze(-1), found.count[found.count > 0]
    one = edge + int(found.fine.codes(torch.tensor([1.5])))
    assert code.tolist() == [edge - 1, one, 2 * edge - 1] and count.tolist() == [1, 209_998, 1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiler(True)
    x, parts = torch.randn(100, 1000, generator=torch.Generator().manual_seed(6)), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        sketch_ = Accumulator(Grid(7), 1000, False, CPU)
        sketch_.add(x)
        parts.append(sketch_.part())
    assert all(torch.equal(part[name], parts[0][name]) for part in parts for name in part)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_the_default_is(default: torch.dtype) -> None:
    """Compiled code writes to their addresses."""
    use_compiler(True)
    x, before = torch.randn(40, 20), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = Accumulator(Grid(7), 20, False, CPU)
        assert found.range.dtype == found.absmax.dtype == torch.float32
        found.add(x)
    finally:
        torch.set_default_dtype(before)
    assert found.range.tolist() == [x.min(), x.max()]
    assert torch.equal(found.absmax, x.abs().amax(0))


@pytest.mark.parametrize("mantissa_bits", [0, 14, -1])
def test_a_grid_that_cannot_be_is_refused(mantissa_bits: int) -> None:
    with pytest.raises(InputError, match="mantissa bits: .*from 1 to 13"):
        Grid(mantissa_bits)
