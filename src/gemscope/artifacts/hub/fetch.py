"""From names to files: say what is missing and how large it is (``plan``), then bring it here (``fetch``).

Everything lies as on the hub, ``OUT/OWNER/REPOSITORY/FOLDER/FILE``, so that OUT can itself be given as ``--hub``. Only
the files that a dictionary needs are fetched; nothing is written outside OUT.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from gemscope.artifacts.catalogue.artifact import EXAMPLES, Artifact
from gemscope.artifacts.catalogue.scope1 import at_l0, canonical_l0
from gemscope.artifacts.hub import record
from gemscope.artifacts.hub.download import download, part_of
from gemscope.artifacts.hub.files import Digest, RemoteFile, digest
from gemscope.artifacts.hub.record import FileRecord
from gemscope.artifacts.hub.sources import MAIN, Source
from gemscope.core.errors import ArtifactNotFoundError, InputError, StorageError
from gemscope.core.files import storage_error

DEFAULT_OUT = Path("artifacts")
"""Where ``gemscope fetch`` puts things, in the working folder."""

State = Literal["here", "partial", "absent"]
_REQUESTS = 8
_MEASURED = re.compile(r"average_l0_([0-9]{1,6})")


@dataclass(frozen=True)
class Step:
    """One file of a plan."""

    artifact: Artifact
    file: RemoteFile
    target: Path
    state: State
    have: int
    """Bytes of it that are here already."""

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return self.file.size - self.have


@dataclass(frozen=True)
class Plan:
    """What a fetch would do."""

    source: Source
    out: Path
    requested: str
    """The revision that was asked for."""
    steps: tuple[Step, ...]
    not_published: tuple[str, ...]
    """Files that are not needed and that the source does not have."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(step.file.size for step in self.steps)

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return sum(step.left for step in self.steps)

    @property
    def revisions(self) -> Mapping[str, str | None]:
        """Repository -> commit."""
        return {step.file.repo: step.file.revision for step in self.steps}


@dataclass(frozen=True)
class Progress:
    """Where a fetch stands."""

    step: Step
    done: int
    """Bytes of this file."""
    record: FileRecord | None = None
    """Set once, when the file is in its place."""


def plan(
    artifacts: Iterable[Artifact],
    source: Source,
    out: Path = DEFAULT_OUT,
    *,
    revision: str = MAIN,
    examples: bool = False,
    rehash: bool = False,
) -> Plan:
    """Ask the source for every file; downloads nothing and writes nothing.

    ``rehash`` reads files again that are here already instead of trusting the record beside them. Raises ArtifactError
    when the source lacks a file, refuses or cannot be reached, InputError when another file is in the way.
    """
    _check_revision(revision)
    wanted = list(artifacts)
    pinned = {repo: source.commit(repo, revision) or revision for repo in dict.fromkeys(one.repo for one in wanted)}
    wanted = [_settled(source, artifact, pinned[artifact.repo]) for artifact in wanted]
    asked = [(artifact, name) for artifact in wanted for name in _names(artifact, examples)]
    described = _describe(source, asked, pinned)
    steps: list[Step] = []
    missing: list[str] = []
    for (artifact, name), file in zip(asked, described, strict=True):
        if file is not None:
            steps.append(_step(artifact, file, _inside(out, artifact, name), rehash))
        elif name in artifact.files:
            raise ArtifactNotFoundError(_not_there(artifact, name, source, pinned[artifact.repo]))
        else:
            missing.append(f"{artifact.name}/{name}")
    return Plan(source, out, revision, tuple(steps), tuple(missing))


def fetch(plan: Plan, report: Callable[[Progress], None] | None = None) -> dict[Path, FileRecord]:
    """Carry out ``plan``; gives the record of every file. Files that are here already are not touched.

    Raises StorageError before anything is fetched when the disk is too small, and whatever ``download`` raises; what
    arrived by then is kept, and the next fetch goes on from there.
    """
    tell = report or _silent
    check_space(plan)
    done: dict[Path, FileRecord] = {}
    for step in plan.steps:
        folder = step.target.parent
        known = record.read(folder).get(step.target.name)
        if step.state != "here" or known is None or known.etag != step.file.etag:
            found = _bring(plan, step, tell)
            known = record.add(folder, step.artifact, plan.source.name, plan.requested, step.file, found)
        done[step.target] = known
        tell(Progress(step, step.file.size, known))
    return done


def check_space(plan: Plan) -> None:
    """Raises StorageError when the disk has no room for what is left of ``plan``."""
    place = plan.out.absolute()
    while not place.exists():
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise storage_error(plan.out, error) from error
    if plan.left > free:
        raise StorageError(
            f"the disk is too small: {plan.left:,} bytes are to come, but {place} has {free:,} free; choose fewer"
            " dictionaries, or another folder with --out."
        )


def _bring(plan: Plan, step: Step, tell: Callable[[Progress], None]) -> Digest:
    if step.state == "here":
        return digest(step.target)
    try:
        step.target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(step.target, error) from error
    _check_inside(plan.out, step.target)
    return download(plan.source, step.file, step.target, lambda count: tell(Progress(step, count)))


def _names(artifact: Artifact, examples: bool) -> tuple[str, ...]:
    wanted = (EXAMPLES,) if examples and artifact.optional_files else ()
    return (*artifact.optional_files, *artifact.files, *wanted)


def _describe(
    source: Source, asked: Sequence[tuple[Artifact, str]], pinned: Mapping[str, str]
) -> list[RemoteFile | None]:
    """Several requests at a time; the first error ends them all."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        answers = [
            pool.submit(source.describe, artifact.repo, f"{artifact.folder}/{name}", pinned[artifact.repo])
            for artifact, name in asked
        ]
        try:
            return [answer.result() for answer in answers]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _settled(source: Source, artifact: Artifact, revision: str) -> Artifact:
    """``artifact`` with its folder; one of Gemma Scope 1 whose L0 is open is looked up."""
    if artifact.pick is None:
        return artifact
    leaves = source.folders(artifact.repo, artifact.folder, revision)
    prefix = "average_l0_"
    measured = sorted(int(match[1]) for leaf in leaves if (match := _MEASURED.fullmatch(leaf)) is not None)
    if not measured:
        raise ArtifactNotFoundError(
            f"{artifact.repo!r} at {source.name} has no dictionary in {artifact.folder}; look at its pages."
        )
    if artifact.pick == "only" and len(measured) > 1:
        names = ", ".join(f"{artifact.name}/{prefix}{l0}" for l0 in measured)
        raise InputError(f"{artifact.name} has {len(measured)} dictionaries; name one of {names}.")
    return at_l0(artifact, canonical_l0(artifact, measured))


def _step(artifact: Artifact, file: RemoteFile, target: Path, rehash: bool) -> Step:
    if not target.exists() and not target.is_symlink():
        part = part_of(target, file)
        kept = part.stat().st_size if part.is_file() else 0
        return Step(artifact, file, target, "partial" if kept else "absent", min(kept, file.size))
    known = record.read(target.parent).get(target.name)
    if not target.is_file():
        raise InputError(f"{target} is in the way and is no file; remove it, or fetch to another folder with --out.")
    size = target.stat().st_size
    unchanged = known is not None and known.etag == file.etag and known.size == size == file.size
    if unchanged and file.etag is None:
        unchanged = known is not None and known.revision == file.revision
    if unchanged and not rehash:
        return Step(artifact, file, target, "here", file.size)
    found = digest(target) if size == file.size else None
    same = found is not None and found.fits(file)
    if found is not None and known is not None and file.etag is None:  # no hash to compare with but our own
        same = same and known.sha256 == found.sha256
    if same:
        return Step(artifact, file, target, "here", file.size)
    if known is None:
        raise InputError(
            f"{target} is not the file that the hub has, and gemscope did not fetch it; move it away, or fetch to"
            " another folder with --out."
        )
    return Step(artifact, file, target, "absent", 0)


def _inside(out: Path, artifact: Artifact, name: str) -> Path:
    relative = PurePosixPath(artifact.repo, artifact.folder, name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{str(relative)!r} leads out of the folder; this name is not one of a released dictionary.")
    target = out.joinpath(*relative.parts)
    _check_inside(out, target)
    return target


def _check_inside(out: Path, target: Path) -> None:
    """Refuse a folder in OUT that is a link to somewhere else."""
    if not target.parent.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"{target.parent} is a link that leads out of {out}; remove the link, or give the place it leads to as"
            " --out."
        )


def _check_revision(revision: str) -> None:
    if not revision or ".." in revision or not all(c.isalnum() or c in "._-/" for c in revision):
        raise InputError(f"{revision!r} is no revision; give a branch, a tag or a commit.")


def _not_there(artifact: Artifact, name: str, source: Source, revision: str) -> str:
    doubt = f" ({artifact.note})" if artifact.note else ""
    return (
        f"{artifact.repo!r} at {source.name} has no {artifact.folder}/{name} in revision {revision[:12]}{doubt}; choose"
        " another dictionary from gemscope list, or another revision."
    )


def _silent(progress: Progress) -> None:
    """Tell nobody."""
