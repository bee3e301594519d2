"""A page of measures for people: one self-contained HTML file, light, dark and printed, without a line of script."""

import json
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from gemscope.core.files import write_json, write_text
from gemscope.evaluation.fidelity import DENSITY_BINS
from gemscope.evaluation.plots import COLOURS, Bar, Series, bars, lines, scatter
from gemscope.evaluation.probes import CONTROLS, Probed, ProbeReport, means_of
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.saebench import export

MARKS = ("dense", "token statistics", "random dictionary")
"""Methods that stand as ticks beside each concept's bar."""

_THRESHOLDS = [0.5 + 0.01 * i for i in range(51)]

Interval = tuple[float, float] | None


def write(folder: Path, measured: Sequence[Evaluation]) -> list[str]:
    """``evaluations.json`` (all), ``NAME.json`` (each), ``saebench/*/*.json`` and ``index.html``; their names."""
    write_json(folder / "evaluations.json", [one.as_dict() for one in measured])
    written = ["evaluations.json"]
    for one in measured:
        name = f"{_file(one)}.json"
        one.save(folder / name)
        written.append(name)
    written += [str(path.relative_to(folder)) for path in export(folder / "saebench", measured)]
    write_text(folder / "index.html", page(measured))
    return [*written, "index.html"]


def _file(one: Evaluation) -> str:
    return (one.name or str(one.site)).replace("/", "_")


def page(measured: Sequence[Evaluation]) -> str:
    """The whole page."""
    first = measured[0]
    style = resources.files("gemscope.evaluation").joinpath("page.css").read_text("utf-8")
    made = first.about.get("provenance", {})
    lead = (
        f"{len(measured)} dictionar{'y' if len(measured) == 1 else 'ies'} of {escape(first.model)}, measured on"
        f" {first.fidelity.rows:,} held-out tokens of {first.about.get('documents', '?')} documents; losses over"
        f" {first.loss.predictions:,} predictions."
    )
    parts = [
        _headline(measured),
        _pareto(measured),
        _where(measured),
        _latents(measured),
        _concepts(measured),
        _probes(measured),
        _first_letters(measured),
        _provenance(first),
    ]
    title = f"Dictionaries of {escape(first.model)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title} · gemscope</title><style>{style}</style></head><body><main>"
        f'<h1>{title}</h1><p class="dim">{lead} Intervals hold 95 % of the figures when documents are drawn anew'
        f" ({escape(str(made.get('created', '')))}).</p>"
        f"{_key(measured)}{''.join(parts)}</main></body></html>\n"
    )


def _name(one: Evaluation) -> str:
    return one.name or str(one.site)


def _key(measured: Sequence[Evaluation]) -> str:
    marks = [f'<li><i class="swatch{i % COLOURS}"></i>{escape(_name(one))}</li>' for i, one in enumerate(measured)]
    return f'<ul class="key">{"".join(marks)}</ul>'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of (class, cells); cells are HTML."""
    body = "".join(f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for kind, cells in rows)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: float | None, interval: Interval = None, digits: int = 4, percent: bool = False) -> str:
    if value is None:
        return "–"
    scale = 100 if percent else 1
    shown = f"{scale * value:.{digits}f}" + ("%" if percent else "")
    if interval is None:
        return shown
    return f"{shown}<small>{scale * interval[0]:.{digits}f} – {scale * interval[1]:.{digits}f}</small>"


def _headline(measured: Sequence[Evaluation]) -> str:
    head = ("dictionary", "L0", "FVU", "robust FVU", "Δ loss", "KL", "top-1 kept", "recovered,<br>mean ablation",
            "recovered,<br>zero ablation", "cosine,<br>norm ratio,<br>bias")  # fmt: skip
    rows: list[tuple[str, Sequence[str]]] = []
    for one in measured:
        f, loss, known = one.fidelity, one.loss, one.intervals
        tail = "" if loss.kl_p95 is None else f"<small>95 %: {loss.kl_p95:.4f}</small>"
        kind = one.kind.upper() if len(one.kind) == 3 else one.kind.replace("_", " ")
        what = f"{kind}, {len(f.firings):,} latents"
        cells = (
            f"<b>{escape(_name(one))}</b><small>{escape(what)}</small>",
            _cell(f.l0, known.get("l0"), 1),
            _cell(f.fvu, known.get("fvu")),
            _cell(f.fvu_robust) + (f"<small>{f.outliers} outliers</small>" if f.outliers is not None else ""),
            _cell(loss.delta_loss, known.get("delta_loss")),
            _cell(loss.kl, known.get("kl")) + tail,
            _cell(loss.top1, known.get("top1"), 1, percent=True),
            _cell(loss.recovered_mean, known.get("recovered_mean"), 1, percent=True),
            _cell(loss.recovered_zero, known.get("recovered_zero"), 1, percent=True),
            _cell(f.cosine, digits=3)
            + f"<small>{_cell(f.norm_ratio, digits=3)}</small><small>{_cell(f.bias, digits=3)}</small>",
        )
        rows.append(("", cells))
        for control in one.controls:
            numbers = [
                _cell(control.l0, digits=1),
                _cell(control.fvu),
                "",
                _cell(control.delta_loss),
                _cell(control.kl),
            ]
            rows.append(("control", [escape(control.name), *numbers, *[""] * 4]))
    note = (
        "Δ loss: nats of cross-entropy lost when the reconstruction takes the place of the activation. FVU: fraction of"
        " variance unexplained, 1 is the mean; robust: without tokens of more than ten times the median norm. KL from"
        " the model to the spliced one. Grey rows are controls: PCA keeps as many components of what is written as"
        " latents are active."
    )
    return f'<h2>Fidelity</h2>{_table(head, rows)}<p class="note">{note}</p>'


def _figure(caption: str, drawing: str, long: bool = False) -> str:
    kind = ' class="long"' if long else ""
    return f"<figure{kind}><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _pareto(measured: Sequence[Evaluation]) -> str:
    if len(measured) < 2:
        return ""

    def series(figure: str, value: Callable[[Evaluation], float]) -> list[Series]:
        return [Series(_name(one), [(one.fidelity.l0, value(one))], [one.intervals.get(figure)]) for one in measured]

    figures = (
        _figure("Δ loss against L0: lower left is better; dashed, the frontier",
                scatter(series("delta_loss", lambda one: one.loss.delta_loss), "L0", "Δ loss (nats)", log_x=True)),
        _figure("FVU against L0",
                scatter(series("fvu", lambda one: one.fidelity.fvu), "L0", "FVU", log_x=True)),
    )  # fmt: skip
    return f'<h2>Sparsity and fidelity</h2><div class="grid2">{"".join(figures)}</div>'


def _where(measured: Sequence[Evaluation]) -> str:
    names = [group.name for group in max((one.fidelity.by_group for one in measured), key=len, default=())]
    stretches = [name for name in names if name[0].isdigit()]
    speakers = [name for name in names if not name[0].isdigit()]
    if not stretches:
        return ""
    fvu = [
        Series(
            _name(one), [(float(stretches.index(g.name)), g.fvu) for g in one.fidelity.by_group if g.name in stretches]
        )
        for one in measured
    ]
    loss = [
        Series(
            _name(one),
            [(float(stretches.index(g.name)), g.delta_loss) for g in one.loss.by_group if g.name in stretches],
        )
        for one in measured
    ]
    figures = _figure("FVU by position in the text", lines(fvu, "position", "FVU", stretches))
    figures += _figure("Δ loss by position of the predicted token", lines(loss, "position", "Δ loss", stretches))
    table = ""
    if len(speakers) > 1:
        rows: list[tuple[str, Sequence[str]]] = []
        for one in measured:
            f = {group.name: group for group in one.fidelity.by_group}
            g = {group.name: group for group in one.loss.by_group}
            cells = [_cell(f[s].fvu if s in f else None) for s in speakers]
            cells += [_cell(g[s].delta_loss if s in g else None) for s in speakers]
            rows.append(("", [f"<b>{escape(_name(one))}</b>", *cells]))
        head = ["by speaker", *(f"FVU, {s}" for s in speakers), *(f"Δ loss, {s}" for s in speakers)]
        table = _table(head, rows)
    return f'<h2>Where</h2><div class="grid2">{figures}</div>{table}'


def _latents(measured: Sequence[Evaluation]) -> str:
    edges = DENSITY_BINS[:-1]
    histogram: list[Series] = []
    for one in measured:
        shares = [n / max(one.fidelity.alive, 1) for n in one.fidelity.histogram]
        histogram.append(Series(_name(one), [(edge + 0.25, n) for edge, n in zip(edges, shares, strict=True)]))
    figures = _figure("How often latents are active (share of the alive ones)",
                      lines(histogram, "log10 of the share of tokens", "share of latents"))  # fmt: skip
    nested = [one for one in measured if one.fidelity.prefixes]
    if nested:
        curves = [Series(_name(one), [(float(p.latents), p.fvu) for p in one.fidelity.prefixes]) for one in measured]
        figures += _figure("FVU of the first latents (Matryoshka)", lines(curves, "latents", "FVU", log_x=True))
    rows: list[tuple[str, Sequence[str]]] = []
    for one in measured:
        shape, quantiles = one.geometry, one.fidelity.l0_quantiles
        spread = " · ".join(f"{q:.0f}" for q in quantiles) or "–"
        cells = ["–"] * 4
        if shape is not None:
            cells = [
                f"{shape.duplicates}",
                _cell(shape.mean_max_decoder_cosine, digits=3),
                _cell(shape.mean_max_encoder_cosine, digits=3),
                _cell(shape.effective_rank, digits=1),
            ]
        shares = [_cell(v, digits=1, percent=True) for v in (one.fidelity.dead_fraction, one.fidelity.dense_fraction)]
        rows.append(("", [f"<b>{escape(_name(one))}</b>", *shares, spread, *cells]))
    head = ("dictionary", "dead", "dense", "L0 at 5 · 25 · 50 · 75 · 95 %", "duplicates<br>(cos &gt; 0.95)",
            "mean max cos<br>decoders", "mean max cos<br>encoders", "effective rank<br>of decoders")  # fmt: skip
    note = (
        f"Dead: active on none of {measured[0].fidelity.rows:,} tokens. Dense: active on more than a tenth of them."
        " Effective rank: how many directions the unit decoders spread over."
    )
    return f'<h2>Latents</h2><div class="grid2">{figures}</div>{_table(head, rows)}<p class="note">{note}</p>'


def _concepts(measured: Sequence[Evaluation]) -> str:
    shown = [one for one in measured if one.concepts is not None]
    if not shown:
        return ""
    coverage = [
        Series(
            _name(one), list(zip(_THRESHOLDS, one.concepts.coverage(_THRESHOLDS), strict=True)) if one.concepts else []
        )
        for one in measured
    ]
    drawing = lines(coverage, "AUROC of the best latent", "share of concepts")
    found = [(one, one.concepts.found) for one in shown if one.concepts is not None]
    sentence = "; ".join(f"{escape(_name(one))} {n} of {of} ({100 * n / max(of, 1):.0f} %)" for one, (n, of) in found)
    return (
        "<h2>Concepts</h2><p>A concept is found when one latent tells its tokens from all others with an AUROC of 0.9:"
        f' {sentence}.</p><div class="half">{_figure("Concepts with a latent of at least that AUROC", drawing)}</div>'
    )


def _probes(measured: Sequence[Evaluation]) -> str:
    pairs = [(one, one.probes) for one in measured if one.probes is not None and one.probes.concepts]
    if not pairs:
        return ""
    reports = [report for _, report in pairs]
    head = ["mean AUROC", *(escape(_name(one)) for one, _ in pairs)]
    rows: list[tuple[str, Sequence[str]]] = []
    found, ruled = means_of(reports), False
    for method in sorted(dict.fromkeys(m for m, _ in found), key=lambda m: (m in CONTROLS, m != "best latent", m)):
        ks = [k for m, k in found if m == method]
        several = len(ks) > 1
        name = escape(method) + (f"<small>k = {' · '.join(map(str, ks))}</small>" if several else "")
        columns = [[found[method, k][i] for k in ks] for i in range(len(pairs))]
        cells = [" · ".join("–" if v is None else f"{v:.3f}" for v in column) for column in columns]
        control = method in CONTROLS
        rows.append((("control" + ("" if ruled else " rule")) if control else "", [name, *cells]))
        ruled = ruled or control
    absorbed = [_cell(report.absorption, digits=3) for report in reports]
    rows.append(("rule", ["absorption (share of tokens)", *absorbed]))
    random = [_mean([c.absorption_random for c in report.concepts]) for report in reports]
    rows.append(("control", ["absorption, random dictionary", *(_cell(v, digits=3) for v in random)]))
    note = (
        f"Fitted on {reports[0].train_rows:,} tokens, scored on {reports[0].test_rows:,} of other documents;"
        f" {len(reports[0].concepts)} labels, those named “rule:” made by rule from the text. Grey rows are controls."
    )
    bars_of = "".join(_bars(one, report, i) for i, (one, report) in enumerate(pairs))
    return f'<h2>Probes and controls</h2>{_table(head, rows)}<p class="note">{note}</p>{bars_of}'


def _first_letters(measured: Sequence[Evaluation]) -> str:
    shown = [(one, one.first_letters) for one in measured if one.first_letters is not None]
    if not shown:
        return ""
    rows: list[tuple[str, Sequence[str]]] = []
    for one, found in shown:
        figures = [_cell(value, digits=3) for value in (found.splits, found.full, found.partial)]
        known = f"{len(found.letters)}<small>{escape(' '.join(label.concept for label in found.letters))}</small>"
        rows.append(("", [f"<b>{escape(_name(one))}</b>", known, *figures]))
    head = ("dictionary", "letters that the model knows", "latents a letter<br>is split into", "absorbed", "partly")
    note = (
        f"{shown[0][1].words:,} words of the vocabulary, read at their last token. Absorbed: the share of tokens at"
        " which the letter's latents are silent and one other stands in."
    )
    return f'<h2>First letters</h2>{_table(head, rows)}<p class="note">{note}</p>'


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _bars(one: Evaluation, report: ProbeReport, index: int) -> str:
    parents = {c.concept: c.parent for c in report.concepts}

    def depth(name: str) -> int:
        parent, found = parents.get(name), 0
        while parent in parents and found < 4:
            parent, found = parents[parent], found + 1
        return found

    rows: list[Bar] = []
    for concept in _by_parent(report):
        best = concept.score("best latent", 1)
        if best is None:
            continue
        beside = [(m, s.auroc) for m in MARKS if (s := concept.score(m, 1 if m == "random dictionary" else None))]
        rows.append(
            Bar(concept.concept.removeprefix("rule: "), best.auroc, best.auroc_interval, beside, depth(concept.concept))
        )
    key = "".join(
        f'<li><i class="tickmark swatch{c}"></i>{escape(m)}</li>' for m, c in zip(MARKS, (1, 2, 7), strict=True)
    )
    caption = f"{_name(one)}: AUROC of the best latent for each label, with its interval"
    opened = " open" if index == 0 else ""
    return (
        f"<details{opened}><summary>{escape(_name(one))}: every label</summary>"
        f'<figure class="long"><figcaption>{escape(caption)}</figcaption><ul class="key">{key}</ul>'
        f"{bars(rows, 0.4, 1.0, 0)}</figure></details>"
    )


def _by_parent(report: ProbeReport) -> list[Probed]:
    """Labels with their children after them, otherwise in the order they came in."""
    names = {c.concept for c in report.concepts}
    found: list[Probed] = []

    def add(parent: str | None) -> None:
        for concept in report.concepts:
            above = concept.parent if concept.parent in names else None
            if above == parent and concept not in found:
                found.append(concept)
                add(concept.concept)

    add(None)
    return found


def _provenance(one: Evaluation) -> str:
    made = one.about.get("provenance", {})
    lines_of = {
        "text": one.about.get("text", "held-out documents of the suite"),
        "positions": one.about.get("positions", ""),
        "command": made.get("command", ""),
        "source": made.get("git") or "installed",
        "versions": ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items()),
        "seeds": json.dumps(made.get("seeds", {})),
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in lines_of.items())
    return f"<h2>How this was made</h2><dl>{items}</dl>"
