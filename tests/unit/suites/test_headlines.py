"""Headlines: which features say yes where, against their rule on the activations; topics; what is refused."""

import pytest

from gemscope.core.errors import InputError
from gemscope.models.gemma import Gemma
from gemscope.suites.headlines import Detector, concept_detectors, read_headlines
from gemscope.suites.suite import Suite

TEXTS = ["the capital of France is Paris", "hello world and we like Lyon", "words"]


@pytest.fixture(scope="module")
def opened(tiny_suite, tiny_folder):
    return Gemma.load(tiny_folder), Suite.open(tiny_suite)


def _activations(gemma, suite, site, text):
    tokens = gemma.tokens(text)
    content = tokens.content_mask
    return (
        tokens,
        suite.dictionary(site).encode(gemma.capture(tokens, [site])[site][0][content]),
        content.nonzero()[:, 0],
    )


def test_features_follow_their_rule(opened):
    gemma, suite = opened
    one, two = suite.sites[1], suite.sites[2]
    asked = [Detector(one, j, f"topic{j % 2}", 0.5, 0.3, 4.0) for j in range(5)]
    asked += [Detector(two, 7, "seven"), Detector(two, 8, "never", threshold=1e9)]
    read = read_headlines(gemma, suite, TEXTS, detectors=asked)
    for text, found in zip(TEXTS, read.features, strict=True):
        expected = {}
        for detector in asked:
            _, acts, place = _activations(gemma, suite, detector.site, text)
            value, at = acts[:, detector.latent].max(0)
            if value > 0 and value >= detector.threshold:
                expected[detector] = float(value), int(place[at])
        assert {f.detector: (f.activation, f.position) for f in found} == {
            d: (pytest.approx(v, rel=1e-5), p) for d, (v, p) in expected.items()
        }
        assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)
        for f in found:
            share = 1.0 if f.detector.largest is None else f.activation / 4.0
            assert f.score == pytest.approx(f.detector.sureness * share)
    assert "never" not in {topic.name for topic in read.topics}
    for topic in read.topics:
        best = [max((f.score for f in fs if f.detector.topic == topic.name), default=0.0) for fs in read.features]
        assert list(topic.scores) == best
        assert set(topic.texts) == {i for i, value in enumerate(best) if value > 0}


def test_concepts_stand_for_topics_from_an_f1_on(opened):
    _, suite = opened
    scores = suite.evaluation(suite.site(2)).concepts.scores
    found = concept_detectors(suite, 2, least=0.1)
    assert {d.topic: d.latent for d in found} == {s.concept: s.f1_latent for s in scores if s.f1 >= 0.1}
    assert concept_detectors(suite, least=2.0) == ()


def test_it_prints_saves_and_draws(opened, tmp_path):
    gemma, suite = opened
    asked = [Detector(suite.sites[0], j, f"topic_{j % 3}") for j in range(12)]
    read = read_headlines(gemma, suite, [*TEXTS, "long " * 40], detectors=asked)
    assert max(map(len, str(read).splitlines())) <= 80
    for ending in ("json", "npz", "svg"):
        assert read.save(tmp_path / f"read.{ending}").stat().st_size > 500
    assert read.as_dict()["texts"][0]["text"] == TEXTS[0]


def test_what_cannot_be_read_is_refused(opened):
    gemma, suite = opened
    with pytest.raises(InputError, match="no texts"):
        read_headlines(gemma, suite, [])
    with pytest.raises(InputError, match="no latent of the suite"):
        read_headlines(gemma, suite, TEXTS, detectors=())
    silent = read_headlines(gemma, suite, TEXTS, detectors=[Detector(suite.sites[0], 0, "x", threshold=1e9)])
    assert silent.topics == ()
    assert "no feature says yes" in str(silent)
    with pytest.raises(InputError, match="no topics to draw"):
        silent.plot()
    with pytest.raises(InputError, match="give --suite another"):
        read_headlines(
            Gemma.load("microworld-pt", check=False), suite, TEXTS, detectors=[Detector(suite.sites[0], 0, "x")]
        )
