"""Bytes from an address: http(s), what fsspec knows, the output of a command. Nothing is kept or tried twice here."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException, HTTPMessage, HTTPResponse, InvalidURL
from itertools import islice
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from vlm import __version__

PIPE = "pipe:"
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 2**20
_MAX_INDEX = 2**28  # bytes of an index.json
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_FOREIGN = {  # what stores' packages raise that is no OSError
    "botocore.exceptions": "BotoCoreError",
    "google.auth.exceptions": "GoogleAuthError",
    "gcsfs.retry": "HttpError",
    "azure.core.exceptions": "AzureError",
}
_ADDRESS = re.compile(r"pipe:|file:|[A-Za-z][\w+.-]+://")
_WILD = re.compile(r"[*?\[]")

log = logging.getLogger(__name__)


class Final(Exception):
    """A refusal that another try would not change."""


class Listed(NamedTuple):
    """What an index.json says of a shard."""

    bytes: int
    sha256: str


class Answer(NamedTuple):
    """What comes: from which byte on, the length of the whole (None: unknown), and how this state of it is called."""

    chunks: Iterator[bytes]
    start: int = 0
    length: int | None = None
    version: str = ""


def is_address(name: str) -> bool:
    """Whether it is no path: pipe:…, file:…, scheme://…"""
    return _ADDRESS.match(name) is not None


def shown(address: str) -> str:
    """For messages: without a query, which may hold a signature."""
    return address.partition("?")[0] if _web(address) else address


def folder(address: str) -> str:
    """Up to the last slash, which is part of it."""
    return shown(address).rpartition("/")[0] + "/"


def file(address: str) -> str:
    """After the last slash."""
    return shown(address).rpartition("/")[2]


def _web(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def names(address: str) -> list[str]:
    """Addresses of shards: itself, or in an object store what matches a glob or lies in a folder, sorted.

    ValueError: no address of shards, nothing there, a missing package.
    """
    scheme = address.partition(":")[0].lower()
    if _web(address):
        if "@" in urlsplit(address).netloc:
            raise ValueError(f"{scheme} address with a user name: vlm takes no passwords from addresses")
        if not shown(address).endswith(".tar") or _WILD.search(shown(address)):
            raise ValueError(
                f"shards {shown(address)!r}: {scheme} lists no folders; name tar files, with braces: …/{{000..099}}.tar"
            )
        return [address]
    if scheme in ("file", "local") or "::" in address:
        raise ValueError(
            f"shards {address!r}: name local files by their path, and others by http://, https://, s3://, gs:// or "
            "what else fsspec knows"
        )
    store, path = _store(address)
    if path.endswith(".tar") and not _WILD.search(path):
        return [store.unstrip_protocol(path)]
    try:
        found = store.glob(path) if _WILD.search(path) else store.ls(path, detail=False)
    except _foreign(OSError) as error:
        raise ValueError(f"shards {address!r}: cannot be listed: {reason(error)}") from None
    if not (tars := sorted(name for name in found if name.endswith(".tar"))):
        raise ValueError(f"shards {address!r}: no .tar file is there")
    return [store.unstrip_protocol(name) for name in tars]


def listing(where: str) -> dict[str, Listed]:
    """What the index.json in a folder says of its shards, by file name; nothing where there is none."""
    try:
        with ask(f"{where}index.json") as answer:
            text = b"".join(islice(answer.chunks, _MAX_INDEX // CHUNK))
        if len(text) < (answer.length or 0):
            raise ConnectionError(f"{len(text)} of {answer.length} bytes came")
    except Final:
        return {}
    except (OSError, HTTPException) as error:
        log.warning("%sindex.json: %s; shards that are in the cache are used as they are", where, reason(error))
        return {}
    return listed(text)


def listed(text: bytes) -> dict[str, Listed]:
    """Shards by file name out of an index.json; nothing where it is one of something else."""
    try:
        found = {shard["file"]: Listed(shard["bytes"], shard["sha256"]) for shard in json.loads(text)["shards"]}
    except (ValueError, TypeError, LookupError):
        return {}
    return {name: one for name, one in found.items() if re.fullmatch("[0-9a-f]{64}", str(one.sha256))}


@contextmanager
def ask(address: str, start: int = 0, version: str = "") -> Iterator[Answer]:
    """The bytes from `start` on if it is the same `version` yet, else from the beginning.

    Errors: Final; OSError and HTTPException, which another try may not meet.
    """
    way = _command if address.startswith(PIPE) else _http if _web(address) else _fsspec
    with way(address, start, version) as answer:
        yield answer


# --- http ------------------------------------------------------------------------------------------------------------


class _Redirects(HTTPRedirectHandler):
    """Follows to http(s) only, and never from https to http."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Final for another scheme."""
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(newurl).scheme not in allowed:
            raise Final(f"the server redirects to {shown(newurl)}, which is not {' or '.join(allowed)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _http(address: str, start: int, version: str) -> Iterator[Answer]:
    rest = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
    request = Request(address, headers={"User-Agent": f"vlm/{__version__}", "Accept-Encoding": "identity"} | rest)
    try:
        reply: HTTPResponse = build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code in (408, 425, 429) or error.code >= 500:
            raise
        advice = "where it wants a login, download the shards and name the files"
        if error.code < 400 or error.code == 404:
            advice = "look at the address and its braces" if error.code == 404 else "only http(s) is followed"
        raise Final(f"{reason(error)}; {advice}") from None
    except (InvalidURL, UnicodeError) as error:
        raise Final(f"is no valid address; write strange characters as %-codes ({error})") from None
    with reply:
        if reply.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise Final("the server answers with a web page; look at the address, or whether it wants a login")
        if (coding := reply.headers.get("Content-Encoding", "identity")) != "identity":
            raise Final(f"the server compresses what it sends ({coding}), although it was asked not to")
        tag = reply.headers.get("ETag", "")
        named = tag if tag and not tag.startswith("W/") else reply.headers.get("Last-Modified", "")
        begin, length = _extent(reply)
        yield Answer(iter(partial(reply.read, CHUNK), b""), begin, length, named)


def _extent(reply: HTTPResponse) -> tuple[int, int | None]:
    """First byte that comes, and length of the whole. Final: a length that nobody could check."""
    if reply.status == 206:
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
        if part is None:
            raise Final("the server sends a part and does not say which")
        return int(part[1]), int(part[2])
    length = reply.headers.get("Content-Length")
    if length is None and not reply.chunked:
        raise Final("the server does not say how long it is, so a part of it could not be told from the whole")
    return 0, None if length is None else int(length)


def reason(error: Exception) -> str:
    """What happened, in words."""
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    inner = error.reason if isinstance(error, URLError) else error
    text = (inner.strerror if isinstance(inner, OSError) else "") or str(inner)
    return text or type(inner).__name__


# --- fsspec and commands ---------------------------------------------------------------------------------------------


def _store(address: str) -> tuple[Any, str]:
    """File system and path. ValueError: a missing package, an unknown scheme."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{address}: fsspec is not installed: pip install 'vlm[remote]'") from None
    scheme = address.partition(":")[0].lower()
    try:
        store, path = url_to_fs(address)
    except ImportError as error:
        wanted = f"pip install {_PACKAGES[scheme]}" if scheme in _PACKAGES else str(error)
        raise ValueError(f"{address}: {scheme}:// needs a package that is not installed: {wanted}") from None
    except ValueError as error:
        raise ValueError(f"{address}: {error}; there are http, https, {', '.join(sorted(_PACKAGES))}") from None
    return store, path


def _foreign(own: type[Exception]) -> tuple[type[Exception], ...]:
    """`own` and those of the packages that are in use."""
    return (own, *(getattr(sys.modules[module], name) for module, name in _FOREIGN.items() if module in sys.modules))


@contextmanager
def _fsspec(address: str, start: int, version: str) -> Iterator[Answer]:
    try:
        store, path = _store(address)
        length, now = store.size(path), store.ukey(path)
        with store.open(path, "rb") as source:
            begin = start if now == version else 0
            source.seek(begin)
            yield Answer(iter(partial(source.read, CHUNK), b""), begin, length, now)
    except FileNotFoundError:
        raise Final("no such file in the store; look at the address and its braces") from None
    except _foreign(PermissionError) as error:
        raise Final(f"the store refuses ({error}); look at your credentials for it") from None


@contextmanager
def _command(address: str, start: int, version: str) -> Iterator[Answer]:
    command = address.removeprefix(PIPE)
    log.warning("--allow-pipe: running in a shell: %s", command)
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield Answer(iter(partial(process.stdout.read, CHUNK), b""))
            code = process.wait()
        finally:
            process.kill()
    if code:
        raise Final(f"the command ended with code {code}")
