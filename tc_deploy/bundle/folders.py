"""Folders that appear whole or not at all, and take the place of none but our own.

Beside an output ``NAME`` stands ``.NAME.tc-deploy`` while a command writes it: the lock of its writers, the new folder
while it is made, the old one while it is removed, and the state of work that was stopped (``state.py``). In this order
a folder comes to be (:meth:`Claim.new_folder`):

1. What an earlier process left is settled, what is there is checked, and so is that it can be replaced.
2. The new folder is made in the hidden one, its marker last, and flushed to disk.
3. When nobody reads the old folder, it is renamed into the hidden one, and the new one into its place.
4. What was written into the old folder is removed, by name, its marker last. What else came into it meanwhile is moved
   into the new one.

A process that dies before 3 leaves the old folder; between the two renames the old one is put back, by the next writer
or reader; later the new one stands.

A folder that cannot be renamed (a mount point, one in a place that cannot be written, another user's, the working
directory) keeps its place. The hidden folder, ``.tc-deploy``, is then inside, and step 3 is: the new folder is renamed
to ``ready``, the old marker removed, then the other files, those of ``ready`` moved in, the new marker last. A process
that dies there leaves a folder without a marker, which no command reads; the next writer or reader goes on.

Never: removes or replaces what the tool did not write.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tc_deploy import __version__
from tc_deploy.bundle import locks
from tc_deploy.bundle.apart import check_apart
from tc_deploy.bundle.documents import Document, canonical_json
from tc_deploy.bundle.kinds import (
    HOLDER_SUFFIX,
    FolderKind,
    NotOursError,
    check_ours,
    known_document,
    remove_written,
    written_names,
)
from tc_deploy.bundle.settle import NEW, OLD, READY, STALE, move_in, settle
from tc_deploy.bundle.storage import like, made_folder, storage_errors, sync
from tc_deploy.errors import StorageError

OWNER = "owner.json"
LOCK = "lock"
_POLL_S = 0.02
_LOG = logging.getLogger(__name__)


class OwnerRecord(Document):
    """What tells a hidden folder of ours from somebody's."""

    kind: Literal["holder"]
    format_version: Literal[1]
    made_by: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An output folder that this process alone writes; made by :func:`claimed`."""

    destination: Path
    """Links resolved."""
    kind: FolderKind
    holder: Path
    """The hidden folder."""
    stays: bool
    """The folder that is there cannot be renamed."""

    @contextlib.contextmanager
    def new_folder(self) -> Iterator[Path]:
        """Make the folder: yields the one in which the block writes it, the marker last.

        Raises:
            StorageError: it cannot be written.
        """
        staged = self.holder / NEW
        shutil.rmtree(staged, ignore_errors=True)
        try:
            with storage_errors(self.destination):
                staged.mkdir()
            # The block does more than write: what its engines say is no word of the disk's.
            with storage_errors(self.destination, self.holder, self.destination):
                yield staged
            if not (staged / self.kind.marker).is_file():
                raise RuntimeError(f"nothing wrote {self.kind.marker} into the new {self.destination}")
            with storage_errors(self.destination):
                for path in [*staged.rglob("*"), staged]:
                    sync(path)
                (self._commit_inside if self.stays else self._commit)(staged)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _commit(self, staged: Path) -> None:
        try:
            if self.destination.exists():
                like(staged, self.destination.stat())
                with _alone(self.destination, self.kind.marker):
                    self.destination.rename(self.holder / OLD)
                    staged.rename(self.destination)
            else:
                staged.rename(self.destination)
            sync(self.destination.parent)
        finally:
            settle(self.destination, self.holder, self.kind)

    def _commit_inside(self, staged: Path) -> None:
        marker = self.kind.marker
        written = written_names(self.destination, self.kind) if (self.destination / marker).exists() else []
        stale = [name for name in written if name != marker and not (staged / name).is_file()]
        (self.holder / STALE).write_text(canonical_json(stale), encoding="utf-8")
        sync(self.holder / STALE)
        with _alone(self.destination, marker):
            staged.rename(self.holder / READY)
            sync(self.holder)
            move_in(self.destination, self.holder, self.kind)


@contextlib.contextmanager
def claimed(destination: Path, kind: FolderKind, *, reads: Iterable[Path] = ()) -> Iterator[Claim]:
    """Claim an output folder for as long as the block runs: whatever can be refused, is refused before it begins.

    Args:
        destination: the folder to make; a symbolic link is followed. One that exists is replaced only if it is empty,
            or of that kind with nothing else in it.
        kind: what it is to be.
        reads: files and folders that the same command reads, and so what it may not lie in.

    Raises:
        StorageError: the place cannot be written, holds something else, lies in a folder that is read or is ours, or
            another process is writing it.
    """
    given, destination = destination, Path(os.path.realpath(destination))
    with contextlib.ExitStack() as stack:
        with storage_errors(given):
            check_apart(given, destination, reads, is_inner=kind.is_inner)
            stack.enter_context(made_folder(destination.parent))
            claim = _claim(given, destination, kind, stack)
        yield claim


def _claim(given: Path, destination: Path, kind: FolderKind, stack: contextlib.ExitStack) -> Claim:
    is_folder, stays = destination.is_dir(), False
    beside = hidden_beside(destination)
    try:
        stack.enter_context(_held(beside, given))
    except OSError as error:
        if not is_folder or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        stays = True
    else:
        settle(destination, beside, kind)
        stays = destination.is_dir() and _stays(destination, beside)
    inside = hidden_inside(destination)
    if stays or inside.is_dir():
        # It may have stayed for another process, whose mount point or working directory it was.
        with contextlib.ExitStack() as held:
            (stack if stays else held).enter_context(_held(inside, given))
            move_in(destination, inside, kind)
    _settle_inner(destination, kind)
    check_ours(destination, kind)
    return Claim(destination=destination, kind=kind, holder=inside if stays else beside, stays=stays)


@contextlib.contextmanager
def new_folder(destination: Path, kind: FolderKind) -> Iterator[Path]:
    """Claim an output folder and make it; see :func:`claimed` and :meth:`Claim.new_folder`.

    Raises:
        StorageError: the place cannot be written, holds something else, or another process is writing it.
    """
    with claimed(destination, kind) as claim, claim.new_folder() as folder:
        yield folder


def check_replaceable(destination: Path, kind: FolderKind, *, reads: Iterable[Path] = ()) -> None:
    """Check that a folder may be made there, as :func:`claimed` does, without keeping the claim.

    Raises:
        StorageError: it may not.
    """
    with claimed(destination, kind, reads=reads):
        pass


def remove_folder(folder: Path, kind: FolderKind) -> None:
    """Remove a folder of a kind, less what the tool did not write into it; one of another kind stays."""
    with contextlib.suppress(StorageError), claimed(folder, kind):
        remove_written(folder, kind)


def remove_folders(parent: Path, kind: FolderKind) -> None:
    """The same for all folders in one."""
    holders = {path.name.removeprefix(".").removesuffix(HOLDER_SUFFIX) for path in parent.glob(f".?*{HOLDER_SUFFIX}")}
    for name in {path.name for path in parent.glob("*") if not path.name.endswith(HOLDER_SUFFIX)} | holders:
        remove_folder(parent / name, kind)


def hidden_beside(destination: Path) -> Path:
    """Where what belongs to an output lies while it is written.

    Raises:
        StorageError: the output has no name of its own.
    """
    if not destination.name:
        raise StorageError(f"{destination} cannot be an output; name a folder in it")
    return destination.with_name(f".{destination.name}{HOLDER_SUFFIX}")


def hidden_inside(destination: Path) -> Path:
    """The same for an output that keeps its place."""
    return destination / HOLDER_SUFFIX


# ------------------------------------------------------------------------------------------------- the hidden folder


@contextlib.contextmanager
def _held(holder: Path, destination: Path) -> Iterator[None]:
    """Hold an output's lock; the hidden folder goes again when nothing is left in it."""
    descriptor = _acquired(holder, destination, shared=False)
    try:
        if not (holder / OWNER).exists():
            record = OwnerRecord(kind="holder", format_version=1, made_by=f"tc-deploy {__version__}")
            (holder / OWNER).write_text(canonical_json(record.model_dump(mode="json")), encoding="utf-8")
        yield
    finally:
        _leave(holder, descriptor)


@contextlib.contextmanager
def kept_from_writers(destination: Path) -> Iterator[None]:
    """Keep others from replacing a folder that is there, while something is made inside it; any number may.

    Raises:
        StorageError: another process is replacing it.
    """
    real = Path(os.path.realpath(destination))
    with contextlib.ExitStack() as stack:
        for holder in (hidden_beside(real), hidden_inside(real)):
            try:
                with storage_errors(destination):
                    descriptor = _acquired(holder, destination, shared=True)
            except StorageError:
                if holder.name == HOLDER_SUFFIX or os.access(real.parent, os.W_OK):
                    raise
                continue
            stack.callback(_leave, holder, descriptor)
            break
        yield


def _acquired(holder: Path, destination: Path, *, shared: bool) -> int:
    try:
        return _locked(holder, shared=shared)
    except BlockingIOError:
        raise StorageError(f"another process is writing {destination}; wait for it to end") from None


def _locked(holder: Path, *, shared: bool) -> int:
    """Lock a hidden folder, which is made if it is not there.

    Raises:
        BlockingIOError: another process holds it.
        StorageError: it is somebody's.
    """
    while True:
        try:
            with contextlib.suppress(FileExistsError):
                holder.mkdir()
            _check_is_holder(holder)
            return locks.acquire(holder / LOCK, shared=shared)
        except FileNotFoundError:
            if not holder.parent.is_dir():
                raise
            # Another process has left, and taken the folder along.
        except BaseException:  # a full disk, or Ctrl-C
            with contextlib.suppress(OSError):
                holder.rmdir()  # which is refused where anything is in it
            raise


def _check_is_holder(holder: Path) -> None:
    """Check that a hidden folder is ours: by its record, or because there is nothing in it yet.

    Raises:
        StorageError: it is somebody's.
        FileNotFoundError: it has gone.
    """
    try:
        if holder.is_symlink():
            raise NotOursError("it is a link")
        known_document(holder / OWNER, "holder", OwnerRecord, {})
    except NotOursError:
        if not os.path.lexists(holder):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(holder)) from None
        if holder.is_symlink() or not holder.is_dir() or not _is_bare(holder):
            raise StorageError(
                f"{holder} is in the way: tc-deploy keeps there what it has not finished; move it away"
            ) from None


def _is_bare(holder: Path) -> bool:
    return all(path.name in (LOCK, OWNER) and not path.is_symlink() for path in holder.iterdir())


def _leave(holder: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):
        if _is_bare(holder):
            (holder / OWNER).unlink(missing_ok=True)
    locks.release(descriptor, holder / LOCK)
    with contextlib.suppress(OSError):
        holder.rmdir()


# --------------------------------------------------------------------------------------- what another process has left


def _settle_inner(destination: Path, kind: FolderKind) -> None:
    """Settle what processes left that were making folders inside."""
    if kind.inner is None or not destination.is_dir():
        return
    for holder in sorted(destination.glob(f".?*{HOLDER_SUFFIX}")):
        name = holder.name.removeprefix(".").removesuffix(HOLDER_SUFFIX)
        with claimed(destination / name, kind.inner):
            pass


def _stays(destination: Path, holder: Path) -> bool:
    """Whether a folder cannot be renamed, or is better not: tried as the commit does it, with a rename that must fail.

    Of a folder onto one that is not empty; the system finds out first what else speaks against it.

    Raises:
        OSError: it cannot be written at all.
    """
    status = destination.stat()
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(status, Path().stat()):
            return True
    if os.geteuid() not in (0, status.st_uid):
        return True  # the new one would be ours
    taken = holder / "taken"
    (taken / "here").mkdir(parents=True, exist_ok=True)
    try:
        destination.rename(taken)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if error.errno in (errno.EBUSY, errno.EXDEV):
            return True
        raise
    finally:
        for path in (taken / "here", taken):
            with contextlib.suppress(OSError):
                path.rmdir()
    raise OSError(errno.EIO, "a rename onto a folder that is not empty did not fail", str(taken))


# ------------------------------------------------------------------------------------------------------------- readers


@contextlib.contextmanager
def _alone(folder: Path, marker: str) -> Iterator[None]:
    """Wait until nobody reads a folder, and keep readers away."""
    file, told = folder / marker, False
    if not file.is_file():
        yield
        return
    while True:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if locks.try_lock(descriptor, file, shared=False):
                break
        except BlockingIOError:
            if not told:
                _LOG.info("waiting until no other process reads %s", folder)
                told = True
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def reading(folder: Path, kind: FolderKind) -> Iterator[None]:
    """Keep a folder as it is for as long as the block reads it; a writer waits with putting another in its place.

    Where nothing can be locked, on a read-only place as elsewhere, or nothing is there, the block runs all the same.
    """
    descriptor = _shared(folder, kind)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _shared(folder: Path, kind: FolderKind) -> int | None:
    file = folder / kind.marker
    while True:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if locks.try_lock(descriptor, file, shared=True):
                return descriptor
        except BlockingIOError:
            time.sleep(_POLL_S)
        except FileNotFoundError:
            if not _is_settled(folder, kind):
                return None
        except OSError:
            return None


def _is_settled(folder: Path, kind: FolderKind) -> bool:
    """Whether it is worth looking again for a folder that is not there: one is being replaced, or was half replaced."""
    real = Path(os.path.realpath(folder))
    ways: tuple[tuple[Path, str, Callable[[Path, Path, FolderKind], None]], ...] = (
        (hidden_beside(real) if real.name else real, OLD, settle),
        (hidden_inside(real), READY, move_in),
    )
    for holder, part, put_right in ways:
        if not (holder / part).is_dir():
            continue
        try:
            descriptor = _locked(holder, shared=False)
        except BlockingIOError:
            time.sleep(_POLL_S)
            return True
        except (OSError, StorageError):
            return False  # to be settled by somebody else, if by anybody
        try:
            put_right(real, holder, kind)
        except (OSError, StorageError):
            return False
        finally:
            _leave(holder, descriptor)
        return (real / kind.marker).is_file()
    return False
