"""``gemscope find``, ``feature`` and ``steer``: the features of a suite, or of an index of its own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemscope.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gemscope.artifacts.config import Loaded
    from gemscope.features.index import FeatureIndex
    from gemscope.features.search import Hit
    from gemscope.features.steering import Steer
    from gemscope.models.gemma import Gemma
    from gemscope.suites.suite import Suite

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Built-in name, model folder or hub id.", show_default="microworld-it"),
]
SuiteFolder = Annotated[
    Path | None, typer.Option("--suite", "-s", help="Folder of a suite.", show_default="suites/MODEL")
]
IndexFolder = Annotated[
    Path | None, typer.Option("--index", "-i", help="Folder of an index.", show_default="the suite's")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Top = Annotated[int, typer.Option("--top", "-k", help="Features to show.", min=1)]


_MODES = ("add", "clamp", "ablate")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (find, feature, steer):
        app.command()(command)


def name_of(loaded: "Loaded", folder: Path) -> str:
    """The folder's name, or its site where it has none."""
    return folder.resolve().name or str(loaded.config.site)


def opened_index(suite: Path | None, model: str | None, folder: Path | None) -> "tuple[Suite | None, FeatureIndex]":
    """The suite, if that is where the index comes from, and the index."""
    from gemscope.cli.inputs import open_suite
    from gemscope.features.index import FeatureIndex
    from gemscope.suites.indexing import open_index

    if folder is not None:
        return None, FeatureIndex.open(folder)
    opened = open_suite(model, suite)
    return opened, open_index(opened)


def loaded_in(suite: "Suite | None", given: list[Path] | None) -> "dict[str, Loaded]":
    """By name, the dictionaries in the folders given, or the suite's; raises InputError where there are neither."""
    from gemscope.artifacts import formats
    from gemscope.suites.indexing import dictionaries_of

    if given:
        found = {name_of(loaded, folder): loaded for folder in given for loaded in [formats.load(folder)]}
        if len(found) < len(given):
            raise InputError("two of the dictionaries have the same name; give their folders different names.")
        return found
    if suite is None:
        raise InputError("this needs the dictionaries themselves: give their folders with --dictionary.")
    return dictionaries_of(suite.folder, suite.sites, suite.others)


def _gemma(model: str | None, made: "FeatureIndex") -> "Gemma":
    from gemscope.models.gemma import Gemma

    return Gemma.load(model or made.about["model"], revision=None if model else made.about["revision"])


def find(
    words: Annotated[str | None, typer.Argument(help="Words of labels; the end of one may be *.")] = None,
    text: Annotated[str | None, typer.Option("--text", "-t", help="Features that this text activates.")] = None,
    at: Annotated[list[str] | None, typer.Option(help="Of the text, only tokens with these letters.")] = None,
    by_token: Annotated[bool, typer.Option("--by-token", help="Of the text, token by token.")] = False,
    concept: Annotated[str | None, typer.Option(help="Features of a known concept.")] = None,
    like: Annotated[str | None, typer.Option(help="Features that point where this one does.")] = None,
    promotes: Annotated[str | None, typer.Option(help="Features that promote this token.")] = None,
    raises: Annotated[str | None, typer.Option(help="Features that raise this token when added; needs --on.")] = None,
    on: Annotated[list[str] | None, typer.Option(help="A prompt to try them on; may be repeated.")] = None,
    meaning: Annotated[str | None, typer.Option(help="Labels that mean this; needs --embed.")] = None,
    embed: Annotated[str | None, typer.Option(help="Embedding model: a folder or hub id.")] = None,
    max_density: Annotated[float, typer.Option(help="Of a text, leave out denser features.", min=0, max=1)] = 1.0,
    dictionary: Annotated[
        list[Path] | None, typer.Option("--dictionary", "-d", help="With --index: their folders.")
    ] = None,
    top: Top = 10,
    suite: SuiteFolder = None,
    folder: IndexFolder = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Find features: by words, text, concept, promoted or raised token, direction or meaning."""
    from gemscope.cli import features_view as view
    from gemscope.cli.terminal import out
    from gemscope.features import effective, search

    _one_way((words, text, concept, like, promotes, raises, meaning))
    _together("--text", text, {"--at": at, "--by-token": by_token, "--max-density": max_density < 1})
    _together("--raises", raises, {"--on": on})
    _together("--meaning", meaning, {"--embed": embed})
    opened, made = opened_index(suite, model, folder)
    if text is not None:
        _find_text(
            made, _gemma(model, made), loaded_in(opened, dictionary), text, at, by_token, top, max_density, as_json
        )
        return
    if meaning is not None:
        hits = _by_meaning(made, meaning, embed, top)
    elif words is not None:
        hits = search.by_words(made, words, top)
    elif concept is not None:
        hits = search.by_concept(made, concept, top)
    elif promotes is not None:
        hits = search.by_promoted(made, promotes, top)
    elif raises is not None:
        hits = effective.by_effect(made, _gemma(model, made), loaded_in(opened, dictionary), raises, on or [], top)
    else:
        hits = search.like(made, loaded_in(opened, dictionary), str(like), top)
    if as_json:
        print(json.dumps([one.as_dict() for one in hits], ensure_ascii=False, indent=2))
    else:
        out().print(view.hits(hits, out().width))


def _one_way(ways: "Sequence[str | None]") -> None:
    if sum(way is not None for way in ways) != 1:
        raise InputError(
            "say one thing to find: words, or --text, --concept, --like, --promotes, --raises or --meaning."
        )


def _together(needed: str, value: str | None, given: "Mapping[str, Any]") -> None:
    """Refuse options that say something of another one that is not there."""
    for option, one in given.items():
        if one and value is None:
            raise InputError(f"{option} goes with {needed} only; add that or leave it out.")


def _by_meaning(made: "FeatureIndex", meaning: str, embed: str | None, top: int) -> "list[Hit]":
    from gemscope.features.meaning import TextModel, by_meaning, embed_labels, missing

    if embed is None:
        raise InputError("searching by meaning needs an embedding model; give its folder with --embed.")
    embedder = TextModel(embed)
    if missing(made, embedder) is not None:
        embed_labels(made, embedder)
    return by_meaning(made, embedder, meaning, top)


def _find_text(
    made: "FeatureIndex",
    gemma: "Gemma",
    dictionaries: "dict[str, Loaded]",
    text: str,
    letters: list[str] | None,
    by_token: bool,
    top: int,
    max_density: float,
    as_json: bool,
) -> None:
    from gemscope.cli import features_view as view
    from gemscope.cli.terminal import out
    from gemscope.features.search import by_text

    tokens = gemma.tokens(text)
    content = tokens.content_mask.nonzero()[:, 0].tolist()
    chosen = [i for i in content if not letters or any(one in tokens.pieces[i] for one in letters)]
    if not content:
        raise InputError("the text is all control tokens; give one with words.")
    if not chosen:
        raise InputError(f"no token of the text has the letters {letters}; its tokens are {' '.join(tokens.pieces)}.")
    runs = [[i] for i in chosen] if by_token else [chosen]
    found = [by_text(made, gemma, dictionaries, tokens, top, at=run, max_density=max_density) for run in runs]
    if as_json:
        print(
            json.dumps(
                [one.as_dict() for one in found] if by_token else found[0].as_dict(), ensure_ascii=False, indent=2
            )
        )
        return
    for run, one in zip(runs, found, strict=True):
        if by_token:
            out().print(view.token(tokens.pieces[run[0]]))
        out().print(view.hits(one.hits, out().width, tokens))


def feature(
    name: Annotated[str, typer.Argument(help="DICTIONARY/LATENT, as resid_post.4/1234.", show_default=False)],
    examples: Annotated[int, typer.Option("--examples", "-n", help="Examples to show of each kind.", min=1)] = 5,
    suite: SuiteFolder = None,
    folder: IndexFolder = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Show everything that is known of one feature."""
    from gemscope.cli import features_view as view
    from gemscope.cli.terminal import out

    _, made = opened_index(suite, model, folder)
    page = made.feature(name)
    if as_json:
        print(json.dumps(page.as_dict(), ensure_ascii=False, indent=2))
    else:
        out().print(view.page(page, made.about, out().width, examples), soft_wrap=False)


def steer(
    text: Annotated[str | None, typer.Argument(help="The prompt; standard input when absent or '-'.")] = None,
    chosen: Annotated[
        list[str] | None,
        typer.Option("--feature", "-f", help="FEATURE[=2], or =ablate, =clamp:2, =add:2; may be repeated."),
    ] = None,
    strength: Annotated[float, typer.Option("--strength", help="In units of the feature's largest activation.")] = 1.0,
    mode: Annotated[str, typer.Option(help="Unless given with a feature: add, clamp or ablate.")] = "add",
    where: Annotated[str, typer.Option(help="all, prompt, generated, or positions: 3,4.")] = "all",
    special: Annotated[bool, typer.Option("--special", help="Steer control tokens and the chat template too.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Take the text as a user's turn.")] = False,
    tokens: Annotated[int, typer.Option(help="New tokens at most.", min=1)] = 32,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, the same on both sides.")] = 0,
    dictionary: Annotated[
        list[Path] | None, typer.Option("--dictionary", "-d", help="With --index: their folders.")
    ] = None,
    suite: SuiteFolder = None,
    folder: IndexFolder = None,
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Generate with features strengthened or removed, beside the model as it is."""
    from gemscope.cli import features_view as view
    from gemscope.cli.inputs import read_text
    from gemscope.cli.terminal import out
    from gemscope.features.steering import steer as run
    from gemscope.models.chat import Turn

    if not chosen:
        raise InputError("nothing to steer; name a feature, as in --feature resid_post.4/1234=2.")
    words = read_text(text)
    opened, made = opened_index(suite, model, folder)
    steers = [_steer(made, one, _mode(mode), strength) for one in chosen]
    options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": temperature, "seed": seed, "special": special}
    found = run(
        _gemma(model, made),
        loaded_in(opened, dictionary),
        [Turn("user", words)] if chat else words,
        steers,
        where=_where(where),
        **options,
    )
    if as_json:
        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
        out().print(view.steered(found, out().width))


def _steer(made: "FeatureIndex", given: str, mode: Any, strength: float) -> "Steer":
    """FEATURE[=[MODE:]STRENGTH] or FEATURE=MODE, with ``mode`` and ``strength`` for what is not said."""
    from gemscope.features.steering import Steer

    dictionary, _, rest = given.rpartition("/")  # the name of a dictionary may hold a =
    latent, equals, how = rest.partition("=")
    said, colon, number = how.rpartition(":")
    if how in _MODES:
        said, number = how, ""
    if (equals and not how) or (colon and not (said and number)):
        raise InputError(f"{given!r} ends too early; write for example resid_post.4/1234=2, =ablate or =clamp:2.")
    chosen = _mode(said) if said else mode
    if chosen == "ablate" and number:
        raise InputError(f"{given!r} gives a strength, but to ablate has none; write add or clamp, or no number.")
    return Steer.of(made, f"{dictionary}/{latent}", chosen, _number(number) if number else strength)


def _mode(mode: str) -> Any:
    if mode not in _MODES:
        raise InputError(f"cannot steer by {mode!r}; use add, clamp or ablate.")
    return mode


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"{text!r} is neither a strength nor a mode; write for example resid_post.4/1234=2, =ablate or =clamp:2."
        ) from error


def _where(text: str) -> Any:
    if text in ("all", "prompt", "generated"):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"cannot steer at {text!r}; use all, prompt, generated, or positions such as 3,4.") from error
