"""The mistakes that other evaluators make, one by one put into ours: each has to fail a named test.

From reference implementations: explained variance with squares before the mean, an mse divided once more, KL through a
softmax, bf16 averages, L1 without absolute values, dictionaries in the model's type, <bos>, padding and chat markers in
averages or left out of the input, outliers that flatter, variance per batch, centred residuals, only zero ablation,
special tokens replaced, dead latents of no stated number of tokens, test rows fitted on, decoders taken for unit norm,
positions counted from the end, tokens drawn instead of documents.
"""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
import torch

from unit.evaluation import test_evaluate, test_fidelity, test_labels_and_controls, test_probes, test_splice
from unit.models import tiny_gemma

E = "gemscope.evaluation."


def fidelity(name: str, *args: Any) -> Callable[[], object]:
    return lambda: getattr(test_fidelity, name)(*args)


def spliced(name: str, *args: Any, precise: bool = False) -> Callable[[], object]:
    dtype = torch.float64 if precise else torch.float32
    return lambda: getattr(test_splice, name)(tiny_gemma.gemma("gemma3", dtype=dtype), *args)


def whole(name: str, *args: Any) -> Callable[[], object]:
    def run() -> None:
        model = tiny_gemma.gemma("gemma3")
        getattr(test_evaluate, name)(model, [model.tokens(text) for text in test_evaluate.TEXTS], *args)

    return run


def probes(name: str, *args: Any) -> Callable[[], object]:
    return lambda: getattr(test_probes, name)(*args)


FORMULA = fidelity("test_every_number_equals_the_formula_over_all_rows_at_once", 0.0, 3, (2, 3, 5))
SHIFTED = fidelity("test_every_number_equals_the_formula_over_all_rows_at_once", 1e4, 0, ())
BATCHES = fidelity("test_the_measures_do_not_depend_on_how_rows_are_batched")
ROWS = whole("test_fidelity_is_that_of_the_content_rows", 4096)
BRUTE = spliced("test_every_loss_equals_brute_force_over_unpadded_documents", 10_000, precise=True)

MUTATIONS: dict[str, tuple[str, str, str, Callable[[], object]]] = {
    "squares before the mean": (
        "fidelity",
        'fvu=total("sse") / spread.total,',
        'fvu=mse / (total("square") / rows - (total("square") / rows / len(spread.mean)) ** 2),',
        SHIFTED,
    ),
    "second moment instead of variance": (
        "fidelity",
        'fvu=total("sse") / spread.total,',
        'fvu=total("sse") / total("square"),',
        SHIFTED,
    ),
    "mse divided by the tokens of a batch": (
        "fidelity",
        "mse=mse,",
        'mse=total("shared") / rows,',
        BATCHES,
    ),
    "kl through a softmax": (
        "splice",
        "before, after = (t[at].to(precise).log_softmax(-1) for t in (original, changed))",
        "before, after = (t[at].to(precise).softmax(-1).log() for t in (original, changed))",
        spliced("test_kl_is_finite_where_a_token_is_impossible"),
    ),
    "kl the other way round": (
        "splice",
        "kl = (before.exp() * (before - after)).double().sum(-1)",
        "kl = (after.exp() * (after - before)).double().sum(-1)",
        BRUTE,
    ),
    "losses in bf16": (
        "splice",
        "losses = (-t.gather(1, target)[:, 0] for t in (before, after))",
        "losses = (-t.gather(1, target)[:, 0].bfloat16() for t in (before, after))",
        spliced("test_differences_far_below_a_bf16_step_are_kept"),
    ),
    "l1 without absolute values": (
        "fidelity",
        "values.double().cpu().abs()",
        "values.double().cpu()",
        fidelity("test_negative_activations_count_in_l1_by_their_size"),
    ),
    "the dictionary in the model's type": (
        "subject",
        "return torch.stack([rows[site] for site in self.reads], dim=1)",
        "return torch.stack([rows[site].bfloat16() for site in self.reads], dim=1)",
        ROWS,
    ),
    "errors passed over": (
        "evaluate",
        "        subject.check(gemma)\n",
        "        pass\n",
        lambda: _refusals(),
    ),
    "padding, bos and markers in the averages": (
        "evaluate",
        "mask = gemma.capture(batch, reading.sites), content_mask(batch)",
        "mask = gemma.capture(batch, reading.sites), torch.ones_like(batch.mask)",
        ROWS,
    ),
    "bos and markers in the averages": (
        "evaluate",
        "mask = gemma.capture(batch, reading.sites), content_mask(batch)",
        "mask = gemma.capture(batch, reading.sites), batch.mask",
        ROWS,
    ),
    "bos left out of the input": (
        "evaluate",
        "captured, mask = gemma.capture(batch, reading.sites), content_mask(batch)",
        "batch = gemma.batch([gemma.tokens_of([*i.ids[1:], 0]) for i in batch.items]);"
        " captured, mask = gemma.capture(batch, reading.sites), content_mask(batch)",
        whole("test_bos_stays_in_the_input"),
    ),
    "outliers in the robust measure": (
        "moments",
        "return self._joined(kept), ~kept",
        "return self._joined(kept | True), ~(kept | True)",
        fidelity("test_an_attention_sink_flatters_the_fvu_and_not_the_robust_one"),
    ),
    "variance per batch": (
        "fidelity",
        'fvu=total("sse") / spread.total,',
        'fvu=1 - total("legacy") / rows,',
        BATCHES,
    ),
    "variance within documents": (
        "moments",
        "        own = self._sum / self._count.clamp(min=1.0)[:, None]\n",
        "        own = mean[None]\n",
        FORMULA,
    ),
    "residual centred before it is squared": (
        "fidelity",
        "error, dot = (y - recon).square().sum(1), (y * recon).sum(1)",
        "error, dot = (y - recon - (y - recon).mean(0)).square().sum(1), (y * recon).sum(1)",
        fidelity("test_a_constant_bias_counts_as_error"),
    ),
    "zeros for the mean ablation": (
        "splice",
        "Ablate(site, None if means is None else means[site], positions=where)",
        "Ablate(site, None, positions=where)",
        BRUTE,
    ),
    "special tokens replaced": (
        "splice",
        "    found[where.to(x.device)] = rows.to(x.device, x.dtype)\n",
        "    found[where.to(x.device)] = rows.to(x.device, x.dtype); found[~where.to(x.device)] = 0\n",
        spliced("test_special_template_and_padding_positions_keep_the_model_s_own_values"),
    ),
    "the first prediction and markers counted": (
        "splice",
        "return mask & (mask.cumsum(1) > 1)",
        "return mask",
        spliced("test_counted_targets_are_content_without_the_first_of_each_document"),
    ),
    "clt layers one by one": (
        "splice",
        "self._codes[: position + 1], self._rows[position]",
        "[(s, v * (i == position)) for i, (s, v) in enumerate(self._codes[: position + 1])], self._rows[position]",
        spliced("test_a_clt_writes_every_mlp_from_what_the_changed_layers_show_it", precise=True),
    ),
    "dead of the latents that fired once": (
        "fidelity",
        "return sum(count == 0 for count in self.firings)",
        "return sum(count <= 1 for count in self.firings)",
        fidelity("test_dead_dense_and_the_histogram_count_latents"),
    ),
    "probes that see the test rows": (
        "features",
        "x, known = self.x[train].double(), y[train].double()",
        "x, known = self.x.double(), y.double()",
        probes("test_nothing_is_fitted_on_the_test_rows"),
    ),
    "token statistics that see the test rows": (
        "probes",
        "known = y.double() * train[:, None]",
        "known = y.double()",
        probes("test_nothing_is_fitted_on_the_test_rows"),
    ),
    "decoders taken for unit norm": (
        "absorption",
        "along = decoder.double() @ unit",
        "along = (decoder.double() / decoder.double().norm(dim=1, keepdim=True)) @ unit",
        probes("test_absorption_counts_the_tokens_at_which_another_latent_stands_in", 10.0),
    ),
    "a ratio averaged over documents": (
        "bootstrap",
        "return (counts @ above.double()) / (counts @ below.double())",
        "return counts @ (above.double() / below.double()) / counts.sum(1)",
        probes("test_an_interval_of_a_ratio_is_that_of_drawn_documents"),
    ),
    "equal documents on both sides": (
        "study",
        "return hashlib.blake2b(tokens.ids.numpy().tobytes(), digest_size=1).digest()[0] % 2 == 0",
        "return bool(torch.rand(()) < 0.5)",
        lambda: test_labels_and_controls.test_equal_documents_are_held_out_together(tiny_gemma.gemma("gemma3")),
    ),
}


def _refusals() -> None:
    model = tiny_gemma.gemma("gemma3")
    items = [model.tokens(text) for text in test_evaluate.TEXTS]
    with pytest.raises(Exception, match="reads 23"):
        test_evaluate.measured(model, items, test_evaluate.random_sae(23))


def test_every_named_test_passes_without_its_mutation():
    seen: list[Callable[[], object]] = []
    for *_, run in MUTATIONS.values():
        if run not in seen:
            seen.append(run)
            run()


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_mistake_fails_its_named_test(name):
    module, old, new, run = MUTATIONS[name]
    with mutated(importlib.import_module(E + module), old, new), pytest.raises(BaseException):  # noqa: B017, PT011
        run()


@contextmanager
def mutated(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """``module`` with one place of its source changed: the code of every function that differs is exchanged."""
    source = inspect.getsource(module)
    assert source.count(old) >= 1, f"{old!r} is not in {module.__name__}"
    before, after = (
        dict(_codes(compile(ast.parse(text), "mutated", "exec"))) for text in (source, source.replace(old, new))
    )
    changed = {name: code for name, code in after.items() if name in before and _differs(code, before[name])}
    assert changed
    kept: list[tuple[FunctionType, CodeType]] = []
    for function in _functions(module):
        if function.__qualname__ in changed:
            kept.append((function, function.__code__))
            function.__code__ = changed[function.__qualname__]
    assert kept, sorted(changed)
    try:
        yield
    finally:
        for function, code in kept:
            function.__code__ = code


def _differs(one: CodeType, other: CodeType) -> bool:
    def plain(code: CodeType) -> object:
        constants = [plain(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        return (code.co_code, code.co_names, code.co_varnames, constants)

    return plain(one) != plain(other)


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if "<locals>" not in constant.co_qualname and not constant.co_name.startswith("<"):
                yield constant.co_qualname, constant
            yield from _codes(constant)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Every function and method of the module, without the wrappers that check its types."""
    for value in vars(module).values():
        members = (
            list(vars(value).values()) if inspect.isclass(value) and value.__module__ == module.__name__ else [value]
        )
        for member in members:
            inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            inner = member.func if isinstance(member, cached_property) else inner
            inner = inspect.unwrap(inner) if callable(inner) and not inspect.isclass(inner) else inner
            if isinstance(inner, FunctionType) and inner.__module__ == module.__name__:
                yield inner
