import pytest

from gemscope.core.errors import reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n  two\t three"), "one two three"),
        (OSError(), "OSError"),
        (RuntimeError(" \n "), "RuntimeError"),
        (RuntimeError("x" * 5000), "x" * 200),
    ],
)
def test_the_words_of_a_library_are_cut_to_a_part_of_a_sentence(error, said):
    assert reason(error) == said
