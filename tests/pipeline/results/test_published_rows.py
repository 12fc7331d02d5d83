"""The published rows: complete, with their source, and in agreement with each other."""

import pandas as pd
import pytest
import yaml

from tests.pipeline.conftest import CONF

TEXTS = ["wikitext2", "c4", "redpajama", "pile"]
TASKS = ["winogrande", "arc_challenge", "arc_easy", "piqa"]
SETTINGS = ["model", "method", "T", "n"]


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    rows = yaml.safe_load((CONF / "table/published.yaml").read_text(encoding="utf-8"))["rows"]
    fields = [*SETTINGS, "time", "ppl", "acc", *TEXTS, *TASKS, "source"]
    assert all(list(row) == fields for row in rows)
    return pd.DataFrame(rows)


def test_every_row_has_its_source_and_no_source_a_row_twice(published):
    assert published["source"].str.len().gt(0).all()
    assert not published.duplicated([*SETTINGS, "source"]).any()
    assert set(published["model"]) == {"llama2-7b", "llama3-8b"}
    assert (published["n"].notna() == (published["method"] == "multigrain")).all()


@pytest.mark.parametrize(("mean", "parts", "rows"), [("ppl", TEXTS, 1), ("acc", TASKS, 8)])
def test_a_stated_mean_is_the_mean_of_its_sets(published, mean, parts, rows):
    whole = published.dropna(subset=[mean, *parts])
    assert len(whole) == rows
    # Both are printed with two digits: half of the last one, the bound itself included.
    apart = whole[parts].mean(axis=1) - whole[mean].astype(float)
    assert apart.abs().max() < 0.005 + 1e-9


def test_numbers_are_perplexities_percentages_and_seconds(published):
    stated = published["ppl"].dropna().map(lambda ppl: float(str(ppl).removeprefix(">")))
    assert stated.between(5, 100).all() and len(stated) == 10
    accuracies = published[["acc", *TASKS]].stack().dropna()
    assert accuracies.between(40, 85).all()
    assert published["time"].dropna().between(60, 24 * 3600).all()
