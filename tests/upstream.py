"""A scripted model backend for tests: a real HTTP/1.1 server on loopback that plays a script.

    def script(request):
        return Reply("hello " * 40, chunk_delay=0.1, cut_after=3)

    with Upstream(script) as up:
        ...                                  # point the program under test at up.url
    assert up.posts("some/model")[0].messages == [{"role": "user", "content": "hi"}]

It is written on bare sockets, so that it can misbehave at the level of single bytes, and it
records every request byte for byte. Each connection has one daemon thread; a script runs on it
and may block (what the client does meanwhile is noticed when the script returns; to hold a reply
and still see the client leave, use a delay, which may be a `threading.Event`). An exception in a
script is printed, and raised again at the end of the `with` block.

Sections: requests, replies, rendering, connections, the server, self-check (run the file).
"""

import collections
import http.client
import json
import math
import re
import socket
import struct
import threading
import time
import traceback
import zlib


# --- requests -------------------------------------------------------------------------------

class Malformed(ValueError):
    """The client sent something that is not the HTTP/1.1 that a strict server accepts."""


class ClientLeft(ConnectionError):
    """The client closed its side of the connection (or the server is being stopped)."""


class Request:
    """One request as it came: `raw_head` and `raw` are its bytes, `raw` without chunked framing.

    `body` is the parsed JSON or None, `n` counts the earlier chat requests for the same model,
    `connection` numbers the TCP connection, `t` is the monotonic time when it was read to its end.
    `closed_at` is the monotonic time when the client left before the reply was complete.
    """

    def __init__(self, connection, raw_head, raw):
        self.method, self.path, self.version, self.headers = parse_head(raw_head)
        self.raw_head, self.raw, self.connection = raw_head, raw, connection
        self.t, self.created = time.monotonic(), int(time.time())
        self.body = parse_json(raw)
        fields = self.body if isinstance(self.body, dict) else {}
        self.model, self.messages = fields.get("model"), fields.get("messages")
        self.stream = bool(fields.get("stream"))
        options = fields.get("stream_options")
        self.wants_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self.n, self.closed_at, self.over = 0, None, threading.Event()

    @property
    def route(self):
        """The path without its query string and trailing slash."""
        return self.path.split("?")[0].rstrip("/")

    @property
    def is_chat(self):
        """Whether this is a chat completions call."""
        return self.method == "POST" and self.route.endswith("/chat/completions")

    @property
    def wants_close(self):
        """Whether the client asked to close the connection after the reply."""
        asked = self.headers.get("connection", "").lower()
        return "close" in asked or self.version == "HTTP/1.0"

    def wait_closed(self, timeout):
        """Wait until the client has left; False if the reply was completed or the time is up."""
        self.over.wait(timeout)
        return self.closed_at is not None


def parse_json(raw):
    """Return the JSON value of these bytes, or None if they are not JSON."""
    try:
        return json.loads(raw.decode("utf-8"))
    except ValueError:
        return None


def parse_head(raw_head):
    """Split a request head into method, path, version and headers; raise Malformed if unclean."""
    first, *lines = raw_head.decode("latin-1")[:-4].split("\r\n")
    start = re.fullmatch(r"([A-Z]+) (\S+) (HTTP/1\.[01])", first)
    if not start:
        raise Malformed("request line %r" % first)
    headers = {}
    for line in lines:
        field = re.fullmatch(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*", line)
        if not field:
            raise Malformed("header line %r" % line)
        name, value = field.group(1).lower(), field.group(2)
        headers[name] = headers[name] + ", " + value if name in headers else value
    if "content-length" in headers and "transfer-encoding" in headers:
        raise Malformed("both Content-Length and Transfer-Encoding")
    return start.group(1), start.group(2), start.group(3), headers


# --- replies --------------------------------------------------------------------------------

REPLY_DEFAULTS = {
    # What is said.
    "reasoning": None,  # sent as reasoning_field, before the text
    "reasoning_field": "reasoning_content",
    "tool_calls": None,  # OpenAI tool calls; streamed as an opening and up to 3 fragments each
    "finish": "auto",  # "tool_calls" if there are any, else "stop"; None is sent as null
    "usage": "auto",  # computed from lengths; None = no usage; anything else is sent as it is
    "cost": None,  # becomes usage.cost if usage is an object
    "model": None,  # the name to answer under, if not the one that was asked for
    "error": None,  # str or OpenAI error object; at status 200 in a stream it is an event
    "error_after": 0,  # that many chunks come before the error event
    # How it is said in HTTP.
    "status": 200,
    "headers": {},  # replace the computed ones in any case; None removes one (framing follows)
    "body": None,  # bytes in place of the computed body
    "content_type": None,
    "raw": None,  # bytes in place of the whole response; b"" = close without a word
    "keep": False,  # go on with the connection after raw
    "gzip": False,
    "as_json": None,  # True = JSON though a stream was asked for, False = the reverse
    "close": False,  # say Connection: close, and do
    "early_close": False,  # say keep-alive, and close all the same
    # When. Seconds, or a threading.Event that is waited for.
    "delay": 0,  # before the headers
    "first_delay": 0,  # after the headers
    "chunk_delay": 0,  # between chunks
    "drip": None,  # (bytes, seconds): head and body in pieces of so many bytes, so far apart
    # Where it ends. A chunk is one delta (the role goes with the first one), then the finish,
    # the usage and [DONE]; of a body that is not streamed, one of 8 pieces. A number beyond the
    # last chunk takes away only the end of the HTTP framing.
    "chunks": None,  # the pieces of the text, if not 8 equal ones
    "cut_after": None,  # close after so many chunks; 0 = after the headers
    "cut": "fin",  # or "rst": how a cut, or the end after raw, looks on the wire
    "hang_after": None,  # send nothing more after so many chunks; -1 = not even headers
    # How it is said in SSE.
    "role_first": True,  # a first delta with the role
    "sse": {},
}

SSE_DEFAULTS = {
    "newline": "\n",  # or "\r\n" or "\r"
    "comments": False,  # comment lines before and inside each event
    "multi_line": False,  # each event in many data: lines
    "no_done": False,
    "no_finish": False,
    "no_space": False,  # data:{...}
    "one_write": False,  # True = all chunks in one send, a number = so many in each
    "split_bytes": None,  # a send and an HTTP chunk for every so many bytes
    "null_first": False,  # the first delta has content: null
    "usage_on": "last_chunk",  # "content" = on the last delta, "x_groq" = on the finish; unasked
    "usage_always": False,  # the usage chunk comes even if it was not asked for
    "duplicate": False,  # each event twice
    "bom": False,
}


class Reply:
    """What the backend does with one request; `REPLY_DEFAULTS` lists and explains the options."""

    def __init__(self, text="", **options):
        vars(self).update(merged(REPLY_DEFAULTS, options))
        self.sse = merged(SSE_DEFAULTS, self.sse)
        self.text = "".join(self.chunks) if self.chunks is not None and not text else text
        if self.cut not in ("fin", "rst"):
            raise ValueError("cut is %r, not fin or rst" % self.cut)
        if self.sse["usage_on"] not in ("last_chunk", "content", "x_groq"):
            raise ValueError("usage_on is %r" % self.sse["usage_on"])
        if self.cut_after is not None and self.hang_after is not None:
            raise ValueError("either cut_after or hang_after")

    @property
    def stop_after(self):
        """The number of chunks after which the reply is cut or hangs, or None."""
        return self.hang_after if self.cut_after is None else self.cut_after


def merged(defaults, options):
    """Return the defaults with the options over them; a name that does not exist is an error."""
    unknown = set(options) - set(defaults)
    if unknown:
        raise TypeError("no such option: %s" % ", ".join(sorted(unknown)))
    return dict(defaults, **options)


def json_reply(obj, **options):
    """Reply with this JSON value as the whole body, whether or not a stream was asked for."""
    return Reply(body=encode(obj), **options)


def error_reply(status, message, code=None, type=None, param=None, **options):
    """Reply with an error of OpenAI's shape."""
    kind = type or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Reply(status=status, error=error, **options)


def context_overflow(kind, n_prompt_tokens=9000, n_ctx=4096, **options):
    """Refuse a prompt as too long the way "llamacpp" or "openai" does."""
    if kind == "llamacpp":
        error = {"code": 400, "type": "exceed_context_size_error",
                 "message": "request (%d tokens) exceeds the available context size (%d tokens), "
                            "try increasing it" % (n_prompt_tokens, n_ctx),
                 "n_prompt_tokens": n_prompt_tokens, "n_ctx": n_ctx}
        return Reply(status=400, error=error, **options)
    if kind != "openai":
        raise ValueError("kind is %r, not llamacpp or openai" % kind)
    message = ("This model's maximum context length is %d tokens. However, your messages resulted "
               "in %d tokens. Please reduce the length of the messages." % (n_ctx, n_prompt_tokens))
    return error_reply(400, message, "context_length_exceeded", param="messages", **options)


# --- rendering ------------------------------------------------------------------------------

def encode(value, indent=None):
    """Return JSON in UTF-8 with nothing escaped that need not be (half an emoji must be)."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).encode("ascii")


def split(data, count=8):
    """Cut text or bytes into `count` pieces of about one size, none of them empty."""
    cuts = [len(data) * step // count for step in range(count + 1)]
    return [data[start:end] for start, end in zip(cuts, cuts[1:]) if start < end]


def counted(request, reply):
    """Return the prompt and completion tokens that the backend bills for this request."""
    reported = reply.usage if isinstance(reply.usage, dict) else {}
    prompt = reported.get("prompt_tokens", len(request.raw) // 4)
    return prompt, reported.get("completion_tokens", max(1, len(reply.text or "") // 4))


def usage_of(request, reply):
    """Return the usage to report, or None for none."""
    usage = reply.usage
    if usage == "auto":
        prompt, completion = counted(request, reply)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion,
                 "total_tokens": prompt + completion}
    if isinstance(usage, dict) and reply.cost is not None:
        usage = dict(usage, cost=reply.cost)
    return usage


def envelope(request, reply, kind, choices):
    """Return a completion object or chunk with these choices."""
    return {"id": "chatcmpl-%x" % id(request), "object": kind, "created": request.created,
            "model": reply.model or request.model, "choices": choices}


def finish_of(reply):
    """Return the finish_reason to send."""
    if reply.finish != "auto":
        return reply.finish
    return "tool_calls" if reply.tool_calls else "stop"


def completion(request, reply):
    """Return the chat.completion object of a reply that is not streamed."""
    message = {"role": "assistant", "content": reply.text}
    if reply.reasoning is not None:
        message[reply.reasoning_field] = reply.reasoning
    if reply.tool_calls:
        message.update(content=reply.text or None, tool_calls=reply.tool_calls)
    choice = {"index": 0, "message": message, "finish_reason": finish_of(reply)}
    answer = envelope(request, reply, "chat.completion", [choice])
    usage = usage_of(request, reply)
    return answer if usage is None else dict(answer, usage=usage)


def error_object(reply):
    """Return the error body; a status that has none of its own gets one that says so."""
    error = reply.error or "scripted status %d" % reply.status
    if isinstance(error, str):
        error = {"message": error, "type": "server_error", "param": None, "code": None}
    return {"error": error}


def call_deltas(index, call):
    """Return the deltas of one tool call: what opens it, then its arguments in fragments."""
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return [dict(call, index=index)]
    opening = dict(call, index=index, function=dict(function, arguments=""))
    return [opening] + [{"index": index, "function": {"arguments": piece}}
                        for piece in split(arguments, 3)]


def deltas(reply):
    """Return the deltas of a stream in their order: reasoning, text, tool calls."""
    found = [{reply.reasoning_field: piece} for piece in split(reply.reasoning or "")]
    pieces = split(reply.text or "") if reply.chunks is None else reply.chunks
    found += [{"content": piece} for piece in pieces]
    for index, call in enumerate(reply.tool_calls or []):
        found += [{"tool_calls": [delta]} for delta in call_deltas(index, call)]
    return found


def event_chunk(request, reply, delta, finish=None):
    """Return one chat.completion.chunk."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return envelope(request, reply, "chat.completion.chunk", [choice])


def event_groups(request, reply):
    """Return the events of a stream, grouped by the chunks that a script counts."""
    groups = [[event_chunk(request, reply, delta)] for delta in deltas(reply)] or [[]]
    if reply.role_first or reply.sse["null_first"]:
        opening = {"role": "assistant"} if reply.role_first else {}
        opening["content"] = None if reply.sse["null_first"] else ""
        groups[0].insert(0, event_chunk(request, reply, opening))
    groups = [group for group in groups if group]
    if reply.error is not None:
        groups = groups[:reply.error_after] + [[error_object(reply)]]
    else:
        groups = with_ending(request, reply, groups)
    return groups if reply.sse["no_done"] else groups + [["[DONE]"]]


def with_ending(request, reply, groups):
    """Return the groups with the finish chunk, and with the usage where the reply wants it."""
    sse, usage = reply.sse, usage_of(request, reply)
    finish = [] if sse["no_finish"] else [[event_chunk(request, reply, {}, finish_of(reply))]]
    if usage is None or not groups + finish:
        return groups + finish
    if sse["usage_on"] == "content":
        (groups or finish)[-1][-1]["usage"] = usage
    elif sse["usage_on"] == "x_groq":
        (finish or groups)[-1][-1]["x_groq"] = {"usage": usage}
    elif request.wants_usage or sse["usage_always"]:
        last = dict(envelope(request, reply, "chat.completion.chunk", []), usage=usage)
        return groups + finish + [[last]]
    return groups + finish


def sse_bytes(event, sse):
    """Encode one event. JSON has raw newlines only between tokens, so there it may be split."""
    newline = sse["newline"].encode()
    done = event == "[DONE]"
    text = b"[DONE]" if done else encode(event, indent=0 if sse["multi_line"] else None)
    label = b"data:" if sse["no_space"] else b"data: "
    block = b"".join(label + line + newline for line in text.split(b"\n")) + newline
    if sse["comments"]:
        block = b": comment" + newline * 2 + b": comment" + newline + block
    return block * 2 if sse["duplicate"] and not done else block


def is_streamed(request, reply):
    """Whether the reply goes out as events."""
    if reply.body is not None or reply.status != 200 or not request.is_chat:
        return False
    return request.stream if reply.as_json is None else not reply.as_json


def body_groups(request, reply):
    """Return the bytes of the body, one entry for each chunk."""
    if is_streamed(request, reply):
        groups = [b"".join(sse_bytes(event, reply.sse) for event in group)
                  for group in event_groups(request, reply)]
        if reply.sse["bom"]:
            groups[:1] = [b"\xef\xbb\xbf" + b"".join(groups[:1])]
    else:
        body = reply.body
        if body is None:
            failed = reply.error is not None or reply.status != 200
            body = encode(error_object(reply) if failed else completion(request, reply))
        groups = split(body) if reply.chunk_delay or reply.stop_after is not None else [body]
    return gzipped(groups) if reply.gzip else groups or [b""]


def gzipped(groups):
    """Compress the groups into one gzip stream, flushed after each of them."""
    packer = zlib.compressobj(wbits=31)
    packed = [packer.compress(group) + packer.flush(zlib.Z_SYNC_FLUSH) for group in groups]
    return packed[:-1] + [b"".join(packed[-1:]) + packer.flush()]


def response_headers(request, reply, groups):
    """Return the headers, with those of the reply over the computed ones."""
    streamed = is_streamed(request, reply)
    kind = "text/event-stream" if streamed else "application/json"
    headers = {"Content-Type": reply.content_type or kind}
    if streamed:
        headers["Transfer-Encoding"] = "chunked"
    else:
        headers["Content-Length"] = str(sum(map(len, groups)))
    if reply.gzip:
        headers["Content-Encoding"] = "gzip"
    if reply.close or request.wants_close:
        headers["Connection"] = "close"
    elif reply.early_close:
        headers["Connection"] = "keep-alive"
    replaced = {name.lower() for name in reply.headers}
    headers = {name: value for name, value in headers.items() if name.lower() not in replaced}
    headers.update(item for item in reply.headers.items() if item[1] is not None)
    return headers


def head_bytes(status, headers):
    """Return the status line and the headers as they go over the wire."""
    lines = ["HTTP/1.1 %d %s" % (status, http.client.responses.get(status, "Unknown"))]
    lines += ["%s: %s" % item for item in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def framed(batch, size, chunked, last):
    """Return the sends for a batch; the end of a chunked body travels with its last bytes.

    A client may leave as soon as it has seen [DONE]; sent apart, the end would come too late.
    """
    step = size or len(batch) or 1
    pieces = [batch[start:start + step] for start in range(0, len(batch), step)] or [b""]
    if chunked:
        pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) if piece else b"" for piece in pieces]
        pieces[-1] += b"0\r\n\r\n" if last else b""
    return pieces


# --- connections ----------------------------------------------------------------------------

class Connection:
    """One TCP connection: reads requests, and plays the replies to them in their order."""

    def __init__(self, upstream, sock, number):
        self.upstream, self.sock, self.number = upstream, sock, number
        self.buffer = bytearray()

    def run(self):
        """Serve requests until the connection ends; this is the body of its thread."""
        ending = "fin"
        try:
            ending = self.serve_one()
            while ending == "keep":
                ending = self.serve_one()
        except OSError:
            ending = "fin"  # the client is gone; if it mattered, the request knows
        except Exception as error:  # the boundary around the test's own script
            traceback.print_exc()
            self.upstream.errors.append(error)
        finally:
            self.upstream.forget(self)
            self.close(ending)

    def close(self, ending):
        """Close, politely or with a reset."""
        if ending == "rst":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def serve_one(self):
        """Serve one request; return what becomes of the connection: "keep", "fin" or "rst"."""
        try:
            request = self.read_request()
        except Malformed as error:
            self.upstream.malformed.append(str(error))
            self.sock.sendall(head_bytes(400, {"Content-Length": 0, "Connection": "close"}))
            return "fin"
        self.upstream.arrive(request)
        try:
            reply = self.upstream.answer(request)
            return self.play(request, reply)
        finally:
            self.upstream.leave(request)
            request.over.set()

    # reading

    def fill(self):
        """Wait for more bytes from the client."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise ClientLeft("end of input")
        self.buffer += data

    def take(self, count):
        """Return the next `count` bytes."""
        while len(self.buffer) < count:
            self.fill()
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def take_through(self, end):
        """Return the bytes up to and including `end`."""
        while end not in self.buffer:
            self.fill()
        return self.take(self.buffer.index(end) + len(end))

    def read_request(self):
        """Read one request to its end."""
        raw_head = self.take_through(b"\r\n\r\n")
        headers = parse_head(raw_head)[3]
        if headers.get("expect", "").lower() == "100-continue" and not self.buffer:
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(self.number, raw_head, self.read_body(headers))

    def read_body(self, headers):
        """Read the body that these headers announce."""
        if "transfer-encoding" not in headers:
            length = headers.get("content-length", "0")
            if not re.fullmatch("[0-9]+", length):
                raise Malformed("Content-Length %r" % length)
            return self.take(int(length))
        if headers["transfer-encoding"].lower() != "chunked":
            raise Malformed("Transfer-Encoding %r" % headers["transfer-encoding"])
        return self.read_chunked()

    def read_chunked(self):
        """Read a chunked body and its trailers."""
        body = bytearray()
        while True:
            line = self.take_through(b"\r\n")
            size = re.fullmatch(rb"([0-9A-Fa-f]+)(;[^\r\n]*)?\r\n", line)
            if not size:
                raise Malformed("chunk size %r" % line)
            if int(size.group(1), 16) == 0:
                break
            body += self.take(int(size.group(1), 16))
            if self.take(2) != b"\r\n":
                raise Malformed("a chunk longer than its size")
        while self.take_through(b"\r\n") != b"\r\n":
            continue
        return bytes(body)

    # replying

    def listen(self, timeout):
        """Keep what the client sends within `timeout` seconds; raise ClientLeft if it leaves.

        A receive with a time limit is used and not select, which stops at descriptor 1024.
        """
        self.sock.settimeout(timeout)
        try:
            self.fill()
        except (socket.timeout, BlockingIOError):
            pass
        finally:
            self.sock.settimeout(None)

    def pause(self, delay):
        """Wait so many seconds, or for an Event; raise ClientLeft as soon as the client leaves.

        An Event is looked at every 10 ms, and less often when many calls wait, which would
        otherwise keep the processor busy.
        """
        event = delay if isinstance(delay, threading.Event) else None
        end = time.monotonic() + (math.inf if event else delay)
        self.listen(0)
        while time.monotonic() < end and not (event and event.is_set()):
            left = max(0, end - time.monotonic())
            self.listen(min(left, 0.01 + self.upstream.in_flight / 5000 if event else 10))

    def play(self, request, reply):
        """Play a reply; return what becomes of the connection: "keep", "fin" or "rst"."""
        try:
            self.pause(reply.delay)
            if reply.hang_after == -1:
                self.pause(math.inf)
            if reply.raw is None:
                return self.play_response(request, reply)
            self.upstream.bill(request, reply, reply.raw.startswith(b"HTTP/1.1 200"))
            self.send(request, reply, reply.raw, last=True)
            return "keep" if reply.keep else reply.cut
        except OSError:
            if not self.upstream.stopping:
                request.closed_at = time.monotonic()
            raise

    def play_response(self, request, reply):
        """Send head and body, then do what the reply wants done at the end."""
        groups = body_groups(request, reply)
        headers = response_headers(request, reply, groups)
        names = {name.lower() for name in headers}
        self.upstream.bill(request, reply, reply.status == 200)
        head = head_bytes(reply.status, headers)
        self.play_body(request, reply, head, groups, "transfer-encoding" in names)
        if reply.hang_after is not None:
            self.pause(math.inf)
        if reply.cut_after is not None:
            return reply.cut
        unframed = not names & {"transfer-encoding", "content-length"}
        ends = reply.close or reply.early_close or request.wants_close or unframed
        return "fin" if ends else "keep"

    def play_body(self, request, reply, head, groups, chunked):
        """Send the head and the chunks up to where the reply stops, at its pace."""
        stop, many = reply.stop_after, reply.sse["one_write"]
        groups = groups[:stop]
        step = max(1, len(groups)) if many is True else many or 1
        batches = [b"".join(groups[start:start + step]) for start in range(0, len(groups), step)]
        if reply.first_delay or not batches:
            self.send(request, reply, head)
            self.pause(reply.first_delay)
            head = b""
        for index, batch in enumerate(batches):
            self.pause(reply.chunk_delay if index else 0)
            last = stop is None and index == len(batches) - 1
            pieces = framed(batch, reply.sse["split_bytes"], chunked, last)
            pieces[0] = head + pieces[0]
            head = b""
            for number, piece in enumerate(pieces):
                self.send(request, reply, piece, last and number == len(pieces) - 1)

    def send(self, request, reply, data, last=False):
        """Send bytes, dripping if the reply drips.

        The request stops being in flight just before its last byte goes out: a client that has
        read that byte may already send the next one, and the two must not count as concurrent.
        """
        step, seconds = reply.drip or (len(data) or 1, 0)
        for start in range(0, len(data), step):
            if start:
                self.pause(seconds)
            if last and start + step >= len(data):
                self.upstream.leave(request)
            self.sock.sendall(data[start:start + step])


# --- the server -----------------------------------------------------------------------------

def default_script(request):
    """Answer every request with a line that names the model."""
    return Reply("draft of %s" % request.model)


class Upstream:
    """The backend: `with Upstream(script) as up` runs it, and leaves no thread behind.

    `script` is a callable that takes the request, or a dict from model to a Reply, a text, a
    callable or a list of these that is used up in order (the last one repeats); the key "*" is
    for all other models, which are 404 without it. `models` are ids or whole objects.
    `routes` maps other paths ("/props") to replies, `models_reply` replaces the list of models.
    `requests` has everything that came; `malformed` what was refused as bad HTTP; `billed` a
    (model, prompt tokens, completion tokens, cost) for each chat call whose 200 was sent.
    """

    def __init__(self, script=None, models=None, owned_by="scripted"):
        self.script = default_script if script is None else script
        named = [name for name in script if name != "*"] if isinstance(script, dict) else []
        self.models, self.owned_by = named if models is None else models, owned_by
        self.models_reply, self.routes = None, {}
        self.requests, self.billed, self.malformed, self.errors = [], [], [], []
        self.connections, self.peak_in_flight, self.stopping = 0, 0, False
        self.lock, self.seen = threading.Lock(), collections.Counter()
        self.active, self.live, self.threads = set(), set(), []
        self.listener = self.port = self.url = None

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.settimeout(0.2)
        self.port = self.listener.getsockname()[1]
        self.url = "http://127.0.0.1:%d/v1" % self.port
        self.acceptor = threading.Thread(target=self.accept, name="upstream", daemon=True)
        self.acceptor.start()
        return self

    def __exit__(self, kind, error, trace):
        self.stop()
        if kind is None and self.errors:
            raise self.errors[0]
        if kind is None and any(thread.is_alive() for thread in self.threads):
            raise RuntimeError("a script is still running after the end of the server")

    def stop(self):
        """Close everything, and wait at most 5 seconds for the threads."""
        self.stopping = True
        shut_down(self.listener)  # wakes accept() on Linux; elsewhere its time limit does
        self.acceptor.join(5)
        self.listener.close()
        with self.lock:
            connections = list(self.live)
        for connection in connections:
            shut_down(connection.sock)
        end = time.monotonic() + 5
        for thread in self.threads:
            thread.join(max(0, end - time.monotonic()))

    def accept(self):
        """Give each connection its thread; this is the body of the accepting thread."""
        while not self.stopping:
            try:
                sock, _ = self.listener.accept()
            except OSError:  # the time limit, no descriptor left, or the end
                time.sleep(0.001)
                continue
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, sock, self.connections)
            with self.lock:
                self.connections += 1
                self.live.add(connection)
            thread = threading.Thread(target=connection.run, name="upstream", daemon=True)
            if len(self.threads) > 500:
                self.threads = [old for old in self.threads if old.is_alive()]
            self.threads.append(thread)
            thread.start()

    # what a test asks

    def posts(self, model=None):
        """Return the chat completions calls so far, or those for one model."""
        with self.lock:
            return [request for request in self.requests
                    if request.is_chat and model in (None, request.model)]

    @property
    def in_flight(self):
        """The number of chat calls that are being answered."""
        with self.lock:
            return len(self.active)

    def open_connections(self):
        """Return how many TCP connections are open now."""
        with self.lock:
            return len(self.live)

    def wait_for(self, condition, timeout=5):
        """Wait until `condition()` is true; return whether it became true in time."""
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return True

    # what a connection tells and asks

    def arrive(self, request):
        """Record a request that has been read to its end."""
        with self.lock:
            self.requests.append(request)
            if request.is_chat:
                request.n = self.seen[repr(request.model)]
                self.seen[repr(request.model)] += 1
                self.active.add(request)
                self.peak_in_flight = max(self.peak_in_flight, len(self.active))

    def leave(self, request):
        """Count a request as answered (once)."""
        with self.lock:
            self.active.discard(request)

    def forget(self, connection):
        """Count a connection as closed."""
        with self.lock:
            self.live.discard(connection)

    def bill(self, request, reply, accepted):
        """Record what a chat call costs, if it is accepted; a cut answer costs it all the same."""
        if not request.is_chat or not accepted:
            return
        reported = reply.usage if isinstance(reply.usage, dict) else {}
        cost = reported.get("cost") if reply.cost is None else reply.cost
        with self.lock:
            self.billed.append((request.model,) + counted(request, reply) + (cost,))

    def answer(self, request):
        """Return the reply to a request."""
        for path, reply in self.routes.items():
            if request.route.endswith(path):
                return chosen(reply, request)
        if request.method == "GET" and request.route.endswith("/models"):
            return self.models_reply or json_reply(self.model_list())
        if not request.is_chat:
            message = "Unknown request URL: %s %s" % (request.method, request.path)
            return error_reply(404, message, "unknown_url")
        if not isinstance(request.body, dict):
            return error_reply(400, "We could not parse the JSON body of your request.")
        if not isinstance(self.script, dict):
            return chosen(self.script, request)
        entry = self.script.get(request.model, self.script.get("*"))
        if entry is None:
            message = "The model `%s` does not exist" % request.model
            return error_reply(404, message, "model_not_found", param="model")
        return chosen(entry, request)

    def model_list(self):
        """Return the body of GET /models."""
        rows = [{"id": model, "object": "model", "owned_by": self.owned_by}
                if isinstance(model, str) else model for model in self.models]
        return {"object": "list", "data": rows}


def chosen(entry, request):
    """Return the Reply that an entry of a script stands for."""
    if isinstance(entry, list):
        entry = entry[min(request.n, len(entry) - 1)]
    if callable(entry):
        entry = entry(request)
    reply = Reply(entry) if isinstance(entry, str) else entry
    if not isinstance(reply, Reply):
        raise TypeError("the script answered %r, not a Reply" % (entry,))
    return reply


def shut_down(sock):
    """Wake whatever thread is blocked on this socket."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already


# --- self-check -----------------------------------------------------------------------------

def _call(up, model, **fields):
    """Post one chat call on a new connection; return status, headers and body."""
    client = http.client.HTTPConnection("127.0.0.1", up.port, timeout=5)
    try:
        _post(client, model, **fields)
        response = client.getresponse()
        return response.status, response.headers, response.read()
    finally:
        client.close()


def _post(client, model, **fields):
    """Send one chat call and do not wait for its reply."""
    body = encode(dict(fields, model=model, messages=[{"role": "user", "content": "h\u00e9"}]))
    client.request("POST", "/v1/chat/completions?x=1", body, {"Content-Type": "application/json"})


def _events(body):
    """Parse an SSE body by the rules of the standard; return the JSON values and [DONE]."""
    text = body.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    blocks = [[line[5:][line[5:6] == " ":] for line in block.split("\n") if line[:5] == "data:"]
              for block in text.split("\n\n")]
    found = ["\n".join(lines) for lines in blocks if lines]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def _text(events, key="content"):
    """Join one key of the deltas of a stream."""
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["delta"].get(key) or "" for choice in choices)


def _raises(kind, function, *arguments, **options):
    """Whether the call raises this kind of exception."""
    try:
        function(*arguments, **options)
    except kind:
        return True
    return False


SAMPLE = "snow\u2603 \U0001f600 caf\u00e9\r\n\u2028\u0085\ttab \"data: [DONE]\" </x> & end"
CALLS = [{"id": "c1", "type": "function",
          "function": {"name": "f", "arguments": '{"a": "\u00e9"}'}}]


def _check_plain():
    """A JSON answer, two on one connection, recorded and billed; a list is used up in order."""
    with Upstream({"a": [Reply("one", cost=0.5), "two"]}, owned_by="llamacpp") as up:
        client = http.client.HTTPConnection("127.0.0.1", up.port)
        for expected in ("one", "two"):
            _post(client, "a")
            answer = json.loads(client.getresponse().read())
            assert answer["choices"][0]["message"]["content"] == expected
        first, second = up.posts("a")
        assert (first.n, second.n, first.connection, second.connection) == (0, 1, 0, 0)
        assert first.raw == second.raw and "h\u00e9".encode() in first.raw
        assert first.raw_head.startswith(b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: ")
        prompt = len(first.raw) // 4
        assert up.billed == [("a", prompt, 1, 0.5), ("a", prompt, 1, None)]
        assert _call(up, "b")[0] == 404 and up.peak_in_flight == 1 and up.in_flight == 0
        client.request("GET", "/v1/models/")
        assert json.loads(client.getresponse().read())["data"][0]["owned_by"] == "llamacpp"
        client.close()
        assert up.connections == 2 and up.wait_for(lambda: up.open_connections() == 0)


def _check_sloppy_streams():
    """Every kind of sloppy SSE says the same text; usage is where it was wanted."""
    flags = [{}, {"newline": "\r"}, {"newline": "\r\n", "split_bytes": 1}, {"comments": True},
             {"multi_line": True}, {"no_space": True, "bom": True}, {"one_write": True},
             {"one_write": 3, "split_bytes": 5}, {"null_first": True}]
    replies = [Reply(SAMPLE, reasoning="hm", tool_calls=CALLS, sse=flag) for flag in flags]
    with Upstream({"a": replies}) as up:
        for _ in flags:
            events = _events(_call(up, "a", stream=True)[2])
            assert (_text(events), _text(events, "reasoning_content")) == (SAMPLE, "hm")
            calls = [call for event in events[:-1]
                     for call in event["choices"][0]["delta"].get("tool_calls", [])]
            arguments = "".join(call["function"]["arguments"] for call in calls)
            assert calls[0]["id"] == "c1" and arguments == CALLS[0]["function"]["arguments"]
            assert events[-1] == "[DONE]" and not any("usage" in event for event in events[:-1])
            assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def _check_usage():
    """Usage comes when asked, on the last delta, under x_groq, as nonsense, or never."""
    odd = Reply("x", usage=float("nan"), sse={"usage_on": "content"})
    replies = [Reply("x"), odd, Reply("x", sse={"usage_on": "x_groq"}), Reply("x", usage=None)]
    with Upstream({"a": replies}) as up:
        streams = [_events(_call(up, "a", stream=True, stream_options={"include_usage": True})[2])
                   for _ in replies]
        assert streams[0][-2]["choices"] == [] and streams[0][-2]["usage"]["completion_tokens"] == 1
        assert streams[1][-3]["usage"] != streams[1][-3]["usage"]
        assert "usage" in streams[2][-2]["x_groq"] and "usage" not in str(streams[3])
        assert len(up.billed) == 4


def _check_cuts():
    """Cut streams and bodies end in the client's errors, and are billed all the same."""
    replies = [Reply("12345678", cut_after=3), Reply("12345678", cut_after=99),
               Reply("12345678", cut_after=2, cut="rst", first_delay=0.05), Reply(raw=b"")]
    with Upstream({"a": replies}) as up:
        assert _raises(http.client.IncompleteRead, _call, up, "a", stream=True)
        assert _raises(http.client.IncompleteRead, _call, up, "a", stream=True)
        assert _raises(ConnectionResetError, _call, up, "a")
        assert _raises(http.client.RemoteDisconnected, _call, up, "a")
        assert len(up.billed) == 3 and all(request.closed_at is None for request in up.requests)


def _check_leaving():
    """The time when a client leaves is known to 50 ms, wherever the reply was held."""
    held = [Reply("x", hang_after=0), Reply("x", hang_after=-1), Reply(delay=threading.Event()),
            Reply("12345678", chunk_delay=30), Reply("x", drip=(1, 20))]
    with Upstream({"a": held}) as up:
        for number in range(len(held)):
            client = http.client.HTTPConnection("127.0.0.1", up.port)
            _post(client, "a", stream=True)
            assert up.wait_for(lambda: len(up.requests) == number + 1)
            assert not up.requests[-1].wait_closed(0.05) and up.in_flight == 1
            client.close()
            left = time.monotonic()
            assert up.requests[-1].wait_closed(5)
            assert abs(up.requests[-1].closed_at - left) < 0.05
        assert len(up.billed) == 3, "what never got its headers is not billed"


def _check_errors():
    """Errors have their shapes, in a stream too; an exception of a script comes out at the end."""
    late = Reply("12345678", error="broke", error_after=2)
    replies = [error_reply(429, "slow down", headers={"Retry-After": "7"}), late,
               context_overflow("llamacpp"), context_overflow("openai"), Reply(status=503)]
    with Upstream({"a": replies}) as up:
        status, headers, _ = _call(up, "a", stream=True)
        assert (status, headers["retry-after"], up.billed) == (429, "7", [])
        events = _events(_call(up, "a", stream=True)[2])
        assert events[-2]["error"]["message"] == "broke" and _text(events[:-2]) == "12"
        errors = [json.loads(_call(up, "a", stream=True)[2])["error"] for _ in range(3)]
        assert errors[0]["n_ctx"] == 4096 and errors[1]["code"] == "context_length_exceeded"
    traceback.print_exc, printer = lambda: None, traceback.print_exc
    try:
        assert _raises(ZeroDivisionError, _run_broken_script)
    finally:
        traceback.print_exc = printer


def _run_broken_script():
    """Call a backend whose script raises."""
    with Upstream(lambda request: 1 // 0) as up:
        assert _raises(http.client.RemoteDisconnected, _call, up, "a")


def _check_http():
    """Framing: gzip, none at all, early close, raw bytes, 100-continue, pipelines, bad HTTP."""
    bare = Reply("x", headers={"content-length": None})
    with Upstream({"a": [Reply("x" * 99, gzip=True), bare, Reply("x", early_close=True)]}) as up:
        up.routes = {"/props": json_reply({"n_ctx": 1}), "/odd": Reply(raw=b"HTTP/1.1 200 OK\r\n")}
        _, headers, body = _call(up, "a")
        assert headers["content-encoding"] == "gzip" and b"x" * 99 in zlib.decompress(body, 31)
        assert json.loads(_call(up, "a")[2])["object"] == "chat.completion"
        assert _call(up, "a")[1]["connection"] == "keep-alive"
        client = http.client.HTTPConnection("127.0.0.1", up.port, timeout=5)
        _post(client, "a")
        client.getresponse().read()
        assert up.wait_for(lambda: up.open_connections() == 0), "closed by the server"
        client.close()
        head = b"POST /props HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        with socket.create_connection(("127.0.0.1", up.port)) as sock:
            sock.sendall(head)
            assert sock.recv(99).startswith(b"HTTP/1.1 100 ")
            sock.sendall(b"3;x=y\r\nabc\r\n0\r\n\r\nGET /odd HTTP/1.1\r\n\r\n")
            answer = b"".join(iter(lambda: sock.recv(99), b""))
        assert answer.endswith(b'\r\n\r\n{"n_ctx": 1}HTTP/1.1 200 OK\r\n')
        assert up.requests[-2].raw == b"abc"
        with socket.create_connection(("127.0.0.1", up.port)) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n")
            assert sock.recv(99).startswith(b"HTTP/1.1 400 ") and len(up.malformed) == 1


def _check_load():
    """Big bodies both ways; concurrent calls are counted; no thread is left, nor a hung one."""
    size = 50 * 1000 * 1000
    with Upstream({"big": Reply("x" * size), "*": Reply("x", delay=0.3, hang_after=1)}) as up:
        assert len(_call(up, "big", padding="y" * size)[2]) > size < len(up.requests[0].raw)
        up.script["one"] = Reply("x")
        assert [_call(up, "one")[0] for _ in range(300)] == [200] * 300
        assert up.peak_in_flight == 1, "calls in turn are not concurrent"
        clients = [http.client.HTTPConnection("127.0.0.1", up.port) for _ in range(50)]
        for client in clients:
            _post(client, "b", stream=True)
        assert up.wait_for(lambda: len(up.billed) == 351)
        assert up.peak_in_flight == up.in_flight == up.open_connections() == 50
    assert [thread for thread in threading.enumerate() if thread.name == "upstream"] == []
    assert all(request.closed_at is None for request in up.requests)
    assert _raises(ConnectionRefusedError, socket.create_connection, ("127.0.0.1", up.port))
    for client in clients:
        client.close()


def _self_check():
    """Drive the backend with http.client and raw sockets, and hold it to what it promises."""
    for check in (_check_plain, _check_sloppy_streams, _check_usage, _check_cuts, _check_leaving,
                  _check_errors, _check_http, _check_load):
        start = time.monotonic()
        check()
        print("ok  %-22s %.2f s" % (check.__name__[7:], time.monotonic() - start))


if __name__ == "__main__":
    _self_check()
