"""What ``gemscope quickstart`` builds for the built-in models, and its parts as training configs.

gemscope train ROWS --recipe microworld --model microworld-it
"""

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.suites.config import QuickstartConfig
from gemscope.training.config import TrainConfig
from gemscope.training.multilayer import MultiLayerConfig
from gemscope.training.recipe import Entry

MODELS = ("microworld-pt", "microworld-it")
N_LAYERS, D_MODEL, D_Z = 6, 128, 192


def quickstart() -> QuickstartConfig:
    """Everything a quickstart decides, with its defaults."""
    return QuickstartConfig(
        site="resid_post",
        tokens=300_000,
        heldout_tokens=40_000,
        splice_tokens=12_000,
        d_sae=1024,
        target_l0=32.0,
        steps=500,
        batch_size=2048,
        batch_tokens=2048,
        seed=0,
        other_tokens=60_000,
        other_steps=150,
        other_batch_size=1024,
        other_l0_factor=3.0,
    )


def entries(model: str) -> list[Entry]:
    """The residual SAEs of every layer, and one of each other kind. Raises InputError for another model."""
    if model not in MODELS:
        raise InputError(f"this recipe is for {' and '.join(MODELS)}, not for {model!r}.")
    config = quickstart()
    found = [_entry(config.train_config(Site("resid_post", layer)), config) for layer in range(N_LAYERS)]
    shared = {"steps": config.other_steps, "batch_size": config.other_batch_size, "calibration_rows": 4096}
    one = {**shared, "d_sae": config.d_sae // 2, "target_l0": config.target_l0}
    many = {**shared, "d_sae": config.d_sae // 4, "target_l0": config.target_l0 * config.other_l0_factor}
    read, written = Site("mlp_in", 3), Site("mlp_out", 3)
    layers, first, last = tuple(range(N_LAYERS)), Site("mlp_in", 0), Site("mlp_out", 0)
    others = [
        TrainConfig(Site("z", 3), **one),
        TrainConfig(written, **one),
        TrainConfig(read, kind="transcoder", target_site=written, **one),
        TrainConfig(read, kind="skip_transcoder", target_site=written, **one),
        MultiLayerConfig(first, kind="clt", target_site=last, layers=layers, skip=True, **many),
        MultiLayerConfig(Site("resid_post", 1), kind="crosscoder", layers=(1, 2, 3, 4), **many),
    ]
    return found + [_entry(other, config) for other in others]


def _entry(config: TrainConfig, whole: QuickstartConfig) -> Entry:
    where = "all" if config.layers else str(config.site.layer)
    width = D_Z if config.site.name == "z" else D_MODEL
    name = f"{config.kind}/{config.site.name}/layer_{where}"
    return Entry(name, config, config.steps * config.batch_size, None, width, width)
