"""The chat format against the published template, run by transformers' jinja."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemscope.core.errors import InputError
from gemscope.models.chat import Turn, render
from gemscope.models.gemma import Gemma
from unit.models.tiny_gemma import build, gemma, tokenizer

G = gemma()
NAMES = {"user": "user", "model": "assistant", "system": "system"}
words = st.text(st.sampled_from("ab ü\n🙂"), min_size=1, max_size=8).filter(lambda text: text.strip() != "")


def _published(turns: list[Turn], answer: bool) -> str:
    messages = [{"role": NAMES[turn.role], "content": turn.text} for turn in turns]
    return tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)


@settings(max_examples=100, deadline=None)
@given(st.lists(words, min_size=1, max_size=4), st.none() | words, st.booleans())
def test_render_equals_the_published_template(texts: list[str], system: str | None, answer: bool) -> None:
    turns = [Turn("user" if i % 2 == 0 else "model", text) for i, text in enumerate(texts)]
    if system is not None:
        turns = [Turn("system", system), *turns]
    ends_with_user = turns[-1].role == "user"
    assert "<bos>" + render(turns, answer=answer) == _published(turns, answer and ends_with_user)


@settings(max_examples=50, deadline=None)
@given(words, words)
def test_chat_tokens_equal_those_of_the_tokenizers_own_template(question: str, reply: str) -> None:
    turns = [Turn("user", question), Turn("model", reply), Turn("user", "and hello")]
    messages = [{"role": NAMES[turn.role], "content": turn.text} for turn in turns]
    ids = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert G.chat(turns).ids.tolist() == ids


def test_a_str_is_one_user_turn_and_roles_are_marked() -> None:
    tokens = G.chat(" hello world ")
    assert tokens.text == "<start_of_turn>user\nhello world<end_of_turn>\n<start_of_turn>model\n"
    content = [p for p, r in zip(tokens.pieces, tokens.roles, strict=True) if r == "content"]
    assert content == ["hello", "▁world"]
    assert G.chat("hello", answer=False).text == "<start_of_turn>user\nhello<end_of_turn>\n"


def test_system_text_goes_untrimmed_before_the_first_user_turn() -> None:
    text = render([Turn("system", " be brief "), Turn("user", " hi ")], answer=False)
    assert text == "<start_of_turn>user\n be brief \n\nhi<end_of_turn>\n"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no user turn"),
        ([Turn("system", "x")], "no user turn"),
        ([Turn("model", "x")], "turn 1 has role 'model'"),
        ([Turn("user", "x"), Turn("user", "y")], "turn 2 has role 'user'"),
        ([Turn("user", "x"), Turn("system", "y")], "turn 2 has role 'system'"),
        ([Turn("user", " \n ")], "turn 1 .* empty"),
        ("", "empty"),
    ],
)
def test_conversations_that_cannot_be_rendered(turns: list[Turn] | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        G.chat(turns)


def test_is_chat_follows_the_template() -> None:
    assert G.is_chat
    from copy import deepcopy

    plain = deepcopy(tokenizer())
    plain.chat_template = None
    assert not Gemma.wrap(build("gemma3"), plain, name="pt", check=False).is_chat


def test_without_turn_markers_there_is_no_chat() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={"<bos>": 0, "a": 1}, merges=[]))
    bare = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>")
    with pytest.raises(InputError, match="no turn markers"):
        Gemma.wrap(build("gemma3"), bare, name="bare", check=False).chat("a")
