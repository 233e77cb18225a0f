"""Files from the network and in the cache: resumed downloads, checked content, atomic writes."""

import hashlib
import http.client
import os
import stat
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 1 << 16
TIMEOUT = 30.0
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses worth another try
DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError, NotImplementedError)


def cache_dir() -> Path:
    """`$JMETA_CACHE_DIR`, else `$XDG_CACHE_HOME/jmeta`, else `~/.cache/jmeta`; created where needed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("JMETA_CACHE_DIR") or Path(base) / "jmeta").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def download(
    url: str,
    path: str | os.PathLike,
    *,
    size: int | None = None,
    sha256: str | None = None,
    retries: int = 5,
    delay: float = 0.5,
) -> Path:
    """Downloads a file, or keeps the one at `path` where it passes the checks.

    Bytes go to `path` + `.part`, which a later call resumes; only a checked file ever appears at `path`. Processes of one machine
    that want the same file take turns.

    Args:
      url: http or https address.
      path: where the file goes; its folder is created. A name in `.zip` must come as a zip archive.
      size: expected bytes.
      sha256: expected digest, hexadecimal.
      retries: further tries after the first, for dropped connections and busy servers.
      delay: seconds before the first of them, doubled for each one after.

    Returns:
      `path`.

    Raises:
      ConnectionError: the server refused, or no try got the whole file. What has arrived stays in `.part`.
      ValueError: a web page, a damaged file or another version came; nothing is left behind.
    """
    path = Path(path)
    with _alone(path):
        if not path.is_file() or _fault(path, path.suffix, size, sha256):
            _download(url, path, size, sha256, retries, delay)
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process of a machine at a time work on a file, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = hashlib.sha256(f"{os.getuid()} {path.absolute()}".encode()).hexdigest()[:32]
    with (Path(tempfile.gettempdir()) / f"jmeta-{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path, size: int | None, sha256: str | None, retries: int, delay: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(retries + 1):
        try:
            _fetch(url, part, size)
            break
        except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
            status = getattr(error, "code", None)
            if attempt == retries or (status and status not in PASSING):
                raise ConnectionError(
                    f"cannot download {url}, try {attempt + 1} of {retries + 1}: {error or type(error).__name__}. "
                    f"Usual causes: no network, a proxy, a moved file. Run again to resume, or put it at {path} by hand"
                ) from error
            time.sleep(delay * 2**attempt)
    fault = _fault(part, path.suffix, size, sha256)
    if fault:
        part.unlink()
        raise ValueError(f"{url}: {fault}. Nothing was kept; run again, or put the file at {path} by hand")
    os.replace(part, path)


def extract_zip(archive: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Extracts a zip archive into a new folder, all of it or nothing.

    Args:
      archive: the zip file.
      folder: does not exist yet, or is empty.

    Returns:
      `folder`.

    Raises:
      FileExistsError: the folder holds something.
      ValueError: the archive is damaged, or a member would land outside the folder or is a link.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: {folder} exists and is not an empty folder; remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for member in file.infolist():
                _check_member(archive, member)
            file.extractall(Path(temporary) / "content")
            (Path(temporary) / "content").mkdir(exist_ok=True)  # an archive without members makes no folder
            os.replace(Path(temporary) / "content", folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive}: damaged zip archive ({error}); usual cause: an interrupted download") from error
    return folder


def write_npz(path: Path, **arrays: Any) -> None:
    """Writes a compressed `.npz` beside `path` and renames it, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_npz(path: str | os.PathLike) -> Any:
    """Opens an `.npz` file, without pickles; damage is a `ValueError` that names the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file at {path} (usual cause: a path relative to another folder)")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a whole .npz file (usual causes: an interrupted copy, or a single array in .npy)")
    try:
        return np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz file ({error}); usual cause: an interrupted copy") from error


def read_keys(file: Any, path: str | os.PathLike, keys: Sequence[str]) -> list[np.ndarray]:
    """Reads arrays from an open `.npz`; a missing key or damaged bytes are a `ValueError` that names both."""
    arrays = []
    for key in keys:
        try:
            arrays.append(file[key])
        except DAMAGE as error:
            raise ValueError(
                f"{path}: cannot read {key!r} ({error}); usual cause: a damaged file, other keys than expected, "
                "or an array of Python objects"
            ) from error
    return arrays


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`: a bar in an interactive terminal, else one line on stderr and silence."""
    if not sys.stderr.isatty():
        print(label, file=sys.stderr, flush=True)
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda number: bar.advance(task, number)


def _fetch(url: str, part: Path, size: int | None) -> None:
    """One try: appends what is missing to `part`, or starts over where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "jmeta"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # `part` is as long as the file or longer: nothing to resume
            part.unlink()
            raise ConnectionError("the partial file did not fit and was removed") from error
        raise
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status == 206 and not resumed:
            part.unlink()
            raise ConnectionError("the server resumed at another byte than asked for")
        _copy(response, part, have if resumed else 0)


def _copy(response: http.client.HTTPResponse, part: Path, have: int) -> None:
    expected = response.headers.get("Content-Length")
    total = have + int(expected) if expected else None
    name = part.name.removesuffix(".part")
    size = f" ({total / 1e6:.1f} MB)" if total else ""
    with part.open("ab" if have else "wb") as file, progress(f"downloading {name}{size}", total) as advance:
        advance(have)
        while block := response.read(BLOCK):
            file.write(block)
            advance(len(block))
        if total is not None and file.tell() < total:
            raise ConnectionError(f"the connection ended after {file.tell()} of {total} bytes")


def _fault(path: Path, suffix: str, size: int | None, sha256: str | None) -> str | None:
    """What is wrong with a downloaded file that is to have this suffix, or None."""
    with path.open("rb") as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
        if suffix.lower() not in (".html", ".htm") and head[:15].lower().startswith((b"<!doctype html", b"<html", b"<head")):
            return "the server sent a web page, not the file (usual causes: it has moved, or asks for a login or consent)"
        if suffix.lower() == ".zip" and head[:2] != b"PK":
            return f"not a zip archive: it starts with {head[:8]!r}"
        length = path.stat().st_size
        if size is not None and length != size:
            return f"{length} bytes, expected {size} (usual cause: another version of the file)"
        if sha256 is not None:
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256.lower():
                return f"sha256 is {found}, expected {sha256} (usual causes: a damaged download or another version)"
    return None


def _check_member(archive: str | os.PathLike, member: zipfile.ZipInfo) -> None:
    parts = member.filename.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ValueError(f"{archive}: member {member.filename!r} would land outside the folder; nothing was extracted")
    if stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"{archive}: member {member.filename!r} is a link; nothing was extracted")
