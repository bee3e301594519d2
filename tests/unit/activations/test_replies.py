"""Replies are the model's own, and a run that is stopped gives the same file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gemscope.activations.replies import ReplyConfig, asked, write_replies
from gemscope.activations.sources import Documents, JsonLines
from gemscope.core.errors import InputError
from gemscope.models.chat import Turn, render
from gemscope.models.gemma import Gemma
from gemscope.suites.corpus import GeneratedText

GREEDY = ReplyConfig(documents=7, max_new_tokens=12, batch=3, temperature=0.0)


@pytest.fixture(scope="module")
def it() -> Gemma:
    return Gemma.load("microworld-it")


def test_what_is_asked() -> None:
    chat = (Turn("system", "Be brief."), Turn("user", "One?"), Turn("model", "1"), Turn("user", "Two?"))
    assert asked((*chat, Turn("model", "2"))) == chat
    assert asked("Two?") == (Turn("user", "Two?"),)
    rendered = render((*chat[1:], Turn("model", "2")))
    assert asked(rendered) == chat[1:]
    assert asked((Turn("model", "2"),)) == ()


def test_replies_are_those_of_the_model_asked_alone(it: Gemma, tmp_path: Path) -> None:
    source = GeneratedText(True, "heldout", running=False)
    seen: list[tuple[int, int]] = []
    count = write_replies(it, source, tmp_path / "x.jsonl", GREEDY, lambda *now: seen.append(now))
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()]
    assert count == len(lines) == 7
    assert seen == [(3, 7), (6, 7), (7, 7)]
    for line, document in zip(lines, source.read(0, 7), strict=True):
        turns = asked(document)
        alone = it.generate([it.chat(turns)], max_new_tokens=12)[0].text
        assert [m["content"] for m in line["messages"]] == [*[t.text for t in turns], alone]
        assert line["messages"][-1]["role"] == "assistant"
    read = JsonLines((tmp_path / "x.jsonl",))
    assert read.count() == 7  # a harvest reads them
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl"]


@pytest.mark.parametrize("cut", [0, 5, -1])
def test_a_stopped_run_goes_on_to_the_same_file(cut: int, it: Gemma, tmp_path: Path) -> None:
    source = GeneratedText(True, "train", running=False)
    config = replace(GREEDY, temperature=1.0)
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    write_replies(it, source, whole, config)

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_replies(it, source, stopped, config, stop)
    part = tmp_path / "stopped.jsonl.part"
    assert not stopped.exists()
    if cut:
        with part.open("ab") as file:  # what kill -9 may leave
            file.write(b'{"messages": []}\n{"done": 9}'[:cut])
    write_replies(it, source, stopped, config)
    assert stopped.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_what_cannot_be_answered_is_left_out(it: Gemma, tmp_path: Path) -> None:
    source = Documents(["", "Where is Paris?", "x " * 5000, (Turn("model", "no question"),)])
    assert write_replies(it, source, tmp_path / "x.jsonl", replace(GREEDY, documents=None)) == 1


def test_mistakes_are_named(it: Gemma, tmp_path: Path) -> None:
    endless, some = GeneratedText(True), Documents(["Where is Paris?"])
    with pytest.raises(InputError, match="never ends"):
        write_replies(it, endless, tmp_path / "x.jsonl", replace(GREEDY, documents=None))
    (tmp_path / "x.jsonl.part").write_bytes(b'{"done": 1}\n')
    with pytest.raises(InputError, match="other text or settings"):
        write_replies(it, some, tmp_path / "x.jsonl", GREEDY)
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(InputError, match="there already"):
        write_replies(it, some, tmp_path / "x.jsonl", GREEDY)
