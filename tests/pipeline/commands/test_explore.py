"""The page to explore: its data are those of the runs, it needs nothing else, and a browser can use it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.commands.cli import main
from pipeline.figures import explored, explorer
from pipeline.results.folders import RunFolder
from tests.pipeline.commands.test_report import Page
from tests.pipeline.conftest import Finished

pytestmark = pytest.mark.slow

EVIL = "<script>window.harmed=1</script><img src=x onerror=window.harmed=1>"
SWEEP = ("-m", "experiment=null", "coding=dense,las,gated", "timesteps=4,6")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(DRIVER is None, reason="no Chromium with its driver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("explore")


@pytest.fixture(scope="module")
def runs(folder, command: Callable[..., Finished]) -> list[Path]:
    """A sweep, and a conversion whose row has a name that would do harm in a page."""
    profiles = "profile=[45nm,lemaire2022,loihi]"
    sweep = command(folder, *SWEEP, profiles)
    assert sweep.code == 0, sweep.err
    odd = command(folder, "coding=las", "timesteps=5", f"row='{EVIL}'", profiles)
    assert odd.code == 0, odd.err
    (single,) = (run for run in sweep.runs.parent.iterdir() if run != sweep.runs)
    return [sweep.runs, single]


@pytest.fixture(scope="module")
def page(folder, runs) -> Path:
    with chdir(folder):
        assert main(["report", *(str(run.relative_to(folder)) for run in runs)]) == 0
    (file,) = (folder / "outputs/reports").glob("runs_*.html")
    return file


@pytest.fixture(scope="module")
def text(page) -> str:
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def jobs(runs) -> list[RunFolder]:
    """Those of both, without the dense model's repetition for another T."""
    every = [job for run in runs for job in RunFolder(run).finished]
    return [job for job in every if job.path.name != "1" or job.result["coding"] != "dense"]


@pytest.fixture(scope="module")
def data(jobs) -> dict[str, list[dict[str, Any]]]:
    return explored.records({job: job.result for job in jobs})


def test_rows_are_those_of_the_results(data, jobs):
    results = [job.result for job in jobs]
    rows = data["rows"]
    assert len({row["row"] for row in rows}) == len(rows) == len(results)
    for row, result in zip(rows, results, strict=True):
        assert row["T"] == result["timesteps"] and row["dense"] == (result["coding"] == "dense")
        ppl, over = (row["ppl"]["wikipedia"][name] for name in ("perplexity", "excess"))
        assert ppl["drawn"] == pytest.approx(result["ppl_wikipedia"], rel=1e-3)
        base = result["ppl_wikipedia"] / (result["ratio_wikipedia"] or 1)
        low, high = (result[f"ratio_wikipedia_{end}"] for end in ("low", "high"))
        if row["dense"]:
            assert not over
            low, high = (1 + s * result["ppl_wikipedia_se"] / base for s in (-1, 1))
        else:
            percents = [max(0.01, 100 * (r - 1)) for r in (result["ratio_wikipedia"], low, high)]
            assert [over[n] for n in ("drawn", "low", "high")] == pytest.approx(percents, rel=1e-2)
        assert [ppl["low"], ppl["high"]] == pytest.approx([base * low, base * high], rel=1e-3)
        for phase, costs in (("prefill", result), ("decode", result["decode"])):
            priced = {name: e["J"] for name, e in row["energy"][phase].items()}
            known = {name: costs[f"energy_J_{name}"] for name in ("45nm", "lemaire2022", "loihi")}
            known = {name: value for name, value in known.items() if value is not None}
            assert priced == pytest.approx(known, rel=1e-3)
            assert ("loihi" in priced) == (not row["dense"])
        assert row["command"].endswith("hydra.mode=RUN") and result["coding"] in row["command"]


def test_parts_add_up_to_the_energy_of_their_row(data):
    parts = pd.DataFrame(data["parts"])
    sums = parts.groupby(["row", "phase", "profile"])["J"].sum()
    for row in data["rows"]:
        for phase, costs in row["energy"].items():
            for profile, cost in costs.items():
                assert sums[row["row"], phase, profile] == pytest.approx(cost["J"], rel=2e-3)


def test_layers_are_means_of_errors_and_sums_of_spikes(data, runs):
    (job,) = RunFolder(runs[1]).finished
    layers = pd.DataFrame(data["layers"]).set_index(["row", "role", "layer"])
    (name,) = (row["row"] for row in data["rows"] if EVIL in row["row"])
    sites = job.sites
    for (role, layer), group in sites.groupby(["role", "layer"]):
        shown = layers.loc[name, role, layer if layer >= 0 else sites["layer"].max() + 1]
        error = np.prod(group["nmse"]) ** (1 / len(group))
        assert math.exp(shown["error"]) == pytest.approx(error, rel=2e-3)
        spikes = group["spikes"].sum() / group["values"].sum()
        assert shown["spikes"] / shown["values"] == pytest.approx(spikes, rel=2e-3)
    dense = {row["row"] for row in data["rows"] if row["dense"]}
    assert not dense & {*layers.index.unique("row")}


def test_what_diverged_stands_above_the_others():
    results = [{"ppl_c4": value} for value in (20.0, 5e6, math.inf, None)]
    made = explored.perplexities("c4", results)
    assert [each["diverged"] for each in made] == [False, True, True, True]
    assert [each["perplexity"] for each in made] == [{"drawn": y} for y in (20, 40, 40)] + [{}]
    assert [each["shown"] for each in made] == ["20.000", "5.0e6", "infinite", "–"]
    assert [each["known"] for each in made] == [True, True, True, False]


def test_names_that_are_alike_are_numbered():
    result = {"coding": "las", "timesteps": 6, "model": "m", "ppl_c4": 2.0}
    other = result | {"coding": "gated", "transform": "rotate"}
    names = explored.unique_names([result, result, other])
    assert names == ["las T=6 (1)", "las T=6 (2)", "gated T=6 rotate"]


def test_controls_offer_what_the_rows_have(data):
    offered = explorer.choices(data)
    assert offered["codings"] == ["dense", "las", "gated"] and offered["timesteps"] == [4, 5, 6]
    assert offered["profile"] == ["45nm", "lemaire2022", "loihi"]
    assert offered["phase"] == ["prefill", "decode"] and offered["corpus"] == ["wikipedia"]


def test_the_page_names_no_address_and_forbids_its_browser_to_read_one(text):
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    rest = text.replace(scripts[0], "")  # Vega, whose names of formats look like addresses
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", rest)
    page = Page(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"link", "iframe", "object", "embed", "base"} & {*page.tags}
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy and policy[1].startswith("default-src 'none';") and "http" not in policy[1]
    assert re.match(r"<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset", text)


def test_names_from_outside_are_no_markup(text):
    assert EVIL not in text and "<script>window" not in text and "<img src=x" not in text
    assert "\\u003cscript\\u003ewindow.harmed" in text  # in the data
    assert "&lt;script&gt;window.harmed" in text  # in tables


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["outputs/runs/zzz"],
            "outputs/runs/zzz is no folder; a report of runs takes their folders",
        ),
        (["empty"], "no job below empty has left a result.json"),
        (
            ["empty", "timesteps=6"],
            "timesteps=6 is no folder; a report of runs takes their folders",
        ),
    ],
)
def test_folders_that_cannot_be_used_are_told_in_one_line(arguments, told, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with chdir(tmp_path):
        assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_has_failed_is_named(runs, folder, capsys):
    """A run without any result is left out; a failed job stands on the page."""
    (folder / "killed").mkdir()
    partly = RunFolder(shutil.copytree(runs[0], folder / "partly"))
    (partly.jobs[0].path / "result.json").unlink()
    partly.jobs[0].fail(["coding=dense"], "<b>no</b> room")
    with chdir(folder):
        assert main(["report", "./partly", "killed"]) == 0
    assert "left out, for no job of it has left a result: killed" in capsys.readouterr().out
    (file,) = (folder / "outputs/reports").glob("*_partly.html")
    assert "failed: coding=dense: &lt;b&gt;no&lt;/b&gt; room" in file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    place = tmp_path_factory.mktemp("browser")
    for flag in (*QUIET, f"--user-data-dir={place}", "--window-size=1300,1500"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@needs_browser
def test_a_reader_filters_chooses_and_reads(browser, page, data):
    requested = opened(browser, page)
    rows = data["rows"]
    assert points(browser) == {row["row"] for row in rows}
    assert bars(browser) == {row["row"] for row in rows}

    tick(browser, "codings", "gated")
    left = {row["row"] for row in rows if row["coding"] != "gated"}
    settled(browser, lambda: points(browser) == left and bars(browser) == left)
    assert browser.find_element(By.ID, "count").text == f"{len(left)} of {len(rows)} rows"
    assert lines(browser) == left - {"dense"} == drawn(browser, "ends_NMSE", "text")
    tick(browser, "timesteps", "4")
    left = {row["row"] for row in rows if row["coding"] != "gated" and row["T"] != 4}
    settled(browser, lambda: points(browser) == left and lines(browser) == left - {"dense"})

    browser.find_element(By.CSS_SELECTOR, "select[name=profile] option[value=loihi]").click()
    priced = left - {"dense"}  # which has no price there
    settled(browser, lambda: points(browser) == priced == bars(browser))

    (mark,) = [m for m in marks(browser, "points_energy") if EVIL in label(m)]
    ActionChains(browser).move_to_element(mark).perform()
    tooltip = browser.find_element(By.ID, "vg-tooltip-element")
    settled(browser, lambda: "hydra.mode=RUN" in tooltip.text)
    (evil,) = (row for row in rows if EVIL in row["row"])
    assert evil["ppl"]["wikipedia"]["shown"] in tooltip.text and EVIL in tooltip.text
    mark.click()
    chosen = browser.find_element(By.ID, "chosen")
    settled(browser, lambda: evil["command"] in chosen.text)
    settled(browser, lambda: lines(browser) == {evil["row"]})

    assert browser.execute_script("return window.harmed") is None
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe
    assert requested(browser) == {page.resolve().as_uri()}


@needs_browser
@pytest.mark.parametrize("width", (900, 1400))
def test_figures_fit_their_page_and_labels_of_an_axis_do_not_touch(width, browser, page):
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    opened(browser, page)
    figure = browser.find_element(By.CSS_SELECTOR, "#figures svg.marks")
    assert figure.rect["x"] + figure.rect["width"] <= width
    boxes = "[...axis.querySelectorAll('.role-axis-label text')].filter(t => t.textContent)"
    boxes += ".map(t => t.getBoundingClientRect()).filter(b => b.width)"
    axes = f"[...document.querySelectorAll('#figures .role-axis')].map(axis => {boxes})"
    for labels in filter(None, browser.execute_script(f"return {axes}")):
        assert not any(touch(*pair) for pair in itertools.combinations(labels, 2))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def touch(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether two rectangles of a browser have a point in common."""
    pairs = (("left", "right"), ("top", "bottom"))
    return all(max(one[a], other[a]) < min(one[b], other[b]) for a, b in pairs)


def opened(browser: webdriver.Chrome, page: Path) -> Callable[[webdriver.Chrome], set[str]]:
    """Open a page and wait for its figures; returns what tells all that was requested."""
    browser.get_log("performance")
    browser.get(page.resolve().as_uri())
    settled(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#explore[data-ready]"))

    def requested(browser: webdriver.Chrome) -> set[str]:
        events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
        sent = [e for e in events if e["method"] == "Network.requestWillBeSent"]
        urls = {event["params"]["request"]["url"] for event in sent}
        return {
            url for url in urls if not url.startswith(("data:", "chrome:", "chrome-untrusted:"))
        }

    return requested


def settled(browser: webdriver.Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser, 20, poll_frequency=0.1).until(lambda _: condition())


def tick(browser: webdriver.Chrome, name: str, value: str) -> None:
    labels = browser.find_elements(By.CSS_SELECTOR, f"[data-list={name}] label")
    (chosen,) = (each for each in labels if each.text.strip() == value)
    chosen.click()


def marks(browser: webdriver.Chrome, group: str) -> list[Any]:
    return browser.find_elements(
        By.CSS_SELECTOR, f"#figures g[class*='{group}_'][class$=_marks] path"
    )


def label(mark: Any) -> str:
    return str(mark.get_attribute("aria-label"))


def drawn(browser: webdriver.Chrome, group: str, shape: str = "path") -> set[str]:
    """The rows of the marks of a group, read in one request."""
    script = "return [...document.querySelectorAll(arguments[0])].map(m => m.__data__.datum.row)"
    query = f"#figures g[class*='{group}_'][class$=_marks] {shape}"
    return set(browser.execute_script(script, query))


def points(browser: webdriver.Chrome) -> set[str]:
    return drawn(browser, "points_energy")


def bars(browser: webdriver.Chrome) -> set[str]:
    return drawn(browser, "bars")


def lines(browser: webdriver.Chrome) -> set[str]:
    return drawn(browser, "points_NMSE")
