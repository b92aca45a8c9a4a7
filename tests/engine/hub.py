"""A model hub on this machine: what it says to the two requests of a download, and how it fails."""

import hashlib
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Hub:
    """A server of one file under every name.

    Attributes:
        content: The file.
        status: Of all answers; 200 serves the file.
        error: The hub's own name of an error.
        cut: Bytes after which the connection breaks, once.
        after_cut: Status of the answer that follows.
        stall: Bytes after which nothing is sent until `release` is set.
        head_seconds: Before the answer to HEAD.
        named: Whether size and digest are told.
        sent: What is sent in place of the file.
        paths: Of all requests for files.
        ranges: Where each GET began.
    """

    content: bytes = b""
    status: int = 200
    error: str = ""
    cut: int | None = None
    after_cut: int = 200
    stall: int | None = None
    head_seconds: float = 0.0
    named: bool = True
    sent: bytes | None = None
    paths: list[str] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                time.sleep(hub.head_seconds)
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def log_message(self, *_arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        resolves = "/resolve/" in request.path
        if resolves:  # the hub's library has other questions too
            self.paths.append(request.path)
        if not resolves or self.status != 200:
            request.send_response(self.status if resolves else 404)
            request.send_header("Content-Length", "0")
            if self.error:
                request.send_header("X-Error-Code", self.error)
            request.end_headers()
            return
        data = self.content if self.sent is None else self.sent
        first = int(request.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        request.send_response(206 if first else 200)
        if first:
            request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if self.named:
            request.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            request.send_header("X-Linked-Size", str(len(self.content)))
            request.send_header("X-Repo-Commit", "0" * 40)
            request.send_header("Content-Length", str(len(data) - first))
        else:
            request.send_header("Connection", "close")
        request.end_headers()
        if not body:
            return
        self.ranges.append(first)
        for start in range(first, len(data), 2**14):
            if self.cut is not None and start >= self.cut:
                self.cut, self.status = None, self.after_cut
                request.close_connection = True
                request.connection.shutdown(2)
                return
            if self.stall is not None and start >= self.stall:
                self.release.wait()
            try:
                request.wfile.write(data[start : start + 2**14])
            except OSError:  # the client has left
                return
        if not self.named:
            request.close_connection = True
