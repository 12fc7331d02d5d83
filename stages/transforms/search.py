"""The search on calibration text for the tokens of a prefix, see `stages.transforms.prefix`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stages.errors import InputError
from stages.model.experts import refuse_experts
from stages.model.sites import find_sites
from stages.registry import register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@register("search/prefix", was="stages.llm.prefix.PrefixSearch")
@dataclass(frozen=True)
class PrefixSearch:
    """A token is an outlier where max|x| exceeds `outlier` times the median over its window."""

    outlier: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.outlier) and self.outlier > 1):
            raise InputError(f"transform.search.outlier={self.outlier!r}: give a number above 1")

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, batch: int
    ) -> dict[str, Any]:
        """Search the prefix for a dense model, from windows ids [W, S], with the counts that led to it.

        Its length is the mean number of outlier tokens of a window at the down_proj that has most
        of them, rounded up, at least 1. The last token is the tokenizer's BOS; the others are the
        ids that are outliers there most often, a window's first position left out, which is one
        whatever token it holds. Without a BOS they take all places; without either, InputError.
        """
        from stages.ports.hooks import stream  # take seconds to import what they need
        from stages.transforms.prefix import PeakPort

        sites = [site for site in find_sites(model) if site.role == "mlp.down"]
        refuse_experts(sites, "the search for a prefix", "use transform=none")
        ports = {site.name: PeakPort() for site in sites}
        stream(model, ids, batch, ports, "prefix", logits=1)
        outliers = torch.stack([self._outliers(ports[site.name].peaks) for site in sites])
        means = outliers.sum(-1).double().mean(-1)  # [sites]
        most = int(means.argmax())
        hits = outliers[most].clone()
        hits[:, 0] = False
        counts = Counter(ids.cpu()[hits].tolist())
        return {
            "ids": _choose(math.ceil(float(means[most])), counts, tokenizer.bos_token_id),
            "site": sites[most].name,
            "outliers_per_window": dict(
                zip([site.name for site in sites], means.tolist(), strict=True)
            ),
            "first_position": float(outliers[most][:, 0].double().mean()),
            "counts": {str(token): count for token, count in _ranked(counts)},
        }

    def _outliers(self, peaks: Tensor) -> Tensor:
        """Which tokens of peaks [W, S] stand out of their window."""
        return peaks > self.outlier * peaks.median(-1, keepdim=True).values


def _ranked(counts: Counter[int]) -> list[tuple[int, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _choose(length: int, counts: Counter[int], bos: int | None) -> list[int]:
    """`length` ids, at least one, fewer where there are no more candidates."""
    ranked = [token for token, _ in _ranked(counts) if token != bos]
    if bos is not None:
        return [*ranked[: max(length, 1) - 1], int(bos)]
    if not ranked:
        raise InputError(
            "transform=rotate_prefix: there is no outlier token behind the first position, and the "
            "tokenizer has no BOS to keep in front; use transform=rotate"
        )
    return ranked[: max(length, 1)]
