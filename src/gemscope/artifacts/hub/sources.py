"""Where files come from: a Hugging Face hub or a mirror of it (``HubSource``), or a folder (``FolderSource``).

A source describes a file (size, hash, revision) and reads it from any byte on. Names of repositories and paths come
from the catalogue; what a hub answers is not trusted further than the hash it announces.
"""

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFolder
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from gemscope.artifacts.hub import record
from gemscope.artifacts.hub.files import CHUNK, RemoteFile
from gemscope.artifacts.hub.retry import BrokenOff, Patience, worth_a_retry
from gemscope.core.errors import (
    ArtifactError,
    ArtifactNotFoundError,
    ArtifactRefusedError,
    ArtifactUnreachableError,
    InputError,
)

MAIN = "main"

Answer = TypeVar("Answer")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRIES_TO_REACH = 3
_NOT_UNDERSTOOD = (ValueError, TypeError, KeyError, AttributeError)
"""What huggingface_hub raises at an answer that is no JSON, or lacks what it looks for."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")


@runtime_checkable
class Source(Protocol):
    """What a download needs of the place that it comes from."""

    @property
    def name(self) -> str:
        """As it is recorded: the address, without any password, or the folder."""
        ...

    @property
    def patience(self) -> Patience:
        """With a hub that is busy or breaks connections."""
        ...

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit that ``revision`` means now; None when the source has no revisions. Raises ArtifactError."""
        ...

    def describe(self, repo: str, path: str, revision: str) -> RemoteFile | None:
        """The file, or None when the repository has none of this name; raises ArtifactError."""
        ...

    def folders(self, repo: str, path: str, revision: str) -> list[str]:
        """Names of the folders in the folder ``path``; raises ArtifactError."""
        ...

    def read(self, file: RemoteFile, start: int) -> Any:
        """A context that gives the first byte's position (``start`` or, if it cannot begin there, 0) and the chunks.

        Raises ArtifactError for what another try will not mend, and whatever ``worth_a_retry`` knows otherwise.
        """
        ...


def open_source(where: str | Path | None = None, patience: Patience | None = None) -> Source:
    """The hub that huggingface_hub uses (``where`` None), one at another address, or a folder.

    Raises InputError when ``where`` is neither an address nor a folder.
    """
    if where is None:
        return HubSource(constants.ENDPOINT, patience or Patience())
    text = str(where)
    if text.startswith(("http://", "https://")):
        try:
            host = urlsplit(text).hostname
        except ValueError:
            host = None
        if host:
            return HubSource(text.rstrip("/"), patience or Patience())
    elif (folder := Path(text).expanduser()).is_dir():
        return FolderSource(folder)
    raise InputError(
        f"{text!r} is neither a hub's address (https://...) nor a folder; a folder holds OWNER/REPOSITORY/FILES."
    )


@dataclass(frozen=True)
class HubSource:
    """A Hugging Face hub. The stored token is sent to the hub that huggingface_hub is set up for, and to no other."""

    endpoint: str
    patience: Patience = field(default_factory=Patience)

    @property
    def name(self) -> str:
        """The address, without user and password."""
        parts = urlsplit(self.endpoint)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    @property
    def _token(self) -> bool | None:
        """None: the stored one, if any; False: none."""
        return None if self.endpoint in (constants.ENDPOINT, "https://huggingface.co") else False

    def commit(self, repo: str, revision: str) -> str | None:
        """One request; see ``Source``."""
        api = HfApi(endpoint=self.endpoint, token=self._token)
        found = self._insist(lambda: api.model_info(repo, revision=revision, expand=["sha"]).sha, repo, revision)
        if found is None:
            raise ArtifactNotFoundError(f"there is no repository {repo!r} at {self.name}; check --hub and the name.")
        if not _COMMIT.fullmatch(found):
            raise self._no_hub(f"no commit for {repo}")
        return found

    def describe(self, repo: str, path: str, revision: str) -> RemoteFile | None:
        """One HEAD request; see ``Source``."""
        url = self._url(repo, path, revision)
        ask = partial(get_hf_file_metadata, url, token=self._token, endpoint=self.endpoint)
        found = self._insist(ask, repo, revision)
        if found is None:
            return None
        if not _COMMIT.fullmatch(found.commit_hash or "") or found.size is None or found.size < 0:
            raise self._no_hub(f"no commit or size of {path}")
        return RemoteFile(repo, path, found.size, found.commit_hash, found.etag)

    def folders(self, repo: str, path: str, revision: str) -> list[str]:
        """One listing; see ``Source``."""
        api = HfApi(endpoint=self.endpoint, token=self._token)
        listed = self._insist(lambda: list(api.list_repo_tree(repo, path, revision=revision)), repo, revision)
        return [entry.path.rsplit("/", 1)[-1] for entry in listed or () if isinstance(entry, RepoFolder)]

    @contextmanager
    def read(self, file: RemoteFile, start: int) -> Generator[tuple[int, Iterator[bytes]]]:
        """One GET request, with a range unless ``start`` is 0; see ``Source``."""
        url = self._url(file.repo, file.path, file.revision or MAIN)
        headers = {**build_hf_headers(token=self._token), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with get_session().stream(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
            ) as response:
                if response.status_code == 416:
                    raise BrokenOff("the hub has no such range")
                hf_raise_for_status(response)
                yield _first_byte(response), response.iter_bytes()
        except HTTPError as error:
            if (sentence := self._sentence(error, file.repo, file.revision or MAIN, file.path)) is None:
                raise
            raise sentence from error

    def _url(self, repo: str, path: str, revision: str) -> str:
        return f"{self.endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}"

    def _no_hub(self, why: str) -> ArtifactUnreachableError:
        return ArtifactUnreachableError(
            f"{self.name} does not answer like a Hugging Face hub ({why}); check the address and any proxy."
        )

    def _insist(self, ask: Callable[[], Answer], repo: str, revision: str) -> Answer | None:
        """The answer, with patience for a busy hub and little for an absent one; None for a file that is not there."""
        failures = 0
        while True:
            try:
                return ask()
            except Exception as error:
                if _no_such_file(error):
                    return None
                if (sentence := self._sentence(error, repo, revision)) is not None:
                    raise sentence from error
                if isinstance(error, _NOT_UNDERSTOOD):
                    raise self._no_hub(f"what it says of {repo} cannot be understood") from error
                if not worth_a_retry(error):
                    raise
                failures += 1
                if not isinstance(error, HfHubHTTPError) and failures >= _TRIES_TO_REACH:
                    raise ArtifactUnreachableError(
                        f"{self.name} cannot be reached; check the network, or give a mirror or a folder with --hub."
                    ) from error
                self.patience.wait(failures, error, repo)

    def _sentence(self, error: Exception, repo: str, revision: str, path: str = "") -> ArtifactError | None:
        """The one sentence for what another try will not mend; None for anything else."""
        page = f"{self.name}/{repo}"
        code = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if worth_a_retry(error):
            return None
        if isinstance(error, GatedRepoError) or code in (401, 403):
            login = "run 'hf auth login' once" if self._token is None else "fetch from the hub itself, without --hub"
            return ArtifactRefusedError(
                f"the hub refuses {repo!r} ({code}): it is gated or private, or does not exist; accept its licence at"
                f" {page}, then {login}."
            )
        if isinstance(error, RevisionNotFoundError):
            return ArtifactNotFoundError(f"{repo!r} has no revision {revision!r}; see {page}/commits/main.")
        if isinstance(error, RepositoryNotFoundError):
            return ArtifactNotFoundError(f"there is no repository {repo!r} at {self.name}; check --hub and the name.")
        if code == 404:
            return ArtifactNotFoundError(f"{repo!r} at {revision} has no file {path}; see {page}/tree/{revision}.")
        if code is not None:
            return ArtifactError(f"the hub answers {code} for {path or repo!r}; see {page}.")
        if isinstance(error, ConnectionError):  # huggingface_hub's offline mode
            return ArtifactUnreachableError("HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or give --hub.")
        return None


@dataclass(frozen=True)
class FolderSource:
    """A folder that holds ``OWNER/REPOSITORY/FILES``, such as an earlier ``gemscope fetch --out`` made."""

    root: Path
    patience: Patience = field(default_factory=Patience)

    @property
    def name(self) -> str:
        """The folder, in full."""
        return str(self.root.resolve())

    def commit(self, repo: str, revision: str) -> str | None:
        """None; raises InputError for a revision, since a folder has none."""
        if revision != MAIN:
            raise InputError(f"the folder {self.root} has no revisions; leave out --revision {revision}.")
        if not (self.root / repo).is_dir():
            raise ArtifactNotFoundError(f"there is no repository {repo!r} in {self.root}; it should be a folder there.")
        return None

    def describe(self, repo: str, path: str, revision: str) -> RemoteFile | None:
        """See ``Source``; hash and revision are known where an earlier fetch recorded them."""
        file = self.root / repo / path
        if not file.is_file():
            return None
        size = file.stat().st_size
        known = record.read(file.parent).get(file.name)
        if known is None or known.size != size:
            return RemoteFile(repo, path, size, None)
        return RemoteFile(repo, path, size, known.revision, known.sha256)

    def folders(self, repo: str, path: str, revision: str) -> list[str]:
        """See ``Source``."""
        folder = self.root / repo / path
        return [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []

    @contextmanager
    def read(self, file: RemoteFile, start: int) -> Generator[tuple[int, Iterator[bytes]]]:
        """See ``Source``."""
        place = self.root / file.repo / file.path
        try:
            stream = place.open("rb")
        except OSError as error:
            raise ArtifactNotFoundError(f"cannot read {place} ({error.strerror}); check the folder.") from error
        with stream:
            stream.seek(start)
            yield start, iter(lambda: stream.read(CHUNK), b"")


def _no_such_file(error: Exception) -> bool:
    """A 404 that does not say that it is the repository or the revision that is missing."""
    if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return False
    return isinstance(error, EntryNotFoundError) or (
        isinstance(error, HfHubHTTPError) and error.response.status_code == 404
    )


def _first_byte(response: Any) -> int:
    """Where the body begins: 0 when the server ignored the range."""
    if response.status_code != 206:
        return 0
    match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if match is None:
        raise BrokenOff("the hub does not say which bytes it sends")
    return int(match[1])
