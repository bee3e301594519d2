"""``gemscope attend``, ``lens``, ``attribute`` and ``headlines``: what happens inside the model that reads a text."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gemscope.lens.heads import HeadScores, Pair
    from gemscope.lens.result import Draw, Result
    from gemscope.lens.trace import Microscope
    from gemscope.models.gemma import Gemma
    from gemscope.models.tokens import Tokens

Text = Annotated[str | None, typer.Argument(help="The text; standard input when absent or '-'.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Built-in name, model folder or hub id.", show_default="microworld-it"),
]
SuiteFolder = Annotated[
    Path | None, typer.Option("--suite", "-s", help="Folder of a suite.", show_default="suites/MODEL")
]
Chat = Annotated[bool, typer.Option("--chat", help="Take the text as a user's turn.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Also write .json, .npz, .svg, .png, .pdf or .html.", show_default=False),
]
Wanted = Annotated[
    str | None, typer.Option("--target", help="Next token asked about.", show_default="the model's answer")
]
Against = Annotated[str | None, typer.Option("--other", help="Token it is compared with.", show_default="none")]
Samples = Annotated[
    int | None, typer.Option("--null", help="Random words beside an edit; 0: none.", min=0, show_default="16")
]
Shown = Annotated[
    int | None, typer.Option("--top", "-k", help="Heads, keys or readings shown.", min=1, show_default="4 to 10")
]
Unit = Literal["weight", "written", "effect"]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (attend, lens, attribute, headlines):
        app.command()(command)


def attend(
    text: Text = None,
    edit: Annotated[
        str | None, typer.Option("--edit", "-e", help="Change a word, word=other: what moves?", show_default=False)
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Rank heads: previous, induction, first, self, entropy, distance.", show_default=False),
    ] = None,
    head: Annotated[str | None, typer.Option(help="One head, layer.head: 3.1.", show_default=False)] = None,
    unit: Annotated[Unit, typer.Option(help="What a number is.")] = "weight",
    target: Wanted = None,
    other: Against = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Do tokens of this microworld concept ...", show_default=False)
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="... read this one?", show_default=False)] = None,
    repeated: Annotated[bool, typer.Option("--repeated", help="Read random words twice, no TEXT.")] = False,
    null: Samples = None,
    seed: Annotated[int | None, typer.Option(help="Of these.", min=0, show_default="0")] = None,
    top: Shown = None,
    chat: Chat = False,
    model: Model = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show where every head looks, find heads, or change a word and see attention move."""
    from gemscope.lens import heads
    from gemscope.lens.alignment import edited
    from gemscope.lens.attention import attend as read
    from gemscope.lens.difference import compare

    asked = {"edit": edit, "head": head, "unit": unit if unit != "weight" else None, "target": target, "other": other}
    _consistent(asked, repeated, by=by, source=source, to=to, TEXT=text, chat=chat, null=null, seed=seed)
    if repeated:
        scores = heads.find_heads(_load(model))
        return _show(scores, _found(scores, by, top), out, as_json)
    words = _words(text)
    gemma = _load(model)
    tokens = _tokens(gemma, words, chat)
    chosen = None if head is None else _head(head)
    if edit is not None:
        after = _tokens(gemma, edited(words, edit), chat)
        n, first = 16 if null is None else null, seed or 0
        moved = compare(gemma, tokens, after, kind=unit, target=target, other=other, null_samples=n, seed=first)
        shown = moved.text(_width(), top or 8) if chosen is None else moved.head_text(chosen, _width(), top or 8)
        return _show(moved, shown, out, as_json, moved.plot if chosen is None else lambda: moved.plot(chosen))
    if by is not None or source is not None:
        scores = heads.find_heads(gemma, tokens, pairs=None if source is None or to is None else _pairs(source, to))
        return _show(scores, _found(scores, by or f"{source}→{to}", top), out, as_json)
    maps = read(gemma, tokens, kind=unit, target=target, other=other)
    if chosen is not None:
        shown = maps.head_text(*chosen, width=_width(), top=top or 8)
        return _show(maps, shown, out, as_json, lambda: maps.plot(chosen))
    if unit != "weight":
        return _show(maps, maps.text(_width(), top or 10), out, as_json)
    scores = heads.find_heads(gemma, tokens)
    shown = f"{maps.text(_width())}\n\n{scores.text(_width(), top or 4)}"
    return _show(maps, shown, out, as_json, numbers=scores)


def lens(
    text: Text = None,
    position: Annotated[
        int | None, typer.Option("--position", "-p", help="Where the next token is predicted.", show_default="-1")
    ] = None,
    target: Wanted = None,
    other: Against = None,
    grid: Annotated[bool, typer.Option("--grid", help="Every position: what each layer would say.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Norms, cosines and latents only.")] = False,
    suite: SuiteFolder = None,
    top: Annotated[
        int, typer.Option("--top", "-k", help="Latents per layer; next tokens kept of the grid.", min=1)
    ] = 5,
    chat: Chat = False,
    model: Model = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show how a prediction forms, layer by layer.

    With a suite of the model (given, or in its usual place) each layer's strongest latents are shown too.
    """
    from gemscope.core.errors import InputError
    from gemscope.lens.formation import form
    from gemscope.lens.logit_lens import logit_lens
    from gemscope.lens.trace import trace as follow

    if grid and trace:
        raise InputError("give --grid or --trace, not both.")
    if grid:
        _unused(
            "--grid shows every position, one next token asked about and no latents;",
            other=other,
            position=position,
            suite=suite,
        )
    if trace:
        _unused("--trace asks about no next token;", target=target, other=other)
    at = -1 if position is None else position
    words = _words(text)
    gemma = _load(model)
    tokens = _tokens(gemma, words, chat)
    if grid:
        read = logit_lens(gemma, tokens, target=target, top=top)
        return _show(read, read.text(_width()), out, as_json)
    dictionaries = _dictionaries(gemma, model, suite)
    if trace:
        followed = follow(gemma, tokens, dictionaries=dictionaries, top=top)
        return _show(followed, followed.text(_width(), at), out, as_json)
    formed = form(gemma, tokens, position=at, target=target, other=other, dictionaries=dictionaries, top=top)
    return _show(formed, formed.text(_width()), out, as_json)


def attribute(
    text: Text = None,
    target: Wanted = None,
    other: Against = None,
    position: Annotated[int, typer.Option("--position", "-p", help="Where the next token is predicted.")] = -1,
    top: Annotated[int, typer.Option("--top", "-k", help="Parts shown.", min=1)] = 12,
    chat: Chat = False,
    model: Model = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Show which heads and MLPs wrote a next token's logit; the parts add up to it."""
    from gemscope.lens.direct import attribute as read

    words = _words(text)
    gemma = _load(model)
    parts = read(gemma, _tokens(gemma, words, chat), target=target, other=other, position=position)
    _show(parts, parts.text(_width(), top), out, as_json)


def headlines(
    texts: Annotated[
        Path | None, typer.Argument(help="One text a line; '-': standard input.", show_default="the microworld's news")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--number", "-n", help="Headlines of the microworld.", min=1, show_default="12")
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", "-l", help="Layer to read.", min=0)] = None,
    top: Annotated[int, typer.Option("--top", "-k", help="Features shown per text.", min=1)] = 4,
    suite: SuiteFolder = None,
    model: Model = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Read many short texts: the features that say something about each, and their topics."""
    from gemscope.cli.inputs import open_suite
    from gemscope.models.gemma import Gemma
    from gemscope.suites.headlines import read_headlines

    if texts is not None:
        _unused("a file is read as a whole;", number=number)
    lines = _news(number or 12) if texts is None else _lines(texts)
    opened = open_suite(model, suite)
    gemma = Gemma.load(model or opened.model, revision=None if model else opened.revision)
    read = read_headlines(gemma, opened, lines, layer=layer)
    _show(read, read.text(_width(), top), out, as_json)


def _show(
    result: "Result",
    shown: str,
    out: Path | None,
    as_json: bool,
    draw: "Draw | None" = None,
    numbers: "Result | None" = None,
) -> None:
    """Save ``result`` and print ``shown``; as JSON, the numbers of ``numbers`` (None: of ``result``)."""
    if out is not None:
        result.save(out, draw)
        print(f"wrote {out}", file=sys.stderr)
    print(json.dumps((numbers or result).as_dict(), ensure_ascii=False, indent=2) if as_json else shown)


def _found(scores: "HeadScores", by: str | None, top: int | None) -> str:
    """All metrics, or the heads by one of them."""
    from gemscope.lens.lines import cut

    body = scores.text(_width(), top or 4) if by is None else scores.table(by, top or 8)
    return f"{cut(scores.title, _width())}\n\n{body}"


def _consistent(asked: "Mapping[str, object]", repeated: bool, **given: object) -> None:
    """Raises InputError for options of ``attend`` that do not go together; ``asked`` are those that read one text."""
    from gemscope.core.errors import InputError

    by, source, null, seed = (given[name] for name in ("by", "source", "null", "seed"))
    if (source is None) != (given["to"] is None):
        raise InputError("--from and --to go together; name two concepts, as in --from capital --to country.")
    if repeated:
        words = {"TEXT": given["TEXT"], "from": source, "chat": given["chat"], "null": null, "seed": seed}
        _unused("--repeated reads random words and finds heads by their weights;", **words, **asked)
    if by is not None or source is not None:
        _unused("--by and --from find heads by their weights;", **asked)
    if asked["edit"] is None:
        _unused("only an edit is measured against random words; add --edit, or", null=null, seed=seed)
    if null == 0:
        _unused("--null 0 draws no random words;", seed=seed)


def _unused(why: str, **given: object) -> None:
    """Raises InputError for options that were given and would do nothing."""
    from gemscope.core.errors import InputError

    named = [name for name, value in given.items() if value is not None and value is not False]
    if named:
        words = ", ".join(name if name == "TEXT" else f"--{name}" for name in named)
        raise InputError(f"{why} leave out {words}.")


def _head(text: str) -> tuple[int, int]:
    from gemscope.core.errors import InputError

    layer, _, head = text.partition(".")
    if not (layer.isdecimal() and head.isdecimal()):
        raise InputError(f"cannot read the head {text!r}; write layer.head, as in 3.1.")
    return int(layer), int(head)


def _pairs(source: str, to: str) -> "Callable[[Tokens], Sequence[Pair]]":
    """The microworld's words of two concepts in any text."""
    from gemscope.core.errors import InputError
    from gemscope.lens.heads import Pair
    from gemscope.microworld.concepts import CONCEPTS, INDEX, find_words
    from gemscope.microworld.documents import Document, Span
    from gemscope.microworld.labels import token_concepts

    for name in (source, to):
        if name not in CONCEPTS:
            raise InputError(f"unknown concept {name!r}; the microworld's concepts are {', '.join(CONCEPTS)}.")

    def pairs(tokens: "Tokens") -> "Sequence[Pair]":
        spans = tuple(Span(*found) for found in find_words(tokens.text))
        marks = token_concepts(tokens, Document(tokens.text, spans, "text"))
        return [Pair(f"{source}→{to}", marks[:, INDEX[source]], marks[:, INDEX[to]])]

    return pairs


def _dictionaries(gemma: "Gemma", model: str | None, folder: Path | None) -> "dict[int, Microscope] | None":
    """Those of the suite that was given, or that lies in its usual place; None without one."""
    from gemscope.cli.inputs import DEFAULT_MODEL, open_suite
    from gemscope.suites.reading import microscopes
    from gemscope.suites.suite import default_folder

    usual = default_folder(model or DEFAULT_MODEL)
    if folder is None and not (usual / "suite.json").is_file():
        return None
    return microscopes(gemma, open_suite(model, folder))


def _words(text: str | None) -> str:
    from gemscope.cli.inputs import read_text

    return read_text(text)


def _load(model: str | None) -> "Gemma":
    from gemscope.cli.inputs import DEFAULT_MODEL
    from gemscope.models.gemma import Gemma

    return Gemma.load(model or DEFAULT_MODEL)


def _tokens(gemma: "Gemma", text: str, chat: bool) -> "Tokens":
    return gemma.chat(text) if chat else gemma.tokens(text)


def _width() -> int:
    from gemscope.cli.terminal import out

    return out().width


def _news(number: int) -> list[str]:
    """Headlines of held-out news of the microworld."""
    from gemscope.microworld.news import news
    from gemscope.microworld.splits import stream

    rng = stream("heldout", 0, "headlines")
    return [news(rng, "heldout").facts["headline"] for _ in range(number)]


def _lines(path: Path) -> list[str]:
    from gemscope.core.errors import InputError

    try:
        text = sys.stdin.buffer.read().decode("utf-8") if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid UTF-8; convert it, for example with iconv.") from error
    return [line for line in text.splitlines() if line.strip()]
