"""A web server of tests: files, and each way in which a server can fail."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = Callable[[BaseHTTPRequestHandler, bytes], None]


class Site:
    """`files` by path; `script`: how the next requests of a path are answered, well when it is used up."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.script: dict[str, list[Reply]] = defaultdict(list)
        self.asked: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.arrived, self.go_on = threading.Event(), threading.Event()


@contextmanager
def serving() -> Iterator[Site]:
    """The site, ended at the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            site.asked[path] += 1
            site.arrived.set()
            if path not in site.files:
                self.send_error(404)
                return
            reply = site.script[path].pop(0) if site.script[path] else well
            site.ranges += [given] if (given := self.headers.get("Range")) else []
            reply(self, site.files[path])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            site.go_on.set()
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, data: bytes, length: int | None, code: int = 200, **headers: str) -> None:
    """`length`: what is claimed."""
    handler.send_response(code)
    for name, value in ({} if length is None else {"Content_Length": str(length)} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def well(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """As asked, a part if the version is the same."""
    tag = f'"{hash(data)}"'
    wanted = handler.headers.get("Range")
    if wanted and handler.headers.get("If-Range") == tag:
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        extent = f"bytes {start}-{len(data) - 1}/{len(data)}"
        send(handler, data[start:], len(data) - start, 206, ETag=tag, Content_Range=extent)
    else:
        send(handler, data, len(data), ETag=tag)


def cut(count: int, tag: bool = True) -> Reply:
    """Breaks off after so many bytes."""

    def reply(handler: BaseHTTPRequestHandler, data: bytes) -> None:
        send(handler, data[:count], len(data), **({"ETag": f'"{hash(data)}"'} if tag else {}))

    return reply


def failing(code: int) -> Reply:
    """An error of the server."""
    return lambda handler, data: handler.send_error(code)


def page(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """A web page where a file is meant."""
    text = b"<html>Please log in</html>"
    send(handler, text, len(text), Content_Type="text/html; charset=utf-8")


def headed(data: bytes, code: int = 200, **headers: str) -> Reply:
    """Another content, with headers of its own."""
    return lambda handler, _: send(handler, data, len(data), code, **headers)


def endless(handler: BaseHTTPRequestHandler, data: bytes) -> None:
    """No length, closed at the end."""
    send(handler, data, None)
