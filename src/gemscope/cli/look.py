"""A reading on the terminal: one token after the other, its strongest latents below one another, in 80
columns.
"""

from collections.abc import Iterator
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.text import Text

from gemscope.lens.lines import fit, pad
from gemscope.models.pieces import shown
from gemscope.models.tokens import END_OF_TURN, START_OF_TURN, Role
from gemscope.suites.reading import LatentReading, PositionReading, Reading

_TOKEN, _LATENT, _ACT, _STRENGTH, _CONCEPT = 13, 6, 7, 6, 23


def reading(read: Reading, width: int) -> RenderableType:
    """The reading as lines no longer than ``width`` cells."""
    width = max(width, 60)
    return Group(*_head(read, width), *_body(read, width))


def _head(read: Reading, width: int) -> Iterator[Text]:
    fvu = "" if read.fvu is None else f" · FVU {read.fvu:.3f} on this text"
    yield Text(f"{read.model} · {read.site} · {read.d_sae:,} latents{fvu}", style="bold", no_wrap=True)
    yield Text()
    if read.answer is not None:
        lines = wrap(f"answer: {' '.join(read.answer.split()) or '(nothing)'}", width)
        yield from (Text(line, style="italic") for line in [*lines, ""])
    titles = (
        pad("token", _TOKEN)
        + f"{'latent':>{_LATENT}}{'act':>{_ACT}}{'of max':>{_STRENGTH + 1}}  "
        + pad("concept", _CONCEPT)
        + "promotes"
    )
    yield Text(titles, style="dim", no_wrap=True)


def _body(read: Reading, width: int) -> Iterator[Text]:
    positions = read.positions
    for number, position in enumerate(positions):
        if position.role == Role.CONTENT:
            yield from _position(position, width)
        elif position.piece == START_OF_TURN and number + 1 < len(positions):
            speaker = positions[number + 1].piece
            yield Text(f"── {speaker} ".ljust(width, "─"), style="dim", no_wrap=True)
        elif position.piece == END_OF_TURN:
            yield Text()


def _position(position: PositionReading, width: int) -> Iterator[Text]:
    token = Text(pad(shown(position.piece), _TOKEN), style="bold", no_wrap=True)
    if not position.latents:
        yield token + Text(f"{'–':>{_LATENT}}  no latent is active", style="dim not bold")
    for number, latent in enumerate(position.latents):
        start = token if number == 0 else Text(" " * _TOKEN, no_wrap=True)
        yield start + _latent(latent, width)


def _latent(latent: LatentReading, width: int) -> Text:
    name = "—" if latent.concept is None else f"{latent.concept.replace('_', ' ')} {latent.concept_share:.0%}"
    space = width - _TOKEN - _LATENT - _ACT - _STRENGTH - 3 - _CONCEPT
    strength = "–" if latent.strength is None else f"{latent.strength:.0%}"
    numbers = f"{latent.latent:>{_LATENT}}{latent.activation:>{_ACT}.2f}{strength:>{_STRENGTH + 1}}  "
    text = Text(numbers, style="not bold")
    text.append(pad(name, _CONCEPT), style="dim not bold" if latent.concept is None else "cyan not bold")
    return text.append(fit(latent.promotes, space), style="dim not bold")
