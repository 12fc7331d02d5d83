"""Runs from a hub on the loopback: commits in keys, offline, one line for what is refused or broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub import Hub, Repository
from tests.pipeline.conftest import REPOSITORY, Finished, Tiny, half_written
from tests.pipeline.forked import Forked, forked
from tests.pipeline.published import (
    C4_SHARD,
    LLAMA,
    PILE,
    PIQA,
    READER,
    SHARD,
    WIKITEXT,
    gated_text,
    publish_texts,
    questions,
    sharded,
    wikitext,
)

pytestmark = pytest.mark.slow
TEXTS = ("wikitext2", "c4", "ptb", "pile")
GATED = ("corpus.ptb.hub.id=org/gated-text", "corpus.ptb.hub.revision=main")


@dataclass
class World:
    """A hub, what it publishes, and a folder with the cache of the hub's library."""

    hub: Hub
    files: dict[str, bytes]  # of the model
    llama: Repository
    folder: Path
    overrides: list[str]
    processes: Forked

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.folder / "home")}

    def run(self, *more: str, token: dict[str, str] = READER) -> Finished:
        """A conversion of `model=llama2-7b` on all four texts, or with other overrides."""
        self.hub.asked.clear()
        done = self.processes.run(self.folder / "runs", *self.overrides, *more, **token)
        assert not self.hub.unknown and "Traceback" not in done.err, done.err
        assert half_written(self.store) == []
        return done

    def refused(self, *more: str, token: dict[str, str] = READER) -> str:
        """The last line of a run that fails with exit status 1, without the overrides that it repeats."""
        done = self.run(*more, token=token)
        assert done.code == 1
        *_, line = done.err.strip().splitlines()
        assert line.startswith("failed: ")
        return line.partition(more[-1] if more else self.overrides[-1])[2].removeprefix(": ")

    @property
    def store(self) -> Path:
        return self.folder / "runs" / "outputs" / "store"


@pytest.fixture(scope="module")
def world(tiny_run: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, hub = tmp_path_factory.mktemp("world"), Hub()
    files = sharded(tiny_run.model, folder / "sharded")
    llama = hub.repository("models", LLAMA, gated=True, readers={"reader"})
    llama.commit(files)
    publish_texts(hub)
    small = [each for each in tiny_run.overrides if not each.startswith(("model.", "corpus."))]
    chosen = ("coding=las", "model=llama2-7b", "calibration.corpus=pile")
    overrides = [*small, *chosen, f"evaluation.corpora=[{','.join(TEXTS)}]"]
    with hub.open():
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
        with forked(environment) as processes:
            yield World(hub, files, llama, folder, overrides, processes)


@pytest.fixture(scope="module")
def first(world: World) -> Finished:
    """The run that downloads everything."""
    done = world.run()
    assert done.code == 0, done.err
    return done


def keys(done: Finished) -> dict[str, str]:
    (result,) = done.results
    return dict(result["keys"])


def states(done: Finished) -> dict[str, list[str]]:
    """The labels of the stages that were built, and of those that were cached."""
    found = re.findall(r"\] (.+?) +(built|cached) +[0-9a-f]{8} ", done.out)
    return {state: [name for name, s in found if s == state] for state in ("built", "cached")}


def test_a_gated_model_needs_a_token_that_has_access(world: World) -> None:
    nobody, stranger, invalid = ({"HF_TOKEN": name} for name in ("", "stranger", "forgotten"))
    page = f"https://huggingface.co/{LLAMA}"
    assert f"it is gated and you are not logged in: accept its terms on {page} and log in" in (
        world.refused(token=nobody)
    )
    assert f"your token has no access to it: ask for it on {page}" in world.refused(token=stranger)
    assert "your token is not valid: log in" in world.refused(token=invalid)


def test_a_sharded_model_and_four_texts_are_read(world: World, first: Finished) -> None:
    read = dict(re.findall(r"text (\w+): .*?; (.*) documents", first.out))
    assert read["c4"].endswith("1100") and {*read} == {*TEXTS}
    assert read["pile"].startswith("the first 65536 tokens") and read["ptb"].endswith(" 60")
    (result,) = first.results
    assert all(1 < result[f"ppl_{name}"] < 1e6 for name in TEXTS)
    assert not world.hub.betrayed  # the token, to another host
    assert half_written(world.store) == [] and len(states(first)["built"]) > 10


def test_a_second_run_asks_for_the_branches_alone(world: World, first: Finished) -> None:
    again = world.run()
    assert keys(again) == keys(first) and states(again)["built"] == []
    assert again.table.read_text() == first.table.read_text()
    branches = [f"models/{LLAMA}/revision/main", f"datasets/{PILE}/revision/main"]
    assert {f"GET /api/{branch}" for branch in branches} < {*world.hub.asked}
    assert len(world.hub.asked) == 5 and all("/revision/" in line for line in world.hub.asked)


def test_without_the_hub_everything_comes_from_the_cache_and_the_store(
    world: World, first: Finished
) -> None:
    with world.hub.closed():
        gone = world.run()
        unknown = world.refused("model.hub=org/new")
    seen = re.findall(
        r"(\S+): the hub cannot be reached; its \S+ is taken to be .*, (\w+)", gone.out
    )
    assert (LLAMA, world.llama.branches["main"]) in seen and len(seen) == 5
    assert keys(gone) == keys(first) and states(gone)["built"] == []
    assert gone.table.read_text() == first.table.read_text()
    assert (
        "model org/new on the hub: the connection failed ([Errno 111] Connection refused)"
        in unknown
    )
    assert unknown.endswith("; or a folder on this machine is used by model.path=FOLDER")
    offline = subprocess.run(
        [sys.executable, "-m", "pipeline", *world.overrides],
        env=os.environ | world.environment | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        cwd=world.folder / "runs",
        **{"capture_output": True, "text": True, "check": True},
    )
    done = Finished(0, offline.stdout, offline.stderr, world.folder / "runs")
    assert keys(done) == keys(first) and states(done)["built"] == []
    assert done.table.read_text() == first.table.read_text()


def test_a_moved_branch_is_another_model_and_a_pinned_commit_is_not(
    world: World, first: Finished
) -> None:
    before = world.llama.branches["main"]
    other = world.files["config.json"].replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')
    now = world.llama.commit(world.files | {"config.json": other})
    moved = world.run()
    line = f"model {LLAMA}: main has moved from {before[:12]} to {now[:12]}; what was made with it"
    assert moved.out.count(line) == 1 and states(moved)["cached"] == []
    assert {*keys(moved).values()}.isdisjoint(keys(first).values())
    assert moved.results[0]["ppl_c4"] != first.results[0]["ppl_c4"]
    pinned = world.run(f"model.revision={before}")
    assert keys(pinned) == keys(first) and states(pinned)["built"] == []
    assert not any(LLAMA in line for line in world.hub.asked) and len(world.hub.asked) == 4
    world.hub.repositories["datasets", WIKITEXT].commit(wikitext(2))
    text = world.run(f"model.revision={before}")
    assert f"dataset {WIKITEXT}: main has moved from" in text.out
    changed = {name for name in keys(first) if keys(first)[name] != keys(text)[name]}
    assert changed and all("wikitext2" in name or name == "energy" for name in changed)
    assert {*states(text)["built"]} == changed


def test_questions_of_the_hub_are_of_one_commit(world: World) -> None:
    """A moved branch is other questions; without the hub those that were seen last are in the store."""
    none = "tasks.piqa.path=null"
    asked = ("coding=dense", "evaluation.corpora=[c4]", "evaluation.tasks=[piqa]", none)
    asked = (*asked, "tasks.piqa.package=null", "evaluation.items=24")
    assert f"dataset {PIQA} on the hub: there is none of this name" in world.refused(*asked)
    piqa = world.hub.repository("datasets", PIQA)
    before = piqa.commit(questions(1))
    one = world.run(*asked)
    assert one.code == 0 and keys(world.run(*asked)) == keys(one)
    with world.hub.closed():
        gone = world.run(*asked)
    assert f"dataset {PIQA}: the hub cannot be reached; its main is taken to be" in gone.out
    assert states(gone)["built"] == [] and keys(gone) == keys(one)
    now = piqa.commit(questions(2))
    two = world.run(*asked)
    assert f"{PIQA}: main has moved from {before[:12]} to {now[:12]}" in two.out
    assert {*states(two)["built"]} == {"evaluation acc_piqa"}
    assert two.results[0]["acc_piqa"] != one.results[0]["acc_piqa"]
    with world.hub.closed():
        others = world.run(*asked, "evaluation.items=20")  # which are in no store
    assert others.code == 0 and f"taken to be the last one seen, {now}" in others.out
    read = ("tasks.piqa.task=niah_single_1", "evaluation.tasks=[piqa]")
    assert "no data set with commits on the hub" in world.refused(*asked, *read)


def test_what_is_not_on_the_hub_is_one_line(world: World) -> None:
    without = {
        "shard": {name: data for name, data in world.files.items() if name != SHARD},
        "config": {name: data for name, data in world.files.items() if name != "config.json"},
    }
    for name, files in without.items():
        world.hub.repository("models", f"org/no-{name}").commit(files)
    gated_text(world.hub)
    dense = ("coding=dense", "evaluation.corpora=[ptb]")
    for overrides, said in {
        ("model.hub=org/none",): "there is none of this name, or your token has no access to it",
        ("model.revision=v9",): f"model {LLAMA} at v9 on the hub: it has no such branch, tag or",
        ("model.hub=org/no-config",): " on the hub: it has no file config.json; or a folder on th",
        (*dense, "model.hub=org/no-shard"): f"lacks {SHARD}, which its index names",
        (
            *dense,
            "corpus.ptb.hub.id=org/none",
        ): "dataset org/none at refs/convert/parquet on the hub",
        (*dense, "corpus.ptb.hub.revision=main"): "scripts are no longer supported, but found ptb",
    }.items():
        assert said in world.refused(*overrides), overrides
    stranger = {"HF_TOKEN": "stranger"}
    world.hub.repository("models", "org/open").commit(world.files)
    gated = world.refused(*dense, "model.hub=org/open", *GATED, token=stranger)
    assert "text org/gated-text (test) cannot be read from the hub" in gated and "gated" in gated


def test_a_connection_that_breaks_leaves_nothing_and_the_next_run_completes(world: World) -> None:
    world.hub.repository("models", "org/broken").commit(world.files | {"README.md": b"# Broken"})
    chosen = ("model.hub=org/broken", "coding=dense", "evaluation.corpora=[c4]")
    cached = world.folder / "home" / "hub" / "models--org--broken"
    for file in (C4_SHARD, SHARD):  # texts are read before weights
        world.hub.broken = {file}
        line = world.refused(*chosen)
        world.hub.broken = set()
        assert "the connection failed (peer closed connection without sending complete" in line
        whole = {len(data) for data in world.files.values()}
        assert {path.stat().st_size for path in (cached / "blobs").glob("*")} <= whole
        assert not [path for path in cached.rglob("*") if path.name in (SHARD, "incomplete")]
    done = world.run(*chosen)
    assert done.code == 0 and "1100 documents" in done.out
    weights = next(cached.glob(f"snapshots/*/{SHARD}"))
    assert weights.read_bytes() == world.files[SHARD]


def test_documents_of_the_hub_may_not_be_in_both_texts(world: World) -> None:
    rows = "corpus.pile.hub.documents"
    assert "documents are in the calibration and in the evaluation text" in world.refused(
        *("corpus.pile.hub.id=Salesforce/wikitext", "corpus.pile.hub.config=wikitext-2-raw-v1"),
        *("corpus.pile.hub.split=train", "corpus.pile.hub.calibration_split=test", f"{rows}=60"),
        "evaluation.corpora=[wikitext2]",
    )
