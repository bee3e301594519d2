"""How long to wait for a hub that is busy or that breaks connections."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from gemscope.core.errors import ArtifactUnreachableError

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers that are worth another try."""

_RESET = re.compile(r"\bt=(\d+)")


class BrokenOff(Exception):
    """The connection ended before the file did; what arrived is kept."""


@dataclass(frozen=True)
class Patience:
    """When to try again, and when to stop trying."""

    tries: int = 6
    """Requests in a row that may fail without a byte arriving."""
    first: float = 1.0
    """Seconds before the second try; each further wait is twice as long."""
    longest: float = 300.0
    """Seconds that a single wait may last; a hub that asks for more is not waited for."""
    sleep: Callable[[float], None] = time.sleep
    tell: Callable[[str], None] | None = None
    """Called with a sentence before each wait."""

    def wait(self, failures: int, error: Exception, what: str) -> None:
        """Sleep after the ``failures``-th failure in a row (1 for the first).

        Raises ArtifactUnreachableError when it was the last that is allowed, or the hub asks for too long a wait.
        """
        asked = _asked_for(error)
        if asked is not None and asked > self.longest:
            raise ArtifactUnreachableError(
                f"the hub is busy and asks to wait {asked:.0f} s before {what} is fetched; run the same command again"
                " then, what has arrived is kept."
            ) from error
        if failures >= self.tries:
            raise ArtifactUnreachableError(
                f"{what} could not be fetched in {failures} tries ({_reason(error)}); run the same command again later,"
                " what has arrived is kept."
            ) from error
        seconds = asked if asked is not None else min(self.first * 2 ** (failures - 1), self.longest)
        if self.tell is not None:
            self.tell(f"{_reason(error)}; waiting {seconds:.0f} s before the next try")
        self.sleep(seconds)


def worth_a_retry(error: Exception) -> bool:
    """Whether the same request may succeed later: a busy hub, a broken connection, a timeout."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in BUSY
    return isinstance(error, HTTPError | BrokenOff | TimeoutError)


def _reason(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        return "the hub answers 429, too many requests" if code == 429 else f"the hub answers {code}"
    return f"the connection breaks: {(str(error).strip().splitlines() or [type(error).__name__])[0][:120]}"


def _asked_for(error: Exception) -> float | None:
    """Seconds the hub asks to wait, from ``Retry-After`` (seconds or a date) or, for a 429, ``RateLimit``."""
    if not isinstance(error, HfHubHTTPError):
        return None
    headers: Mapping[str, str] = error.response.headers
    if (after := headers.get("Retry-After", "").strip()).isdecimal():
        return float(after[:9])
    if after:
        try:
            then = parsedate_to_datetime(after)
        except (ValueError, TypeError, OverflowError):
            return None
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        return max(0.0, (then - datetime.now(UTC)).total_seconds())
    reset = _RESET.search(headers.get("RateLimit", ""))
    return float(reset[1]) + 1 if error.response.status_code == 429 and reset else None
