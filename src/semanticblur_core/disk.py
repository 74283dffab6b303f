"""Files: where they are, and writing them so that they are whole or not there at all."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from semanticblur_core.errors import ImageError

_IN_USE = "in-use"
# In place of a home folder where there is none: nothing is found in it, and nothing can be written.
_NO_HOME = Path(os.devnull, "no-home")


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write UTF-8 text; durable as of `replacing`."""
    with replacing(path, durable=durable) as temporary:
        # Names of files that are not UTF-8 keep their bytes.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def require_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before the work; what is there is not touched.

    Raises
    ------
    ImageError
        With the system's reason.
    """
    if is_special(path):
        return
    try:
        temporary = temporary_name(_target(path))
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def user_folder() -> Path:
    """Folder of what the user makes here; it need not exist.

    ``SEMANTICBLUR_HOME``, or else the platform's folder for a user's data. For a user without a
    home folder it is one that cannot be written: what is only kept to save time is left out.
    """
    home = os.environ.get("SEMANTICBLUR_HOME")
    if home:
        return Path(home)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share")
    return base / "semanticblur"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a number that no user of the system has
        return _NO_HOME


def temporary_name(path: Path, kind: str = "part") -> Path:
    """A hidden name beside ``path`` that no other writer takes.

    Random, since the number of a process does not tell apart those of several machines.
    """
    return path.with_name(f".{shortened(path.name)}.{secrets.token_hex(4)}.{kind}")


def shortened(name: str) -> str:
    """So much of a name that more fits behind it: file systems take 255 bytes."""
    return os.fsdecode(os.fsencode(name)[:220]) if len(os.fsencode(name)) > 220 else name


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Lock a temporary file or folder, made if it is not there, for as long as it is written.

    The lock goes with its process, however that ends. Without effect where the system or the disk
    has no such locks.
    """
    if not temporary.is_dir():
        temporary.touch()
    descriptor = _lock(temporary)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file or a folder, of a link the link; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_if_stale(temporary: Path) -> None:
    """Delete a temporary file or folder, unless a process may still be writing it."""
    if (temporary / _IN_USE).exists():
        remove_unused(temporary)
        return
    if os.name == "nt":  # without such locks, but a file that is open cannot be deleted
        with suppress(OSError):
            temporary.unlink()
        return
    descriptor = _lock(temporary)
    if descriptor is None:
        return
    try:
        remove(temporary)
    finally:
        os.close(descriptor)


@contextmanager
def in_use(folder: Path, tidy: Callable[[Path], None]) -> Iterator[None]:
    """Keep a folder, made if it is not there, from `remove_unused`; several processes may use it.

    Parameters
    ----------
    folder
        A file in it is locked: locks of folders are unknown to some shared disks.
    tidy
        Called first with the folder, if no other process uses it.

    Raises
    ------
    OSError
        If it cannot be made or written.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _IN_USE).open("ab") as stream:
            if _flock(stream):
                tidy(folder)
            _flock(stream, shared=True)  # waits for one that deletes it
            if os.name == "nt" or _is_still_there(stream, folder / _IN_USE):
                yield
                return


def remove_unused(folder: Path, *, own: bool = False) -> None:
    """Delete a folder of `in_use`, unless a process uses it.

    Where the disk has no locks, only one's ``own`` is deleted.
    """
    with suppress(OSError), (folder / _IN_USE).open("ab") as stream:
        is_free = _flock(stream)
        if os.name != "nt" and (is_free or (is_free is None and own)):
            shutil.rmtree(folder, ignore_errors=True)
    if os.name == "nt":
        with suppress(OSError):
            (folder / _IN_USE).unlink()  # not while it is open
            shutil.rmtree(folder, ignore_errors=True)


def _flock(file: BinaryIO | int, *, shared: bool = False) -> bool | None:
    """Lock an open file, shared as soon as that can be; False where it is another's.

    None where the system or the disk has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_still_there(stream: BinaryIO, path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None where another has it or it cannot be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None
    if _flock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def left_behind(path: Path) -> list[Path]:
    """Temporary files beside ``path`` of writers that were killed."""
    path = _target(path)
    pattern = f".{glob.escape(shortened(path.name))}.{'[0-9a-f]' * 8}.part"
    return sorted(path.parent.glob(pattern))


def leave_behind(temporary: Path) -> None:
    """Keep a temporary file of `replacing` whose block fails, as one of `left_behind`."""
    other = f"{secrets.token_hex(4)}.part"
    temporary.rename(temporary.with_name(temporary.name[: -len(other)] + other))


@contextmanager
def replacing(path: Path, *, durable: bool = False, new: bool = False) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when the block succeeds.

    Parameters
    ----------
    path
        File to write or replace; of a link, the file that it leads to. A pipe or a device is
        written to when the block has succeeded.
    durable
        Wait until the content is on the disk before it takes its place, so that not even a power
        cut leaves an empty file.
    new
        Replace nothing.

    Raises
    ------
    TakenError
        If nothing is to be replaced, and there is a file.
    ImageError
        If the file cannot be written, with the system's reason.
    """
    if is_special(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder, path.name)
            yield temporary
            try:
                with temporary.open("rb") as source, path.open("wb") as special:
                    shutil.copyfileobj(source, special)
            except OSError as error:
                raise unwritable(path, error) from error
        return
    try:
        target = _target(path)
    except OSError as error:  # a name that is too long
        raise unwritable(path, error) from error
    temporary = temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(temporary):
            yield temporary
        if durable:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
        if os.name == "posix":  # elsewhere what is read-only cannot be replaced
            with suppress(OSError):  # there is none yet
                shutil.copymode(target, temporary)
        if new:
            put_new(temporary, target)
        else:
            temporary.replace(target)
        if durable:
            sync_folder(target.parent)
    except TakenError:
        raise
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


class TakenError(FileExistsError):
    """There is a file of the name that was to be new."""


def put_new(temporary: Path, target: Path) -> None:
    """Give a file a name that no other has; of several programs that try, one does.

    Raises
    ------
    TakenError
        If there is a file of that name.
    OSError
        If it cannot be written.
    """
    try:
        target.hardlink_to(temporary)
    except OSError as error:
        if target.exists() or isinstance(error, FileExistsError):
            raise TakenError(f"{target}: exists already") from None
        # A disk without such links.
        temporary.rename(target)
    else:
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names of new files in it durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _target(path: Path) -> Path:
    """The file that is to be replaced: not the link that leads to it."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def is_special(path: Path) -> bool:
    """Whether it is a pipe or a device, such as /dev/stdout, that no file can take the place of."""
    with suppress(OSError):
        # /dev/stdout may lead to a file, which the shell holds open under its own name.
        is_device = path.absolute().parent in (Path("/dev"), Path("/dev/fd"))
        return path.exists() and (is_device or not (path.is_file() or path.is_dir()))
    return False


def expand_home(path: str | Path) -> Path:
    """With the home folder for a leading ``~``; as it is where there is no such user."""
    with suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def require_file(path: Path) -> None:
    """Refuse what is no file, or one without a byte.

    Raises
    ------
    ImageError
        If it is so.
    """
    if not path.is_file():
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        what = "a folder, a pipe or a device, and no file" if path.exists() else what
        raise ImageError(f"{path}: {what}")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty (0 bytes)")


def unwritable(path: Path, error: OSError) -> ImageError:
    """What to raise for a file that the system does not let be written."""
    if _NO_HOME in path.parents:
        return ImageError(
            f"{path.name}: cannot be written: there is no home folder; set SEMANTICBLUR_HOME to a "
            "folder that can"
        )
    return ImageError(f"{path}: cannot be written: {error.strerror or error}")


def unreadable(path: Path, error: Exception) -> ImageError:
    """What to raise for a library's error about a file: one line that a person understands."""
    text = getattr(error, "strerror", None) or str(error)
    reason = text.splitlines()[0] if text else ""
    if isinstance(error, MemoryError):
        return ImageError(f"{path}: out of memory")
    if "allow_pickle" in reason:  # numpy's advice is not to be followed
        reason = "not a file of numbers in numpy's format"
    if not isinstance(error, (OSError, ValueError, RuntimeError, SyntaxError)) or not reason:
        # Of others the text alone, such as the key that lacks, says nothing.
        reason = ": ".join(part for part in (type(error).__name__, reason) if part)
        if isinstance(error, LookupError):  # what its beginning points at is not there
            reason = f"it ends too early, or is of a kind that is not read ({reason})"
    return ImageError(f"{path}: damaged or unreadable: {reason}")


def refuse_bomb(path: Path, n_pixels: int, max_pixels: int) -> None:
    """Refuse an image that would fill the memory, by what its header says.

    Raises
    ------
    ImageError
        If it has more pixels than the limit.
    """
    if n_pixels > max_pixels:
        raise ImageError(
            f"{path}: {n_pixels / 1e6:.7g} million pixels, more than the limit of "
            f"{max_pixels / 1e6:.7g} million; --max-pixels of detect and focus raises it"
        )
