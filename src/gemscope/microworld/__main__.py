"""``python -m gemscope.microworld train|score|show``."""

import sys

from gemscope.core.errors import GemscopeError
from gemscope.microworld.command import app


def main() -> None:
    """Run the command; a user's mistake is one sentence and exit code 2, Ctrl-C exit code 130."""
    try:
        app(standalone_mode=False)
    except GemscopeError as error:
        sys.exit(_say(str(error), error.exit_code))
    except KeyboardInterrupt:
        sys.exit(_say("stopped; run the same command again to go on.", 130))


def _say(text: str, code: int) -> int:
    sys.stderr.write(f"gemscope.microworld: {text}\n")
    return code


if __name__ == "__main__":
    main()
