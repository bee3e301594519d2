"""The scorecard of the built-in models: each planted behaviour, measured on held-out prompts."""

from _common import Result, arguments, machine, report

from gemscope.core.provenance import collect
from gemscope.microworld.scorecard import scorecard
from gemscope.models.gemma import Gemma


def main() -> None:
    """Run and print."""
    options = arguments(__doc__ or "")
    for model in ("microworld-it",) if options.quick else ("microworld-pt", "microworld-it"):
        found = scorecard(Gemma.load(model), collect())
        report(
            [
                Result(f"{s.behaviour} ({model})", s.share, "", f"{s.n} held-out prompts; {machine()}")
                for s in found.scores
            ],
            options.json,
        )


if __name__ == "__main__":
    main()
