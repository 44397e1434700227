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
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tc_deploy.bundle.apart import check_apart
from tc_deploy.bundle.documents import canonical_json
from tc_deploy.bundle.holders import acquired, held, hidden_beside, hidden_inside, leave
from tc_deploy.bundle.kinds import (
    HOLDER_SUFFIX,
    FolderKind,
    check_ours,
    remove_written,
    written_names,
)
from tc_deploy.bundle.readers import alone
from tc_deploy.bundle.settle import NEW, OLD, READY, STALE, move_in, settle
from tc_deploy.bundle.storage import like, made_folder, storage_errors, sync
from tc_deploy.errors import StorageError


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
                with alone(self.destination, self.kind.marker):
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
        with alone(self.destination, marker):
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
        stack.enter_context(held(beside, given))
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
        with contextlib.ExitStack() as meanwhile:
            (stack if stays else meanwhile).enter_context(held(inside, given))
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
                    descriptor = acquired(holder, destination, shared=True)
            except StorageError:
                if holder.name == HOLDER_SUFFIX or os.access(real.parent, os.W_OK):
                    raise
                continue
            stack.callback(leave, holder, descriptor)
            break
        yield


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
