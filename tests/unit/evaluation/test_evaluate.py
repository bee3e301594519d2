"""Everything measured of several dictionaries in one pass, and its way to disk and back."""

import json
from dataclasses import replace

import pytest
import torch

from gemscope.core.errors import FormatError, InputError, SiteError
from gemscope.core.files import write_json
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.sae import SAE
from gemscope.evaluation import first_letter
from gemscope.evaluation.compare import compare
from gemscope.evaluation.concepts import ConceptLabels
from gemscope.evaluation.evaluate import EvaluateConfig, evaluate
from gemscope.evaluation.first_letter import FirstLetters
from gemscope.evaluation.page import page, write
from gemscope.evaluation.probes import Absorption, Probed
from gemscope.evaluation.result import Evaluation
from gemscope.evaluation.saebench import absorption, core, export, problems, sparse_probing
from gemscope.evaluation.subject import Subject
from gemscope.evaluation.tasks import rule_labels
from unit.dictionaries.zoo import random_dictionary
from unit.models import tiny_gemma

SITE = Site("resid_post", 2)
TEXTS = [
    *tiny_gemma.TEXTS,
    "<start_of_turn>user\nhello we<end_of_turn>\n<start_of_turn>model\nParis<end_of_turn>\n",
]
PLAIN = EvaluateConfig(controls=False, probes=False)


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


@pytest.fixture(scope="module")
def items(model):
    return [model.tokens(text) for text in TEXTS]


def identity(d_in: int, at: float = 1e4) -> SAE:
    eye = torch.eye(d_in, dtype=torch.float64)
    b_enc, zero = torch.full((d_in,), at, dtype=torch.float64), torch.zeros(d_in, dtype=torch.float64)
    return SAE(eye, b_enc, eye.clone(), zero - at, zero.clone())


def random_sae(d_in: int = 24, d_sae: int = 32, seed: int = 0, prefixes: tuple[int, ...] = ()) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(d_sae, d_in, generator=generator) / d_in**0.5
    floor = torch.full((d_sae,), 1.0)
    return SAE(W.T.contiguous(), torch.zeros(d_sae), W, torch.zeros(d_in), floor, prefixes=prefixes)


def sae_at(dictionary: SAE, name: str = "one") -> Subject:
    return Subject(name, dictionary, (SITE,), (SITE,))


def measured(model, items, dictionary=None, labels=None, config=PLAIN, **options) -> Evaluation:
    return evaluate(model, [sae_at(dictionary or random_sae())], items, labels, config, **options)[0]


def content(model, items, site=SITE) -> torch.Tensor:
    """Rows of single, unpadded captures in float64."""
    return torch.cat([model.capture(i, [site])[site][0][i.content_mask] for i in items]).double()


@pytest.mark.parametrize("batch_tokens", [20, 4096])
def test_fidelity_is_that_of_the_content_rows(model, items, batch_tokens):
    """Of no padding, no <bos>, no turn marker: all of them are in the input and in no average."""
    sae = random_sae()
    got = measured(model, items, sae, config=EvaluateConfig(batch_tokens=batch_tokens, controls=False)).fidelity
    x = content(model, items)
    acts = sae.encode(x.float()).double()
    recon = acts @ sae.W_dec.double() + sae.b_dec.double()
    assert got.rows == len(x) == sum(int(item.content_mask.sum()) for item in items)
    assert got.l0 == pytest.approx((acts > 0).sum(1).double().mean().item())
    fvu = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
    assert got.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert got.firings == tuple((acts > 0).sum(0).tolist())


def test_bos_stays_in_the_input(model, items):
    with_bos = content(model, items[:1])
    without = model.capture(model.tokens_of(items[0].ids[1:]), [SITE])[SITE][0].double()
    assert not torch.allclose(with_bos, without, atol=1e-2)
    got = measured(model, items[:1]).fidelity
    x = with_bos
    recon = random_sae()(x.float()).double()
    assert got.mse == pytest.approx((x - recon).square().sum(1).mean().item(), rel=1e-5)


KINDS = ("sae", "transcoder", "skip_transcoder", "crosscoder", "clt", "clt_skip")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_measured_against_what_it_writes(kind):
    model = tiny_gemma.gemma("gemma3", dtype=torch.float64)
    items = [model.tokens(text) for text in TEXTS]
    n = model.shape.n_layers if kind in ("crosscoder", "clt", "clt_skip") else 1
    one = random_dictionary(kind, d_in=24, d_out=24, n=n)
    reads = tuple(Site("mlp_in" if "trans" in kind or "clt" in kind else "resid_post", i) for i in range(n))
    writes = tuple(Site("mlp_out", i) for i in range(n)) if reads[0].name == "mlp_in" else reads
    (got,) = evaluate(model, [Subject(kind, one, reads, writes)], items, config=EvaluateConfig(probes=False))
    x = torch.stack([content(model, items, site) for site in reads], 1)
    y = torch.stack([content(model, items, site) for site in writes], 1)
    recon = one(x if n > 1 else x[:, 0]).view(y.shape)
    each = [
        float((y[:, i] - recon[:, i]).square().sum() / (y[:, i] - y[:, i].mean(0)).square().sum()) for i in range(n)
    ]
    assert [site.fvu for site in got.fidelity.by_site] == pytest.approx(each, rel=1e-9)
    assert got.fidelity.fvu == pytest.approx(sum(each) / n, rel=1e-9)
    acts = one.encode(x if n > 1 else x[:, 0])
    assert got.fidelity.l0 == pytest.approx((acts != 0).flatten(1).sum(1).double().mean().item(), rel=1e-12)
    assert (got.kind, len(got.fidelity.firings)) == (one.kind, one.n_latents)
    assert [control.name for control in got.controls] == ["random dictionary", "PCA at equal k"]
    assert got.controls[0].fvu > 0.5
    assert Evaluation.of(json.loads(json.dumps(got.as_dict())), "here") == got


def test_a_perfect_dictionary_scores_perfectly(model, items):
    got = measured(model, items, identity(model.width(SITE)))
    assert got.fidelity.fvu < 1e-20
    assert got.loss.delta_loss == 0.0


def test_several_dictionaries_are_measured_as_if_each_were_alone(model, items):
    several = [sae_at(random_sae(seed=i), str(i)) for i in range(3)]
    passes = []
    real = type(model).capture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "capture", lambda *a, **k: passes.append(a) or real(*a, **k))
        together = evaluate(model, several, items, config=PLAIN)
    reading = [a for a in passes if a[2]]
    assert len(reading) == 1
    for one, got in zip(several, together, strict=True):
        (alone,) = evaluate(model, [one], items, config=PLAIN)
        assert (got.fidelity, got.loss, got.documents) == (alone.fidelity, alone.loss, alone.documents)


def test_the_dictionary_computes_in_fp32_whatever_the_model_s_type(items):
    model = tiny_gemma.gemma("gemma3", dtype=torch.bfloat16)
    got = measured(model, items)
    x = content(model, items)
    assert got.fidelity.mse == pytest.approx((x - random_sae()(x.float()).double()).square().sum(1).mean().item())


def test_matryoshka_prefixes_are_a_curve_that_ends_at_the_whole(model, items):
    sae = random_sae(prefixes=(8, 16, 32))
    got = measured(model, items, sae).fidelity
    assert [point.latents for point in got.prefixes] == [8, 16, 32]
    x = content(model, items)
    for point in got.prefixes:
        part = sae.prefix(point.latents) if point.latents < 32 else sae
        error = (x - part(x.float()).double()).square().sum()
        assert point.fvu == pytest.approx((error / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
        assert point.l0 == pytest.approx((part.encode(x.float()) > 0).sum(1).double().mean().item())
    assert got.prefixes[-1].fvu == pytest.approx(got.fvu, rel=1e-12)


def test_a_topk_chooses_anew_within_a_prefix(model, items):
    W = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    sae = SAE(W.T.contiguous(), torch.zeros(16), W, torch.zeros(24), activation=Activation("topk", 4), prefixes=(8,))
    got = measured(model, items, sae).fidelity
    x = content(model, items).float()
    assert got.prefixes[0].l0 == pytest.approx((sae.prefix(8).encode(x) > 0).sum(1).double().mean().item())


def test_a_latent_that_marks_a_labelled_concept_is_found(model, items):
    items = items * 3
    direction = content(model, items)[::5].mean(0)
    projection = [model.capture(i, [SITE])[SITE][0].double() @ direction for i in items]
    values = torch.cat([p[i.content_mask] for p, i in zip(projection, items, strict=True)]).unique()
    cut = values[len(values) // 2 - 1 : len(values) // 2 + 1].mean()
    marks = [torch.stack([p > cut, p < -1e9], 1) for p in projection]
    sae = random_sae()
    W_enc = sae.W_enc.clone()
    W_enc[:, 5] = direction.float()
    threshold = sae.threshold.clone()
    threshold[5] = float(cut)
    sae = SAE(W_enc, sae.b_enc.clone(), sae.W_dec.clone(), sae.b_dec.clone(), threshold)
    for batch_tokens in (20, 4096):
        labels = ConceptLabels(("above", "never"), marks)
        config = EvaluateConfig(batch_tokens=batch_tokens, controls=False, probes=False)
        found = measured(model, items, sae, labels, config).concepts
        assert found.too_few == {"never": 0}
        assert found.found[0] == 1
        assert found.coverage([0.5, 1.0]) == [1.0, 1.0]
        (score,) = found.scores
        assert (score.f1_latent, score.auroc_latent) == (5, 5)
        assert score.f1 == 1.0
        assert score.auroc == 1.0


def test_the_loss_is_measured_on_the_first_documents_only(model, items):
    config = EvaluateConfig(splice_tokens=len(items[0].ids) + 1, controls=False, probes=False)
    some = measured(model, items, config=config).loss
    first_two = measured(model, items[:2]).loss
    assert (some.predictions, some.original, some.spliced) == (
        first_two.predictions,
        first_two.original,
        first_two.spliced,
    )
    assert some.predictions < measured(model, items).loss.predictions


def test_an_evaluation_reads_back_as_it_was(model, items, tmp_path):
    marks = [torch.ones(len(i.ids), 2, dtype=torch.bool) for i in items]
    for mark in marks:
        mark[::2, 0] = False
    for labels in (None, ConceptLabels(("even", "all"), marks)):
        made = measured(model, items, labels=labels, about={"key": "k"})
        made.save(tmp_path / "e.json")
        assert Evaluation.load(tmp_path / "e.json") == made
        assert made.about["key"] == "k"
        assert "versions" in made.about["provenance"]


def test_progress_runs_to_the_end(model, items):
    for config in (EvaluateConfig(batch_tokens=20, controls=False), EvaluateConfig(batch_tokens=20)):
        calls = []
        measured(model, items, config=config, progress=lambda *now, calls=calls: calls.append(now))
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert calls[-1][0] == calls[-1][1]
        assert len({call[1] for call in calls}) == 1


def test_what_does_not_fit_is_refused(model, items, tmp_path):
    with pytest.raises(InputError, match="reads 23"):
        measured(model, items, random_sae(23))
    with pytest.raises(SiteError):
        evaluate(model, [Subject("x", random_sae(), (Site("resid_post", 9),) * 1, (Site("resid_post", 9),))], items)
    with pytest.raises(InputError, match="spread"):
        measured(model, [])
    short = ConceptLabels(("a",), [torch.zeros(1, 1, dtype=torch.bool)] * len(items))
    with pytest.raises(InputError, match="label the same tokens"):
        measured(model, items, labels=short)
    few = ConceptLabels(("a",), [torch.zeros(len(items[0].ids), 1, dtype=torch.bool)])
    with pytest.raises(InputError, match="label the same documents"):
        measured(model, items, labels=few)
    write_json(tmp_path / "e.json", {"format": "gemscope.evaluation", "version": 2, "site": str(SITE)})
    with pytest.raises(FormatError, match="lacks a part"):
        Evaluation.load(tmp_path / "e.json")
    write_json(tmp_path / "e.json", [])
    with pytest.raises(FormatError, match=r"no gemscope\.evaluation"):
        Evaluation.load(tmp_path / "e.json")


@pytest.fixture(scope="module")
def full(model) -> tuple[Evaluation, ...]:
    """Two dictionaries with everything that there is, on 40 short documents."""
    words = "the capital of France is Paris and we like Lyon today hello world in words long".split()
    generator = torch.Generator().manual_seed(0)
    texts = [
        " ".join(words[int(i)] for i in torch.randint(len(words), (14,), generator=generator)) + f' ({k}) "Lyon" 12.'
        for k in range(40)
    ]
    items = [model.tokens(text) for text in texts]
    marks = [torch.tensor([[p in ("▁Paris", "▁Lyon"), p == "▁Lyon"] for p in i.pieces]) for i in items]
    labels = ConceptLabels(("city", "lyon"), marks, frozenset(), {"lyon": "city"})
    several = [sae_at(random_sae(seed=i, d_sae=24 + 8 * i, prefixes=(8, 24 + 8 * i)), f"sae{i}") for i in range(2)]
    return evaluate(model, several, items, labels, EvaluateConfig(batch_tokens=512), tasks=rule_labels(items))


def test_the_page_and_the_files_hold_what_was_measured(full, tmp_path):
    written = write(tmp_path, full)
    assert {"evaluations.json", "sae0.json", "sae1.json", "index.html"} <= set(written)
    assert Evaluation.load(tmp_path / "sae1.json") == full[1]
    text = page(full)
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "<script" not in text
    for one in full:
        assert f"{one.loss.delta_loss:.4f}" in text
    for name in ("city", "shuffled labels", "random model", "PCA at equal k", "Matryoshka"):
        assert name in text


def test_the_export_passes_saebench_s_schema_and_holds_the_right_values(full, tmp_path):
    write(tmp_path, full)
    files = sorted((tmp_path / "saebench" / "core").glob("*_eval_results.json"))
    assert len(files) == 2
    for path, one in zip(files, full, strict=True):
        value = json.loads(path.read_text())
        assert problems(value, "core") == []
        metrics = value["eval_result_metrics"]
        assert metrics["reconstruction_quality"]["explained_variance"] == 1 - one.fidelity.fvu
        assert metrics["model_performance_preservation"]["ce_loss_with_sae"] == one.loss.spliced
        assert metrics["sparsity"]["l0"] == one.fidelity.l0
        assert set(value["eval_result_unstructured"]["compat"]) == {
            "explained_variance_saebench_bug",
            "mse_saebench_bug",
        }
        assert "explained_variance_saebench_bug" in value["eval_config"]["compat"]
        assert len(value["eval_result_details"]) == one.d_sae
    broken = core(full[0])
    del broken["eval_result_metrics"]["sparsity"]["l0"]
    assert problems(broken, "core") == ["sparsity.l0 is None"]


def test_sparse_probing_is_exported_with_balanced_accuracies_under_saebench_s_keys(full, tmp_path):
    files = [path for path in export(tmp_path, full) if path.parent.name == "sparse_probing"]
    assert len(files) == 2
    for path, one in zip(files, full, strict=True):
        value = json.loads(path.read_text())
        assert problems(value, "sparse_probing") == []
        metrics = value["eval_result_metrics"]
        scores = [
            [label.score(*m).accuracy for label in one.probes.concepts] for m in (("dense", None), ("latents", 2))
        ]
        assert metrics["llm"]["llm_test_accuracy"] == pytest.approx(sum(scores[0]) / len(scores[0]))
        assert metrics["sae"]["sae_top_2_test_accuracy"] == pytest.approx(sum(scores[1]) / len(scores[1]))
        assert all(0.3 <= v <= 1 for kind in metrics.values() for v in kind.values())
        details = {line["dataset_name"]: line for line in value["eval_result_details"]}
        assert details["city"]["llm_top_1_test_accuracy"] == one.probes.concepts[0].score("neurons", 1).accuracy
    broken = sparse_probing(full[0])
    del broken["eval_result_metrics"]["sae"]["sae_test_accuracy"]
    assert problems(broken, "sparse_probing") == ["sae.sae_test_accuracy is None"]
    assert sparse_probing(replace(full[0], probes=None)) is None


def test_first_letters_are_exported_as_saebench_s_absorption(full, tmp_path):
    def letter(name: str, whole: float, part: float, tokens: int, splits: int) -> Probed:
        return Probed(name, 50, (), 0, splits, None, Absorption(whole, part, tokens))

    found = FirstLetters("one", 500, (letter("a", 0.25, 0.3, 40, 1), letter("b", 0.75, 0.5, 20, 3)), ("c",))
    one = replace(full[0], first_letters=found)
    (path,) = [path for path in export(tmp_path, [one]) if path.parent.name == "absorption"]
    value = json.loads(path.read_text())
    assert problems(value, "absorption") == []
    mean = value["eval_result_metrics"]["mean"]
    assert (mean["mean_full_absorption_score"], mean["mean_absorption_fraction_score"]) == (0.5, pytest.approx(0.4))
    assert mean["mean_num_split_features"] == 2.0
    assert mean["std_dev_full_absorption_score"] == pytest.approx(0.125**0.5)
    assert [line["num_full_absorption"] for line in value["eval_result_details"]] == [10, 15]
    assert "c" in value["eval_config"]["method"]
    assert absorption(full[0]) is absorption(replace(one, first_letters=replace(found, letters=()))) is None
    one.save(tmp_path / "one.json")
    assert Evaluation.load(tmp_path / "one.json") == one
    assert "a b" in page([one])


def test_first_letters_are_measured_when_asked_for(model, items, monkeypatch):
    words = ["".join("abcd"[(i >> 2 * p) % 4] for p in range(4)) for i in range(220)]
    monkeypatch.setattr(first_letter, "words_of", lambda *_: words)
    monkeypatch.setattr(first_letter, "SHOWN", 1)
    asked = EvaluateConfig(controls=False, probes=False, first_letters=True)
    assert measured(model, items, config=asked).first_letters.words == 220
    assert measured(model, items).first_letters is None


def test_a_comparison_is_paired_and_a_dictionary_is_no_better_than_itself(full):
    same = compare(full[0], full[0])
    assert all(one.difference == 0 and one.better is None for one in same.differences)
    assert same.verdict.startswith("No difference")
    found = compare(*full)
    by = {(one.figure, one.where): one for one in found.differences}
    assert by["fvu", "everywhere"].difference == pytest.approx(full[1].fidelity.fvu - full[0].fidelity.fvu)
    assert by["delta_loss", "everywhere"].first == pytest.approx(full[0].loss.delta_loss)
    back = compare(full[1], full[0])
    for one in back.differences:
        other = by[one.figure, one.where]
        assert one.difference == pytest.approx(-other.difference)
        swapped = {None: None, "first": "second", "second": "first"}
        assert one.better == swapped[other.better]
    assert by["l0", "everywhere"].better is None
    low, high = by["fvu", "everywhere"].interval
    assert low <= by["fvu", "everywhere"].difference <= high
    with pytest.raises(InputError, match="same documents"):
        compare(full[0], full[0].__class__(**{**full[0].__dict__, "documents": {}}))


def test_intervals_hold_their_figures_and_come_from_documents(full):
    for one in full:
        figures = {"fvu": one.fidelity.fvu, "l0": one.fidelity.l0, "delta_loss": one.loss.delta_loss, "kl": one.loss.kl}
        for name, value in figures.items():
            low, high = one.intervals[name]
            assert low <= value <= high
        assert sum(one.documents["unexplained"]) / sum(one.documents["spread"]) == pytest.approx(one.fidelity.fvu)
        assert sum(one.documents["delta"]) / sum(one.documents["predictions"]) == pytest.approx(one.loss.delta_loss)
        assert sum(one.documents["rows"]) == one.fidelity.rows


def test_probes_stand_beside_their_controls_and_tokens_explain_a_token_concept(full):
    for one in full:
        report = one.probes
        assert report is not None
        names = {probed.concept: probed for probed in report.concepts}
        assert {"city", "rule: digit", "rule: inside quotes"} <= set(names)
        city = names["city"]
        for method in ("latents", "random dictionary", "neurons", "PCA", "shuffled labels", "random model"):
            assert [s.k for s in city.scores if s.method == method] == [1, 2, 5, 16]
        assert city.score("token statistics").auroc == 1.0
        assert city.score("dense").auroc > 0.8
        assert city.absorption is not None
        assert city.absorption_random is not None
        assert names["lyon"].parent == "city"
        assert report.as_dict()["mean_auroc"]
