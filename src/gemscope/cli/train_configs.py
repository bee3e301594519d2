"""What the options of gemscope train ask for: configs, what each begins from, and the passes they share."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from gemscope.artifacts import formats
from gemscope.artifacts.config import Loaded
from gemscope.cli.rows import Rows, sites_of_model
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.training.config import MULTI_LAYER, TrainConfig
from gemscope.training.finetune import finetune_config
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.origins import Origin, find, read
from gemscope.training.recipe import Entry, Finished, load, passes, select

if TYPE_CHECKING:
    from gemscope.models.gemma import Gemma

_RUN = ("rows", "out", "plan", "latent_shards", "held_out", "live", "text", "tokens", "loss_text", "checkpoint_every")
_EVERY = (*_RUN, "tensorboard", "wandb", "steps", "batch_size", "learning_rate", "freeze", "sparsity", "end_to_end")
EVERY = {*_EVERY, "frequency_weight", "setting"}
"""Options that are used whatever is trained."""
_CHANGES = ("steps", "batch_size", "learning_rate", "sparsity", "frequency_weight", "end_to_end")
_OWN = {"site", "d_sae", "target_l0", "kind", "target_site", "layers", "activation", "seed", "prefixes", "frozen"}
_NOT_SET = {*_OWN, *_CHANGES, "skip", "tied", "moments", "offload"}
"""Fields with an option of their own."""
_STREAMED = ("bf16_moments", "offload")


@dataclass(frozen=True)
class Job:
    """One dictionary to be trained."""

    entry: Entry
    """Without a name where it is not a recipe's."""
    origin: Origin | None = None
    """What it begins from, if from anything."""


def jobs(o: SimpleNamespace, rows: Rows | None) -> list[list[Job]]:
    """What is to be trained, pass by pass. Raises InputError for an option that would do nothing."""
    if o.live is not None:
        _used(o, {"rows"}, "beside --live, which runs a model instead", without=True)
    else:
        _used(o, {"text", "tokens"}, "without --live", without=True)
    if not _many() and not o.plan:
        _used(o, {"latent_shards"}, "in a single process; torchrun starts several", without=True)
    if o.recipe is not None:
        return _of_recipe(o, rows)
    _used(o, {"model", "only", "show"}, "without --recipe", without=True)
    loaded = [_fitting(one, o, rows) for path in o.artefact or () for one in formats.load_all(path)]
    if loaded and not (o.kind in MULTI_LAYER and any(one.config.kind not in MULTI_LAYER for one in loaded)):
        return [_finetuning(o, loaded)]
    origin = (lambda: loaded) if loaded else None
    return [[Job(Entry("", config, 0), origin) for config in _sweep(o, rows, loaded)]]


def entries(o: SimpleNamespace) -> list[Entry]:
    """Those of a recipe that are wanted, as the options change them."""
    if o.recipe is None or o.model is None:
        raise InputError("name a recipe and a model, as in --recipe gemma_scope_2 --model gemma-3-4b-pt.")
    _used(o, {*EVERY, "recipe", "model", "only", "show", "artefact"}, "beside --recipe, whose entries say it")
    found: list[Entry] = []
    for entry in select(load(o.recipe, o.model), o.only or ()):
        changes = _changes(o, type(entry.config))
        config = replace(entry.config, **changes)
        counted = {"tokens": config.steps * config.batch_size} if {"steps", "batch_size"} & set(changes) else {}
        found.append(replace(entry, config=config, **counted))
    return found


def _of_recipe(o: SimpleNamespace, rows: Rows | None) -> list[list[Job]]:
    """Entries begin from what --from holds, or from what an earlier pass of the same run made."""
    wanted = entries(o)
    here, names = Finished(o.out), {entry.name for entry in wanted}
    folders: list[Path] = list(o.artefact or ())

    def origin(entry: Entry) -> Origin | None:
        own = [start for start in entry.starts if start in names or here.dictionary(start) is not None]
        paths = {start: find(start, folders) for start in entry.starts if start not in own}

        def origins() -> list[Loaded]:
            found = [find(start, [o.out]) if start in own else paths[start] for start in entry.starts]
            return [_fitting(read(path), o, rows) for path in found]

        return origins if entry.starts else None

    groups = passes(wanted)
    return [[Job(entry, None if o.plan else origin(entry)) for entry in group] for group in groups]


def _finetuning(o: SimpleNamespace, loaded: Sequence[Loaded]) -> list[Job]:
    """Going on with each of some dictionaries, at each L0."""
    several = all(one.config.kind in MULTI_LAYER for one in loaded)
    streamed = _STREAMED if several or _many() else ()
    _used(o, {*EVERY, "artefact", "l0", "seed", *streamed}, "beside --from, whose dictionary says it")
    if len(o.seed or ()) > 1:
        raise InputError("--seed is only the order of the rows beside --from; give it once.")
    found: list[Job] = []
    for one, l0 in product(loaded, o.l0 or [None]):
        make = MultiLayerConfig if one.config.kind in MULTI_LAYER else TrainConfig
        has_skip = getattr(one.dictionary, "W_skip", None) is not None
        more = {"seed": (o.seed or [0])[0], **_changes(o, make)}
        config = finetune_config(one.config, skip=has_skip, l0=l0, frozen=more.pop("frozen", ()), **more)
        found.append(Job(Entry("", _streamed(o, config), 0), partial(list, [one])))
    return found


def _streamed(o: SimpleNamespace, config: TrainConfig) -> TrainConfig:
    """With what --bf16-moments and --offload ask for; a config of one layer is left as it is without them."""
    flags: dict[str, Any] = {"moments": "bfloat16"} if o.bf16_moments else {}
    flags |= {"offload": True} if o.offload else {}
    if not flags:
        return config
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    return MultiLayerConfig(**{**given, **flags})


def _sweep(o: SimpleNamespace, rows: Rows | None, loaded: Sequence[Loaded]) -> list[TrainConfig]:
    """Every combination of sites and axes, from scratch or, over several layers, from single-layer dictionaries."""
    kind, several = o.kind, o.kind in MULTI_LAYER
    writes_other = kind in ("transcoder", "skip_transcoder", "clt")
    names = {"kind", "site", "latents", "l0", "seed", "activation", "prefixes", *(["artefact"] if loaded else [])}
    names |= {"target"} if writes_other else set()
    names |= {"layers", "tied"} if several else set()
    names |= {"skip"} if kind == "clt" else set()
    names |= set(_STREAMED) if several or _many() else set()
    _used(o, {*EVERY, *names}, f"for --kind {kind}")
    if o.sparsity is not None and o.activation in ("topk", "batchtopk"):
        raise InputError(f"--sparsity does nothing for {o.activation}, which has no penalty; leave it out.")
    known = sorted((one.config.site for one in loaded), key=lambda site: site.order) or _known(rows, o)
    wanted = [Site.parse(s) for s in o.site or ()]
    wanted = wanted or ([s for s in known if s.name == "mlp_in"] if writes_other and not loaded else known)
    if not wanted:
        raise InputError(f"nothing here is read by a {kind}; harvest mlp_in and mlp_out, or name a --site.")
    layers: tuple[int, ...] = ()
    if several:
        if len(o.site or ()) > 1:
            raise InputError(f"a {kind} reads one --site in several --layers, not {' and '.join(o.site)}.")
        layers = _layers(o, wanted[0], known)
        wanted = [Site(wanted[0].name, layers[0])]
    make = MultiLayerConfig if several else TrainConfig
    about = {"kind": kind, "activation": o.activation, "prefixes": _numbers(o.prefixes, "--prefixes"), "layers": layers}
    if several:
        skips = any(one.config.kind == "skip_transcoder" for one in loaded)
        about |= {"tied": o.tied, "skip": o.skip or skips}
    found: list[TrainConfig] = []
    for where, d_sae, l0, seed in product(wanted, o.latents or [1024], o.l0 or [32.0], o.seed or [0]):
        target = Site(o.target or "mlp_out", where.layer) if writes_other else None
        named: dict[str, Any] = {"site": where, "target_site": target, "d_sae": d_sae, "target_l0": l0, "seed": seed}
        found.append(_streamed(o, make(**named, **about, **_changes(o, make))))
    return found


def _layers(o: SimpleNamespace, site: Site, known: Sequence[Site]) -> tuple[int, ...]:
    """Of a crosscoder or CLT: those given, or all in which there is its site."""
    if o.layers not in (None, "all"):
        return _numbers(o.layers, "--layers")
    every = tuple(sorted(s.layer for s in known if s.name == site.name and s.layer is not None))
    if not every:
        raise InputError(f"{site.name} is not here in any layer, and a {o.kind} reads several; give another --site.")
    return every


def _known(rows: Rows | None, o: SimpleNamespace) -> list[Site]:
    """The sites there are."""
    if rows is not None:
        return list(rows.data.sites)
    if o.site and (o.kind not in MULTI_LAYER or o.layers not in (None, "all")):
        return [Site.parse(site) for site in o.site]
    known = sites_of_model(o.live)
    return [*known, *(Site.parse(site) for site in o.site or () if Site.parse(site) not in known)]


def _many() -> bool:
    """Whether dictionaries are spread over processes, where the streamed learner trains every kind."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _fitting(loaded: Loaded, o: SimpleNamespace, rows: Rows | None) -> Loaded:
    """In fp32, and reading what the rows hold: a norm's output with its gain."""
    from gemscope.evaluation.subject import Subject

    loaded.dictionary.float()
    if loaded.config.read_gain:
        return loaded
    gemma = _gemma(o.live, None) if rows is None else _gemma(rows.model, rows.revision)
    made = Subject.of("", loaded, gemma).dictionary.cpu()
    return replace(loaded, dictionary=made, config=replace(loaded.config, read_gain=True))


@cache
def _gemma(model: str, revision: str | None) -> "Gemma":
    from gemscope.models.gemma import Gemma

    return Gemma.load(model, revision=revision, device="cpu")


def _changes(o: SimpleNamespace, make: type[TrainConfig]) -> dict[str, Any]:
    """The fields that the options set, in a config of that class."""
    found = {name: getattr(o, name) for name in _CHANGES if getattr(o, name) is not None}
    if o.freeze:
        found["frozen"] = tuple(o.freeze)
    hints = get_type_hints(make)
    known = [field.name for field in fields(make) if field.name not in _NOT_SET]
    for word in o.setting or ():
        name, sign, text = word.partition("=")
        if not sign or name not in known:
            raise InputError(f"--set {word!r} sets nothing here; write FIELD=VALUE with one of {', '.join(known)}.")
        found[name] = _value(name, text, hints[name])
    return found


def _value(name: str, text: str, hint: Any) -> Any:
    """The text as a field's type has it."""
    kinds = (hint,) if get_origin(hint) is Literal else get_args(hint) or (hint,)
    if NoneType in kinds and text == "none":
        return None
    if bool in kinds and text in ("true", "false"):
        return text == "true"
    if get_origin(kinds[0]) is Literal and text in get_args(kinds[0]):
        return text
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                break
    words = {NoneType: "none", bool: "true or false", int: "a whole number", float: "a number"}
    choices = [str(one) for kind in kinds for one in get_args(kind) or (words[kind],)]
    raise InputError(f"--set {name}={text} cannot be; give {' or '.join(choices)}.")


def _used(o: SimpleNamespace, names: set[str], where: str, *, without: bool = False) -> None:
    """Raise InputError for an option given that is not among ``names``; ``without``: that is among them."""
    idle = [flag for name, flag in o.given.items() if (name in names) == without]
    if idle:
        raise InputError(f"{' and '.join(idle)} {'do' if len(idle) > 1 else 'does'} nothing {where}; leave it out.")


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InputError(f"{option} is {text!r}; write whole numbers between commas, such as 0,1,2.") from None
