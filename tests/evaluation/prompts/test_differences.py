"""Marked differences: nothing is lost, and what is marked is what differs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compress.evaluation.prompts.differences import differences

TEXT = st.text(alphabet="ab ,\n<é", max_size=40)


def joined(pieces):
    return "".join(piece.text for piece in pieces)


@given(TEXT, TEXT)
def test_each_side_is_its_text_and_what_is_unmarked_is_on_both(first, second):
    sides = differences(first, second)
    assert (joined(sides[0]), joined(sides[1])) == (first, second)
    common = ["".join(piece.text for piece in side if not piece.differs) for side in sides]
    assert common[0] == common[1]
    assert all(piece.text for side in sides for piece in side)


@given(TEXT)
def test_equal_texts_have_no_mark(text):
    assert not any(piece.differs for side in differences(text, text) for piece in side if piece.text.strip())


def test_a_changed_word_is_marked_and_its_neighbours_are_not():
    source, compressed = differences("the river Rhine flows", "the river Seine flows north")
    assert [(piece.text, piece.differs) for piece in source] == [
        ("the river ", False),
        ("Rhine", True),
        (" flows", False),
    ]
    assert [piece.text for piece in compressed if piece.differs] == ["Seine", " north"]


def test_a_space_between_two_changed_words_is_not_agreement():
    assert [piece.text for piece in differences("ripe pears.", "green plums.")[0] if piece.differs] == ["ripe pears"]
