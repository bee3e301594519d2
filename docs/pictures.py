"""Draw the pictures of the docs from real output: run ``gemscope`` in 80 columns and save the terminal as SVG, or let
it draw.
"""

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
WIDTH = 80


def draw(name: str, *words: str) -> None:
    """Run one command and write ``images/NAME.svg``."""
    environment = {**os.environ, "COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "gemscope.cli.main", *words]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    with Path(os.devnull).open("w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        typed = " ".join(f'"{word}"' if " " in word else word for word in words)
        console.print(Text.assemble(("$ ", "bold green"), (f"gemscope {typed}", "bold")))
        console.print(Text.from_ansi(shown.rstrip("\n")))
        (HERE / "images").mkdir(exist_ok=True)
        console.save_svg(str(HERE / "images" / f"{name}.svg"), title="gemscope", unique_id=name)


def save(name: str, *words: str) -> None:
    """Let one command write ``images/NAME.svg`` itself."""
    out = str(HERE / "images" / f"{name}.svg")
    command = [sys.executable, "-m", "gemscope.cli.main", *words, "--out", out]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    draw("look", "look", "SCIENCE: Study of the chromosome surprises researchers in Daegu")
    draw("quickstart", "quickstart")
    save("attend", "attend", "The capital of the country where Lyon lies is", "--edit", "Lyon=Osaka")
