"""What masks add to scores."""

from torch import Tensor

from stages.ports.visibility import View


def bias(mask: Tensor) -> Tensor:
    """The bias of a mask [B, 1, Q, K]."""
    return View(mask, mask[:, 0].sum(-1), None).bias.expand(mask.shape).contiguous()
