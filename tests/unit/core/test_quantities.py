import pytest

from gemscope.core.quantities import size_text, time_text, work_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.00 kB"),
        (1000, "1.00 kB"),
        (604_307_968, "604 MB"),
        (999_600, "1.00 MB"),
        (15e12, "15.0 TB"),
        (1.26e15, "1.26 PB"),
        (4e24, "4,000 ZB"),
    ],
)
def test_sizes_have_three_digits(count, text):
    assert size_text(count) == text


@pytest.mark.parametrize(("flops", "text"), [(0.5, "0.50 FLOP"), (96.6e12, "96.6 TFLOP"), (999.9e15, "1.00 EFLOP")])
def test_work_has_the_units_of_sizes(flops, text):
    assert work_text(flops) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (119, "119 s"),
        (120, "2.00 min"),
        (7199, "120 min"),
        (7200, "2.00 h"),
        (172_800, "2.00 days"),
        (1234.4 * 86400, "1,234 days"),
    ],
)
def test_time_is_in_the_largest_unit_of_which_there_are_two(seconds, text):
    assert time_text(seconds) == text
