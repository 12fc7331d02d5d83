import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from stages.errors import InputError
from stages.text import documents
from stages.text.documents import Piece, check_head, read_pieces, shards

DOCUMENTS = ["One = 1.\n", "", 'Zwei, "≠" 2.']
WIKITEXT = next(
    (found for p in Path(__file__).parents if (found := p / "shared/data/wikitext2").is_dir()), None
)


def read_documents(path, field, rows="document"):
    """Each whole, None for a row whose text is null."""
    whole, going_on = [], False
    for text, more in read_pieces(path, field, rows):
        if going_on:
            whole[-1] += text
        else:
            whole.append(text)
        going_on = more
    return whole


def lines(texts=DOCUMENTS):
    return "".join(json.dumps({"text": text, "id": 7}) + "\n" for text in texts)


def write(path, texts=DOCUMENTS):
    """The documents in column `text` of a file, whose name says in which format."""
    rows = pd.DataFrame({"text": texts, "id": 7})
    match path.suffixes[0]:
        case ".parquet":
            rows.to_parquet(path)
        case ".csv":
            rows.to_csv(path, index=False)
        case ".array":
            path.write_text(json.dumps(rows.to_dict("records"), indent=1))
        case _:
            content = lines(texts).encode()
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "array.json", "parquet", "csv", "JSONL"]
)
def test_every_format_holds_the_same_documents(tmp_path, suffix):
    assert read_documents(write(tmp_path / f"text.{suffix}"), "text") == DOCUMENTS


def test_plain_text_is_one_document_or_one_a_line(tmp_path):
    (tmp_path / "a.raw").write_text(" = A = \n \n b <unk> \n\nc", encoding="utf-8")
    read = {
        rows: read_documents(tmp_path / "a.raw", "text", rows) for rows in ("document", "lines")
    }
    assert read["document"] == [" = A = \n \n b <unk> \n\nc"]
    assert read["lines"] == [" = A = \n", "", " b <unk> \n", "", "c"]
    sentences = read_documents(tmp_path / "a.raw", "text", "sentences")
    assert sentences == ["= A =", "", "b <unk>", "", "c"]


@pytest.mark.parametrize("length", [0, 1, 6, 7, 13, 14, 15, 30])
def test_a_long_file_comes_in_pieces_of_one_document(tmp_path, monkeypatch, length):
    monkeypatch.setattr(documents, "_CHARACTERS", 7)
    text = "ab\n\ncd é≠ 東京 ef\r\ngh 12 34 56 78"[:length]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    pieces = list(read_pieces(tmp_path / "a.txt", "text"))
    assert "".join(piece.text for piece in pieces) == text.replace("\r\n", "\n").replace("\r", "\n")
    assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert len(pieces) == max(1, -(-len("".join(p.text for p in pieces)) // 7))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_read_a_row_at_a_time(tmp_path, monkeypatch, size, indent):
    monkeypatch.setattr(documents, "_CHARACTERS", size)
    texts = ["a, ] [ b", "", '"}', "\\", None, "é" * 70]
    for rows in (texts, []):
        content = json.dumps([{"text": text, "more": [1, {}]} for text in rows], indent=indent)
        (tmp_path / "a.json").write_text(f"  \n{content}\n ", encoding="utf-8")
        assert read_documents(tmp_path / "a.json", "text") == rows
    # Rows in front of what is wrong have been read by then.
    (tmp_path / "a.json").write_text('[{"text": "a"}' + " " * 9 + ', {"text": "b"}, {"text": "c"')
    pieces = read_pieces(tmp_path / "a.json", "text")
    assert [next(pieces), next(pieces)] == [Piece("a"), Piece("b")]


def test_a_mark_in_front_is_no_text(tmp_path):
    for name, content in (
        ("a.txt", "one"),
        ("a.csv", "text\none\n"),
        ("a.jsonl", '{"text": "one"}'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_documents(tmp_path / name, "text") == ["one"], name


def test_null_rows_stay_apart_from_empty_ones(tmp_path):
    rows = ["a", None, "", "NA"]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert read_documents(tmp_path / name, "text") == rows, name
    (tmp_path / "a.csv").write_text('text,id\n"a\nb",1\n,2\nNA,3\n007,4\n')  # csv has no null
    assert read_documents(tmp_path / "a.csv", "text") == ["a\nb", "", "NA", "007"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json.gz", "csv"])
def test_a_folder_is_its_shards_in_order(tmp_path, suffix):
    (tmp_path / "README.md").write_text("what it is")
    (tmp_path / ".cache").mkdir()
    for number in (1, 0, 2):
        write(tmp_path / f"train-0000{number}-of-00003.{suffix}", DOCUMENTS[number : number + 1])
    assert read_documents(tmp_path, "text") == DOCUMENTS
    assert [file.name[:11] for file in shards(tmp_path)] == [f"train-0000{n}" for n in range(3)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no file with one of the suffixes .txt"),
        (["a.jsonl", "b.csv"], "more than one text .a.jsonl, b.csv."),
        (["test-00000-of-00001.jsonl", "train-00000-of-00001.jsonl"], "more than one.*test, train"),
        (
            ["c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"],
            "more than one text .c4-train, c4-validation.",
        ),
    ],
)
def test_a_folder_that_is_not_one_text_is_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        shards(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "does not exist"),
        ("a.doc", b"x", "suffixes"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}\n', "line 3 has no text.*'text'.*body"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has no text in field 'text', it has 5"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is no JSON"),
        ("a.json", b'[{"text": "x"}, {"body": "x"}]', "row 2 has no text"),
        ("a.json", b'[{"text": "x"}, ', "cannot be read"),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', "cannot be read: no comma"),
        ("a.json", b'[{"text": "x"},]', "cannot be read"),
        ("a.json", b'[{"text": "x"}] []', "something stands behind the end"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt", b"\xff\xfe", "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.csv", b"body\nx\n", "no column 'text', it has body"),
        ("a.csv", b"text,id\nx,1\ny,2,3\n", "Row #3: Expected 2 columns, got 3"),
        ("a.csv", b"text,id\nx,1\ny\n", "Row #3: Expected 2 columns, got 1"),
        ("a.csv", b"", "cannot be read"),
    ],
)
def test_an_unusable_file_is_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_documents(tmp_path / name, "text")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_parquet_file_without_the_column_names_what_it_has(tmp_path):
    pd.DataFrame({"body": ["x"], "text": [5]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"'story'.*body, text"):
        read_documents(tmp_path / "a.parquet", "story")
    with pytest.raises(InputError, match=r"row 1 has no text in field 'text', it has 5"):
        read_documents(tmp_path / "a.parquet", "text")


def test_the_head_of_a_text_says_whether_there_is_one(tmp_path):
    for rows in (["", "x"], [None, "x"]):
        check_head(write(tmp_path / "a.jsonl", rows), "text", "document")
    for rows in ([], [""], [None]):
        with pytest.raises(InputError, match="is empty"):
            check_head(write(tmp_path / "a.jsonl", rows), "text", "document")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nno JSON')  # behind the head
    check_head(tmp_path / "a.jsonl", "text", "document")


@pytest.mark.skipif(WIKITEXT is None, reason="evaluation data not present")
def test_the_raw_file_of_wikitext_has_the_rows_of_the_data_set(byte_tokenizer):
    raw = read_documents(WIKITEXT / "raw/wiki.test.raw", "text", "lines")
    rows = read_documents(WIKITEXT / "test.jsonl", "text")
    assert len(rows) == 4358 and raw == rows
    (whole,) = read_documents(WIKITEXT / "raw/wiki.test.raw", "text")
    assert whole != "\n\n".join(rows)  # another text, of another protocol
