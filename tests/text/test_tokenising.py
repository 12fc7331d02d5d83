"""The ids of a text in pieces are those of the whole text, whatever stands where it is cut."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from stages.errors import InputError
from stages.text import tokenising
from stages.text.tokenising import Pieces, token_ids, tokenise
from tests.text.token_kinds import KINDS, at_once, text, tokenizer

SMALL = (Pieces(100, 60, 1), Pieces(160, 120, 2), Pieces(700, 300, 4))
WORDS = ("gpt2", "llama3", "smollm", "unigram", "wordpiece")  # that their pre-tokenizer splits


def in_pieces(kind: str, parts: list[str], pieces: Pieces) -> tuple[list[int], int]:
    """The ids, and in how many pieces they came."""
    found = list(token_ids(parts, tokenizer(kind), pieces))
    return np.concatenate(found).tolist(), len(found) - 2


@pytest.mark.parametrize("kind", KINDS)
def test_ids_in_pieces_are_those_in_one(kind):
    number = 0
    for seed in range(12):
        whole = text(1000 + seed, 3000)
        expected = at_once(kind, [whole])
        for pieces in SMALL:
            ids, cut = in_pieces(kind, [whole[:17], "", whole[17:]], pieces)
            assert ids == expected, (seed, pieces)
            number += cut
    assert number > 400


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_overlap_they_would_not_be(kind, monkeypatch):
    """The texts are hard to cut: pieces that are put together at any character have other ids."""

    def anywhere(left, right, shift, *_):
        return left.tail(shift)[0], 0

    monkeypatch.setattr(tokenising, "_cut", anywhere)
    for seed in range(3):
        whole = text(1000 + seed, 3000)
        assert in_pieces(kind, [whole], SMALL[0])[0] != at_once(kind, [whole])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "letter", ["a", "aa", " ", "\n", " \n", "1", "é", "e\u0301", "</s>", "東", "👩‍👩‍👧"]
)
def test_long_runs_are_cut_at_the_right_places_or_not_at_all(kind, letter):
    for front, run in (("b ", 397), ("", 400), ("x1", 403)):
        whole = front + letter * run + " the spike 2024"
        assert in_pieces(kind, [whole], SMALL[0])[0] == at_once(kind, [whole])


@pytest.mark.parametrize("kind", KINDS)
def test_short_texts_are_those_of_the_tokenizer(kind):
    for whole in ("", " ", "a", "\n\n", "the spike"):
        for parts in ([whole], [*whole], []):
            if "".join(parts) == whole:
                assert in_pieces(kind, parts, SMALL[0])[0] == at_once(kind, [whole])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WORDS])
def test_a_text_without_blanks_is_cut_all_the_same(kind):
    whole = "".join(text(seed, 400) for seed in range(5)).translate(
        dict.fromkeys(map(ord, " \t\n\r"))
    )
    ids, number = in_pieces(kind, [whole], SMALL[1])
    assert ids == at_once(kind, [whole]) and number > 5


def test_special_tokens_stand_once_in_front_and_at_the_end():
    whole = text(7, 2000).replace("<", "").replace(">", "")
    found = {kind: in_pieces(kind, [whole], SMALL[0])[0] for kind in ("llama2", "unigram", "gpt2")}
    begin, end = (tokenizer("llama2").convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    assert [found["llama2"].index(begin), found["llama2"].count(begin)] == [0, 1]
    assert [found["unigram"].index(end), found["unigram"].count(end)] == [
        len(found["unigram"]) - 1,
        1,
    ]
    assert not {begin, end} & {*found["gpt2"]} and end not in found["llama2"]


def test_a_text_is_read_no_further_than_its_ids_are_asked_for():
    taken: list[str] = []

    def parts():
        for seed in range(1000):
            taken.append(text(seed, 100))
            yield taken[-1]

    ids = token_ids(parts(), tokenizer("gpt2"), SMALL[1])
    first = np.concatenate([next(ids) for _ in range(4)])
    assert 3 < len(taken) < 12
    assert first.tolist() == at_once("gpt2", taken)[: len(first)]


def test_parts_and_documents_do_not_matter():
    documents = [text(seed, 500) for seed in range(9)]
    joined = "\n\n".join(documents)
    assert tokenise(documents, "\n\n", tokenizer("llama3")).tolist() == at_once("llama3", [joined])
    letters = in_pieces("llama3", list(joined), SMALL[2])
    assert letters == in_pieces("llama3", [joined], SMALL[2]) and letters[1] > 5


def test_what_cannot_be_cut_becomes_one_piece_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(tokenising, "_LONG", 500)
    with caplog.at_level(logging.WARNING):
        ids, number = in_pieces("gpt2", ["a" * 3000], SMALL[0])
    assert ids == at_once("gpt2", ["a" * 3000]) and number == 1
    assert "have no place to cut at" in caplog.text


def test_ids_that_change_as_the_text_goes_on_are_refused(monkeypatch):
    cuts, heads = iter([(30, 3)]), itertools.count()
    monkeypatch.setattr(tokenising, "_cut", lambda *_: next(cuts, None))
    monkeypatch.setattr(tokenising._Encoded, "head", lambda *_: next(heads))
    with pytest.raises(InputError, match="cannot be tokenised in pieces"):
        in_pieces("gpt2", [text(1, 900)], SMALL[0])


def test_a_tokenizer_without_offsets_reads_all_at_once_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(tokenising, "_LONG", 500)
    slow, whole = ByT5Tokenizer(), text(3, 900)
    assert not slow.is_fast
    ids = np.concatenate(list(token_ids([whole[:100], whole[100:]], slow, SMALL[0])))
    assert ids.tolist() == slow(whole)["input_ids"]
    assert "ByT5Tokenizer has no offsets" in caplog.text
