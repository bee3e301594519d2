"""The pictures of the lens, drawn with matplotlib (extra ``plot``) and without pyplot's global state.

Sizes go from dark to light in cividis; signed values from orange over white to blue: both can be told apart with any
kind of colour vision, and every picture stands beside the same numbers as text.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.extras import need

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
_MOST_NAMES = 80
"""More token names than this are not drawn on an axis."""


def figure(width: float, height: float) -> tuple[Any, Any]:
    """matplotlib, and a figure of so many inches."""
    matplotlib: Any = need("matplotlib", "plot")
    made = need("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return matplotlib, made


def as_svg(drawn: Any) -> str:
    """A figure as SVG, its text as text, the same bytes each time."""
    out = io.StringIO()
    with need("matplotlib", "plot").rc_context({"svg.fonttype": "none", "svg.hashsalt": "gemscope"}):
        drawn.savefig(out, format="svg", metadata={"Date": None})
    whole = out.getvalue()
    return whole[whole.index("<svg") :]


def mosaic(values: Float[Tensor, "layer head query key"], layers: Sequence[str], title: str) -> Any:
    """Every head's map in one image, rows of layers."""
    n_layers, n_heads, size, _ = values.shape
    gap = max(1, size // 16)
    side = size + gap
    whole = torch.full((n_layers * side - gap, n_heads * side - gap), float("nan"))
    for row in range(n_layers):
        for head in range(n_heads):
            seen = values[row, head].masked_fill(torch.ones(size, size).triu(1).bool(), float("nan"))
            whole[row * side : row * side + size, head * side : head * side + size] = seen
    matplotlib, fig = figure(max(4.0, min(16.0, 1.2 * n_heads + 1.5)), max(3.0, min(24.0, 1.2 * n_layers + 0.8)))
    axes = fig.subplots()
    signed = bool((values < 0).any())
    _image(matplotlib, fig, axes, whole, signed=signed, bar=True)
    axes.set_xticks([i * side + size / 2 for i in range(n_heads)], [f"head {i}" for i in range(n_heads)])
    axes.set_yticks([i * side + size / 2 for i in range(n_layers)], list(layers))
    _bare(axes)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def matrix(values: Float[Tensor, "query key"], names: Sequence[str], title: str, *, signed: bool = False) -> Any:
    """One map with its tokens."""
    side = max(4.0, min(14.0, 0.28 * len(names) + 1.5))
    matplotlib, fig = figure(side + 0.6, side)
    axes = fig.subplots()
    _image(matplotlib, fig, axes, _below(values), signed=signed, bar=True)
    _names(axes, names)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def grids(values: Float[Tensor, "metric layer head"], metrics: Sequence[str], layers: Sequence[str], title: str) -> Any:
    """Layers × heads, once for each metric."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    n_layers, n_heads = values.shape[1:]
    matplotlib, fig = figure(columns * max(2.6, 0.3 * n_heads + 1.2), rows * max(2.2, 0.18 * n_layers + 1.0))
    for i, axes in enumerate(fig.subplots(rows, columns, squeeze=False).flatten()):
        if i >= len(metrics):
            axes.set_axis_off()
            continue
        _image(matplotlib, fig, axes, values[i], signed=False, bar=True)
        axes.set_title(_escape(metrics[i]), fontsize=7)
        axes.set_xticks(range(n_heads), range(n_heads))
        axes.set_yticks(range(n_layers), layers)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("head", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def difference(
    scores: Float[Tensor, "layer head"],
    what: str,
    layers: Sequence[str],
    maps: tuple[Tensor, Tensor, Tensor],
    names: Sequence[str],
    head: tuple[int, int],
    title: str,
) -> Any:
    """Scores of all heads; of one head, the map before, after, and what moved."""
    side = max(3.2, min(9.0, 0.24 * len(names) + 1.2))
    matplotlib, fig = figure(2 * side + 1.4, 2 * side)
    (first, before), (after, moved) = fig.subplots(2, 2)
    _image(matplotlib, fig, first, scores, signed=bool((scores < 0).any()), bar=True)
    first.set_title(f"all heads: {what}", fontsize=8)
    first.set_xticks(range(scores.shape[1]), range(scores.shape[1]), fontsize=7)
    first.set_yticks(range(len(layers)), layers, fontsize=7)
    first.set_xlabel("head", fontsize=7)
    which = f"head {head[0]}.{head[1]}"
    top = max(float(maps[0].abs().max()), float(maps[1].abs().max()))
    for axes, value, name in ((before, maps[0], "before"), (after, maps[1], "after")):
        _image(matplotlib, fig, axes, _below(value), signed=bool((value < 0).any()), bar=False, top=top)
        axes.set_title(f"{which} {name}", fontsize=8)
        _names(axes, names)
    _image(matplotlib, fig, moved, _below(maps[2]), signed=True, bar=True)
    moved.set_title(f"{which}: after − before (blue gained, orange lost)", fontsize=8)
    _names(moved, names)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def lens(
    probs: Float[Tensor, "row pos"], words: list[list[str]], rows: Sequence[str], names: Sequence[str], title: str
) -> Any:
    """Positions to the right, layers upwards: the word said, on the colour of its probability."""
    n_rows, n_pos = probs.shape
    matplotlib, fig = figure(max(4.0, min(30.0, 0.75 * n_pos + 1.5)), max(2.5, min(20.0, 0.28 * n_rows + 1.2)))
    axes = fig.subplots()
    _image(matplotlib, fig, axes, probs, signed=False, bar=True, top=1.0)
    axes.invert_yaxis()
    if n_pos <= _MOST_NAMES:
        for row in range(n_rows):
            for pos in range(n_pos):
                ink = "black" if float(probs[row, pos]) > 0.5 else "white"
                axes.text(pos, row, _escape(words[row][pos][:9]), ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(n_pos), [_escape(name) for name in names], rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(n_rows), rows, fontsize=7)
    axes.set_ylabel("after layer", fontsize=8)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def attribution(
    embed: float, heads: Float[Tensor, "layer head"], mlp: Float[Tensor, " layer"], layers: Sequence[str], title: str
) -> Any:
    """Every head and MLP as a cell, signed; the last columns are the MLPs and the embedding's one number."""
    n_layers, n_heads = heads.shape
    matplotlib, fig = figure(max(4.5, 0.5 * (n_heads + 1) + 1.8), max(2.6, 0.3 * n_layers + 1.4))
    axes = fig.subplots()
    both = torch.cat([heads, mlp[:, None]], dim=1)
    _image(matplotlib, fig, axes, both, signed=True, bar=True)
    if n_layers * (n_heads + 1) <= 400:
        for row in range(n_layers):
            for column in range(n_heads + 1):
                value = float(both[row, column])
                strong = abs(value) > 0.6 * float(both.abs().max())
                ink = "white" if strong else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
    axes.set_xticks(range(n_heads + 1), [*map(str, range(n_heads)), "MLP"], fontsize=7)
    axes.set_yticks(range(n_layers), layers, fontsize=7)
    axes.set_xlabel(f"head (the embedding itself: {embed:+.2f})", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(_escape(title), fontsize=8)
    return fig


def trace(
    norms: Float[Tensor, "layer pos"],
    cosines: Float[Tensor, "layer pos"],
    layers: Sequence[str],
    names: Sequence[str],
    title: str,
) -> Any:
    """Norm of the stream after each layer, and its cosine with the stream before."""
    n_layers, n_pos = norms.shape
    matplotlib, fig = figure(max(5.0, min(24.0, 0.36 * n_pos + 2.0)), 2 * max(1.8, min(9.0, 0.2 * n_layers + 0.9)))
    above, below = fig.subplots(2, 1, sharex=True)
    for axes, values, what in ((above, norms, "norm"), (below, cosines, "cosine with the stream before")):
        _image(matplotlib, fig, axes, values, signed=False, bar=True)
        axes.invert_yaxis()
        axes.set_title(what, fontsize=8)
        axes.set_yticks(range(n_layers), layers, fontsize=7)
        axes.set_ylabel("after layer", fontsize=7)
    below.set_xticks(range(n_pos), [_escape(name) for name in names], rotation=60, ha="right", fontsize=7)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def formation(
    rows: Sequence[str],
    said: Sequence[str],
    prob: Sequence[float],
    entropy: Sequence[float],
    added: Sequence[float],
    target: str,
    title: str,
) -> Any:
    """Probability and entropy after each layer, and what each layer adds to the logit."""
    place = list(range(len(rows)))
    _, fig = figure(max(5.5, min(20.0, 0.55 * len(rows) + 2.0)), 4.6)
    above, below = fig.subplots(2, 1, sharex=True)
    above.plot(place, prob, "o-", color=BLUE, label=f"probability of {_escape(target)}")
    above.set_ylim(-0.03, 1.03)
    above.set_ylabel("probability", fontsize=8)
    other = above.twinx()
    other.plot(place, entropy, "s--", color=ORANGE, label="entropy (nats)")
    other.set_ylim(bottom=0)
    other.set_ylabel("entropy, nats", fontsize=8)
    handles = [*above.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    labels = [*above.get_legend_handles_labels()[1], *other.get_legend_handles_labels()[1]]
    above.legend(handles, labels, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    above.tick_params(labelsize=7)
    other.tick_params(labelsize=7)
    below.bar(place, added, color=[BLUE if value >= 0 else ORANGE for value in added])
    below.axhline(0, color=GREY, linewidth=0.6)
    below.set_ylabel("added to the logit", fontsize=8)
    below.tick_params(labelsize=7)
    ticks = [f"{row}\n{_escape(word[:10])}" for row, word in zip(rows, said, strict=True)]
    below.set_xticks(place, ticks, fontsize=7)
    below.set_xlabel("after layer, and what the model would say there", fontsize=8)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def topics(values: Float[Tensor, "text topic"], texts: Sequence[str], names: Sequence[str], title: str) -> Any:
    """Texts down, topics to the right: how strongly each text speaks of each."""
    n_texts, n_topics = values.shape
    matplotlib, fig = figure(max(5.0, min(20.0, 0.4 * n_topics + 5.0)), max(2.4, min(24.0, 0.28 * n_texts + 1.8)))
    axes = fig.subplots()
    _image(matplotlib, fig, axes, values, signed=False, bar=True)
    axes.set_xticks(range(n_topics), [_escape(name) for name in names], rotation=50, ha="right", fontsize=7)
    axes.set_yticks(range(n_texts), [_escape(text) for text in texts], fontsize=7)
    fig.suptitle(_escape(title), fontsize=9)
    return fig


def _image(
    matplotlib: Any, fig: Any, axes: Any, values: Tensor, *, signed: bool, bar: bool, top: float | None = None
) -> None:
    data = values.detach().double().cpu().numpy()
    largest = float(values.nan_to_num().abs().max()) if values.numel() else 0.0
    top = top or largest or 1.0
    if signed:
        colours = matplotlib.colors.LinearSegmentedColormap.from_list("moved", [ORANGE, "#ffffff", BLUE])
        image = axes.imshow(data, cmap=colours, vmin=-top, vmax=top, interpolation="nearest", aspect="auto")
    else:
        low = min(0.0, float(values.nan_to_num().min()))
        image = axes.imshow(data, cmap="cividis", vmin=low, vmax=top, interpolation="nearest", aspect="auto")
    if bar:
        fig.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)


def _below(values: Float[Tensor, "query key"]) -> Float[Tensor, "query key"]:
    """What a query cannot see is left empty."""
    return values.masked_fill(torch.ones(values.shape).triu(1).bool(), float("nan"))


def _names(axes: Any, names: Sequence[str]) -> None:
    shown = [_escape(name[:16]) for name in names] if len(names) <= _MOST_NAMES else []
    place = range(len(shown))
    axes.set_xticks(place, shown, rotation=90, fontsize=6)
    axes.set_yticks(place, shown, fontsize=6)


def _bare(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=7)


def _escape(text: str) -> str:
    """matplotlib takes a dollar sign for mathematics."""
    return text.replace("$", r"\$")
