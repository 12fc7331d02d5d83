import bz2
import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from stages.errors import InputError
from stages.model.sources import HubText, PackageFile
from stages.text.corpus import Corpus, remainder, windows
from stages.text.documents import Piece
from stages.text.hub import read_hub
from stages.text.joined import Read, check_disjoint, fingerprints, joined
from stages.text.tokenising import tokenise
from stages.text.wikipedia import clean, extract_wikipedia

DOCUMENTS = ["One = 1.\n", "", "Zwei ≠ 2."]
WHEEL = PackageFile("some-wheel", "1.0", "text.bz2", "0" * 64)


def corpus(**fields):
    plain = {"name": "some", "package": None, "hub": None, "path": None, "calibration_path": None}
    return Corpus(**{**plain, "field": "text", "join": "\n\n", **fields})


def test_own_files_win_over_packages():
    both = corpus(package=WHEEL, path="/e.txt", calibration_path="/c.txt")
    assert [str(both.origin("evaluation")), str(both.origin("calibration"))] == ["/e.txt", "/c.txt"]
    assert corpus(package=WHEEL).origin("calibration") == WHEEL


@pytest.mark.parametrize("source", [None, WHEEL])
def test_one_file_serves_one_purpose(source):
    with pytest.raises(InputError, match=r"corpus.some.calibration_path=FILE"):
        corpus(package=source, path="/e.txt").origin("calibration")
    with pytest.raises(InputError, match="two texts"):
        corpus(path="/e.txt", calibration_path="/e.txt")
    with pytest.raises(InputError, match=r"corpus.some.path=FILE"):
        corpus().origin("evaluation")


def put_together(*pieces, join="+"):
    read = Read()
    return "".join(joined("mine", (Piece(*piece) for piece in pieces), join, read)), read


def test_null_rows_are_left_out_and_counted():
    text, read = put_together(("a",), (None,), ("",), (None,), ("b",))
    assert text == "a++b" and (read.rows, read.null) == (5, 2)
    assert put_together((None,), ("a",))[0] == "a"
    with pytest.raises(InputError, match="mine: '7' is no text"):
        put_together(("a",), (7,))


def test_a_document_in_pieces_is_one():
    text, read = put_together(("a", True), ("b", True), ("c",), ("d",))
    assert text == "abc+d" and read.rows == 2


def test_a_long_document_is_known_by_its_beginning():
    """So that it is known before all of it has been read."""
    long, head = "w" * 70_000, [(" " + "w" * 65_600, True), ("x" * 9, False)]
    known = put_together(*head)[1].documents
    assert known == fingerprints([f"  {long}"]) == fingerprints([long + "x"])
    assert known != fingerprints(["w" * 65_535 + "x"]) and len(known) == 1


def test_how_a_text_is_put_together_is_said(tmp_path):
    (tmp_path / "a.raw").write_text("a\nb")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    plain = str(tmp_path / "a.raw")
    said = {
        rows: corpus(path=plain, rows=rows).protocol("evaluation") for rows in ("lines", "document")
    }
    assert said == {
        "lines": "lines (corpus.some.rows=lines), joined by '\\n\\n'",
        "document": "files as they stand (corpus.some.rows=document), joined by '\\n\\n'",
    }
    for source in ({"package": WHEEL}, {"hub": hub_text()}, {"path": str(tmp_path / "a.jsonl")}):
        told = corpus(**source, rows="lines", join=" ").protocol("evaluation")
        assert told == "rows of a table, joined by ' '"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": "line"}, "corpus.some.rows='line': choose document, lines or sentences"),
        ({"path": 5}, "corpus.some.path=5 is no text"),
        ({"join": None}, "corpus.some.join=None is no text"),
        ({"hub": {"id": "org/text"}}, "corpus.some.hub=.*HubText"),
    ],
)
def test_fields_of_another_kind_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        corpus(**fields)


def test_shared_documents_are_refused_and_short_ones_are_not():
    long = "w" * 200
    seen = fingerprints(["== A ==", long])
    check_disjoint(seen, fingerprints(["== A ==", long + "!"]))
    with pytest.raises(InputError, match="1 documents"):
        check_disjoint(seen, fingerprints(["b", f" {long}\n"]))


def test_documents_become_one_text(byte_tokenizer):
    ids = tokenise(DOCUMENTS, "\n\n", byte_tokenizer)
    assert ids.dtype == torch.int64 and ids.shape == (len("\n\n".join(DOCUMENTS).encode()),)
    assert byte_tokenizer.decode(ids) == "\n\n".join(DOCUMENTS)


def test_a_begin_token_comes_once_and_only_from_the_tokenizer(byte_tokenizer):
    adding = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    without = tokenise(DOCUMENTS, " ", byte_tokenizer)
    assert tokenise(DOCUMENTS, " ", adding).tolist() == [256, *without.tolist()]


def test_windows_are_the_first_and_do_not_overlap():
    assert windows(torch.arange(10), 2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert windows(torch.arange(10), 2, 3, skip=4).tolist() == [[4, 5, 6], [7, 8, 9]]


def test_all_windows_are_those_that_are_whole():
    ids = torch.arange(11)
    assert windows(ids, "all", 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert remainder(ids, 3) == 2
    assert windows(ids, "all", 3, begin=0).tolist() == [[0, 2 * n + 1, 2 * n + 2] for n in range(5)]
    assert remainder(ids, 3, begin=0) == 0 and remainder(ids, 3, begin=7) == 1
    assert windows(ids[:6], "all", 3).equal(windows(ids[:6], 2, 3)) and remainder(ids[:6], 3) == 0
    with pytest.raises(InputError, match="has 11 tokens, 1 windows of 12 tokens need 12"):
        windows(ids, "all", 12)


def test_windows_of_a_text_on_disk_are_no_copy():
    ids = torch.arange(10, dtype=torch.int32)
    assert windows(ids, "all", 3).data_ptr() == ids.data_ptr()


def test_a_begin_token_stands_in_front_of_every_window_once():
    ids = torch.arange(10)
    assert windows(ids, 2, 3, begin=77).tolist() == [[77, 0, 1], [77, 2, 3]]
    assert windows(ids, 2, 3, skip=4, begin=77).tolist() == [[77, 4, 5], [77, 6, 7]]
    assert windows(ids, 2, 3, begin=0).tolist() == [[0, 1, 2], [0, 3, 4]]  # the tokenizer's own
    with pytest.raises(InputError, match="5 windows of 2 tokens after 1 need 11"):
        windows(ids, 5, 3, skip=1, begin=77)


@pytest.mark.parametrize(("count", "length", "skip", "needed"), [(1, 11, 0, 11), (3, 3, 2, 11)])
def test_a_short_corpus_says_what_it_has_and_needs(count, length, skip, needed):
    with pytest.raises(InputError, match=f"c4 has 10 tokens.* need {needed};"):
        windows(torch.arange(10), count, length, skip, name="c4")
    with pytest.raises(InputError, match="has 0 tokens"):
        windows(torch.arange(0), count, length, skip)


@pytest.mark.parametrize("bad", [(0, 8, 0), (1, 1, 0), (1, 8, -1)])
def test_windows_need_a_sensible_size(bad):
    with pytest.raises(InputError, match="needs 1 or more"):
        windows(torch.arange(10), *bad)


MARKUP = """{{Infobox | a = {{nested|x}} }}
'''Alpha''' is the [[letter (alphabet)|first letter]] of all.<ref name="a">A book<br></ref>
[[File:A.png|thumb|A caption with a [[link]]]] It is seen in [[CSI: Miami]].

{| class="wikitable"
| cell
|}
== History ==
It is old: <math>x^2</math> years.

== References ==
* A list of books
[[Category:Letters]]
[[de:Alpha]]
"""


def test_markup_becomes_prose():
    assert clean(MARKUP) == (
        "Alpha is the first letter of all.\n\nIt is seen in CSI: Miami."
        "\n\nHistory\n\nIt is old: years."
    )


def dump(tmp_path, pages):
    xml = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"
        for title, ns, extra, text in pages
    )
    path = tmp_path / "dump.bz2"
    path.write_bytes(bz2.compress(f'<mediawiki xmlns="http://m/">{xml}</mediawiki>'.encode()))
    return path


def test_articles_are_split_by_their_titles_alone(tmp_path):
    titles = [f"Title {number}" for number in range(40)]
    pages = [(title, 0, "", f"Text of {title}.") for title in titles]
    pages += [
        ("Old name", 0, '<redirect title="x"/>', "a redirect"),
        ("Talk:A", 1, "", "talk"),
        ("Empty", 0, "", "{{only a template}}"),
    ]
    extract_wikipedia(dump(tmp_path, pages), tmp_path)
    found = {}
    for split in ("calibration", "evaluation"):
        rows = map(json.loads, (tmp_path / f"{split}.jsonl").read_text().splitlines())
        found[split] = {row["title"]: row["text"] for row in rows}
    odd = {title for title in titles if hashlib.sha256(title.encode()).digest()[0] % 2}
    assert set(found["evaluation"]) == odd and 5 < len(odd) < 35
    assert set(found["calibration"]) == set(titles) - odd
    assert found["calibration"] | found["evaluation"] == {t: f"Text of {t}." for t in titles}


def test_a_cut_dump_is_an_error(tmp_path):
    path = dump(tmp_path, [("A", 0, "", "Text " * 1000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="complete bz2 dump"):
        extract_wikipedia(path, tmp_path)


def hub_text(**fields):
    plain = {
        "id": "org/text",
        "config": None,
        "revision": "main",
        "split": "test",
        "calibration_split": "train",
    }
    return HubText(**{**plain, "field": "text", "documents": 3, **fields})


@pytest.fixture
def published(monkeypatch):
    """Publishes rows at commit c0ffee, whichever revision is asked for."""

    def publish(rows, commit="c0ffee"):
        def builder(path, *, name, revision):
            assert path == "hf://datasets/org/text" and name is None and revision == "c0ffee"
            return SimpleNamespace(hash=commit, as_streaming_dataset=lambda split: rows(split))

        monkeypatch.setattr("datasets.load_dataset_builder", builder)
        monkeypatch.setattr("stages.text.hub.commit", lambda *_: "c0ffee")

    return publish


def test_hub_text_takes_the_first_documents_of_each_split(published):
    published(lambda split: ({"text": f"{split} {number}"} for number in range(100)))

    def read(text, purpose):
        return [piece.text for piece in read_hub(text, purpose)]

    assert read(hub_text(), "evaluation") == [f"test {n}" for n in range(3)]
    assert read(hub_text(), "calibration") == [f"train {n}" for n in range(3)]
    same = hub_text(split="train")
    assert read(same, "evaluation") == [f"train {n}" for n in range(3)]
    assert read(same, "calibration") == [f"train {n}" for n in range(3, 6)]
    assert len(read(hub_text(documents=None), "evaluation")) == 100


def test_without_network_one_line_says_what_to_give(published):
    def rows(split):
        yield {"text": "read before"}
        raise ConnectionError("no route\nto the hub")

    published(rows)
    pieces = read_hub(hub_text(), "calibration")
    assert next(pieces).text == "read before"
    with pytest.raises(InputError, match=r"org/text.*no route.*calibration_path=FILE") as error:
        next(pieces)
    assert "\n" not in str(error.value)


def test_a_field_that_the_rows_lack_is_named(published):
    published(lambda split: iter([{"sentence": "one"}]))
    with pytest.raises(InputError, match=r"\(test\) .*it has no field 'text', it has sentence;"):
        next(read_hub(hub_text(), "evaluation"))


def test_another_commit_than_the_one_that_is_asked_for_is_refused(published):
    published(lambda split: iter([{"text": "of another commit"}]), commit="older")
    with pytest.raises(InputError, match="commit c0ffee is not at hand; without it give"):
        next(read_hub(hub_text(), "evaluation"))


def test_hub_text_keeps_calibration_and_evaluation_apart():
    with pytest.raises(InputError, match="two splits"):
        hub_text(split="train", documents=None)
    with pytest.raises(InputError, match="1 or more"):
        hub_text(documents=0)
