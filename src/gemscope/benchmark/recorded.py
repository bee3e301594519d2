"""What peers reached, with where the figure is from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recorded:
    """One figure of a peer; means over seeds."""

    tier: str
    trainer: str
    method: str
    mcc: float
    f1: float
    seeds: int
    source: str


_PAPER = "published for 200 M rows at L0 25, read off the figures of SynthSAEBench"
_MEASURED = "measured once on 2.05 M rows, learning rate 1e-3 falling over the last 30 %"

RECORDED: tuple[Recorded, ...] = (
    Recorded("nano", "SAELens 6.54.12", "matryoshka", 0.756, 0.778, 3, _MEASURED),
    Recorded("nano", "SAELens 6.54.12", "batchtopk", 0.698, 0.617, 3, _MEASURED),
    Recorded("16k", "SynthSAEBench", "matryoshka", 0.793, 0.88, 1, _PAPER),
    Recorded("16k", "SynthSAEBench", "batchtopk", 0.757, 0.73, 1, _PAPER),
    Recorded("16k", "SynthSAEBench", "jumprelu", 0.729, 0.61, 1, _PAPER),
)
