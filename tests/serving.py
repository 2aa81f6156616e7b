"""A server under test, in process, between a scripted upstream and clients on raw sockets.

    with Serving(fusion, folder, script) as made:      # the script is that of upstream.Upstream
        answer = made.post({"messages": QUESTION})     # a whole Answer
        client = made.stream({"messages": QUESTION})   # a Client that reads it bit by bit
        frame = client.frame()

`made.up` is the upstream, `made.lines` the log, `made.defects` what the server reports as its own
defects; the end of the `with` block stops everything, and fails if there was a defect.
"""

import json
import re
import socket
import threading
import time
from typing import NamedTuple

from upstream import Upstream

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
PATIENCE_S = 10.0
MEMBERS = ("m1", "m2", "m3")
PRICED = MEMBERS + ("judge", "writer", "w2")


class Answer(NamedTuple):
    """An HTTP response: the bytes of its head and body as they came, and both decoded."""

    raw_head: bytes
    raw_body: bytes
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body.decode("utf-8"))


class Steps(threading.Event):
    """A delay of the scripted upstream that lets one pause pass for each `release`."""

    def __init__(self):
        super().__init__()
        self.permits = threading.Semaphore(0)

    def release(self, count=1):
        for _ in range(count):
            self.permits.release()

    def is_set(self):
        return self.permits.acquire(blocking=False)


def until(condition, seconds=PATIENCE_S):
    """Wait until a condition holds; returns what it returned last."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found or time.monotonic() > end:
            return found
        time.sleep(0.005)


def encode_request(body, method="POST", path=CHAT, version="1.1", host="127.0.0.1", headers=()):
    """The bytes of a request; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else \
        json.dumps(body).encode()
    lines = ["%s %s HTTP/%s" % (method, path, version), "Host: " + host]
    if body is not None:
        lines += ["Content-Type: application/json", "Content-Length: %d" % len(data)]
    lines += ["%s: %s" % pair for pair in dict(headers).items()]
    return "\r\n".join(lines + ["", ""]).encode() + data


class Client:
    """One connection to the server, on a raw socket. Reading fails after PATIENCE_S of silence."""

    def __init__(self, port, receive_buffer=None):
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE_S)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = bytearray()
        self.events = bytearray()
        self.raw = bytearray()  # everything that came
        self.status, self.headers, self.chunked = None, None, False

    def send(self, data):
        self.sock.sendall(data)
        return self

    def request(self, body, **options):
        """Send a request; see encode_request."""
        return self.send(encode_request(body, **options))

    def close(self):
        self.sock.close()

    # reading

    def fill(self):
        """Take more bytes; False at the end of the connection."""
        data = self.sock.recv(1 << 16)
        self.buffer += data
        self.raw += data
        return bool(data)

    def take(self, count):
        while len(self.buffer) < count:
            if not self.fill():
                raise EOFError("the connection ended; before that came %r" % bytes(self.raw))
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def take_through(self, mark):
        while mark not in self.buffer:
            if not self.fill():
                raise EOFError("the connection ended; before that came %r" % bytes(self.raw))
        return self.take(self.buffer.index(mark) + len(mark))

    def head(self):
        """Read status line and headers; returns their bytes."""
        raw = self.take_through(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1")[:-4].split("\r\n")
        found = re.fullmatch(r"HTTP/1\.1 (\d{3}) [ -~]*", first)
        assert found, "no status line: %r" % raw
        self.status = int(found.group(1))
        pairs = [line.split(": ", 1) for line in lines]
        assert all(len(pair) == 2 for pair in pairs), raw
        self.headers = {name.lower(): value for name, value in pairs}
        assert len(self.headers) == len(pairs), "a header stands there twice: %r" % raw
        self.chunked = self.headers.get("transfer-encoding") == "chunked"
        return raw

    def chunk(self):
        """Return the next piece of a body in chunks, b"" at its end."""
        size = int(self.take_through(b"\r\n"), 16)
        data = self.take(size)
        assert self.take(2) == b"\r\n"
        return data

    def frame(self):
        """Return the next event of a stream, without the blank line that ends it; None at its end.

        It reads the head first if nobody has.
        """
        if self.headers is None:
            self.head()
        while b"\n\n" not in self.events:
            piece = self.chunk() if self.chunked else self.unframed()
            if not piece:
                assert not self.events, "half an event: %r" % bytes(self.events)
                return None
            self.events += piece
        frame, _, rest = bytes(self.events).partition(b"\n\n")
        self.events = bytearray(rest)
        return frame

    def unframed(self):
        """Return what there is of a body that ends with the connection, b"" at its end."""
        if not self.buffer:
            self.fill()
        return self.take(len(self.buffer))

    def frames(self):
        """Yield the events until the stream ends."""
        frame = self.frame()
        while frame is not None:
            yield frame
            frame = self.frame()

    def answer(self):
        """Read a whole response."""
        raw_head = self.head()
        start = len(self.raw) - len(self.buffer)
        if self.chunked:
            body = b"".join(iter(self.chunk, b""))
        elif self.status == 204:
            body = b""
        elif "content-length" in self.headers:
            body = self.take(int(self.headers["content-length"]))
        else:
            body = b"".join(iter(self.unframed, b""))
        raw_body = bytes(self.raw[start:len(self.raw) - len(self.buffer)])
        status, headers, self.headers = self.status, self.headers, None
        return Answer(raw_head, raw_body, status, headers, body)

    def is_closed(self):
        """Whether the server closes the connection now, having sent nothing more."""
        try:
            return not self.buffer and not self.fill()
        except ConnectionError:
            return True


class Serving:
    """The server, with a configuration of three members, a judge and a writer, all priced."""

    def __init__(self, fusion, folder, script=None, served=None, network=None, **settings):
        self.fusion, self.folder, self.settings = fusion, folder, settings
        self.up = Upstream(script)
        self.served = dict(served or {})
        self.network = network or fusion.Network()
        self.lines, self.defects, self.clients = [], [], []

    def __enter__(self):
        self.up.__enter__()
        self.config = self.configuration(**self.settings)
        self.server = self.fusion.Server(
            self.config, self.fusion.Served(**self.served), self.network, log=self.lines.append,
            debug=self.defects.append)
        self.front = self.fusion.Front(self.server, self.fusion.listen_on("127.0.0.1", 0))
        self.port = self.front.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.front.serve, name="front", daemon=True)
        self.thread.start()
        return self

    def configuration(self, **settings):
        """Return the Config of a file with these settings; None leaves a key out."""
        values = {
            "panel": list(MEMBERS), "judge": "judge", "synthesizer": "writer",
            "retry_backoff": 0, "max_retries": 0,
            "prices": {model: {"input": 1, "output": 10} for model in PRICED}}
        values.update(settings)
        path = self.folder / "config.json"
        path.write_text(json.dumps({key: value for key, value in values.items()
                                    if value is not None}))
        return self.fusion.load_config(str(path), self.fusion.Env(
            {"FUSION_BASE_URL": self.up.url}))

    def __exit__(self, kind, error, trace):
        self.stop()
        self.network.close()
        self.up.__exit__(kind, error, trace)
        if kind is None:
            assert self.defects == []

    def stop(self):
        """End the server at once, and what it is doing."""
        for client in self.clients:
            client.close()
        until(lambda: not self.front.running, 2)
        self.front.stopped = True
        try:
            self.front.alarm.send(b"x")
        except OSError:
            pass  # it has ended by itself
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the front does not end"
        for connection in list(self.front.connections.values()):
            connection.leave()
            connection.sock.close()

    # clients

    def client(self, **options):
        """Return a new connection."""
        client = Client(self.port, **options)
        self.clients.append(client)
        return client

    def post(self, body, **options):
        """Return the whole answer to one request."""
        client = self.client()
        answer = client.request(body, **options).answer()
        client.close()
        return answer

    def get(self, path, **options):
        """Return the answer to a GET."""
        return self.post(None, method="GET", path=path, **options)

    def stream(self, body, receive_buffer=None, **options):
        """Return the Client of a stream that was asked for; nothing is read yet."""
        client = self.client(receive_buffer=receive_buffer)
        return client.request(dict(body, stream=True) if isinstance(body, dict) else body,
                              **options)

    def logged(self, count=1):
        """Return the log once it has so many lines."""
        assert until(lambda: len(self.lines) >= count), self.lines
        return self.lines
