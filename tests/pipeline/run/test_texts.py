"""Texts: all of one or no more than is needed, how one is put together, documents that two share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.run import runner, texts
from pipeline.run.chain import chain
from pipeline.run.settings import Settings
from pipeline.store.store import Store
from stages.errors import InputError
from tests.pipeline.conftest import main_in

Make = Callable[..., Settings]
WIKITEXT = next(
    (found for p in Path(__file__).parents if (found := p / "shared/data/wikitext2").is_dir()), None
)


@pytest.fixture
def small(monkeypatch) -> None:
    """64 tokens are the fewest that are read."""
    monkeypatch.setattr(texts, "LEAST", 6)


def stored(made: Settings, store: Path, corpus: str, purpose: str) -> tuple[torch.Tensor, dict]:
    stage = chain(made, Store(store)).tokens[corpus, purpose]
    artifact = stage.build(Store(store), None)
    record = json.loads((artifact.path / "documents.json").read_text())
    return texts.load_tokens(artifact), record


@pytest.mark.parametrize("begin", ["null", "256"])
def test_all_windows_are_as_many_as_there_are(settings: Make, tmp_path, caplog, begin) -> None:
    more = ("coding=dense", f"model.begin={begin}")
    ids, _ = stored(settings(tmp_path, *more), tmp_path, "wikipedia", "evaluation")
    number, rest = divmod(len(ids), 48 if begin == "null" else 47)
    assert number > 3 and rest
    with caplog.at_level(logging.INFO):
        every, *_ = runner.execute(settings(tmp_path, *more, "evaluation.windows=all"))
    assert f"wikipedia: all {number} windows of 48 tokens; {rest} fill none" in caplog.text
    assert every["evaluation"]["wikipedia"]["windows"] == number
    counted, *_ = runner.execute(settings(tmp_path, *more, f"evaluation.windows={number}"))
    assert counted["ppl_wikipedia"] == every["ppl_wikipedia"]
    assert [r["evaluation"]["wikipedia"]["all"] for r in (every, counted)] == [True, False]
    first, *_ = runner.execute(settings(tmp_path, *more))
    assert first["ppl_wikipedia"] != every["ppl_wikipedia"]


def test_a_text_too_short_for_one_window_is_refused(settings: Make, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("thirty tokens of one byte each")
    made = settings(
        tmp_path,
        "evaluation.windows=all",
        f"corpus.wikipedia.path={tmp_path}/short.txt",
        "coding=dense",
    )
    with pytest.raises(InputError, match="wikipedia has 30 tokens, 1 windows of 48 tokens need 48"):
        runner.execute(made)


def test_a_table_of_all_windows_says_so_and_compares_with_dense(
    tmp_path, command, tiny_run
) -> None:
    done = command(tmp_path, "coding=dense,las", "evaluation.windows=all")
    assert done.code == 0, done.err
    number = done.results[0]["evaluation"]["wikipedia"]["windows"]
    markdown = done.table.with_suffix(".md").read_text()
    assert f"wikipedia (all {number} windows of 48 tokens)" in markdown
    assert "ratio_wikipedia" in done.table.read_text()
    chosen = ["plan", *tiny_run.overrides, "coding=gated", "evaluation.windows=all"]
    planned = main_in(tmp_path, chosen)
    assert planned.code == 0 and "no past build" not in planned.out


@pytest.mark.usefixtures("small")
def test_no_more_is_read_than_is_needed(settings: Make, tmp_path, byte_tokenizer) -> None:
    documents = [f"{n:04d}" + "w" * 296 for n in range(4000)]
    text, rows = "\n\n".join(documents), [json.dumps({"text": each}) for each in documents]
    (tmp_path / "long.jsonl").write_text("\n".join(rows) + "\nno JSON")
    path = f"corpus.wikipedia.path={tmp_path}/long.jsonl"
    for windows, tokens in ((1, 64), (2, 128), (3, 256), (5, 256)):
        made = settings(tmp_path, path, f"evaluation.windows={windows}")
        ids, record = stored(made, tmp_path, "wikipedia", "evaluation")
        assert len(ids) == record["tokens"] == tokens
        assert byte_tokenizer.decode(ids) == text[:tokens]
        assert 1 < record["rows"] < 4000 and len(record["documents"]) == record["rows"]
    keys = {
        windows: chain(settings(tmp_path, path, f"evaluation.windows={windows}"), Store(tmp_path))
        .tokens["wikipedia", "evaluation"]
        .key()
        for windows in (2, 3, 5)
    }
    assert keys[3] == keys[5] != keys[2]
    with pytest.raises(InputError, match="line 4001 is no JSON"):
        stored(
            settings(tmp_path, path, "evaluation.windows=all"), tmp_path, "wikipedia", "evaluation"
        )


@pytest.mark.usefixtures("small")
def test_what_is_read_first_is_the_beginning_of_all(settings: Make, tmp_path) -> None:
    every, _ = stored(
        settings(tmp_path, "evaluation.windows=all"), tmp_path, "wikipedia", "evaluation"
    )
    first, _ = stored(
        settings(tmp_path, "evaluation.windows=3"), tmp_path, "wikipedia", "evaluation"
    )
    assert len(first) == 256 < len(every) and first.equal(every[:256])


@pytest.mark.usefixtures("small")
def test_held_out_windows_leave_the_keys_of_what_is_fitted(settings: Make, tmp_path) -> None:
    """4 windows of 48 tokens are 192, with 2 more 288, with 8 more 576."""
    few, many = (
        chain(settings(tmp_path, f"patching.windows={n}"), Store(tmp_path)) for n in (1, 8)
    )
    for label in few.steps:
        same = few.steps[label].key() == many.steps[label].key()
        assert same == (label != "patching"), label
    assert {
        "tokens wikipedia calibration (256 tokens)",
        "tokens wikipedia calibration (1024 tokens)",
    } <= {*many.sources}
    assert many.tokens["wikipedia", "calibration"].spec["tokens"] == 1024


@pytest.mark.usefixtures("small")
def test_documents_that_are_not_read_may_be_shared(settings: Make, tiny_run, tmp_path) -> None:
    rows = (tiny_run.folder / "evaluation.jsonl").read_text().splitlines()
    fitted = (tiny_run.folder / "calibration.jsonl").read_text().splitlines()
    own = "".join(json.dumps({"text": f"{n} " * 100}) + "\n" for n in range(3000))
    (tmp_path / "long.jsonl").write_text("\n".join([*rows, own, *fitted[:1]]))
    made = ("coding=gated", f"corpus.wikipedia.path={tmp_path}/long.jsonl")
    runner.execute(settings(tmp_path, *made))
    (tmp_path / "long.jsonl").write_text("\n".join([*rows, *fitted[:1], own]))
    with pytest.raises(InputError, match="1 documents are in the calibration and in the eval"):
        runner.execute(settings(tmp_path, *made, "timesteps=5"))


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 5]])
def test_ids_are_written_as_they_come_and_read_as_safetensors(tmp_path, lengths) -> None:
    ids = [np.arange(n, dtype=np.int32) - 7 for n in lengths]
    file = tmp_path / "tokens.safetensors"
    assert texts._write(file, ids) == sum(lengths)
    read = texts.load_file(file)["ids"]
    assert read.dtype == torch.int32 and read.tolist() == [i for each in ids for i in each.tolist()]


@pytest.mark.skipif(WIKITEXT is None, reason="evaluation data not present")
def test_wikitext_is_the_same_from_its_raw_file_and_its_rows(
    settings: Make, tmp_path, caplog
) -> None:
    read = {}
    for name, more in {
        "raw/wiki.test.raw": (),
        "test.jsonl": (),
        "raw/wiki.test.raw ": ("corpus.wikitext2.rows=document", "evaluation.windows=3"),
        "test_document_level.jsonl": ("corpus.wikitext2.field=page", "evaluation.windows=3"),
    }.items():
        made = settings(
            tmp_path,
            f"corpus.wikitext2.path={WIKITEXT}/{name.strip()}",
            *("evaluation.corpora=[wikitext2]", "evaluation.windows=all", "coding=dense", *more),
        )
        read[name], record = stored(made, tmp_path, "wikitext2", "evaluation")
        stage = chain(made, Store(tmp_path)).tokens["wikitext2", "evaluation"]
        with caplog.at_level(logging.INFO):
            texts.say_protocol(
                made.corpus["wikitext2"], "evaluation", stage, stage.build(Store(tmp_path), None)
            )
        assert len(read[name]) == record["tokens"]
    raw, rows, whole, pages = read.values()
    assert raw.equal(rows) and not raw[: 1 << 16].equal(whole) and not whole.equal(pages)
    said = [record.message for record in caplog.records if "text wikitext2" in record.message]
    assert "lines (corpus.wikitext2.rows=lines), joined by" in said[0]
    assert f"{len(raw)} tokens, 4358 documents" in said[0] and "4358 documents" in said[1]
    assert "files as they stand (corpus.wikitext2.rows=document)" in said[2]
    assert "rows of a table" in said[1] and "the first 65536 tokens" in said[3]
