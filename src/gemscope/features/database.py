"""The part of an index that is searched by words: dictionaries and labels in SQLite with FTS5."""

import json
import re
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemscope.core.errors import FormatError, InputError
from gemscope.core.files import atomic_path

LOOKED_AT = 400
"""Of one source's labels only those among this many hits are found: else a common word would take long."""

_WORD = re.compile(r"[^\W_]+")
_LONGEST = 255
"""More words than these count as these."""
_SCORES = (1 << 7) - 1
"""Steps in which scores from 0 to 1 are told apart in a label's id."""
_NUMBERS = (1 << 32) - 1
"""The bits of a label's id that number it in the order of adding."""

_SCHEMA = """
CREATE TABLE dictionary (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, latents INTEGER NOT NULL, first INTEGER NOT NULL,
    about TEXT NOT NULL
);
CREATE TABLE label (
    id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL, score REAL,
    about TEXT
);
CREATE INDEX label_feature ON label (feature);
CREATE INDEX label_source ON label (source, text);
CREATE VIRTUAL TABLE words USING fts5 (
    text, content='label', content_rowid='id', tokenize='porter unicode61', detail='column', columnsize=0
);
CREATE TRIGGER label_added AFTER INSERT ON label BEGIN
    INSERT INTO words (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER label_removed AFTER DELETE ON label BEGIN
    INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text);
END;
"""


@dataclass(frozen=True)
class Label:
    """A text that says what a latent is for."""

    feature: int
    """Number of the latent over all dictionaries."""
    text: str
    source: str
    """Who says so: ``tokens`` (made from the latent's strongest tokens), ``concept``, the name of an explainer."""
    score: float | None = None
    about: Mapping[str, Any] | None = None
    """Whatever else is known of it."""


def create(path: Path, dictionaries: Sequence[tuple[str, int, Mapping[str, Any]]]) -> None:
    """A database of (name, number of latents, about) and no labels, whole or not at all."""
    with atomic_path(path) as temporary, closing(sqlite3.connect(temporary)) as base:
        base.execute("PRAGMA page_size = 4096")
        base.executescript(_SCHEMA)
        first = 0
        for number, (name, latents, about) in enumerate(dictionaries):
            text = json.dumps(about, default=str)
            base.execute("INSERT INTO dictionary VALUES (?, ?, ?, ?, ?)", (number, name, latents, first, text))
            first += latents
        base.commit()


class Database:
    """An open database. Reading needs no lock; several processes may read while one writes."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError when it is missing or damaged."""
        self.path = path
        if not path.is_file():
            raise FormatError(f"there is no file {path}; make the index again.")
        self._base = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)

    def close(self) -> None:
        """Close it."""
        self._base.close()

    @property
    def changes(self) -> int:
        """How often the file was changed, as SQLite counts it in the file itself (its header's bytes 24 to 27)."""
        with self.path.open("rb") as file:
            return int.from_bytes(file.read(28)[24:], "big")

    @contextmanager
    def _read(self, question: str, *values: Any) -> Generator[sqlite3.Cursor]:
        try:
            with closing(self._base.execute(question, values)) as rows:
                yield rows
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{self.path} is damaged ({error}); make the index again.") from error

    def _rows(self, question: str, *values: Any) -> list[Any]:
        with self._read(question, *values) as rows:
            return rows.fetchall()

    def dictionaries(self) -> list[tuple[str, int, int, dict[str, Any]]]:
        """(name, latents, number of the first one, about), in order."""
        rows = self._rows("SELECT name, latents, first, about FROM dictionary ORDER BY id")
        return [(name, latents, first, json.loads(about)) for name, latents, first, about in rows]

    def labels(self, feature: int) -> list[Label]:
        """Labels of a latent, those with a score first."""
        question = "SELECT feature, text, source, score, about FROM label WHERE feature = ?"
        rows = self._rows(f"{question} ORDER BY source = 'tokens', score IS NULL, score DESC, id", feature)
        return [_label(row) for row in rows]

    def every_label(self, source: str | None = None) -> Iterator[Label]:
        """All labels, or those of one source, by latent."""
        where = "" if source is None else "WHERE source = ?"
        question = f"SELECT feature, text, source, score, about FROM label {where} ORDER BY feature, id"
        yield from map(_label, self._rows(question, *([] if source is None else [source])))

    def labelled(self, source: str, text: str) -> list[Label]:
        """The labels of a source with exactly this text, the highest score first."""
        question = "SELECT feature, text, source, score, about FROM label WHERE source = ? AND text = ?"
        return [_label(row) for row in self._rows(f"{question} ORDER BY score DESC, feature", source, text)]

    def texts_of(self, source: str) -> list[str]:
        """The different labels of a source."""
        return [row[0] for row in self._rows("SELECT DISTINCT text FROM label WHERE source = ? ORDER BY text", source)]

    def search(self, words: str, limit: int, source: str | None = None) -> list[Label]:
        """Labels with all the words until ``limit`` features have one, best first: fewest other words, then the highest
        score, then those added first, which is the order of their ids.

        Words are stemmed; the last one may be a beginning, written ``cat*``. Raises InputError without any word.
        """
        hits = "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid"
        given = [question_of(words)]
        if source is not None:
            hits, given = f"{hits} LIMIT {LOOKED_AT}", [*given, source]
        question = (
            f"SELECT feature, text, source, score, about FROM ({hits}) AS hit CROSS JOIN label ON label.id = hit.rowid"
            f" {'' if source is None else 'WHERE source = ?'} ORDER BY hit.rowid"
        )
        found, features = list[Label](), set[int]()
        with self._read(question, *given) as rows:
            while len(features) < limit and (row := rows.fetchone()):
                found.append(_label(row))
                features.add(found[-1].feature)
        return found


@contextmanager
def writing(path: Path) -> Generator[sqlite3.Connection]:
    """A connection that may write; what was done is kept only when nothing fails."""
    with closing(sqlite3.connect(path)) as base, base:
        yield base


def add_labels(path: Path, labels: Iterable[Label], replace: Sequence[str] = ()) -> None:
    """Add labels; those of the sources in ``replace`` are removed before."""
    with writing(path) as base:
        base.execute("BEGIN IMMEDIATE")  # nobody else numbers at the same time
        for source in replace:
            base.execute("DELETE FROM label WHERE source = ?", (source,))
        begin = base.execute("SELECT coalesce(max(id & ?), -1) + 1 FROM label", (_NUMBERS,)).fetchone()[0]
        rows = (
            (
                _id_of(one, number),
                one.feature,
                one.source,
                one.text,
                one.score,
                None if one.about is None else json.dumps(dict(one.about)),
            )
            for number, one in enumerate(labels, begin)
        )
        base.executemany("INSERT INTO label (id, feature, source, text, score, about) VALUES (?, ?, ?, ?, ?, ?)", rows)


def tidy(path: Path) -> None:
    """Give free pages back and bring the words' index into one piece."""
    with closing(sqlite3.connect(path)) as base:
        base.execute("INSERT INTO words (words) VALUES ('optimize')")
        base.commit()
        base.execute("VACUUM")


def question_of(words: str) -> str:
    """The words as FTS5 reads them: all of them, each quoted, so that nothing is an operator."""
    found = re.findall(r"[^\W_]+\*?", words)
    if not found:
        raise InputError(f"{words!r} has no word to search for; give at least one.")
    return " ".join(f'"{word.rstrip("*")}"{"*" if word.endswith("*") else ""}' for word in found)


def _id_of(label: Label, number: int) -> int:
    """An id in whose order labels are the best first: hits come in it from the words' index, and nothing is sorted."""
    words = min(len(_WORD.findall(label.text)), _LONGEST)
    worse = round(_SCORES * (1 - min(max(0.0, label.score or 0.0), 1.0)))
    return (words * (_SCORES + 1) + worse) * (_NUMBERS + 1) + number


def _label(row: Sequence[Any]) -> Label:
    feature, text, source, score, about = row
    return Label(feature, text, source, score, None if about is None else json.loads(about))
