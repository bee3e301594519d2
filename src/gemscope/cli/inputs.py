"""What a command is given: a text, a suite."""

import sys
from pathlib import Path

from gemscope.core.errors import InputError
from gemscope.suites.suite import Suite, default_folder

DEFAULT_MODEL = "microworld-it"


def read_text(argument: str | None) -> str:
    """The argument, or standard input when it is absent or ``-``; without the newline that ends it.

    Raises InputError when there is no text, or bytes that are not UTF-8.
    """
    text = argument
    if argument is None or argument == "-":
        if argument is None and sys.stdin.isatty():
            raise InputError('no text was given; write it in quotes, as in gemscope look "Paris is in France".')
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            bad = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
            raise InputError(
                f"standard input is not valid UTF-8 ({bad}); convert it, for example with iconv."
            ) from error
    text = (text or "").removesuffix("\n")
    if not text:
        raise InputError("the text is empty; give at least one character.")
    return text


def open_suite(model: str | None, folder: Path | None) -> Suite:
    """The suite in ``folder``, or the one of ``model`` in its usual place.

    Raises InputError, with the command that builds it, when there is none.
    """
    place = folder or default_folder(model or DEFAULT_MODEL)
    if not (place / "suite.json").is_file():
        command = "gemscope quickstart"
        command += f" --model {model}" if model not in (None, DEFAULT_MODEL) else ""
        command += f" --out {folder}" if folder is not None else ""
        raise InputError(f"there is no finished suite in {place}; build it first with: {command}")
    return Suite.open(place)
