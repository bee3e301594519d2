"""The object everything starts from: a Gemma 2 or 3 with its tokenizer, ready to be looked into.

Notable: one class for all sizes; the 4B, 12B and 27B models are read through their multimodal wrapper, of
which only the text decoder runs. All methods may be called from several threads; passes over one model take
turns.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gemscope.core.arrays import Float, Int, Tensor
from gemscope.core.device import choose_device, choose_dtype
from gemscope.core.errors import InputError
from gemscope.core.sites import SITE_KINDS, Site
from gemscope.models import generation, loading, selftest
from gemscope.models.capture import Capture
from gemscope.models.chat import Turn, render
from gemscope.models.forward import Pass, lock_of, run
from gemscope.models.generation import Generation, Sampling
from gemscope.models.interventions import Intervention
from gemscope.models.layout import ModelShape, find_decoder
from gemscope.models.positions import Moment
from gemscope.models.tokens import Batch, Tokens, Vocabulary, collate

Inputs = Tokens | Sequence[Tokens] | Batch


class Gemma:
    """A loaded model. Make one with ``Gemma.load`` or ``Gemma.wrap``."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        revision: str | None,
        check: bool,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        """The hub's commit hash; None for a folder, a built-in or a wrapped model."""
        self.decoder = find_decoder(model, name)
        self.shape: ModelShape = self.decoder.shape
        self.vocabulary = Vocabulary(tokenizer, name)
        if check:
            selftest.check(model, self.decoder, self.tokens(selftest.TEXT), name)

    def __repr__(self) -> str:
        name = f"{self.name}@{self.revision[:8]}" if self.revision else self.name
        return f"Gemma({name}: {self.shape.n_layers} layers, d_model {self.shape.d_model}, {self.dtype})"

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        device_map: str | dict[str, Any] | None = None,
        check: bool = True,
    ) -> "Gemma":
        """Load a built-in name (``microworld-pt``, ``microworld-it``), a model folder, or a hub id.

        ``dtype`` is bf16, fp32 or fp64 (default: bf16 on CUDA, else fp32); ``device_map`` spreads the model
        over devices instead of ``device``; ``check`` runs the self-test. Parameters are frozen. Raises
        ModelError and its kinds, FormatError, InputError, SelfTestError.
        """
        if device is not None and device_map is not None:
            raise InputError("give device or device_map, not both.")
        place = choose_device(device) if device_map is None else None
        wanted = choose_dtype(dtype, place or choose_device())
        if wanted not in (torch.bfloat16, torch.float32, torch.float64):
            raise InputError(f"Gemma cannot run in {wanted} (its activations overflow float16); use bf16 or fp32.")
        checkpoint = loading.locate(name, revision)
        tokenizer = loading.load_tokenizer(checkpoint)
        model = loading.load_model(checkpoint, str(name), dtype=wanted, device=place, device_map=device_map)
        return cls(model, tokenizer, str(name), checkpoint.revision, check)

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str, check: bool = True
    ) -> "Gemma":
        """Look into a model that is already built; it is put in evaluation mode, its parameters stay as they
        are.

        Raises UnsupportedModelError, FormatError for a tokenizer that is not Gemma's, SelfTestError.
        """
        return cls(model, tokenizer, name, None, check)

    def twin(self) -> "Gemma":
        """The same weights in modules of their own: hooks belong to modules, so one model makes one pass at a time."""
        memo: dict[int, Any] = {id(one): one for one in (*self.model.parameters(), *self.model.buffers())}
        other = copy.copy(self)
        with lock_of(self.decoder.trunk):
            other.model = copy.deepcopy(self.model, memo)
        other.decoder = find_decoder(other.model, self.name)
        return other

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return next(self.decoder.trunk.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of weights and activations."""
        return next(self.decoder.trunk.parameters()).dtype

    @property
    def is_chat(self) -> bool:
        """Whether the model is instruction-tuned: its tokenizer carries a chat template."""
        return self.vocabulary.has_turns and getattr(self.tokenizer, "chat_template", None) is not None

    def check_site(self, site: str | Site) -> Site:
        """The parsed site; raises SiteError when this model has no such site, naming the layers that
        exist."""
        return self.shape.check(site)

    def width(self, site: str | Site) -> int:
        """Size of the last axis at ``site``; raises SiteError for a pattern."""
        return self.shape.width(self.check_site(site))

    def every_layer(self, name: str) -> list[Site]:
        """The site ``name`` in every layer; raises SiteError when it is no per-layer site."""
        if name not in SITE_KINDS:
            Site.parse(name)
        return [Site(name, layer) for layer in range(self.shape.n_layers)]

    def tokens(self, text: str) -> Tokens:
        """``text`` with exactly one ``<bos>``; raises InputError when it is empty, ContextLengthError when
        too long."""
        return self.vocabulary.encode(text, context=self.shape.context, vocab_size=self.shape.vocab_size)

    def chat(self, turns: str | Sequence[Turn], *, answer: bool = True) -> Tokens:
        """A conversation in Gemma's format; a str is one user turn; ``answer`` opens the model's turn.

        Raises InputError for roles that do not alternate, empty turns, or a tokenizer without turn markers.
        """
        if not self.vocabulary.has_turns:
            raise InputError(f"the tokenizer of {self.name!r} has no turn markers; use tokens() with plain text.")
        return self.tokens(render(turns, answer=answer))

    def tokens_of(self, ids: Iterable[int] | Int[Tensor, "pos"]) -> Tokens:
        """Tokens of ids, with the text they spell; nothing is added. Raises InputError for an unknown id."""
        listed = [int(i) for i in ids]
        text, pieces, offsets = self.vocabulary.decode(listed)
        return self.vocabulary.assemble(text, listed, pieces, offsets)

    def batch(self, items: Sequence[Tokens], side: Literal["right", "left"] = "right") -> Batch:
        """Several texts in one rectangle; raises InputError for an empty list."""
        return collate(items, self.vocabulary.pad_id, side)

    def capture(
        self,
        inputs: Inputs,
        sites: Iterable[str | Site],
        *,
        logits: bool = False,
        interventions: Sequence[Intervention] = (),
        grad: bool = False,
    ) -> Capture:
        """Activations at ``sites`` in one forward pass, which ends after the last of them unless logits are
        asked for.

        The value at a changed site is the one after the changes. With ``grad`` the tensors are connected to a
        graph whose leaf is the embeddings (or a later ``Leaf``); without, they carry none. Raises SiteError,
        InputError.
        """
        wanted = tuple(dict.fromkeys(self.check_site(site) for site in sites))
        if not wanted and not logits:
            raise InputError("nothing to capture; name at least one site, for example 'resid_post.0'.")
        batch = self._batch(inputs)
        moment = Moment(batch, 0, batch.ids.shape[1])
        this = Pass(
            moment=moment,
            ids=batch.ids.to(self.device),
            mask=batch.mask,
            sites=wanted,
            interventions=interventions,
            final=logits,
            grad=grad,
        )
        acts, last = run(self.decoder, this)
        return Capture(acts, None if last is None else self._head(last, grad), batch)

    def logits(self, inputs: Inputs, *, interventions: Sequence[Intervention] = ()) -> Float[Tensor, "batch pos vocab"]:
        """Next-token logits at every position; at padding they are meaningless."""
        found = self.capture(inputs, (), logits=True, interventions=interventions).logits
        assert found is not None
        return found

    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int,
        interventions: Sequence[Intervention] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        cache: bool = True,
    ) -> list[Generation]:
        """Continue each input until end of text, end of turn, or ``max_new_tokens``.

        ``temperature`` 0 is greedy; above, item i samples with ``seed`` + i. ``cache`` keeps keys and values
        between steps and changes nothing but the time. Raises InputError, ContextLengthError.
        """
        batch = self._batch(inputs)
        batch = batch if batch.side == "left" else self.batch(batch.items, "left")
        stream = generation.steps(
            self.decoder,
            batch,
            max_new_tokens=max_new_tokens,
            interventions=interventions,
            sampling=Sampling(temperature, seed),
            cache=cache,
        )
        found = generation.until_stopped(stream, len(batch.items), self.stop_ids)
        return [self._generation(item, ids, stop) for item, (ids, stop) in zip(batch.items, found, strict=True)]

    def stream(
        self,
        prompt: Tokens,
        *,
        max_new_tokens: int,
        interventions: Sequence[Intervention] = (),
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """The new tokens of one prompt as they come, ending before a stop token. Same errors as
        ``generate``."""
        chosen = generation.steps(
            self.decoder,
            self.batch([prompt], "left"),
            max_new_tokens=max_new_tokens,
            interventions=interventions,
            sampling=Sampling(temperature, seed),
            cache=True,
        )
        for token in chosen:
            if int(token) in self.stop_ids:
                return
            yield int(token)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a generation: end of text, end of turn, and what the model's configuration adds."""
        configured: Any = getattr(self.model.generation_config, "eos_token_id", None)
        found = list(configured) if isinstance(configured, list | tuple) else [configured]
        return frozenset(i for i in [*found, self.vocabulary.eos_id, self.vocabulary.end_id] if i is not None)

    def unembed(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of residual-stream values: final norm by each value's own RMS, lm_head, Gemma 2's cap.

        This is the logit lens (nostalgebraist 2020). Differentiable.
        """
        with lock_of(self.decoder.trunk):
            return self.decoder.unembed(self.decoder.final(resid.to(self.dtype)))

    def final_gain(self) -> Float[Tensor, "d_model"]:
        """The gain of the final norm: 1 + its weight, in float32."""
        weight = self.decoder.final.get_parameter("weight")
        return 1.0 + weight.detach().float()

    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding's rows: a view of the weight, not a copy."""
        return self.decoder.head.get_parameter("weight").detach()

    def _batch(self, inputs: Inputs) -> Batch:
        if isinstance(inputs, Batch):
            return inputs
        return self.batch([inputs] if isinstance(inputs, Tokens) else inputs)

    def _head(self, last: Tensor, grad: bool) -> Tensor:
        with lock_of(self.decoder.trunk), torch.set_grad_enabled(grad):
            return self.decoder.unembed(last)

    def _generation(self, prompt: Tokens, ids: list[int], stopped: bool) -> Generation:
        text, pieces, offsets = self.vocabulary.decode(ids)
        shift = len(prompt.text)
        whole = self.vocabulary.assemble(
            prompt.text + text,
            [*prompt.ids.tolist(), *ids],
            [*prompt.pieces, *pieces],
            [*prompt.offsets, *((start + shift, end + shift) for start, end in offsets)],
        )
        new = torch.tensor(ids, dtype=torch.long)
        return Generation(text, new, prompt, whole, "stop" if stopped else "length")
