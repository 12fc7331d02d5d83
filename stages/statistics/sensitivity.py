"""The curvature of the loss at every site, by magnitude: one backward pass a window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.fits.sensitivity import CELLS, Sensitivity, cell
from stages.model.offload import refuse_offloaded
from stages.model.shares import Part, Share
from stages.model.sites import Site, find_sites
from stages.neurons.channels import per_channel
from stages.ports.counters import Counters, SiteCounter
from stages.ports.hooks import attached
from stages.ports.port import DensePort
from stages.ports.visibility import View
from stages.statistics import Earlier, Meter, meter

PLAIN, ABOUT = ("total", "count"), ("about_total", "about_count")


@meter.register
def sensitivity(
    statistic: Sensitivity,
    model: PreTrainedModel,
    ids: Tensor,
    sites: Sequence[Site],
    earlier: Earlier,
) -> Meter:
    """total, count [S, CELLS]: sum of f, and number of values, by cell of |x|; macs [S]:
    multiplications that a site's values enter; all float64, over `tokens` [S]."""
    return Curvatures(statistic, model, ids, sites, [None for _ in sites])


class Curvatures:
    """The meter of the same by cell of |x - m| with the means m [C] of the channels of some sites; where
    there are any also of plain_total and plain_count, by cell of |x|. A window is a batch."""

    def __init__(
        self,
        statistic: Sensitivity,
        model: PreTrainedModel,
        ids: Tensor,
        sites: Sequence[Site],
        means: Sequence[Tensor | None],
    ) -> None:
        refuse_offloaded(model, "a coding's sensitivity", "leave coding.sensitivity off")
        if len(ids) < statistic.windows:
            raise InputError(
                f"sensitivity: {statistic.windows} windows asked of {len(ids)} calibration windows; give "
                "more calibration.windows"
            )
        self._statistic, self._model, self._ids, self._sites = statistic, model, ids, sites
        self._counters = Counters(sites, model.device)
        self._ports = [
            _CurvaturePort(SiteCounter(self._counters, i), model.device, mean)
            for i, mean in enumerate(means)
        ]
        self._centred = any(mean is not None for mean in means)
        self._sums: Part = {}

    def run(self, batch: int) -> None:
        windows = self._ids[: self._statistic.windows].split(1)
        self.run_shares([Share(n, tokens, self.merge) for n, tokens in enumerate(windows)])

    def run_shares(self, shares: Iterable[Share]) -> None:
        ports = {site.name: port for site, port in zip(self._sites, self._ports, strict=True)}
        model = self._model
        with _differentiable(model), torch.enable_grad(), attached(model, find_sites(model), ports):
            for share in tqdm(shares, desc="sensitivity", unit="window", disable=None):
                tokens = share.tokens.to(model.device)
                logits = model(tokens, use_cache=False).logits[0].float()
                drawn = self._drawn(logits.detach(), share.number)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
                share.leave(self._take(tokens.numel()))

    def _drawn(self, logits: Tensor, window: int) -> Tensor:
        """A token of the model's choice at every position of a window, [S]."""
        seed = np.random.SeedSequence([self._statistic.seed, window]).generate_state(1, np.uint64)
        generator = torch.Generator(device=logits.device).manual_seed(int(seed[0]))
        return logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)

    def _take(self, tokens: int) -> Part:
        """What one window has left at all sites."""
        rows = [port.take() for port in self._ports]
        names = PLAIN + ABOUT if self._centred else PLAIN
        part = {name: torch.stack([row[name] for row in rows]).cpu() for name in names}
        return part | {"counters": self._counters.take(), "tokens": torch.tensor(float(tokens))}

    def merge(self, part: Part) -> None:
        self._counters.merge(part["counters"])
        for name, value in part.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def tensors(self) -> dict[str, Tensor]:
        plain = {name: self._sums[name] for name in PLAIN}
        silent = [s.name for s, n in zip(self._sites, plain["count"].sum(-1), strict=True) if not n]
        if silent:  # experts: without a derivative they would have no weight in the fit, silently
            raise InputError(
                f"sensitivity: {len(silent)} sites passed no value in {self._statistic.windows} windows, "
                f"the first is {silent[0]}: give more coding.sensitivity.windows"
            )
        cells = plain
        if self._centred:
            cells = {f"plain_{name}": tensor for name, tensor in plain.items()}
            cells |= {plain: self._sums[about] for plain, about in zip(PLAIN, ABOUT, strict=True)}
        macs = torch.from_numpy(self._counters.frame(set())["macs"].to_numpy().copy())
        tokens = torch.full((len(macs),), float(self._sums["tokens"]), dtype=torch.float64)
        return cells | {"macs": macs, "tokens": tokens}


@contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Let the derivatives of values be asked, and of no weight, while the context is open."""
    embedding = model.get_input_embeddings()
    follow = embedding.register_forward_hook(lambda _, args, x: x.detach().requires_grad_())
    learns = [p for p in model.parameters() if p.requires_grad]
    try:
        for weight in learns:
            weight.requires_grad_(False)
        yield
    finally:
        follow.remove()
        for weight in learns:
            weight.requires_grad_(True)


class _CurvaturePort(DensePort):
    """Passes a value on, and adds the squares of its derivative by magnitude when it comes: `total` and
    `count` by that of the value, those `about` by that of the value less its channel's mean."""

    plain = False

    def __init__(self, counter: SiteCounter, device: torch.device, mean: Tensor | None) -> None:
        super().__init__(counter)
        self._mean = mean
        self._device = device
        self._begin()

    def _begin(self) -> None:
        self.total, self.count = torch.zeros(2, CELLS, dtype=torch.float64, device=self._device)
        self.about_total, self.about_count = self.total, self.count
        if self._mean is not None:
            self.about_total, self.about_count = torch.zeros_like(self.total).repeat(2, 1)

    def take(self) -> dict[str, Tensor]:
        """What has come since this was last asked, [CELLS] each; without a mean the same about it."""
        taken = {name: getattr(self, name) for name in PLAIN + ABOUT}
        self._begin()
        return taken

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self._follow(super().__call__(x, real, fanout), None)
        return x

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        probs, spikes = super().softmax(scores, scaling, view)
        self._follow(probs, view.mask)
        return probs, spikes

    def _follow(self, x: Tensor, mask: Tensor | None) -> None:
        value = x.detach()

        def add(derivative: Tensor) -> None:
            square = derivative.float().square()
            if mask is not None:
                square = square * mask
            self._add(value, square, self.total, self.count)
            if self._mean is not None:
                about = value.float() - per_channel(self._mean.to(value.device), value, 0.0)
                self._add(about, square, self.about_total, self.about_count)
            if mask is not None:  # what is masked is zero, and no value
                seen = mask.sum().to(self.count.device)
                self.count[0] -= (mask.numel() - seen) * x.shape[1]

        if x.requires_grad:
            x.register_hook(add)

    @staticmethod
    def _add(value: Tensor, square: Tensor, total: Tensor, count: Tensor) -> None:
        places = cell(value).flatten()
        total += torch.bincount(places, square.flatten().double(), CELLS).to(total.device)
        count += torch.bincount(places, minlength=CELLS).to(count.device)
