"""What ``gemscope quickstart`` builds for the built-in models, and its parts as training configs.

gemscope train ROWS --recipe microworld --model microworld-it
"""

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.suites.config import QuickstartConfig
from gemscope.suites.others import others
from gemscope.training.config import TrainConfig
from gemscope.training.recipe import Entry

MODELS = ("microworld-pt", "microworld-it")
N_LAYERS, D_MODEL, D_Z = 6, 128, 192


def entries(model: str) -> list[Entry]:
    """The residual SAEs of every layer, and one of each other kind. Raises InputError for another model."""
    if model not in MODELS:
        raise InputError(f"this recipe is for {' and '.join(MODELS)}, not for {model!r}.")
    config = QuickstartConfig()
    found = [config.train_config(Site(config.site, layer)) for layer in range(N_LAYERS)]
    return [_entry(one) for one in (*found, *others(N_LAYERS, config).configs)]


def _entry(config: TrainConfig) -> Entry:
    where = "all" if config.layers else str(config.site.layer)
    width = D_Z if config.site.name == "z" else D_MODEL
    name = f"{config.kind}/{config.site.name}/layer_{where}"
    return Entry(name, config, config.steps * config.batch_size, None, width, width)
