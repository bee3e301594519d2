"""Everything that Gemma Scope 2 released, as training configs: ``entries("gemma-3-4b-it")``, and so on for ten models.

From the technical paper (McDougall et al. 2025, Table 1, section 3 and appendix A) and the released artefacts: which
sites, layers, widths, targets and seeds there are, the ramp of the targets over the first third of the layers, the
schedules. Not published and chosen here: token counts (those of Gemma Scope 1 by width, a tenth of them to finetune),
the weights of the penalties, the Matryoshka prefixes (powers of four), which width and target has a second seed for
crosscoders and CLTs.

    gemscope train --recipe gemma_scope_2 --model gemma-3-4b-pt --list
    gemscope train ROWS --recipe gemma_scope_2 --model gemma-3-4b-pt --only 'resid_post/layer_17_width_16k_*'
    gemscope train CHATS --recipe gemma_scope_2 --model gemma-3-4b-it --from FOLDER_WITH_THOSE_OF_4B_PT
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.recipe import Entry


@dataclass(frozen=True)
class Size:
    """One size of Gemma 3."""

    n_layers: int
    d_model: int
    d_z: int
    deep: tuple[int, int, int, int]
    """Layers at 25, 50, 65 and 85 % of the depth."""


SIZES = {
    "270m": Size(18, 640, 1024, (5, 9, 12, 15)),
    "1b": Size(26, 1152, 1024, (7, 13, 17, 22)),
    "4b": Size(34, 2560, 2048, (9, 17, 22, 29)),
    "12b": Size(48, 3840, 4096, (12, 24, 31, 41)),
    "27b": Size(62, 5376, 4096, (16, 31, 40, 53)),
}
MODELS = tuple(f"gemma-3-{size}-{kind}" for size in SIZES for kind in ("pt", "it"))

WIDTHS = {"16k": 1 << 14, "65k": 1 << 16, "262k": 1 << 18, "524k": 1 << 19, "1m": 1 << 20}
TOKENS = {"16k": 4e9, "65k": 8e9, "262k": 8e9, "524k": 16e9, "1m": 16e9}
FINETUNING = 0.1
"""Share of those tokens for an instruction-tuned model, which begins from the pretrained one's dictionaries."""

SITES = {"resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out"}
"""Their folder -> our site (their attn_out is the input of o_proj)."""
L0 = {"small": (10, 20), "medium": (30, 60), "big": (60, 150)}
L0_ALL = {"small": (10, 20), "big": (60, 120)}
L0_JOINT = {"medium": 50, "big": 150}

BATCH = 4096
WARMUP, ANNEALING = 1000, 50_000
"""Steps: of the learning rate; of the penalty's weight, and of the multi-layer target's fall."""


def target_l0(bounds: tuple[int, int], layer: int, n_layers: int) -> int:
    """floor(lo + (hi - lo) min(1, layer / (n_layers / 3))): reproduces every released value."""
    low, high = bounds
    return int(low + (high - low) * min(1.0, layer / (n_layers / 3)))


def entries(model: str) -> list[Entry]:
    """Every dictionary of one model. Raises InputError for a model that has none."""
    name = model.removeprefix("google/")
    name = "gemma-3-270m-pt" if name == "gemma-3-270m" else name
    if name not in MODELS:
        raise InputError(f"there is no Gemma Scope 2 for {model!r}; it has {', '.join(MODELS)}.")
    label, tuned = name.split("-")[2], name.endswith("it")
    size = SIZES[label]
    found = [*_deep(size, label), *_every_layer(size), *_crosscoders(size)]
    if label in ("270m", "1b"):
        found += _clts(size)
    return [_finetuned(entry, label) for entry in found] if tuned else found


def _schedule(width: str) -> dict[str, Any]:
    steps = round(TOKENS[width] / BATCH)
    return {
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": 7e-5,
        "warmup": WARMUP / steps,
        "decay": None,
        "sparsity_warmup": ANNEALING / steps,
        "beta1": 0.0,
        "beta2": 0.999,
        "first_l0_factor": 1.0,
        "frequency_weight": 0.1,
        "prefixes": _prefixes(WIDTHS[width]),
        "dead_after_rows": 10_000_000,
        "calibration_rows": 65_536,
    }


def _prefixes(d_sae: int) -> tuple[int, ...]:
    found, size = [], d_sae // 4
    while size >= 1024:
        found.append(size)
        size //= 4
    return tuple(sorted(found))


def _single(folder: str, layer: int, width: str, level: str, l0: int, size: Size, **more: Any) -> Iterator[Entry]:
    """An SAE, or a transcoder with and without skip."""
    name = f"{folder}/layer_{layer}_width_{width}_l0_{level}"
    given = {"d_sae": WIDTHS[width], "target_l0": float(l0), **_schedule(width), **more}
    base = folder.removesuffix("_all")
    if base != "transcoder":
        config = TrainConfig(Site(SITES[base], layer), **given)
        wide = size.d_z if base == "attn_out" else size.d_model
        suffix = f"_seed_{config.seed}" if config.seed else ""
        yield Entry(name + suffix, config, int(TOKENS[width]), None, wide, wide)
        return
    for kind, suffix in (("transcoder", ""), ("skip_transcoder", "_affine")):
        config = TrainConfig(Site("mlp_in", layer), kind=kind, target_site=Site("mlp_out", layer), **given)
        yield Entry(name + suffix, config, int(TOKENS[width]), None, size.d_model, size.d_model)


def _deep(size: Size, label: str) -> Iterator[Entry]:
    """Four layers, many widths, three targets, and a second seed."""
    for folder in (*SITES, "transcoder"):
        widths = ["16k", "65k", "262k"]
        if folder == "resid_post" or (folder == "mlp_out" and label == "1b"):
            widths.append("1m")
        for layer in size.deep:
            for width in widths:
                for level, bounds in L0.items():
                    l0 = target_l0(bounds, layer, size.n_layers)
                    yield from _single(folder, layer, width, level, l0, size)
                    if (folder, width, level) == ("resid_post", "262k", "medium"):
                        yield from _single(folder, layer, width, level, l0, size, seed=1)


def _every_layer(size: Size) -> Iterator[Entry]:
    """All layers, two widths, two targets."""
    for folder in (*SITES, "transcoder"):
        for layer in range(size.n_layers):
            for width in ("16k", "262k"):
                for level, bounds in L0_ALL.items():
                    l0 = target_l0(bounds, layer, size.n_layers)
                    yield from _single(f"{folder}_all", layer, width, level, l0, size)


def _joint(name: str, width: str, level: str, per_layer: int, size: Size, **more: Any) -> Entry:
    """Several layers at once; the width in the name counts the latents of all of them."""
    given = {**_schedule(width), "prefixes": _prefixes(per_layer), "first_l0_factor": 4.0}
    given["annealing"] = ANNEALING / given["steps"]
    config = MultiLayerConfig(d_sae=per_layer, target_l0=float(L0_JOINT[level]), **{**given, **more})
    return Entry(name, config, int(TOKENS[width]), None, size.d_model, size.d_model)


def _crosscoders(size: Size) -> Iterator[Entry]:
    layers = "_".join(map(str, size.deep))
    for width in ("65k", "262k", "524k", "1m"):
        for level in L0_JOINT:
            for seed in (0, 1) if (width, level) == ("262k", "medium") else (0,):
                name = f"crosscoder/layer_{layers}_width_{width}_l0_{level}" + (f"_seed_{seed}" if seed else "")
                about = {"site": Site("resid_post", size.deep[0]), "kind": "crosscoder", "layers": size.deep}
                yield _joint(name, width, level, WIDTHS[width] // len(size.deep), size, seed=seed, **about)


def _clts(size: Size) -> Iterator[Entry]:
    about = {"site": Site("mlp_in", 0), "target_site": Site("mlp_out", 0), "kind": "clt"}
    for width in ("262k", "524k"):
        per_layer = WIDTHS[width] // size.n_layers // 32 * 32
        for level in L0_JOINT:
            for skip in (False, True):
                for seed in (0, 1) if (width, level, skip) == ("262k", "medium", True) else (0,):
                    name = f"clt/width_{width}_l0_{level}" + ("_affine" if skip else "")
                    name += f"_seed_{seed}" if seed else ""
                    layers = tuple(range(size.n_layers))
                    yield _joint(name, width, level, per_layer, size, skip=skip, seed=seed, layers=layers, **about)


def _finetuned(entry: Entry, label: str) -> Entry:
    """The same for the instruction-tuned model: from the pretrained one's dictionary, nothing annealed."""
    config, tokens = entry.config, int(entry.tokens * FINETUNING)
    given = {name: getattr(config, name) for name in config.__dataclass_fields__}
    steps = max(1, round(tokens / BATCH))
    given |= {"steps": steps, "warmup": min(1.0, WARMUP / steps), "sparsity_warmup": 0.0}
    given |= {"first_l0_factor": 1.0, "annealing": 0.0}
    start = f"{entry.name}:gemma-3-{label}-pt"
    return Entry(entry.name, type(config)(**given), tokens, start, entry.width, entry.width_out)
