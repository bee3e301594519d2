"""Delta loss and KL: exact zero for a perfect dictionary, the brute-force loss for others, and who is counted."""

import copy

import pytest
import torch
from torch import nn

from gemscope.core.errors import InputError
from gemscope.core.sites import Site
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder
from gemscope.evaluation.groups import speakers
from gemscope.evaluation.splice import Change, counted_targets, effects, splice_losses
from gemscope.evaluation.subject import Subject
from gemscope.models.interventions import Edit
from gemscope.models.tokens import Role
from unit.models import tiny_gemma

CHAT = "<start_of_turn>user\nhello world<end_of_turn>\n<start_of_turn>model\nLyon and Paris<end_of_turn>\n"
SITE = Site("resid_post", 1)
PLACES = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out", "resid_post")
KINDS = ("sae", "transcoder", "skip_transcoder", "crosscoder", "clt", "clt_skip")


@pytest.fixture(scope="module")
def model():
    return tiny_gemma.gemma("gemma3")


@pytest.fixture(scope="module")
def model64():
    return tiny_gemma.gemma("gemma3", dtype=torch.float64)


def documents(model):
    return [model.tokens(text) for text in [*tiny_gemma.TEXTS, "Paris", CHAT]]


def linear(kind: str, width: int, n: int, scale: float, shift: float = 0.0):
    """A dictionary of any kind that writes ``scale`` times what it reads, plus ``shift``; the latents stay above 0."""
    at = 1e4
    eye, zero = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    b_enc, b_dec = zero + at, zero - scale * at + shift
    relu = {"activation": Activation("relu")}
    if kind == "sae":
        return SAE(eye, b_enc, scale * eye, b_dec, **relu)
    if kind == "transcoder":
        return Transcoder(eye, b_enc, scale * eye, b_dec, **relu)
    nothing = {"W_enc": eye, "b_enc": zero - at, "W_dec": scale * eye, "b_dec": zero + shift}
    if kind == "skip_transcoder":
        return SkipTranscoder(**nothing, W_skip=scale * eye, **relu)
    dec = [torch.stack([scale * eye if m == 0 else 0 * eye for m in range(n - i)]) for i in range(n)]
    if kind == "crosscoder":
        return Crosscoder([eye] * n, [b_enc] * n, dec, [b_dec] * n, **relu)
    if kind == "clt":
        return CrossLayerTranscoder([eye] * n, [b_enc] * n, dec, [b_dec] * n, **relu)
    silent = [zero - at] * n
    return CrossLayerTranscoder([eye] * n, silent, dec, [zero + shift] * n, W_skip=[scale * eye] * n, **relu)


def subject(model, kind: str, name: str = "resid_post", scale: float = 1.0, shift: float = 0.0) -> Subject:
    n = model.shape.n_layers if kind in ("crosscoder", "clt", "clt_skip") else 1
    sites = tuple(Site(name, layer) for layer in (range(n) if n > 1 else [1]))
    return Subject(kind, linear(kind, model.width(sites[0]), n, scale, shift), sites, sites)


def means(model, sites, value=0.3):
    return {site: torch.full((model.width(site),), value) for site in sites}


def measured(model, one: Subject, **options):
    return splice_losses(model, [one], means(model, one.writes), documents(model), **options)[0][0].loss


def brute_force(model, item, edits):
    """Per counted target of one unpadded document, in float64, position by position: (loss, KL, same first choice)."""
    content = [i for i, role in enumerate(item.roles) if role is Role.CONTENT]
    before = model.logits(item)[0].double()
    after = model.logits(item, interventions=edits(content))[0].double()
    found = []
    for i in content[1:]:
        p, q = before[i - 1].log_softmax(-1), after[i - 1].log_softmax(-1)
        kl = sum(float(a.exp() * (a - b)) for a, b in zip(p, q, strict=True))
        found.append((-float(p[item.ids[i]]), -float(q[item.ids[i]]), kl, int(p.argmax()) == int(q.argmax())))
    return found


def at_content(site, change):
    def edits(content):
        def function(x):
            y = x.clone()
            y[:, content] = change(x[:, content])
            return y

        return [Edit(site, function)]

    return edits


@pytest.mark.parametrize("batch_tokens", [20, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_dictionary_has_a_delta_loss_of_exactly_zero_at_every_site(model, kind, batch_tokens):
    for name in PLACES:
        loss = measured(model, subject(model, kind, name), batch_tokens=batch_tokens)
        assert loss.delta_loss == 0.0, name
        assert (loss.kl, loss.kl_p95, loss.top1) == (0.0, 0.0, 1.0)
        assert loss.zero != loss.original
        assert all(group.delta_loss == 0.0 for group in loss.by_group)


def test_the_places_outside_the_layers_are_spliced_too(model):
    for name in ("embed", "final_in", "final_norm"):
        site = Site(name)
        one = Subject("sae", linear("sae", model.width(site), 1, 1.0), (site,), (site,))
        assert measured(model, one).delta_loss == 0.0


class _TheMlp(Transcoder):
    """A perfect transcoder: the MLP itself."""

    def bind(self, layer: nn.Module) -> "_TheMlp":
        self._mlp, self._norm = copy.deepcopy(layer.mlp), copy.deepcopy(layer.post_feedforward_layernorm)
        return self

    def write_at(self, position, codes, x):
        return self._norm(self._mlp(x))


def test_a_perfect_transcoder_has_a_delta_loss_of_exactly_zero(model):
    width = model.width("mlp_in.1")
    zeros = torch.zeros(width, 3), torch.zeros(3), torch.zeros(3, width), torch.zeros(width)
    one = _TheMlp(*zeros, activation=Activation("relu")).bind(model.decoder.layer(1))
    found = measured(model, Subject("mlp", one, (Site("mlp_in", 1),), (Site("mlp_out", 1),)))
    assert found.delta_loss == pytest.approx(0.0, abs=1e-6)  # rows instead of a rectangle: other sums in fp32
    assert found.kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_dictionary_equals_the_zero_ablation_exactly_at_every_site(model, kind):
    for name in PLACES:
        loss = measured(model, subject(model, kind, name, scale=0.0))
        assert loss.spliced == loss.zero, name
        assert loss.kl == loss.kl_zero
        assert loss.recovered_zero == (0.0 if loss.zero > loss.original else None)
        same = measured(model, subject(model, kind, name, scale=0.0, shift=0.3))
        assert same.spliced == same.mean, name


@pytest.mark.parametrize("batch_tokens", [20, 10_000])
def test_every_loss_equals_brute_force_over_unpadded_documents(model64, batch_tokens):
    model, mean = model64, torch.linspace(-1, 1, model64.width(SITE), dtype=torch.float64)
    one = subject(model, "sae", scale=0.5, shift=0.1)
    spliced, _ = splice_losses(model, [one], {SITE: mean}, documents(model), batch_tokens=batch_tokens)
    loss = spliced[0].loss
    changes = {
        "spliced": lambda x: 0.5 * x + 0.1,
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    for name, change in changes.items():
        found = [p for d in documents(model) for p in brute_force(model, d, at_content(SITE, change))]
        original, changed, kl, same = (torch.tensor(c, dtype=torch.float64) for c in zip(*found, strict=True))
        assert loss.predictions == len(found)
        assert loss.original == pytest.approx(original.mean().item(), rel=1e-9)
        assert getattr(loss, name) == pytest.approx(changed.mean().item(), rel=1e-9)
        if name == "spliced":
            assert loss.kl == pytest.approx(kl.mean().item(), rel=1e-9)
            assert loss.top1 == pytest.approx(same.mean().item(), rel=1e-12)
            assert loss.kl_p95 == pytest.approx(kl.sort().values[-(-95 * len(kl) // 100) - 1].item(), rel=1e-9)
        else:
            assert getattr(loss, f"kl_{name}") == pytest.approx(kl.mean().item(), rel=1e-9)
    assert abs(loss.delta_loss) > 1e-3
    assert loss.as_dict()["delta_loss"] == loss.delta_loss


def test_a_clt_writes_every_mlp_from_what_the_changed_layers_show_it(model64):
    """Against a forward pass taken apart layer by layer: what a layer reads was changed by the ones before."""
    model, n = model64, model64.shape.n_layers
    generator = torch.Generator().manual_seed(0)
    width = model.width("mlp_in.0")

    def normal(*shape):
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    clt = CrossLayerTranscoder(
        [normal(width, 20) for _ in range(n)],
        [normal(20) for _ in range(n)],
        [normal(n - i, 20, width) for i in range(n)],
        [normal(width) for _ in range(n)],
        W_skip=[normal(width, width) for _ in range(n)],
        activation=Activation("relu"),
    )
    reads, writes = (tuple(Site(name, i) for i in range(n)) for name in ("mlp_in", "mlp_out"))
    loss = measured(model, Subject("clt", clt, reads, writes))

    def edits(content):
        acts, rows = [], []

        def note(x, at):
            rows.append(x[:, content])
            acts.append((x[:, content] @ clt.W_enc[at] + clt.b_enc[at]).relu())
            return x

        def write(x, at):
            y = x.clone()
            parts = [acts[low] @ clt.W_dec[low][at - low] for low in range(at + 1)]
            y[:, content] = sum(parts) + clt.b_dec[at] + rows[at] @ clt.W_skip[at]
            return y

        return [
            edit
            for at in range(n)
            for edit in (
                Edit(reads[at], lambda x, at=at: note(x, at)),
                Edit(writes[at], lambda x, at=at: write(x, at)),
            )
        ]

    found = [p for d in documents(model) for p in brute_force(model, d, edits)]
    assert loss.spliced == pytest.approx(sum(p[1] for p in found) / len(found), rel=1e-9)
    assert loss.kl == pytest.approx(sum(p[2] for p in found) / len(found), rel=1e-9)


def test_a_topk_over_layers_is_read_on_the_model_s_own_pass(model64):
    one = subject(model64, "crosscoder")
    n = model64.shape.n_layers
    all_of_them = Activation("topk", n * model64.width(SITE))
    parts = {name: list(getattr(one.dictionary, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    same = Subject("topk", Crosscoder(**parts, activation=all_of_them), one.reads, one.writes)
    assert measured(model64, same).delta_loss == pytest.approx(0.0, abs=1e-9)


def test_counted_targets_are_content_without_the_first_of_each_document(model):
    items = documents(model)
    mask = counted_targets(model.batch(items))
    for row, item in enumerate(items):
        content = [i for i, role in enumerate(item.roles) if role is Role.CONTENT]
        assert mask[row].nonzero()[:, 0].tolist() == content[1:]
    counted = "".join(items[-1].pieces[i] for i in mask[-1].nonzero()[:, 0].tolist())
    assert counted == "▁worldLyon▁and▁Paris"


def test_a_prediction_that_is_not_counted_could_not_have_changed(model):
    item = documents(model)[0]
    edited = [Edit("resid_post.1", lambda x: x * 0, positions="content")]
    before, after = model.logits(item)[0, 0], model.logits(item, interventions=edited)[0, 0]
    assert torch.equal(before, after)


def test_special_template_and_padding_positions_keep_the_model_s_own_values(model):
    items = documents(model)
    seen = {}
    change = Change.functions({SITE: torch.zeros_like})
    batch = model.batch(items)
    mask = torch.zeros_like(batch.mask)
    for row, item in enumerate(items):
        mask[row, : len(item)] = item.content_mask
    plain = model.capture(batch, [SITE])[SITE]
    seen = model.capture(batch, [SITE], interventions=change.edits(mask, {}))[SITE]
    assert torch.equal(seen[~mask], plain[~mask])
    assert not seen[mask].any()


def test_by_speaker_and_position_the_losses_average_to_the_whole(model):
    loss = measured(model, subject(model, "sae", scale=0.5))
    groups = {group.name: group for group in loss.by_group}
    assert groups["user"].predictions == 1
    assert groups["model"].predictions == 3
    speaking = [groups[name] for name in ("text", "user", "model")]
    assert sum(g.predictions for g in speaking) == loss.predictions
    whole = sum(g.delta_loss * g.predictions for g in speaking) / loss.predictions
    assert whole == pytest.approx(loss.delta_loss, abs=1e-9)
    item = documents(model)[-1]
    who = speakers(item).tolist()
    assert [who[i] for i, piece in enumerate(item.pieces) if piece in ("▁world", "Lyon")] == [1, 2]


def test_kl_is_finite_where_a_token_is_impossible(model):
    """Softmax and then a logarithm would give NaN, which SAEBench stores as -1."""
    site = Site("final_norm")
    one = Subject("loud", linear("sae", model.width(site), 1, 1e3), (site,), (site,))
    loss = measured(model, one)
    assert loss.kl is not None
    assert 1 < loss.kl < float("inf")
    assert loss.kl == pytest.approx(loss.kl, nan_ok=False)


def test_differences_far_below_a_bf16_step_are_kept(model):
    loss = measured(model, subject(model, "sae", scale=1 + 1e-4))
    assert 0 < abs(loss.delta_loss) < 1 / 64


def test_one_pass_of_the_model_serves_all_and_ablations_are_shared(model, monkeypatch):
    passes = []
    real = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda *a, **k: passes.append(1) or real(*a, **k))
    several = [subject(model, "sae", scale=s) for s in (0.5, 0.9, 1.0)]
    spliced, others = splice_losses(model, several, means(model, [SITE]), documents(model), batch_tokens=10_000)
    assert len(passes) == len(several) + 2
    assert others == []
    alone = measured(model, several[0])
    assert spliced[0].loss == alone


def test_documents_without_a_prediction_are_refused(model):
    with pytest.raises(InputError, match="no prediction"):
        effects(model, [Change.ablation([SITE])], [model.tokens("a")])


def test_a_dictionary_that_writes_before_it_reads_is_refused(model):
    one = Subject("odd", linear("transcoder", 24, 1, 1.0), (Site("resid_post", 2),), (Site("resid_post", 1),))
    with pytest.raises(InputError, match="before it reads"):
        one.check(model)
