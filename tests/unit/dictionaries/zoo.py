"""Random dictionaries of all five kinds, and plain formulas for what each of them computes."""

import torch

from gemscope.artifacts.config import AnyDictionary
from gemscope.dictionaries.activation import Activation
from gemscope.dictionaries.multilayer import Crosscoder, CrossLayerTranscoder
from gemscope.dictionaries.sae import SAE
from gemscope.dictionaries.transcoder import SkipTranscoder, Transcoder

KINDS = ("sae", "transcoder", "skip_transcoder", "crosscoder", "clt", "clt_skip")
ACTIVATIONS = (Activation("jumprelu"), Activation("batchtopk", 3.5), Activation("relu"), Activation("topk", 4))


def random_dictionary(
    kind: str,
    activation: Activation = ACTIVATIONS[0],
    *,
    seed: int = 0,
    d_in: int = 5,
    d_out: int = 6,
    d_sae: int = 13,
    n: int = 3,
    dtype: torch.dtype = torch.float64,
    prefixes: tuple[int, ...] = (),
) -> AnyDictionary:
    """Normal weights, thresholds of about the size of the pre-activations."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    about = {"activation": activation, "prefixes": prefixes}
    if kind in ("sae", "crosscoder"):
        d_out = d_in
    if kind in ("sae", "transcoder", "skip_transcoder"):
        tensors = [normal(d_in, d_sae), normal(d_sae), normal(d_sae, d_out), normal(d_out)]
        if activation.has_threshold:
            tensors.append(normal(d_sae).abs())
        if kind == "skip_transcoder":
            return SkipTranscoder(*tensors, W_skip=normal(d_in, d_out), **about)
        return (SAE if kind == "sae" else Transcoder)(*tensors, **about)
    W_enc, b_enc = [normal(d_in, d_sae) for _ in range(n)], [normal(d_sae) for _ in range(n)]
    W_dec, b_dec = [normal(n - i, d_sae, d_out) for i in range(n)], [normal(d_out) for _ in range(n)]
    threshold = [normal(d_sae).abs() for _ in range(n)] if activation.has_threshold else None
    if kind == "crosscoder":
        return Crosscoder(W_enc, b_enc, W_dec, b_dec, threshold, **about)
    W_skip = [normal(d_in, d_out) for _ in range(n)] if kind == "clt_skip" else None
    return CrossLayerTranscoder(W_enc, b_enc, W_dec, b_dec, threshold, W_skip, **about)


def inputs(dictionary: AnyDictionary, *batch: int, seed: int = 1) -> torch.Tensor:
    """Normal activations that suit the dictionary."""
    generator = torch.Generator().manual_seed(seed)
    positions = (dictionary.n_positions,) if dictionary.kind in ("crosscoder", "clt") else ()
    x = torch.randn(*batch, *positions, dictionary.d_in, generator=generator, dtype=torch.float64)
    return x.to(dictionary.compute_dtype)


def by_formula(dictionary: AnyDictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [batch, n, d_sae] and reconstruction [batch, n, d_out] of ``x`` [batch, n, d_in], number by number.

    Knows nothing of the package but the names of the tensors; everything is float64 and scalar.
    """
    p = {name: value.double() for name, value in dictionary.named_parameters()}
    multi = dictionary.kind in ("crosscoder", "clt")
    n = dictionary.n_positions

    def get(name: str, at: int) -> torch.Tensor:
        return p[f"{name}.{at}"] if multi else p[name]

    acts = torch.zeros(len(x), n, dictionary.d_sae, dtype=torch.float64)
    for b in range(len(x)):
        pre = torch.zeros(n, dictionary.d_sae, dtype=torch.float64)
        for at in range(n):
            for i in range(dictionary.d_sae):
                pre[at, i] = get("b_enc", at)[i] + sum(
                    x[b, at, j].double() * get("W_enc", at)[j, i] for j in range(dictionary.d_in)
                )
        if dictionary.activation.kind == "topk":
            order = sorted(range(pre.numel()), key=lambda i: (-pre.view(-1)[i].item(), i))
            for i in order[: int(dictionary.activation.k or 0)]:
                acts[b].view(-1)[i] = max(pre.view(-1)[i].item(), 0.0)
        else:
            for at in range(n):
                for i in range(dictionary.d_sae):
                    floor = get("threshold", at)[i] if dictionary.activation.has_threshold else 0.0
                    acts[b, at, i] = pre[at, i] if pre[at, i] > floor else 0.0
    recon = torch.zeros(len(x), n, dictionary.d_out, dtype=torch.float64)
    for b in range(len(x)):
        for m in range(n):
            total = get("b_dec", m).clone()
            for at in range(m + 1):
                for i in range(dictionary.d_sae):
                    row = p[f"W_dec.{at}"][m - at, i] if multi else p["W_dec"][i]
                    total += acts[b, at, i] * row
            if (f"W_skip.{m}" if multi else "W_skip") in p:
                for j in range(dictionary.d_in):
                    total += x[b, m, j].double() * get("W_skip", m)[j]
            recon[b, m] = total
    return acts, recon
