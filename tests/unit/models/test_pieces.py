"""Pieces of the vocabulary as a person reads them."""

import pytest

from gemscope.models.pieces import shown


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ("▁the", "the"),
        ("the", "the"),
        ("▁", "␣"),
        ("▁▁", "␣"),
        ("▁▁▁x", "␣␣x"),
        ("a▁b", "a␣b"),
        ("\n", "↵"),
        ("\n\n", "↵↵"),
        ("\t", "⇥"),
        ("<0x0A>", "↵"),
        ("<0x41>", "A"),
        ("<0xE2>", "<0xE2>"),
        ("<0x00>", "<0x00>"),
        ("<0x7F>", "<0x7F>"),
        ("▁é", "é"),
        ("\u200b", "\\u200b"),
        ("\x1b[31m", "\\u001b[31m"),
        ("", ""),
    ],
)
def test_a_piece_is_one_visible_word(piece, expected):
    assert shown(piece) == expected
    assert all(char.isprintable() and char != " " for char in shown(piece))
