"""Features on the terminal: hits, the page of one, and two continuations side by side, in 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gemscope.features import histogram
from gemscope.features.feature import Example, Feature, Relative
from gemscope.features.search import Hit
from gemscope.features.steering import Side, Steered
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens

_BARS = "▁▂▃▄▅▆▇█"
_SHADES = ("", "dim underline", "underline", "bold underline", "bold reverse")


def hits(found: Sequence[Hit], width: int, tokens: Tokens | None = None) -> RenderableType:
    """One line a feature; with ``tokens`` also where in the text it is strongest, else the strength if it has one."""
    if not found:
        return Text("nothing was found.", style="dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", width=max(width, 60))
    table.add_column("feature", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("density", justify="right", no_wrap=True)
    if tokens is not None:
        table.add_column("strongest on", no_wrap=True)
    elif found[0].strength is not None:
        table.add_column("strength", justify="right", no_wrap=True)
    table.add_column("labels", no_wrap=True, overflow="ellipsis", ratio=1)
    for one in found:
        strength = [] if one.strength is None else [f"{one.strength:g}"]
        where = strength if tokens is None else [_strongest(one, tokens)]
        labels = " · ".join(one.labels) or "–"
        cells = (one.id, f"{one.score:.3f}", f"{one.density:.2%}", *where)
        table.add_row(*map(Text, cells), Text(labels, style="cyan"))
    return table


def _strongest(hit: Hit, tokens: Tokens) -> str:
    content: list[int] = tokens.content_mask.nonzero()[:, 0].tolist()
    at = max(content, key=lambda i: hit.values[i])
    return shown(tokens.pieces[at])[:14]


def token(piece: str) -> RenderableType:
    """A token as the title of its features."""
    return Text(shown(piece), style="bold")


def page(feature: Feature, about: Mapping[str, Any], width: int, examples: int) -> RenderableType:
    """Everything on one feature."""
    return Group(*_page(feature, about, max(width, 60), examples))


def _page(feature: Feature, about: Mapping[str, Any], width: int, examples: int) -> Iterator[RenderableType]:
    yield Text(f"{feature.id} · {about['model']}", style="bold")
    for label in feature.labels:
        score = "" if label.score is None else f" {label.score:.2f}"
        yield Text(set_cell_size(f"{label.source:<10}{label.text}{score}", width).rstrip(), style="cyan")
    yield Text()
    share = f"{feature.density:.3%} of content tokens"
    if about["tokens"] and (feature.count or not feature.density):  # imported evidence may lack either
        share = f"{feature.count:,} of {about['tokens']:,} content tokens ({feature.density:.3%})"
    yield Text(f"active on {share}, at most {feature.peak:.4g}")
    if about["special_tokens"]:
        share = f"{feature.special_count:,} of {about['special_tokens']:,} control tokens"
        yield Text(f"and on {share}, at most {feature.special_peak:.4g}")
    yield from _bars(feature, about, width)
    yield Text()
    shifts = ("promotes", feature.promoted, feature.by_output)
    for title, every, by_output in (shifts, ("suppresses", feature.suppressed, feature.suppressed_by_output)):
        yield _line(title, [f"{shown(t)} {v:+.2f}" for t, v in every], width)
        for out, tokens in enumerate(by_output):
            if tokens:
                yield _line(f"  output {out}", [shown(t) for t, _ in tokens], width)
    yield _line("like it", _related(feature.nearest), width)
    yield _line("elsewhere", _related(feature.elsewhere), width)
    yield _line("active with", _related(feature.partners), width)
    yield Text()
    if feature.top:
        yield Text("strongest", style="dim")
    yield from (_example(one, feature.peak, width) for one in feature.top[:examples])
    for number in reversed(range(len(feature.groups))):
        if feature.groups[number]:
            yield Text(f"random, {_range(feature, number)}", style="dim")
            few = feature.groups[number][: max(1, examples // 2)]
            yield from (_example(one, feature.peak, width) for one in few)


def _range(feature: Feature, group: int) -> str:
    """Which activations are in a group of examples."""
    if feature.bounds:
        low, high = feature.bounds[group]
        return f"activations from {low:.4g} to {high:.4g}"
    return f"{100 * group // len(feature.groups)}-{100 * (group + 1) // len(feature.groups)} % of its activations"


def _bars(feature: Feature, about: Mapping[str, Any], width: int) -> Iterator[Text]:
    if feature.histogram:
        counts = histogram.columns(feature.histogram, min(50, width - 30))
        low, high = feature.histogram[0][0], feature.histogram[-1][0]
        yield Text(f"activations {low:.3g} {_spark(counts)} {high:.3g}")
        shares = [n / of for n, of in zip(feature.steps, about.get("steps") or [], strict=False) if of]
        if shares:
            yield Text(f"by position {_spark(shares)}  (0, 1-2, 3-6, 7-14, ...)")


def _spark(values: Sequence[float | int]) -> str:
    most = max(values) or 1
    return "".join(_BARS[min(7, int(8 * value / most))] if value else " " for value in values)


def _related(relatives: Sequence[Relative]) -> list[str]:
    return [f"{one.feature} {one.value:.2f}" for one in relatives]


def _line(title: str, words: Sequence[str], width: int) -> Text:
    """A title and as many whole words as fit."""
    text = Text(f"{title:<12}", style="dim")
    room = width - 12
    for word in words or ["–"]:
        if cell_len(word) + 2 > room:
            break
        text.append(f"{word}  ", style="not dim")
        room -= cell_len(word) + 2
    return text


def _example(example: Example, peak: float, width: int) -> Text:
    """One line around the marked token; the stronger a token, the more it stands out."""
    text = Text(f"{example.value:>8.3f}  ", style="dim")
    words = [_visible(token) for token in example.tokens]
    first = last = example.marked
    room = width - 11 - cell_len(words[first])
    while True:
        left = first > 0 and cell_len(words[first - 1]) <= room
        if left:
            first -= 1
            room -= cell_len(words[first])
        right = last + 1 < len(words) and cell_len(words[last + 1]) <= room
        if right:
            last += 1
            room -= cell_len(words[last])
        if not left and not right:
            break
    for at in range(first, last + 1):
        level = min(4, int(4 * example.values[at] / peak + 0.999)) if peak > 0 and example.values[at] > 0 else 0
        style = "dim" if example.special[at] else f"not dim {_SHADES[4 if at == example.marked else level]}"
        text.append(words[at], style=style)
    return text


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def steered(found: Steered, width: int) -> RenderableType:
    """Both continuations, and under each its tokens with their probabilities."""
    half = (max(width, 60) - 3) // 2
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("as it is", width=half, overflow="fold")
    table.add_column("steered", width=half, overflow="fold")
    for row in zip_longest(*(_side(side, half) for side in (found.default, found.steered)), fillvalue=""):
        table.add_row(*row)
    what = ", ".join(
        f"{one.mode} {one.dictionary}/{one.latent}" + ("" if one.mode == "ablate" else f" x {one.strength:g}")
        for one in found.steers
    )
    return Group(Text(what, style="dim"), table)


def _side(side: Side, width: int) -> list[Text]:
    mean = sum(one.logprob for one in side.tokens) / max(len(side.tokens), 1)
    lines = [Text(" ".join(side.text.split()) or "(nothing)"), Text()]
    lines.append(Text(f"mean log-probability {mean:.2f}", style="dim"))
    for one in side.tokens:
        others = " ".join(shown(piece) for piece, _ in one.best if piece != one.piece)
        start = f"{set_cell_size(shown(one.piece), 12)}{one.logprob:>7.2f}  "
        lines.append(Text(start, style="not dim").append(set_cell_size(others, width - 21).rstrip(), style="dim"))
    return lines
