"""The self-test finds what it is there to find, and names it."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from gemscope.core.errors import SelfTestError
from gemscope.models import attention
from gemscope.models.gemma import Gemma
from unit.models.tiny_gemma import KINDS, Kind, build, gemma, tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_passes_on_every_class_and_number_type(kind: Kind, dtype: torch.dtype) -> None:
    gemma(kind, dtype=dtype, check=True)


def _layer_output(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_hook(lambda _, args, output: output + 1e-3)


def _layer_input(model: PreTrainedModel) -> None:
    model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] * 1.001,))


def _norm_input(model: PreTrainedModel) -> None:
    model.model.layers[0].pre_feedforward_layernorm.register_forward_pre_hook(lambda _, args: (args[0] * 1.1,))


def _logits(model: PreTrainedModel) -> None:
    def change(_: object, args: object, output: object) -> object:
        output.logits = output.logits * 1.01
        return output

    model.register_forward_hook(change)


def _nan(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))


@pytest.mark.parametrize(
    ("break_it", "identity"),
    [
        (_layer_output, r"resid_post\.1 = resid_mid\.1 \+ mlp_out\.1"),
        (_layer_input, r"resid_pre\.2 = resid_post\.1"),
        (_norm_input, r"resid_mid\.0 = resid_pre\.0 \+ attn_out\.0"),
        (_logits, "logits with hooks = logits without"),
        (_nan, "finite"),
    ],
)
def test_it_names_the_identity_that_fails(break_it: Callable[[PreTrainedModel], None], identity: str) -> None:
    model = build("gemma3")
    break_it(model)
    with pytest.raises(SelfTestError, match=identity):
        Gemma.wrap(model, tokenizer(), name="broken")
    Gemma.wrap(model, tokenizer(), name="broken", check=False)


def test_it_checks_that_the_last_resid_post_is_what_the_logits_come_from() -> None:
    model = build("gemma3")
    calls: list[int] = []

    def change(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        return args if len(calls) % 3 == 0 else (args[0] * torch.linspace(0.5, 1.5, 24),)

    model.model.norm.register_forward_pre_hook(change)
    with pytest.raises(SelfTestError, match=r"lm_head\(norm\(resid_post\[-1\]\)\)"):
        Gemma.wrap(model, tokenizer(), name="broken")


def test_it_checks_the_rows_of_the_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.attention_pattern
    monkeypatch.setattr(attention, "attention_pattern", lambda *args: true(*args) * 1.01)
    with pytest.raises(SelfTestError, match=r"rows of pattern\.\d sum to one"):
        gemma(check=True)
