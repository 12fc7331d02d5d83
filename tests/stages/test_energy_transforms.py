"""Energy of a transformed model: what the rotation adds, and the keys of a kept prefix."""

from __future__ import annotations

import pandas as pd
import pytest

from stages.energy import account, by_kind
from stages.transforms.prefix import attach_prefix
from stages.transforms.rotation import rotate
from tests.stages.test_energy import TOKENS, part, plan_of, tiny


def test_a_rotated_model_adds_its_transforms_in_front_of_down_proj(energy):
    plain, rotated = tiny(), tiny()
    rotate(rotated, seed=0)
    before = by_kind(account(plan_of(plain), energy, TOKENS))
    after = by_kind(account(plan_of(rotated), energy, TOKENS))
    added = after[after["kind"].isin(["hadamard", "mixing"])]
    pd.testing.assert_frame_equal(after.drop(added.index).reset_index(drop=True), before)
    for (_, phase), rows in added.groupby(["convention", "phase"]):
        tokens = TOKENS if phase == "prefill" else 1
        costs = rows.set_index("kind")[["macs_G", "acs_G"]] * 1e9
        # 52 = 4 x 13 in two layers: two additions a value, and 13 products with the odd factor.
        assert costs.loc["hadamard"].tolist() == pytest.approx([0, tokens * 2 * 52 * 2])
        assert costs.loc["mixing"].tolist() == pytest.approx([tokens * 2 * 52 * 13, 0])
        joules = (0.9 * costs["acs_G"].sum() + 4.6 * costs["macs_G"].sum()) * 1e-12
        assert rows["energy_J"].sum() == pytest.approx(joules)


@pytest.mark.parametrize("window", [None, 4])
def test_every_query_meets_the_kept_keys_too(energy, window):
    model = tiny() if window is None else tiny("mistral", sliding_window=window)
    attach_prefix(model, (3, 5))
    plan = plan_of(model)
    frame = account(plan, energy, TOKENS).set_index(["convention", "phase", "op"])["macs"]
    op, width = "model.layers.0.self_attn:qk", 4 * 8
    seen = [min(2 + query, window or 99) for query in range(1, TOKENS + 1)]
    assert frame["causal", "prefill", op] == width * sum(seen)
    assert frame["causal", "decode", op] == width * seen[-1]
    assert frame["paper", "prefill", op] == width * TOKENS * (2 + TOKENS)
    steps = [part(account(plan, energy, t), "causal", "decode") for t in range(1, TOKENS + 1)]
    whole = part(account(plan, energy, TOKENS), "causal")
    assert sum(step["macs"].sum() for step in steps) == whole["macs"].sum()
