"""Signed digits: spikes of either sign on the residual, fewer of them at the same levels."""

from __future__ import annotations

from dataclasses import dataclass

from stages.codings.gated import Gated
from stages.registry import register


@register("coding/signed_digit", was="stages.codings.signed_digit.SignedDigit")
@dataclass(frozen=True)
class SignedDigit(Gated):
    """s(t) = sign(v) Θ(|v| - theta(t)) with weights 2^-t, behind the gate and levels of `gated`.

    theta(t) lies half a level above the largest number that the later steps reach without two
    spikes in a row, so the digits are the non-adjacent form of the nearest level, of which a third
    are not zero. It rounds by itself: v0 = 0. One grain is the ungated code. Source of the form:
    Reitwiesner 1960.
    """

    name: str = "signed_digit"

    signed = True
