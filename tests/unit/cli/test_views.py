"""What the terminal shows: 80 columns, aligned, complete."""

from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from gemscope.cli import doctor, models, tables
from gemscope.cli import look as view
from gemscope.core.sites import Site
from gemscope.evaluation.concepts import ConceptReport, ConceptScore
from gemscope.evaluation.fidelity import Fidelity
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.splice import SpliceLoss
from gemscope.suites.reading import LatentReading, PositionReading, Reading
from gemscope.suites.suite import Suite


def drawn(what, width: int = 80) -> list[str]:
    """The lines of a terminal of that width."""
    console = Console(width=width, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text().splitlines()


def reading(*positions: PositionReading, answer: str | None = None) -> Reading:
    return Reading("microworld-it", Site("resid_post", 3), 1024, "text", answer, 0.0123, positions)


def position(piece: str, *latents: LatentReading, role: str = "content") -> PositionReading:
    return PositionReading(0, 7, piece, role, len(latents), latents)


LATENT = LatentReading(17, 12.345, 0.876, "country", 0.931, ("France", "Italy", "Spain"))
LONG = LatentReading(
    1023, 9999.5, 1.5, "the_very_long_name_of_a_concept", 0.5, tuple("antidisestablishment" for _ in range(9))
)
NAMELESS = LatentReading(5, 0.04, None, None, 0.0, ("日本", "🙂", "é"))


def test_a_reading_shows_each_token_with_its_latents_below_one_another():
    lines = drawn(view.reading(reading(position("▁Paris", LATENT, NAMELESS), position("is")), 80))
    assert lines[0] == "microworld-it · resid_post.3 · 1,024 latents · FVU 0.012 on this text"
    assert lines[2] == "token        latent    act of max  concept                promotes"
    assert lines[3] == "Paris            17  12.35    88%  country 93%            France Italy Spain"
    assert lines[4] == "                  5   0.04      –  —                      日本 🙂 é"
    assert lines[5] == "is                –  no latent is active"


def test_no_line_of_a_reading_is_wider_than_the_terminal():
    rows = [position("▁supercalifragilistic", LONG, LATENT), position("🙂🙂🙂🙂🙂🙂🙂🙂🙂", NAMELESS)]
    for width in (60, 80, 120):
        lines = drawn(view.reading(reading(*rows, answer="word " * 60), width), width)
        assert max(cell_len(line) for line in lines) <= width
        starts = [line for line in lines if "FVU" not in line and ("93%" in line or "50%" in line)]
        assert starts
    assert any("supercalifr… " in line for line in lines)


def test_a_chat_shows_the_answer_and_whose_turn_it_is():
    marks = [
        position("<bos>", role="special"),
        position("<start_of_turn>", role="special"),
        position("user", role="template"),
        position("\n", role="template"),
        position("hello", LATENT),
        position("<end_of_turn>", role="special"),
        position("\n", role="template"),
        position("<start_of_turn>", role="special"),
        position("model", role="template"),
        position("\n", role="template"),
        position("Paris", LATENT),
    ]
    lines = drawn(view.reading(reading(*marks, answer="Paris\nis it"), 80))
    assert lines[2] == "answer: Paris is it"
    assert [line.split()[1] for line in lines if line.startswith("──")] == ["user", "model"]
    assert all(cell_len(line) == 80 for line in lines if line.startswith("──"))
    assert [line.split()[0] for line in lines[5:] if line and not line.startswith("──")] == ["hello", "Paris"]


def evaluation(layer: int, concepts: bool = True) -> Evaluation:
    score = ConceptScore("country", 50, 0.95, 1, 0.9, 1, False, 0.5)
    low = ConceptScore("city", 50, 0.85, 1, 0.9, 1, False, 0.5)
    report = ConceptReport(1000, (score, low), {}, (None,) * 4, (0.0,) * 4, (0.0,) * 4)
    return Evaluation(
        "microworld-it",
        Site("resid_post", layer),
        4,
        Fidelity(40000, 19.96, 0.03124, 1.0, 0.99, 0.98, (0, 10, 400, 5)),
        SpliceLoss(12000, 1.0, 1.0102, 5.0, 3.0),
        report if concepts else None,
        {},
    )


def test_the_table_of_measures_has_a_line_per_dictionary():
    lines = drawn(tables.evaluations([evaluation(0), evaluation(11, concepts=False)], 20.0))
    assert lines[0].split("  ")[0] == "site"
    assert lines[1].split() == ["resid_post.0", "20.0", "0.0312", "0.0102", "99.5%", "1/4", "1/2", "0/0"]
    assert lines[2].split() == ["resid_post.11", "20.0", "0.0312", "0.0102", "99.5%", "1/4", "–", "–"]
    assert any("(target 20), over 40,000 held-out tokens" in line for line in lines)
    assert max(map(cell_len, lines)) <= 80


@pytest.mark.parametrize(
    ("model", "folder", "expected"),
    [
        ("microworld-it", None, "  gemscope look --chat"),
        ("microworld-pt", None, "  gemscope feature --model microworld-pt resid_post.2/0"),
        ("microworld-it", Path("here"), "  gemscope look --suite here --chat"),
    ],
)
def test_the_next_steps_name_the_suite_only_where_needed(model, folder, expected):
    suite = Suite(Path("suites/x"), model, None, (Site("resid_post", 2),), {})
    lines = drawn(tables.next_steps(suite, model, folder, chat=model.endswith("it")))
    assert any(line.startswith(expected) for line in lines)
    assert any("--chat" in line for line in lines) == model.endswith("it")


def test_the_models_fit_and_are_all_of_gemma_2_and_3():
    lines = drawn(models.table())
    assert lines[0].split() == ["model", "layers", "d_model", "class", "here"]
    assert [line.split()[-1] for line in lines if line.startswith("microworld")] == ["yes", "yes"]
    assert max(map(cell_len, lines)) <= 80
    for size in ("270m", "1b-pt", "4b-it", "12b-pt", "27b-it"):
        assert any(f"google/gemma-3-{size}" in line for line in lines)


def test_the_doctor_names_versions_devices_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor.huggingface_hub, "get_token", lambda: None)
    lines = drawn(doctor.report())
    text = "\n".join(lines)
    for word in ("python", "torch", "transformers", "cores", "fp32 bf16 fp64", "free", "hf auth login"):
        assert word in text
    assert max(map(cell_len, lines)) <= 100
