"""Reading many short texts at once: which features say something about each, grouped into topics.

A feature is a latent with a name that can be relied on and the rule by which it says yes: "activation ≥ threshold". By
default these are, for every labelled concept, the latent that finds it best on held-out text, where it does so with an
F1 of at least ``FOUND_F1`` (``evaluation.concepts``). Labelled latents can be given instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemscope.core.arrays import Float, Tensor
from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.sae import SAE
from gemscope.lens import pictures
from gemscope.lens.inputs import identity
from gemscope.lens.lines import cut, fit, pad
from gemscope.lens.result import Result
from gemscope.models.gemma import Gemma
from gemscope.models.pieces import shown
from gemscope.models.tokens import Tokens
from gemscope.suites.reading import dictionary_for
from gemscope.suites.suite import Suite

_TOPIC = 22
FOUND_F1 = 0.4
"""A concept's best latent stands for it from this F1 on."""


@dataclass(frozen=True)
class Detector:
    """A latent that stands for a topic."""

    site: Site
    latent: int
    topic: str
    sureness: float = 1.0
    """How much its word counts, 0 to 1."""
    threshold: float = 0.0
    """It says yes at a positive activation from here on."""
    largest: float | None = None
    """Its largest known activation."""


@dataclass(frozen=True)
class TextFeature:
    """A feature that says yes somewhere in a text."""

    detector: Detector
    activation: float
    """The largest in the text."""
    piece: str
    """The token on which it was largest."""
    position: int

    @property
    def score(self) -> float:
        """Sureness times the activation in shares of the largest known one."""
        largest = self.detector.largest
        return self.detector.sureness * (self.activation / largest if largest else 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        one = self.detector
        return {
            "site": str(one.site),
            "latent": one.latent,
            "topic": one.topic,
            "score": self.score,
            "activation": self.activation,
            "piece": self.piece,
            "position": self.position,
        }


@dataclass(frozen=True)
class Topic:
    """Features of one name."""

    name: str
    features: tuple[str, ...]
    """The latents that stand for it, as ``site/latent``."""
    texts: tuple[int, ...]
    """Numbers of the texts that have it, strongest first."""
    scores: tuple[float, ...]
    """For each text, the largest score of its features of this topic; 0 where it has none."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadlineReading(Result):
    """What a list of texts is about, as the features see it."""

    model: str
    detectors: tuple[Detector, ...]
    """The features that were asked."""
    texts: tuple[str, ...]
    features: tuple[tuple[TextFeature, ...], ...]
    """For each text, the features that say yes, highest score first."""
    topics: tuple[Topic, ...]
    """Most texts first."""

    @property
    def title(self) -> str:
        return f"{self.name} · {len(self.texts)} texts · {len(self.detectors)} features · {len(self.topics)} topics"

    def as_dict(self) -> dict[str, Any]:
        texts = [
            {"text": text, "features": [feature.as_dict() for feature in found]}
            for text, found in zip(self.texts, self.features, strict=True)
        ]
        return {
            "kind": "headlines",
            "model": self.model,
            "texts": texts,
            "topics": [asdict(topic) for topic in self.topics],
            "detectors": [asdict(one) | {"site": str(one.site)} for one in self.detectors],
        }

    def arrays(self) -> Mapping[str, Tensor]:
        return {"scores": self._scores()}

    def _scores(self) -> Float[Tensor, "text topic"]:
        return torch.tensor([topic.scores for topic in self.topics]).reshape(len(self.topics), len(self.texts)).T

    def text(self, width: int = 80, top: int = 4) -> str:
        width = max(width, 60)
        lines = [cut(self.title, width), ""]
        for i, text in enumerate(self.texts):
            lines.append(pad(f"{i + 1:>3} {' '.join(text.split())}", width).rstrip())
            words = [f"{_plain(f.detector.topic)} {f.score:.2f} on {shown(f.piece)}" for f in self.features[i][:top]]
            lines.append("      " + (fit(words, width - 6, " · ") or "no feature says yes"))
        lines += ["", pad("topic", _TOPIC) + pad("features", 24) + "texts"]
        for topic in self.topics:
            numbers = fit([str(i + 1) for i in topic.texts], width - _TOPIC - 24)
            lines.append(pad(_plain(topic.name), _TOPIC) + pad(fit(topic.features, 22), 24) + numbers)
        return "\n".join(lines)

    def plot(self, most: int = 24) -> Any:
        """Texts × the ``most`` topics of most texts. Raises InputError when no feature says yes anywhere."""
        if not self.topics:
            raise InputError("no feature says yes in these texts, so there are no topics to draw.")
        names = [_plain(topic.name) for topic in self.topics[:most]]
        texts = [f"{i + 1} {' '.join(text.split())[:60]}" for i, text in enumerate(self.texts)]
        return pictures.topics(self._scores()[:, :most], texts, names, self.title)


def concept_detectors(suite: Suite, layer: int | None = None, least: float = FOUND_F1) -> tuple[Detector, ...]:
    """For each concept the latent of a layer that finds it best, where its F1 is at least ``least``.

    ``layer`` None: the one that finds most concepts. Raises InputError when the suite has no such layer.
    """
    site = suite.best_site() if layer is None else suite.site(layer)
    concepts = suite.evaluation(site).concepts
    if concepts is None:
        return ()
    return tuple(
        Detector(site, s.f1_latent, s.concept, s.f1, s.f1_threshold, concepts.latent_max[s.f1_latent])
        for s in concepts.scores
        if s.f1 >= least
    )


@torch.no_grad()
def read_headlines(
    gemma: Gemma,
    suite: Suite,
    texts: Sequence[str],
    *,
    layer: int | None = None,
    detectors: Sequence[Detector] | None = None,
) -> HeadlineReading:
    """The features of each text and their topics; ``detectors`` None: ``concept_detectors`` of ``layer``.

    Raises InputError for an empty list, a text that cannot be read, a layer the suite does not have, a suite of another
    model, or one in which no latent stands for a concept.
    """
    if not texts:
        raise InputError("there are no texts to read; give one a line.")
    asked = tuple(concept_detectors(suite, layer) if detectors is None else detectors)
    if not asked:
        raise InputError(
            f"no latent of the suite in {suite.folder} finds a concept with an F1 of {FOUND_F1}; train longer, or give"
            " labelled latents."
        )
    by_site: dict[Site, list[Detector]] = {}
    for one in asked:
        by_site.setdefault(one.site, []).append(one)
    dictionaries = {site: dictionary_for(gemma, suite, site) for site in by_site}
    features = tuple(_features(gemma, gemma.tokens(text), by_site, dictionaries) for text in texts)
    return HeadlineReading(identity(gemma), asked, tuple(texts), features, _topics(features))


def _features(
    gemma: Gemma,
    tokens: Tokens,
    by_site: Mapping[Site, Sequence[Detector]],
    dictionaries: Mapping[Site, SAE],
) -> tuple[TextFeature, ...]:
    content = tokens.content_mask.nonzero()[:, 0].cpu()
    seen = gemma.capture(tokens, by_site)
    found: list[TextFeature] = []
    for site, asked in by_site.items():
        x = seen[site][0].float().cpu()[content]
        acts = dictionaries[site].encode(x, latents=[one.latent for one in asked])
        for one, value, at in zip(asked, *acts.max(0), strict=True):
            if value > 0 and value >= one.threshold:
                place = int(content[at])
                found.append(TextFeature(one, float(value), tokens.pieces[place], place))
    return tuple(sorted(found, key=lambda feature: -feature.score))


def _topics(features: Sequence[Sequence[TextFeature]]) -> tuple[Topic, ...]:
    scores: dict[str, list[float]] = {}
    latents: dict[str, dict[str, None]] = {}
    for i, found in enumerate(features):
        for feature in found:
            one = feature.detector
            row = scores.setdefault(one.topic, [0.0] * len(features))
            row[i] = max(row[i], feature.score)
            latents.setdefault(one.topic, {})[f"{one.site}/{one.latent}"] = None
    topics = [
        Topic(
            name,
            tuple(latents[name]),
            tuple(sorted((i for i, value in enumerate(row) if value > 0), key=lambda i: -row[i])),
            tuple(row),
        )
        for name, row in scores.items()
    ]
    return tuple(sorted(topics, key=lambda topic: (-len(topic.texts), -sum(topic.scores), topic.name)))


def _plain(name: str) -> str:
    return name.replace("_", " ")
