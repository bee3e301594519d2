"""What every result of the lens can do: print in 80 columns, be saved, draw itself."""

import html
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemscope.core.arrays import Tensor
from gemscope.core.errors import InputError
from gemscope.core.files import atomic_path, write_json, write_text
from gemscope.core.provenance import collect
from gemscope.lens import pictures

_PICTURES = ("png", "pdf")

Draw = Callable[[], Any]
"""Makes a matplotlib figure."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
h1 {{ font-size: 1.1rem; }}
figure {{ margin: 0; }}
figure svg {{ max-width: 100%; height: auto; background: #fff; }}
pre {{ overflow-x: auto; line-height: 1.4; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #e6e6e6; background: #1a1a1a; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<figure role="img" aria-label="{title}; the same numbers follow as text">
{svg}
</figure>
<pre dir="auto">{text}</pre>
</body>
</html>
"""


class Result(ABC):
    """A frozen value that was read from a model."""

    model: str
    """Name of the model, and its revision (``inputs.identity``)."""

    @property
    def name(self) -> str:
        """The model's name without revision, folder and owner."""
        return self.model.split("@")[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    @abstractmethod
    def title(self) -> str:
        """One line that says what it is."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: everything but the large arrays."""

    @abstractmethod
    def arrays(self) -> Mapping[str, Tensor]:
        """The large arrays by name."""

    @abstractmethod
    def text(self, width: int = 80) -> str:
        """Lines of at most ``width`` cells, or of 80 where that is more."""

    @abstractmethod
    def plot(self) -> Any:
        """A matplotlib figure (extra ``plot``); raises InputError when matplotlib is not installed."""

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def svg(self, draw: Draw | None = None) -> str:
        """The figure as SVG that needs nothing else; the same value gives the same bytes."""
        return pictures.as_svg((draw or self.plot)())

    def html(self, draw: Draw | None = None) -> str:
        """A page that needs nothing else: the figure, and the same as text."""
        title, text = html.escape(self.title), html.escape(self.text(100))
        return _PAGE.format(title=title, svg=self.svg(draw), text=text)

    def save(self, path: Path | str, draw: Draw | None = None) -> Path:
        """Write .json (the numbers), .npz (the arrays, and the numbers as the string ``about``), .svg, .png, .pdf or
        .html, by the ending of ``path``; with provenance.

        ``draw`` makes another figure than ``plot()`` would: ``lambda: maps.plot((3, 1))``. Raises InputError for
        another ending, StorageError.
        """
        path = Path(path)
        kind = path.suffix.removeprefix(".").lower()
        if kind == "json":
            write_json(path, self._about())
        elif kind == "npz":
            arrays = {name: value.detach().cpu().numpy() for name, value in self.arrays().items()}
            arrays["about"] = np.array(json.dumps(self._about(), ensure_ascii=False))
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        elif kind == "html":
            write_text(path, self.html(draw))
        elif kind == "svg":
            write_text(path, '<?xml version="1.0" encoding="utf-8"?>\n' + self.svg(draw))
        elif kind in _PICTURES:
            figure = (draw or self.plot)()
            with atomic_path(path) as temporary:
                figure.savefig(temporary, format=kind, dpi=150)
        else:
            raise InputError(f"cannot save as {path.name!r}; end the name in .json, .npz, .svg, .png, .pdf or .html.")
        return path

    def _about(self) -> dict[str, Any]:
        return self.as_dict() | {"provenance": collect(model=self.model).as_dict()}
