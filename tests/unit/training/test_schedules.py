"""Schedule values at named steps."""

import pytest

from gemscope.training.schedules import cosine_warmup, geometric, linear_decay, linear_warmup


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.1), (250, 0.1 + 0.9 * (1 - 2**-0.5) / 2), (500, 0.55), (1000, 1.0), (9999, 1.0)]
)
def test_cosine_warmup(step: int, value: float) -> None:
    assert cosine_warmup(step, 1000.0) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("step", "value"), [(0, 0.0), (250, 0.25), (999, 0.999), (1000, 1.0), (5000, 1.0)])
def test_linear_warmup(step: int, value: float) -> None:
    assert linear_warmup(step, 1000.0) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("step", "value"), [(0, 1.0), (800, 1.0), (900, 0.5), (999, 0.005), (1000, 0.0)])
def test_linear_decay(step: int, value: float) -> None:
    assert linear_decay(step, 1000, 200.0) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("step", "value"), [(0, 80.0), (250, 80 / 2**0.5), (500, 40.0), (1000, 20.0), (4000, 20.0)])
def test_geometric(step: int, value: float) -> None:
    assert geometric(step, 80.0, 20.0, 1000.0) == pytest.approx(value, abs=1e-12)


def test_a_length_of_zero_switches_a_schedule_off() -> None:
    assert (cosine_warmup(0, 0.0), linear_warmup(0, 0.0), linear_decay(0, 10, 0.0)) == (1.0, 1.0, 1.0)
    assert geometric(0, 8.0, 2.0, 0.0) == 2.0
