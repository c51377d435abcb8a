"""An HTTP server of byte strings on this machine that breaks its answers on demand."""

import contextlib
import http.server
import socket
import struct
import threading
import time

FAULTS = (
    "500",
    "503",
    "429",
    "408",  # refusals that pass
    "hang-up",  # closes before any answer
    "reset",  # resets in the middle of the body
    "cut",  # announces all bytes, sends half
    "short",  # announces the range, its length and body are shorter
    "more",  # sends more bytes than the range has
    "endless",  # a body without end
    "shifted",  # answers with another range
    "bare",  # 206 without saying which range
    "ignored",  # 200 with the whole object
    "page",  # 200 with a page of words
    "gzip",  # says the bytes are compressed
    "stall",  # says nothing
    "trickle",  # begins and then says nothing more
)


class ObjectServer:
    """Serves `objects` by range at `address(name)`; a context manager.

    Args:
      objects: name -> bytes.
      pick: called with (name, start, stop) for every request; returns one of `FAULTS` or "".

    Attributes:
      requests: answered so far; sent: bytes of bodies; tags: name -> ETag.
    """

    def __init__(self, objects, pick=lambda name, start, stop: ""):
        self.objects, self.pick = dict(objects), pick
        self.tags = {name: f'"{n}"' for n, name in enumerate(objects)}
        self.requests = self.sent = 0
        self.lock, self.ended = threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"store": self})
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def address(self, name):
        return f"http://127.0.0.1:{self.http.server_port}/{name}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: ObjectServer

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # the client hung up, as it should on an endless body
            super().handle()

    def do_GET(self):
        store, name = self.store, self.path.lstrip("/")
        with store.lock:
            store.requests += 1
        data = store.objects.get(name)
        if data is None:
            return self.answer(404, b"")
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, stop = int(first), min(int(last) + 1, len(data))
        fault = store.pick(name, first, stop)
        if first >= len(data):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        body = data[first:stop]
        said = {"Content-Range": f"bytes {first}-{stop - 1}/{len(data)}", "ETag": store.tags[name]}
        if fault.isdigit():
            return self.answer(int(fault), b"later", {"Retry-After": "0"})
        if fault == "hang-up":
            self.close_connection = True
        elif fault == "stall":
            self.wait()
        elif fault in ("reset", "cut", "trickle"):
            self.answer(206, body[: len(body) // 2], said, length=len(body))
            if fault == "trickle":
                self.wait()
            elif fault == "reset":  # a linger of 0 seconds makes close() send a reset
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            self.close_connection = True
        elif fault == "short":
            self.answer(206, body[:-1], said)
        elif fault == "more":
            self.answer(206, body + bytes(1000), said)
        elif fault == "endless":
            self.answer(206, body, said, length=1 << 40)
            while not store.ended.is_set():
                self.write(bytes(1 << 16))
        elif fault == "shifted":
            moved = first + 1 if first + 1 < stop else first - 1
            said["Content-Range"] = f"bytes {moved}-{stop - 1}/{len(data)}"
            self.answer(206, data[moved:stop], said)
        elif fault == "bare":
            self.answer(206, body, {"ETag": store.tags[name]})
        elif fault == "ignored":
            self.answer(200, data)
        elif fault == "page":
            self.answer(200, b"<html>The server is being moved.</html>")
        elif fault == "gzip":
            self.answer(206, body, {**said, "Content-Encoding": "gzip"})
        else:
            self.answer(206, body, said)

    def answer(self, status, body, headers=(), length=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.write(body)

    def write(self, body):
        for start in range(0, len(body), 1 << 16):
            self.wfile.write(body[start : start + (1 << 16)])
            with self.store.lock:
                self.store.sent += len(body[start : start + (1 << 16)])

    def wait(self):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not self.store.ended.wait(0.05):
            pass
        self.close_connection = True
