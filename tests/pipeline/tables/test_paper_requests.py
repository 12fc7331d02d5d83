"""What a command line asks of a paper's table, before anything is looked up."""

from __future__ import annotations

import inspect

import pandas as pd
import pytest
from hydra.utils import instantiate

from pipeline.results import uncertainty
from tests.pipeline.conftest import CONF
from tests.pipeline.tables.papers import TABLES, loaded, made


def test_a_mean_of_independent_tasks_has_their_errors_in_quadrature():
    frame = pd.DataFrame({"acc_a": [0.5], "acc_a_se": [0.03], "acc_b": [0.7], "ppl_x": [2.0]})
    found = uncertainty.with_means(frame.assign(acc_b_se=0.04)).iloc[0]
    assert found["acc_mean"] == pytest.approx(0.6)
    assert found["acc_mean_se"] == pytest.approx(0.05 / 2)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_names_an_experiment_and_the_options_of_its_layout(name):
    config = loaded(name)
    assert set(config) - {"published"} == {
        *("experiment", "fill", "folder", "columns", "wide", "layout")
    }
    assert (CONF / "experiment" / f"{config.experiment}.yaml").exists()
    made = instantiate(config.layout)
    inspect.signature(made.func).bind([], **made.keywords)  # no option is missing or unknown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["table=zzz"], f"got table=zzz; choose among {', '.join(TABLES)}"),
        (["timesteps=6"], "got no table; give one NAME out of codings"),
        (["table=main", "table.zzz=1"], "zzz"),
        (["table=main", "experiment=zzz"], "zzz"),
        (["table=main", "codin=las"], "codin"),
        (["table=main", "table.columns=[]"], "table.columns=[]: give names of columns"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(arguments, told, tmp_path):
    done = made(tmp_path, *arguments)
    assert done.code == 1 and told in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_lists_the_tables(tmp_path):
    done = made(tmp_path, "--help")
    assert done.code == 0 and all(name in done.out for name in TABLES)
    assert "published" not in TABLES
