"""The HTTP/1.1 front: what is refused, what works, and that nobody can make it stand still.

Requests go to a real server over raw sockets; the upstream counts what reached a model.
"""

import contextlib
import errno
import gc
import http.client
import json
import os
import random
import re
import socket
import threading
import time
from typing import NamedTuple

import pytest

from serving import CHAT, PATIENCE_S, QUESTION, Serving, encode_request, until
from test_talk import Program
from upstream import Reply, Upstream, error_reply

SOLO = {"mode": "solo"}  # one upstream call for each request
HOST = b"Host: 127.0.0.1\r\n"
TYPE = b"Content-Type: application/json\r\n"
ASKED = json.dumps({"messages": QUESTION}).encode()
HIDDEN = encode_request({"messages": [{"role": "user", "content": "hidden"}]})
HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
ESTIMATE = "/v1/estimate"  # a POST that calls no model
KEY = "k-0123456789"


def length(data=ASKED):
    return b"Content-Length: %d\r\n" % len(data)


def post(fields, body=ASKED, version=b"1.1"):
    """A POST with exactly these header lines beside Host and Content-Type."""
    line = b"POST /v1/chat/completions HTTP/%s\r\n" % version
    return line + HOST + TYPE + fields + b"\r\n" + body


def get(fields=b"", target=b"/health", version=b"HTTP/1.1", method=b"GET", host=HOST):
    return method + b" " + target + b" " + version + b"\r\n" + host + fields + b"\r\n"


def chunked(*pieces, end=b"0\r\n\r\n"):
    """The bytes of a body in chunks."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = chunked(ASKED)
SIZE = b"%x" % len(ASKED)


def in_chunks(body, fields=CHUNKED):
    return post(fields, body)


def sized(value):
    """A POST with this for the Content-Length; it would be whole if that meant its length."""
    return post(b"Content-Length: " + value + b"\r\n", ASKED + HIDDEN)


def coded(value, body=IN_CHUNKS):
    """A POST with this for the Transfer-Encoding."""
    return post(b"Transfer-Encoding: " + value + b"\r\n", body + HIDDEN)


def sentence(line):
    """A request with this for its first line."""
    return line + b"\r\n" + HOST + b"\r\n"


def hosted(lines):
    """A GET with these for its Host."""
    return get(target=b"/v1/models", host=lines)


@pytest.fixture
def serving(fusion, tmp_path):
    """Makes servers that one model answers; they end with the test."""
    with contextlib.ExitStack() as stack:
        def made(script=None, served=None, **settings):
            folder = tmp_path / ("server-%d" % len(list(tmp_path.iterdir())))
            folder.mkdir()
            settings = dict(SOLO, **settings)
            return stack.enter_context(Serving(fusion, folder, script or answered, served,
                                               **settings))
        yield made


@pytest.fixture(scope="module")
def shared(fusion, tmp_path_factory):
    """One server for many tests that leave it as it was."""
    with Serving(fusion, tmp_path_factory.mktemp("http"), answered, **SOLO) as made:
        yield made


@pytest.fixture
def quick(fusion, monkeypatch):
    """Sets constants of the front; it looks at the clock often."""
    def set_to(**values):
        for name, value in values.items():
            monkeypatch.setattr(fusion, name, value)
    set_to(TICK_S=0.02)
    return set_to


def answered(request):
    """Says again what it was asked."""
    return Reply("re: " + request.messages[-1]["content"])


def question(text):
    return {"messages": [{"role": "user", "content": text}]}


def said(answer):
    assert answer.status == 200, answer
    return answer.json["choices"][0]["message"]["content"]


def check_refusal(answer, statuses):
    """An answer is an error of OpenAI's shape with one of these statuses."""
    assert answer.status in statuses, answer
    assert answer.headers["content-type"].startswith("application/json")
    assert list(answer.json) == ["error"]
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)
    assert error["type"] and isinstance(error["type"], str)
    assert error["code"] is None or error["code"] and isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    again = answer.status in (429, 503)
    assert answer.headers["x-should-retry"] == ("true" if again else "false")
    assert ("retry-after" in answer.headers) == again
    if again:
        assert int(answer.headers["retry-after"]) >= 2
    seen = (answer.raw_head + answer.body).lower()
    assert b"traceback" not in seen and b"<html" not in seen and b"python" not in seen


def check_alive(made):
    answer = made.get("/health")
    assert (answer.status, answer.json["status"]) == (200, "ok")


# ---- framing that is refused ------------------------------------------------------------------

LENGTHS = [  # values of Content-Length
    b"+%d" % len(ASKED), b"-1", b"-0", b"0x%x" % len(ASKED), b"1_0", b" 5 5", b"", b"5;", b"5.0",
    b"1e2", b"five", b'"5"', b"5, 5", b"5,5", b"\xb2", b"\xef\xbc\x95", b"9" * 19, b"9" * 5000,
    b"%d\x0b" % len(ASKED), b"%d\x00" % len(ASKED)]
CODINGS = [  # values of Transfer-Encoding
    b"identity", b"gzip", b"gzip, chunked", b"chunked, chunked", b"chunked, identity",
    b"chunked;q=1", b"xchunked", b"", b'"chunked"', b"chunked\x0b", b"chunked\x00", b"\xa0chunked"]
SIZES = [  # of a chunk
    b"+" + SIZE, b"-" + SIZE, b"0x" + SIZE, b"0_5", b" " + SIZE, b"", b"g", b"5 5", b"5.",
    b"FFFFFFFFFFFFFFFF", b"FFFFFFFFF", b"-0", b"\xb2", SIZE + b"\x00", SIZE + b";a=\x00",
    SIZE + b";a=\x7f", SIZE + b"\x0b", SIZE + b";" + b"x" * 2000, b"0" * 2000 + SIZE]
LINES = {  # the first line
    "lower case method": b"get /health HTTP/1.1",
    "mixed case method": b"Get /health HTTP/1.1",
    "no method": b" /health HTTP/1.1",
    "endless method": b"G" * 100 + b" /health HTTP/1.1",
    "method with a dash": b"GET-IT /health HTTP/1.1",
    "HTTP/0.9": b"GET /health",
    "two blanks": b"GET  /health HTTP/1.1",
    "tabs": b"GET\t/health\tHTTP/1.1",
    "a blank after it": b"GET /health HTTP/1.1 ",
    "a blank in the target": b"GET /hea lth HTTP/1.1",
    "NUL in the target": b"GET /health\x00 HTTP/1.1",
    "CR in the target": b"GET /hea\rlth HTTP/1.1",
    "DEL in the target": b"GET /health\x7f HTTP/1.1",
    "target in UTF-8": "GET /h\u00e9alth HTTP/1.1".encode(),
    "no slash": b"GET health HTTP/1.1",
    "absolute form": b"GET http://127.0.0.1/health HTTP/1.1",
    "absolute form elsewhere": b"GET http://evil.example/v1/models HTTP/1.1",
    "authority form": b"CONNECT 127.0.0.1:443 HTTP/1.1",
    "lower case version": b"GET /health http/1.1",
    "no version number": b"GET /health HTTP/",
    "version with three numbers": b"GET /health HTTP/1.1.1",
    "other protocol": b"GET /health ICY/1.1",
    "proxy protocol": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\nGET /health HTTP/1.1",
    "SSH": b"SSH-2.0-OpenSSH_9.6",
    "a status line": b"HTTP/1.1 200 OK"}
VERSIONS = [b"HTTP/1.2", b"HTTP/1", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/2", b"HTTP/3", b"HTTP/10.1",
            b"HTTP/9999999999.9"]  # of the protocol
FIELDS = {  # a header line
    "folded": b"X: a\r\n b\r\n", "folded with a tab": b"X: a\r\n\tb\r\n",
    "folded first": b" X: a\r\n", "a folded empty line": b"X: a\r\n \r\n",
    "NUL": b"X: a\x00b\r\n", "SOH": b"X: a\x01b\r\n", "VT": b"X: a\x0bb\r\n",
    "FF": b"X: a\x0cb\r\n", "ESC": b"X: \x1b[31m\r\n", "DEL": b"X: a\x7fb\r\n",
    "CR": b"X: a\rb\r\n", "CR CR LF": b"X: a\r\r\n", "LF": b"X: a\nY: b\r\n",
    "LF at its end": b"X: a\n", "blank before the colon": b"X : a\r\n",
    "tab before the colon": b"X\t: a\r\n", "blank in the name": b"X Y: a\r\n",
    "no name": b": a\r\n", "no colon": b"X\r\n", "bracket in the name": b"X(1): a\r\n",
    "name in UTF-8": "\u00c9: a\r\n".encode(), "NUL in the name": b"X\x00: a\r\n",
    "request line again": b"GET /health HTTP/1.1\r\n"}
HOSTS = {
    "none": b"", "two": HOST + b"Host: localhost\r\n", "two equal ones": HOST + HOST,
    "two in one": b"Host: localhost, localhost\r\n", "empty": b"Host:\r\n",
    "foreign": b"Host: evil.example\r\n", "foreign with a port": b"Host: evil.example:8000\r\n",
    "beginning like ours": b"Host: 127.0.0.1.evil.example\r\n",
    "ending like ours": b"Host: evil.localhost\r\n", "with a user": b"Host: evil@localhost\r\n",
    "with a path": b"Host: localhost/evil\r\n", "with a scheme": b"Host: http://localhost\r\n",
    "with two ports": b"Host: localhost:80:80\r\n", "of another net": b"Host: 10.0.0.1\r\n",
    "only a port": b"Host: :80\r\n", "forwarded": b"X-Forwarded-Host: localhost\r\n"}
BROKEN = {
    "two lengths": post(b"Content-Length: 5\r\n" + length(), ASKED + HIDDEN),
    "two lengths, the other way": post(length() + b"Content-Length: 0\r\n", ASKED + HIDDEN),
    "two equal lengths": post(length() + length(), ASKED + HIDDEN),
    "two lengths in other letters": post(length() + length().upper(), ASKED + HIDDEN),
    "length and chunks": post(length(IN_CHUNKS) + CHUNKED, IN_CHUNKS + HIDDEN),
    "chunks and length": post(CHUNKED + length(IN_CHUNKS), IN_CHUNKS + HIDDEN),
    "length 0 and chunks": post(b"Content-Length: 0\r\n" + CHUNKED, IN_CHUNKS + HIDDEN),
    "length before a hidden request": post(
        b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n" + HIDDEN),
    "two codings": post(CHUNKED + CHUNKED, IN_CHUNKS + HIDDEN),
    "coding and identity": post(CHUNKED + b"Transfer-Encoding: identity\r\n", IN_CHUNKS + HIDDEN),
    "chunks in 1.0": post(CHUNKED, IN_CHUNKS + HIDDEN, b"1.0"),
    "chunks in 1.0 that would stay": post(
        CHUNKED + b"Connection: keep-alive\r\n", IN_CHUNKS + HIDDEN, b"1.0"),
    "folded coding": coded(b"\r\n chunked"),
    "folded length": sized(b"\r\n %d" % len(ASKED)),
    "coding with a blank before the colon": post(
        length() + b"Transfer-Encoding : chunked\r\n", ASKED + HIDDEN),
    "length with a blank before the colon": post(
        b"Content-Length : %d\r\n" % len(ASKED), ASKED + HIDDEN),
    "coding behind a bare LF": post(
        length() + b"X: a\nTransfer-Encoding: chunked\r\n", IN_CHUNKS + HIDDEN),
    "coding behind a bare CR": post(
        length() + b"X: a\rTransfer-Encoding: chunked\r\n", IN_CHUNKS + HIDDEN),
    "length behind a NUL": post(b"X: a\x00" + length(), ASKED + HIDDEN),
    "GET with length and chunks": get(b"Content-Length: 5\r\n" + CHUNKED) + b"0\r\n\r\n" + HIDDEN,
    "GET with two lengths": get(b"Content-Length: 0\r\nContent-Length: 5\r\n") + HIDDEN,
    "chunk longer than it says": in_chunks(
        b"%x\r\n" % (len(ASKED) - 2) + ASKED + b"\r\n0\r\n\r\n" + HIDDEN),
    "chunk shorter than it says": in_chunks(
        b"%x\r\n" % (len(ASKED) + 4) + ASKED + b"\r\n0\r\n\r\n" + HIDDEN),
    "no line end behind a chunk": in_chunks(SIZE + b"\r\n" + ASKED + b"0\r\n\r\n" + HIDDEN),
    "other bytes behind a chunk": in_chunks(SIZE + b"\r\n" + ASKED + b"XX0\r\n\r\n" + HIDDEN),
    "LF behind a chunk": in_chunks(SIZE + b"\r\n" + ASKED + b"\n0\r\n\r\n" + HIDDEN),
    "LF behind a size": in_chunks(SIZE + b"\n" + ASKED + b"\r\n0\r\n\r\n" + HIDDEN),
    "CR behind a size": in_chunks(SIZE + b"\r" + ASKED + b"\r\n0\r\n\r\n" + HIDDEN),
    "LF behind the last chunk": in_chunks(chunked(ASKED, end=b"0\n\r\n") + HIDDEN),
    "a request for a trailer": in_chunks(chunked(ASKED, end=b"0\r\n") + HIDDEN),
    "trailer with a blank in its name": in_chunks(chunked(ASKED, end=b"0\r\nX Y: a\r\n\r\n")),
    "folded trailer": in_chunks(chunked(ASKED, end=b"0\r\nX: a\r\n b\r\n\r\n")),
    "trailer with a NUL": in_chunks(chunked(ASKED, end=b"0\r\nX: \x00\r\n\r\n")),
    "long trailer": in_chunks(chunked(ASKED, end=b"0\r\nX: " + b"a" * 5000 + b"\r\n\r\n")),
    "many trailers": in_chunks(
        chunked(ASKED, end=b"0\r\n" + b"X: aaaaaaaa\r\n" * 1000 + b"\r\n")),
    "endless trailer": in_chunks(chunked(ASKED, end=b"0\r\n" + b"X" * 5000)),
    "endless size": in_chunks(b"1" * 5000),
    "body behind a broken line": post(b"X\r\n" + length(), ASKED + HIDDEN),
    "bare LFs": b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n" + HIDDEN,
    "bare LFs and no more": b"GET /health HTTP/1.1\nHost: 127.0.0.1\n\n",
    "bare LFs in a POST": post(length()).replace(b"\r\n", b"\n") + HIDDEN,
    "one bare LF": b"GET /health HTTP/1.1\n" + HOST + b"\r\n" + HIDDEN,
    "a bare LF first": b"\n" + HEALTH,
    "a bare LF at the end": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\n\r\n" + HIDDEN,
    "bare CRs": HEALTH.replace(b"\r\n", b"\r") + b"\r\n\r\n" + HIDDEN,
    "a NUL first": b"\x00" + HEALTH,
    "a blank first": b" " + HEALTH,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    "TLS hello": bytes.fromhex("16030100a5010000a10303") + bytes(range(160)),
    "SOCKS": b"\x05\x01\x00",
    "redis": b"*1\r\n$4\r\nPING\r\n",
    "JSON": ASKED,
    "proxy protocol 2": b"\r\n\r\n\x00\r\nQUIT\n" + b"\x21\x11\x00\x0c" + bytes(12),
    "noise": random.Random(7).getrandbits(8000).to_bytes(1000, "big").lstrip(b"ABCDEFGHIJKLMNOP\r")}
TWICE = ["Authorization: Bearer k", "X-Api-Key: k", "Origin: http://127.0.0.1", "X-Fusion-Depth: 0",
         "Content-Encoding: identity", "Expect: 100-continue", "Content-Type: application/json"]
LARGE = {
    "101 headers": (get(b"".join(b"X-%d: a\r\n" % index for index in range(100))), 431),
    "2,000 headers": (get(b"X: a\r\n" * 2000), 431),
    "a header of 33 kB": (get(b"X: " + b"a" * 33_000 + b"\r\n"), 431),
    "a header of 1 MB": (get(b"X: " + b"a" * 1_000_000 + b"\r\n"), 431),
    "33 kB without an end": (b"GET /health HTTP/1.1\r\nX: " + b"a" * 33_000, 431),
    "a first line of 40 kB without an end": (b"GET /" + b"a" * 40_000, 431),
    "a target of 9 kB": (get(target=b"/" + b"a" * 9_000), 414),
    "a query of 9 kB": (get(target=b"/health?" + b"a" * 9_000), 414),
    "a body of 10 MB and one byte": (post(b"Content-Length: 10000001\r\n", b""), 413),
    "a body of 100 TB": (post(b"Content-Length: 100000000000000\r\n", b""), 413),
    "a chunk of 10 MB and one byte": (in_chunks(b"989681\r\n"), 413),
    "a chunk of 4 GB": (in_chunks(b"FFFFFFFF\r\n"), 413)}
CASES = [("length %.20r" % value, sized(value), (400, 413)) for value in LENGTHS]
CASES += [("coding %r" % value, coded(value), (400, 501)) for value in CODINGS]
CASES += [("size %.20r" % value, in_chunks(value + b"\r\n" + ASKED + b"\r\n0\r\n\r\n" + HIDDEN),
           (400, 413)) for value in SIZES]
CASES += [("line: " + name, sentence(line) + HIDDEN, (400,)) for name, line in LINES.items()]
CASES += [("version %r" % version, get(version=version) + HIDDEN, (505,)) for version in VERSIONS]
CASES += [("field: " + name, get(field) + HIDDEN, (400,)) for name, field in FIELDS.items()]
CASES += [("last field: " + name, post(length() + field) + HIDDEN, (400,))
          for name, field in FIELDS.items()]
CASES += [("host: " + name, hosted(lines) + HIDDEN,
           (400,) if name in ("none", "two", "two equal ones") else (400, 421))
          for name, lines in HOSTS.items()]
CASES += [("two of: " + line, post(length() + 2 * (line.encode() + b"\r\n")) + HIDDEN, (400,))
          for line in TWICE]
CASES += [(name, data, (400, 501, 505)) for name, data in BROKEN.items()]
CASES += [("large: " + name, data, (status,)) for name, (data, status) in LARGE.items()]


@pytest.mark.parametrize("data, statuses", [case[1:] for case in CASES],
                         ids=[case[0] for case in CASES])
def test_broken_framing_gets_one_refusal_and_the_connection_ends(shared, data, statuses):
    def refusals():
        return [line["status"] for line in list(shared.lines) if line["status"] >= 400]

    calls, before = len(shared.up.requests), len(refusals())
    client = shared.client()
    client.send(data)
    answer = client.answer()
    check_refusal(answer, statuses)
    assert client.is_closed(), bytes(client.raw)
    client.close()
    check_alive(shared)
    assert until(lambda: len(refusals()) > before)
    assert refusals()[before:] == [answer.status]
    assert len(shared.up.requests) == calls
    assert shared.defects == []


POLITE = {  # requests that are whole, and refused all the same
    "PUT": (get(target=b"/v1/models", method=b"PUT"), 405),
    "DELETE": (get(target=b"/v1/models/m1", method=b"DELETE"), 405),
    "TRACE": (get(method=b"TRACE"), 405),
    "BREW": (get(method=b"BREW"), 405),
    "POST where GET is": (get(method=b"POST", target=b"/v1/models"), 405),
    "GET where POST is": (get(target=CHAT.encode()), 405),
    "OPTIONS without --cors": (get(method=b"OPTIONS", target=CHAT.encode()), 405),
    "OPTIONS of the server": (get(method=b"OPTIONS", target=b"*"), 404),
    "CONNECT in origin form": (get(method=b"CONNECT"), 405),
    "nothing there": (get(target=b"/v1/nothing"), 404),
    "path with an escape": (get(target=b"/%68ealth"), 404),
    "path through a parent": (get(target=b"/v1/../health"), 404),
    "two slashes": (get(target=b"//health"), 404),
    "slash and host": (get(target=b"//evil.example/health"), 404),
    "a form": (post(length()).replace(b"application/json", b"application/x-www-form-urlencoded"),
               415),
    "plain text": (post(length()).replace(b"application/json", b"text/plain"), 415),
    "gzip": (post(length() + b"Content-Encoding: gzip\r\n"), 415),
    "another expectation": (post(length() + b"Expect: miracles\r\n"), 417),
    "cross-site": (post(length() + b"Origin: https://evil.example\r\n"), 403),
    "cross-site by a browser's word": (post(length() + b"Sec-Fetch-Site: cross-site\r\n"), 403),
    "from a fusion server": (post(length() + b"X-Fusion-Depth: 1\r\n"), 400)}


@pytest.mark.parametrize("name", POLITE)
def test_a_whole_request_that_cannot_be_served_is_refused_with_its_status(shared, name):
    data, status = POLITE[name]
    calls = len(shared.up.requests)
    client = shared.client()
    client.send(data)
    answer = client.answer()
    check_refusal(answer, (status,))
    if status == 405:
        assert "allow" in answer.headers
    assert not client.buffer
    client.close()
    check_alive(shared)
    assert len(shared.up.requests) == calls


@pytest.mark.parametrize("fields", [
    b"Content-Length: %d\r\n" % len(HIDDEN), CHUNKED], ids=["length", "chunks"])
def test_a_request_in_the_body_of_a_get_is_a_body(shared, fields):
    calls = len(shared.up.requests)
    client = shared.client()
    client.send(get(fields) + (chunked(HIDDEN) if fields is CHUNKED else HIDDEN) + HEALTH)
    assert [client.answer().status, client.answer().status] == [200, 200]
    client.close()
    check_alive(shared)
    assert len(shared.up.requests) == calls and not client.buffer


def test_a_request_behind_a_refused_one_is_not_served(shared):
    """What follows a refused head may be its body."""
    calls = len(shared.up.requests)
    client = shared.client()
    client.send(post(length() + b"X\x00: a\r\n") + HEALTH + HIDDEN)
    check_refusal(client.answer(), (400,))
    assert client.is_closed()
    assert len(shared.up.requests) == calls


def test_heads_at_their_limits_are_served(shared):
    """100 headers, 8192 bytes of a first line, 32768 bytes in all."""
    many = b"".join(b"X-%d: a\r\n" % index for index in range(99))
    target = b"/health?" + b"a" * (8192 - len("GET /health? HTTP/1.1"))
    large = get(b"X: %s\r\n")
    large %= b"a" * (32_768 + 4 - len(large) + 2)
    client = shared.client()
    for data in (get(many), get(target=target), large):
        assert client.send(data).answer().status == 200
    assert len(large) == 32_768 + 4
    client.close()


@pytest.mark.parametrize("field", [
    b"X:a", b"X:", b"X: ", b"X:\t a \t", b"X: a\tb", b"X: \xe9\xff", b"!#$%&'*+.^_`|~-09Az: a",
    b"X: a: b", b"X: \"a\\\"b\"", b"Connection: Keep-Alive, Foo", b"Content-Length: 0",
    b"Content-Length: 000", b"Transfer_Encoding: gzip", b"TE: trailers", b"Upgrade: h2c",
    b"Accept: a\r\nAccept: b", b"HTTP2-Settings: AAMAAABkAAQ"])
def test_unusual_header_lines_that_are_valid_are_taken(shared, field):
    client = shared.client()
    assert client.send(get(field + b"\r\n") * 2).answer().status == 200
    assert client.answer().status == 200
    client.close()


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "localhost:", "[::1]", "[::1]:80",
    "127.1.2.3"])
def test_hosts_that_are_this_machine_are_taken(shared, host):
    assert shared.get("/v1/models", host=host).status == 200


# ---- time that a single request can take ------------------------------------------------------

def slow_lines():
    blanks = b" " * 30_000
    return {
        "blanks before a control character": get(b"X:" + blanks + b"\x01\r\n"),
        "tabs before a control character": get(b"X:a" + b"\t" * 30_000 + b"\x01\r\n"),
        "blanks between letters": get(b"X:a" + blanks + b"b\r\n"),
        "blanks and letters": get(b"X:" + b" a" * 15_000 + b"\r\n"),
        "only blanks": get(b"X:" + blanks + b"\r\n"),
        "colons in the host": hosted(b"Host: " + b":" * 30_000 + b"x\r\n"),
        "digits and colons in the host": hosted(b"Host: " + b"1:" * 15_000 + b"x\r\n"),
        "points in the host": hosted(b"Host: " + b"1." * 15_000 + b"x\r\n"),
        "brackets in the host": hosted(b"Host: " + b"[" * 30_000 + b"\r\n"),
        "words in the connection": get(b"Connection: " + b", " * 15_000 + b"\r\n"),
        "blanks in the first line": b"GET" + blanks + b"/ HTTP/2.0\r\n\r\n",
        "blanks in a trailer": in_chunks(
            chunked(ASKED, end=b"0\r\nX:" + b" " * 1000 + b"\x01\r\n\r\n"))}


@pytest.mark.parametrize("name", slow_lines())
def test_no_line_costs_more_time_than_it_is_long(shared, name):
    client = shared.client().send(HEALTH)
    client.answer()
    started = time.monotonic()
    client.send(slow_lines()[name])
    client.answer()
    took = time.monotonic() - started
    client.close()
    check_alive(shared)
    assert took < 0.25


# ---- bodies that are no JSON ------------------------------------------------------------------

def holding(value):
    """The body of a good request with one more field, of which this is the JSON."""
    return ASKED[:-1] + b', "metadata": ' + value + b"}"


def nested(count, opening=b"[", inmost=b"[]", closing=b"]"):
    """A body in which brackets stand in each other, so many in all."""
    return holding(opening * (count - 2) + inmost + closing * (count - 2))


OBJECTS = (b'{"a":', b"{}", b"}")


def content(text):
    """The body of a request that has this between the quotes of its question."""
    return b'{"messages": [{"role": "user", "content": "' + text + b'"}]}'


MILLIONS = 9_900_000
NO_JSON = {
    "empty": b"", "blanks": b" \r\n\t ", "NUL": b"\x00", "NUL behind it": ASKED + b"\x00",
    "truncated": ASKED[:-1], "truncated in a text": ASKED[:-6], "one byte": b"{",
    "truncated in an escape": b'{"messages": "\\u12', "truncated in a word": b'{"stream": tru',
    "text behind it": ASKED + b" x", "twice": ASKED + ASKED, "two lines": ASKED + b"\n" + ASKED,
    "bracket behind it": ASKED + b"}", "comma behind it": ASKED + b",",
    "array": b"[" + ASKED + b"]", "text": json.dumps(ASKED.decode()).encode(), "number": b"17",
    "true": b"true", "null": b"null", "NaN alone": b"NaN",
    "NaN": holding(b"NaN"), "Infinity": holding(b"Infinity"), "-Infinity": holding(b"-Infinity"),
    "1e999": holding(b"1e999"), "-1e999": holding(b"-1e999"), "5000 digits": holding(b"9" * 5000),
    "minus 5000 digits": holding(b"-" + b"9" * 5000), "400 digits": holding(b"9" * 400),
    "MB of digits": holding(b"9" * MILLIONS), "MB of an exponent": holding(b"1e" + b"9" * MILLIONS),
    "leading zero": holding(b"01"), "plus": holding(b"+1"), "bare point": holding(b".5"),
    "point at the end": holding(b"5."), "hexadecimal": holding(b"0x10"), "1_000": holding(b"1_000"),
    "two keys": ASKED[:-1] + b', "messages": []}',
    "two equal keys": ASKED[:-1] + b", " + ASKED[1:],
    "two keys, one escaped": ASKED[:-1] + b', "mess\\u0061ges": []}',
    "two keys in a message": b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
    "two keys in an unknown field": holding(b'{"a": {"b": [{"c": 1, "c": 1}]}}'),
    "two empty keys": holding(b'{"": 1, "": 1}'),
    "raw surrogate": content(b"\xed\xa0\x80"), "raw pair": content(b"\xed\xa0\xbd\xed\xb8\x80"),
    "escaped surrogate": content(b"\\ud800"), "escaped low surrogate": content(b"\\udc00"),
    "pair the wrong way": content(b"\\ude00\\ud83d"), "surrogate as a key": holding(
        b'{"\\uD800": 1}'),
    "surrogate deep in an unknown field": holding(b'{"a": [[{"b": "\\udfff"}]]}'),
    "latin-1": content(b"caf\xe9"), "cut UTF-8": content(b"\xe2\x82"),
    "overlong UTF-8": content(b"\xc0\xaf"), "beyond Unicode": content(b"\xf4\x90\x80\x80"),
    "byte FF": content(b"\xff"), "cut UTF-8 at the end": ASKED + b"\xe2",
    "UTF-16": ASKED.decode().encode("utf-16"), "UTF-16 without mark": ASKED.decode().encode(
        "utf-16-le"), "UTF-32": ASKED.decode().encode("utf-32"), "mark": b"\xef\xbb\xbf" + ASKED,
    "101 brackets": nested(101), "1,000 brackets": nested(1000),
    "100,000 brackets": nested(100_000), "101 objects": nested(101, *OBJECTS),
    "100,000 objects": nested(100_000, *OBJECTS),
    "MB of brackets": b"[" * MILLIONS, "MB of objects": b'{"a":' * (MILLIONS // 5),
    "MB of closed brackets": nested(MILLIONS // 2 - 100), "MB of minus": b"-" * MILLIONS,
    "single quotes": ASKED.replace(b'"', b"'"),
    "bare keys": ASKED.replace(b'"messages"', b"messages"),
    "comment": ASKED + b" // a comment", "comment inside": ASKED.replace(b"[", b"[/* a */"),
    "comma at the end": ASKED[:-1] + b",}", "comma at the end of a list": ASKED.replace(
        b"]", b",]"), "no comma": ASKED.replace(b'", "', b'" "'),
    "no colon": ASKED.replace(b":", b""),
    "line end in a text": content(b"a\nb"), "tab in a text": content(b"a\tb"),
    "NUL in a text": content(b"a\x00b"), "unknown escape": content(b"\\x41"),
    "undefined": holding(b"undefined"), "Python's True": holding(b"True"),
    "None": holding(b"None"), "form": b"messages=hello&stream=true",
    "separator before it": b"\x1e" + ASKED, "in a fence": b"```json\n" + ASKED + b"\n```",
    "multipart": b"--x\r\nContent-Disposition: form-data\r\n\r\n" + ASKED + b"\r\n--x--\r\n"}


@pytest.mark.parametrize("name", NO_JSON)
def test_a_body_that_is_no_json_is_refused_at_once(shared, name):
    calls = len(shared.up.requests)
    client = shared.client()
    started = time.monotonic()
    client.send(encode_request(NO_JSON[name]) + HEALTH)
    answer = client.answer()
    took = time.monotonic() - started
    check_refusal(answer, (400,))
    assert client.answer().status == 200  # the framing was good, so the connection is
    client.close()
    assert answer.json["error"]["type"] == "invalid_request_error"
    assert len(answer.body) < 1000
    assert took < (5 if len(NO_JSON[name]) > 1_000_000 else 1)
    assert len(shared.up.requests) == calls
    assert shared.defects == []


@pytest.mark.parametrize("body", [
    nested(100), nested(100, *OBJECTS), holding(b"9" * 300),
    holding(b"1e308"), holding(b"-0"), holding(b"1E-999"), content(b"\\ud83d\\ude00"),
    content(b"\\\\ud800"), content("\U0001f600\u2028\u00e9".encode()), content(b"\\u0000"),
    holding(b'{"a": 1, "A": 1, "a ": 1}'), b" \r\n\t" + ASKED + b"\r\n ", holding(b'{"": 1}')],
    ids=range(13))
def test_a_body_that_is_json_to_the_letter_is_taken(shared, body):
    assert shared.post(body, path=ESTIMATE).status == 200


# ---- how a request may come -------------------------------------------------------------------

def test_a_request_may_come_byte_by_byte(shared):
    client = shared.client()
    with_trailer = chunked(ASKED[:7], ASKED[7:], end=b"0\r\nX: a\r\n\r\n")
    for data in (post(length()), in_chunks(with_trailer)):
        for byte in data:
            client.send(bytes([byte]))
        assert said(client.answer()) == "re: Why is the sky blue?"
    client.close()


WIRE = (b"4\r\nWiki\r\n006;a=b\r\npedia \r\nD \t;x=\"y;z\"; q\r\nin \r\n\r\nchunks\r\n"
        b"0;last\r\nX: 1\r\nY:\r\n\r\n")


def body_of(fusion, pieces, most=1000):
    """Gives these pieces to a Body one after the other: (data, what is left) once it is whole."""
    head = fusion.read_head(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked")
    body, buffer = fusion.Body(head, most), bytearray()
    done = False
    for piece in pieces:
        buffer += piece
        done = done or body.take(buffer)
    return (bytes(body.data), bytes(buffer)) if done else None


def test_chunks_may_be_split_anywhere(fusion):
    wire = WIRE + b"GET"
    for first in range(len(wire) + 1):
        for second in range(first, len(wire) + 1):
            pieces = wire[:first], wire[first:second], wire[second:]
            assert body_of(fusion, pieces) == (b"Wikipedia in \r\n\r\nchunks", b"GET"), pieces
    for end in range(len(WIRE)):
        assert body_of(fusion, [WIRE[:end]]) is None
    assert body_of(fusion, [WIRE[index:index + 1] for index in range(len(WIRE))])


def has_come(made, client, count):
    """Wait until the front has read so many bytes of this client, or has refused it."""
    name = client.sock.getsockname()

    def has():
        for connection in list(made.front.connections.values()):
            with contextlib.suppress(OSError):
                if connection.sock.getpeername() == name:
                    return connection.held() >= count or connection.state == "linger"
        return False

    assert until(has)


@pytest.mark.parametrize("back", [1, 2, 3])
def test_a_head_at_its_limit_may_be_split_in_its_end(shared, back):
    large = get(b"X: %s\r\n")
    large %= b"a" * (32_768 + 4 - len(large) + 2)
    client = shared.client().send(large[:-back])
    has_come(shared, client, len(large) - back)
    assert client.send(large[-back:]).answer().status == 200
    client.close()


def test_a_size_line_at_its_limit_may_be_split_in_its_end(fusion):
    line = b"3;" + b"x" * 1022
    assert body_of(fusion, [line + b"\r\nabc\r\n0\r\n\r\n"]) == (b"abc", b"")
    assert body_of(fusion, [line + b"\r", b"\nabc\r\n0\r\n\r\n"]) == (b"abc", b"")


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b"CHUNKED"])
def test_the_name_of_the_coding_has_no_case(shared, coding):
    data = in_chunks(IN_CHUNKS, b"Transfer-Encoding: " + coding + b"\r\n")
    client = shared.client().send(data)
    assert said(client.answer()).startswith("re: ")
    client.close()


@pytest.mark.parametrize("before", [b"\r\n", b""])
def test_an_empty_line_before_a_request_is_passed_over(shared, before):
    client = shared.client().send(before + HEALTH + before + post(length()) + before + HEALTH)
    assert [client.answer().status for _ in range(3)] == [200, 200, 200]
    client.close()


# ---- Expect -----------------------------------------------------------------------------------

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECT = b"Expect: 100-continue\r\n"


@pytest.mark.parametrize("fields, body", [
    (length() + EXPECT, ASKED), (CHUNKED + b"expect: 100-Continue\r\n", IN_CHUNKS)],
    ids=["length", "chunks"])
def test_who_waits_for_continue_gets_it(shared, fields, body):
    client = shared.client().send(post(fields, b""))
    assert client.take(len(CONTINUE)) == CONTINUE
    assert said(client.send(body).answer()).startswith("re: ")
    assert client.send(HEALTH).answer().status == 200
    client.close()


def test_who_does_not_wait_for_continue_is_served_as_well(shared):
    client = shared.client().send(post(length() + EXPECT))
    while client.head() == CONTINUE:
        pass
    assert client.status == 200
    client.close()


@pytest.mark.parametrize("data, status", [
    (post(b"Content-Length: 1001\r\n" + EXPECT, b""), 413),
    (post(length() + EXPECT, b""), 401),
    (post(length() + EXPECT + b"X-Api-Key: wrong\r\n", b""), 401),
    (post(length() + EXPECT + b"Origin: https://evil.example\r\n", b""), 403),
    (encode_request(None, path="/v1/nothing", headers={"X-Api-Key": KEY, "Content-Length": 5,
                                                       "Expect": "100-continue"}), 404),
    (encode_request(None, path="/v1/models", headers={"X-Api-Key": KEY, "Content-Length": 5,
                                                      "Expect": "100-continue"}), 405),
    (encode_request(None, path=CHAT, headers={
        "X-Api-Key": KEY, "Content-Length": 5, "Content-Type": "text/plain",
        "Expect": "100-continue"}), 415),
    (post(length() + b"X-Api-Key: " + KEY.encode() + b"\r\nExpect: 200-ok\r\n", b""), 417),
    (post(length() + CHUNKED + EXPECT, b""), 400)],
    ids=["large", "no key", "wrong key", "origin", "path", "method", "type", "expect", "framing"])
def test_who_waits_for_continue_is_refused_before_the_body(serving, data, status):
    made = serving(served={"tokens": (KEY,), "max_body": 1000})
    client = made.client().send(data)
    answer = client.answer()  # a 100 would fail here
    check_refusal(answer, (status,))
    assert client.is_closed()
    assert made.up.requests == []


def test_http_1_0_is_never_told_to_continue(shared):
    client = shared.client().send(post(length() + EXPECT, b"", b"1.0"))
    client.sock.settimeout(0.2)
    with pytest.raises(socket.timeout):
        client.fill()
    client.sock.settimeout(PATIENCE_S)
    assert said(client.send(ASKED).answer()).startswith("re: ")


# ---- connections ------------------------------------------------------------------------------

def test_pipelined_requests_are_answered_in_order(serving):
    """Whatever the time that each of them takes."""
    rng = random.Random(1)
    made = serving(lambda request: Reply("re: " + request.messages[-1]["content"],
                                         delay=rng.choice([0, 0, 0.02])))
    client, data, wanted = made.client(), b"", []
    for number in range(40):
        kind = rng.choice(["chat", "chat", "health", "models", "wrong", "estimate"])
        if kind == "chat":
            data += encode_request(question("question %d" % number))
            wanted.append((200, "re: question %d" % number))
        elif kind == "wrong":
            data += encode_request(b"no JSON")
            wanted.append((400, "error"))
        elif kind == "estimate":
            data += encode_request(question("a"), path=ESTIMATE)
            wanted.append((200, "estimate"))
        else:
            path = {"health": "/health", "models": "/v1/models/writer"}[kind]
            data += encode_request(None, "GET", path)
            wanted.append((200, {"health": "ok", "models": "writer"}[kind]))
    client.send(data)
    for status, mark in wanted:
        answer = client.answer()
        seen = json.dumps(answer.json)
        assert answer.status == status and '"%s' % mark in seen, (wanted, seen)
    assert not client.buffer


def test_a_thousand_pipelined_gets_are_answered(shared):
    client = shared.client()
    threading.Thread(target=client.send, args=(HEALTH * 1000,), daemon=True).start()
    assert {client.answer().status for _ in range(1000)} == {200}
    assert client.send(HEALTH).answer().status == 200
    client.close()


MODELS = encode_request(None, "GET", "/v1/models")


def unread(made, count=1000):
    """A client that asks for more than the buffers hold and reads nothing of it."""
    client = made.client(receive_buffer=4096)
    return client.send(MODELS * count)


def is_quiet(made, seconds=0.1):
    """Whether the server comes to answer nothing more."""
    def settled():
        count = len(made.lines)
        time.sleep(seconds)
        return count and len(made.lines) == count
    return until(settled)


@pytest.fixture
def talkative(serving):
    """A server whose list of models is long."""
    return serving(panel=["model-%d" % number for number in range(16)])


def test_who_reads_after_it_has_sent_all_gets_all(talkative):
    client = unread(talkative)
    assert is_quiet(talkative)
    assert {client.answer().status for _ in range(1000)} == {200}
    assert client.send(HEALTH).answer().status == 200


def test_who_reads_nothing_costs_no_thread(talkative):
    before = threading.active_count()
    clients = [unread(talkative, 300) for _ in range(6)]
    assert is_quiet(talkative)
    assert threading.active_count() <= before + 2
    check_alive(talkative)
    for client in clients:
        client.close()
    assert until(lambda: not talkative.front.connections)


def test_who_reads_nothing_has_left_after_a_while(quick, talkative):
    quick(WRITE_S=0.2)
    unread(talkative)
    assert is_quiet(talkative)
    assert until(lambda: not talkative.front.connections)
    check_alive(talkative)


def test_who_reads_nothing_of_a_stream_has_left_after_a_while(quick, serving):
    """The server waits for the client, and does not gather what it does not take."""
    quick(WRITE_S=0.3)
    made = serving(lambda request: Reply(chunks=["x" * 100_000] * 200))
    client = made.stream(question("a"), receive_buffer=4096)
    assert until(lambda: made.up.posts())
    assert made.up.posts()[0].wait_closed(5)
    assert made.logged()[0]["bytes"] < 15_000_000
    assert until(lambda: not made.front.connections)
    client.close()


def test_a_large_request_behind_one_that_is_under_way_is_served(serving):
    gate = threading.Event()
    made = serving(lambda request: Reply("re: " + request.messages[-1]["content"][:9],
                                         delay=gate))
    client = made.client()
    client.send(encode_request(question("a")))
    assert until(lambda: made.up.in_flight)
    client.sock.settimeout(2)
    sending = threading.Thread(target=lambda: send_quietly(
        client.sock, encode_request(question("b" * 3_000_000))), daemon=True)
    sending.start()
    sending.join(0.5)
    gate.set()
    assert said(client.answer()) == "re: a"
    assert said(client.answer()) == "re: bbbbbbbbb"


def test_who_has_sent_much_ahead_and_leaves_is_noticed(serving, gated):
    """What it has sent still fits into the buffers, or its leaving could not come through."""
    made = serving(gated)
    client = made.client().send(encode_request(question("a")))
    assert is_waiting(made, 1)
    client.send(encode_request(question("b" * 3_000_000))[:1_050_000])
    has_come(made, client, 1_000_000)
    client.close()
    assert made.up.posts()[0].wait_closed(2)
    gated.gate.set()
    assert until(lambda: not made.front.connections)
    assert gated.order == ["a"]


def send_quietly(sock, data):
    """Send all, or as much as the other side takes."""
    with contextlib.suppress(OSError):
        sock.sendall(data)


@pytest.mark.parametrize("version, field, stays", [
    ("1.1", None, True), ("1.1", "keep-alive", True), ("1.1", "close", False),
    ("1.1", "Close", False), ("1.1", "TE, close", False), ("1.1", "keep-alive,close", False),
    ("1.1", "closed", True), ("1.0", None, False), ("1.0", "keep-alive", True),
    ("1.0", "Keep-Alive, Foo", True), ("1.0", "close", False),
    ("1.0", "keep-alive, close", False)])
@pytest.mark.parametrize("kind", ["GET", "POST"])
def test_a_connection_lives_as_long_as_the_client_wants_it(shared, version, field, stays, kind):
    fields = {"Connection": field} if field else {}
    if kind == "GET":
        data = encode_request(None, "GET", "/health", version, headers=fields)
    else:
        data = encode_request(QUESTION_BODY, "POST", ESTIMATE, version, headers=fields)
    client = shared.client().send(data)
    answer = client.answer()
    assert answer.status == 200
    if stays:
        assert answer.headers.get("connection") == (None if version == "1.1" else "keep-alive")
        assert client.send(data).answer().status == 200
    else:
        assert answer.headers["connection"] == "close"
        assert client.is_closed()
    client.close()


QUESTION_BODY = {"messages": QUESTION}


def test_nothing_behind_a_connection_close_is_served(shared):
    calls = len(shared.up.requests)
    client = shared.client().send(get(b"Connection: close\r\n") + HIDDEN)
    assert client.answer().status == 200
    assert client.is_closed()
    check_alive(shared)
    assert len(shared.up.requests) == calls


def test_http_1_0_needs_no_host_and_gets_its_stream_without_chunks(shared):
    assert b"200" in raw_exchange(shared, b"GET /health HTTP/1.0\r\n\r\n").split(b"\r\n")[0]
    body = json.dumps(dict(QUESTION_BODY, stream=True)).encode()
    raw = raw_exchange(shared, b"POST /v1/chat/completions HTTP/1.0\r\nConnection: keep-alive\r\n"
                       + length(body) + b"\r\n" + body)
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and b"content-length" not in head.lower()
    assert b"\r\nconnection: close" in head
    assert rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")


def raw_exchange(made, data):
    """Send bytes; return all that comes until the server closes."""
    client = made.client().send(data)
    while client.fill():
        pass
    client.close()
    return bytes(client.raw)


def test_a_stream_is_followed_by_the_next_request(shared):
    client = shared.client()
    body = dict(QUESTION_BODY, stream=True)
    client.send(encode_request(body) + HEALTH + encode_request(body))
    assert list(client.frames())[-1] == b"data: [DONE]"
    client.headers = None
    assert client.answer().status == 200
    assert list(client.frames())[-1] == b"data: [DONE]"
    client.close()


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/writer",
                                  "/v1/models/?limit=1", "/health/"])
def test_head_is_get_without_the_body(shared, path):
    wanted = shared.get(path)
    client = shared.client().send(encode_request(None, "HEAD", path) + HEALTH)
    client.head()
    assert (client.status, client.headers["content-type"]) == (
        200, wanted.headers["content-type"])
    assert set(client.headers) == set(wanted.headers)
    if path != "/metrics":  # its numbers move
        assert client.headers["content-length"] == wanted.headers["content-length"]
    assert client.answer().status == 200
    client.close()


@pytest.mark.parametrize("path, status", [("/v1/nothing", 404), (CHAT, 405),
                                          ("/v1/models/nobody", 404)])
def test_a_refusal_of_head_has_no_body(shared, path, status):
    client = shared.client().send(get(target=path.encode(), method=b"HEAD",
                                      fields=b"Connection: close\r\n"))
    client.head()
    assert client.status == status
    assert client.is_closed()


def test_options_is_answered_for_a_page_of_an_allowed_origin(serving):
    made = serving(served={"origins": ("https://app.example",), "tokens": (KEY,)})
    asked = "authorization, content-type, x-stainless-lang, x-stainless-retry-count"
    client = made.client().send(encode_request(None, "OPTIONS", headers={
        "Origin": "https://app.example", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked}) + HEALTH)
    client.head()
    assert client.status == 204
    assert "content-length" not in client.headers and "content-type" not in client.headers
    assert client.headers["access-control-allow-origin"] == "https://app.example"
    assert client.headers["access-control-allow-headers"] == asked
    assert "POST" in client.headers["access-control-allow-methods"]
    assert client.answer().status == 200
    answer = made.post(QUESTION_BODY, method="OPTIONS", headers={"Origin": "https://b.example"})
    check_refusal(answer, (403,))


def test_idle_connections_are_closed_without_a_word(quick, serving):
    quick(KEEP_S=0.3, HEAD_S=0.1)
    made = serving()
    fresh, used, busy = made.client(), made.client(), made.client()
    assert used.send(HEALTH).answer().status == 200
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        assert busy.send(HEALTH).answer().status == 200
        time.sleep(0.02)
    assert fresh.is_closed() and used.is_closed()
    assert not fresh.raw
    assert busy.send(HEALTH).answer().status == 200
    assert until(lambda: len(made.front.connections) == 1)


# ---- limits of size and time ------------------------------------------------------------------

def test_a_body_may_be_as_large_as_the_limit_and_no_larger(serving):
    most = 1000
    made = serving(served={"max_body": most})
    whole = ASKED + b" " * (most - len(ASKED))
    for data in (post(length(whole), whole), in_chunks(chunked(*whole.partition(b" ")))):
        assert said(made.client().send(data).answer())
    calls = len(made.up.requests)
    for data in (post(b"Content-Length: 1001\r\n", b""),
                 in_chunks(chunked(whole, end=b"1\r\n")), in_chunks(b"3E9\r\n"),
                 in_chunks(chunked(*[b"x"] * 1000, end=b"1\r\n"))):
        client = made.client().send(data)  # the byte that is too much never comes
        answer = client.answer()
        check_refusal(answer, (413,))
        assert "1000" in answer.json["error"]["message"]
        assert client.is_closed()
    assert len(made.up.requests) == calls


def test_a_body_that_is_too_large_is_logged_with_its_path_and_readable_for_its_page(serving):
    made = serving(served={"max_body": 100, "origins": ("https://app.example",)})
    client = made.client().send(post(length(b" " * 101) + b"Origin: https://app.example\r\n"))
    answer = client.answer()
    check_refusal(answer, (413,))
    assert answer.headers.get("access-control-allow-origin") == "https://app.example"
    line = made.logged()[0]
    assert (line["method"], line["path"], line["status"]) == ("POST", CHAT, 413)


REFUSED_EARLY = {
    "too large": (post(b"Content-Length: 20000000\r\nX-Api-Key: k\r\n", b""), 413),
    "no key": (post(b"Content-Length: 6000000\r\n", b""), 401),
    "no path": (post(b"Content-Length: 6000000\r\nX-Api-Key: k\r\n", b"")
                .replace(b"/chat", b"/chap"), 404),
    "no sense": (post(b"Content-Length: 6000000\r\nX\x00: k\r\n", b""), 400),
    "large chunk": (in_chunks(b"2000000\r\n", CHUNKED + b"X-Api-Key: k\r\n"), 413)}


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_an_early_refusal_can_be_read_by_who_sends_on(serving, name):
    """The body is still being sent when the answer comes; no reset may overtake it."""
    made = serving(served={"tokens": ("k",)})
    data, status = REFUSED_EARLY[name]
    client = made.client().send(data)
    for _ in range(60):
        client.send(b"x" * 100_000)
    check_refusal(client.answer(), (status,))
    assert client.is_closed()


@contextlib.contextmanager
def dripping(client, pause=0.02):
    """Send a byte again and again meanwhile, for as long as the server takes them."""
    over = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not over.wait(pause):
                client.sock.send(b"x")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_an_early_refusal_can_be_read_by_who_sends_slowly(quick, serving):
    quick(LINGER_S=0.3)
    made = serving(served={"max_body": 1000})
    client = made.client().send(post(b"Content-Length: 5000\r\n", b""))
    for _ in range(40):
        client.send(b"x")
        time.sleep(0.02)
    check_refusal(client.answer(), (413,))


def test_a_refused_connection_ends_although_the_client_keeps_it(quick, serving):
    quick(LINGER_S=0.2)
    made = serving()
    client = made.client().send(b"nonsense\r\n\r\n")
    assert until(lambda: made.lines)
    assert until(lambda: not made.front.connections, 3)
    check_refusal(client.answer(), (400,))


def test_a_refused_client_cannot_send_for_ever(quick, serving):
    quick(LINGER_S=0.2, BODY_S=0.4)
    made = serving(served={"max_body": 1000})
    client = made.client().send(post(b"Content-Length: 5000\r\n", b""))
    with dripping(client):
        check_refusal(client.answer(), (413,))
        assert until(lambda: not made.front.connections, 3)


ENDLESS = {
    "head": (b"GET /health HTTP/1.1\r\nX: ", "HEAD_S"),
    "first line": (b"GET /", "HEAD_S"),
    "body": (post(b"Content-Length: 1000\r\n", b""), "BODY_S"),
    "chunk": (in_chunks(b"100\r\n"), "BODY_S"),
    "size": (in_chunks(b"1;"), "BODY_S"),
    "trailer": (in_chunks(b"0\r\nX: "), "BODY_S")}


@pytest.mark.parametrize("drips", [True, False], ids=["drips", "is silent"])
@pytest.mark.parametrize("name", ENDLESS)
def test_who_never_comes_to_an_end_is_refused_with_408(quick, serving, name, drips):
    quick(HEAD_S=100, BODY_S=100)
    data, limit = ENDLESS[name]
    quick(**{limit: 0.2})
    made = serving()
    started = time.monotonic()
    client = made.client().send(data)
    with dripping(client) if drips else contextlib.nullcontext():
        check_refusal(client.answer(), (408,))
        assert 0.15 < time.monotonic() - started < 1.2
        assert client.is_closed()
    assert made.up.requests == []


def test_a_later_request_on_a_connection_has_its_own_time(quick, serving):
    quick(HEAD_S=0.25)
    made = serving()
    client = made.client()
    for _ in range(2):
        time.sleep(0.3)
        client.send(HEALTH[:20])
        time.sleep(0.1)
        assert client.send(HEALTH[20:]).answer().status == 200


def test_a_large_body_may_take_as_long_as_it_needs(quick, serving):
    """A second more for each BODY_RATE bytes that came."""
    quick(BODY_S=0.3, BODY_RATE=1000)
    made = serving()
    whole = ASKED + b" " * 1000
    client = made.client().send(post(length(whole), b""))
    for start in range(0, len(whole), 100):
        client.send(whole[start:start + 100])
        time.sleep(0.06)
    assert said(client.answer())


def test_unfinished_requests_share_a_bounded_memory(quick, serving):
    """Whoever holds most of it is refused; the others go on."""
    quick(BUFFER_BYTES=300_000)
    made = serving()
    small = made.client().send(post(length(), ASKED[:5]))
    large = made.client().send(post(b"Content-Length: 900000\r\n", b"x" * 400_000))
    check_refusal(large.answer(), (503,))
    assert said(small.send(ASKED[5:]).answer())
    check_alive(made)


def test_a_request_under_way_is_not_what_makes_room(quick, serving):
    quick(BUFFER_BYTES=300_000)
    gate = threading.Event()
    made = serving(lambda request: Reply("whole", delay=gate))
    client = made.client().send(encode_request(QUESTION_BODY))
    assert until(lambda: made.up.in_flight)
    client.send(post(b"Content-Length: 900000\r\n", b"x" * 400_000))
    has_come(made, client, 350_000)
    other = made.client().send(HEALTH)
    assert other.answer().status == 200
    assert not until(lambda: client.raw or len(made.lines) > 1, 0.2)
    gate.set()
    assert said(client.answer()) == "whole"
    check_alive(made)


# ---- bounded work -----------------------------------------------------------------------------

class Gated:
    """A script whose answers wait for `gate`; `order` has what was asked, as it came."""

    def __init__(self):
        self.gate = threading.Event()
        self.order = []

    def __call__(self, request):
        self.order.append(request.messages[-1]["content"])
        return Reply("re: " + self.order[-1], delay=self.gate)


@pytest.fixture
def gated():
    script = Gated()
    yield script
    script.gate.set()


def is_waiting(made, running, waiting=0):
    """Whether so many requests come to run, and so many to wait."""
    return until(lambda: (made.front.running, len(made.front.waiting)) == (running, waiting)
                 and made.up.in_flight == running)


def test_two_run_two_wait_and_more_are_refused(serving, gated):
    made = serving(gated, served={"max_requests": 2})
    clients = []
    for number in range(4):
        clients.append(made.client().send(encode_request(question("q%d" % number))))
        assert is_waiting(made, min(2, number + 1), max(0, number - 1))
    for path in (CHAT, ESTIMATE):
        late = made.client().send(encode_request(question("late"), path=path))
        answer = late.answer()
        check_refusal(answer, (503,))
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after"]) >= 2
    assert made.get("/health").json["waiting"] == 2  # it is not held up
    metrics = made.get("/metrics").body
    assert b"\nfusion_requests_running 2\n" in metrics
    assert b"\nfusion_requests_waiting 2\n" in metrics
    gated.gate.set()
    assert [said(client.answer()) for client in clients] == ["re: q%d" % n for n in range(4)]
    assert gated.order[:2] in (["q0", "q1"], ["q1", "q0"]) and len(gated.order) == 4
    assert made.up.peak_in_flight == 2
    assert said(late.send(encode_request(question("again"))).answer()) == "re: again"
    assert is_waiting(made, 0)


def test_those_who_wait_run_in_their_order(serving):
    gates = {"q%d" % number: threading.Event() for number in range(6)}
    order = []

    def script(request):
        order.append(request.messages[-1]["content"])
        return Reply("re: " + order[-1], delay=gates[order[-1]])

    made = serving(script, served={"max_requests": 3})
    clients = []
    for number, name in enumerate(gates):
        clients.append(made.client().send(encode_request(question(name)) + HEALTH))
        assert is_waiting(made, min(number + 1, 3), max(0, number - 2))
    for number, name in enumerate(gates):
        gates[name].set()
        assert said(clients[number].answer()) == "re: " + name
        assert clients[number].answer().status == 200
        assert until(lambda: len(order) == min(6, number + 4))
    assert order[3:] == ["q3", "q4", "q5"]


def test_who_waits_too_long_is_refused_and_can_come_again(quick, serving, gated):
    quick(QUEUE_S=0.3)
    made = serving(gated, served={"max_requests": 1})
    first = made.client().send(encode_request(question("first")))
    assert is_waiting(made, 1)
    started = time.monotonic()
    second = made.client().send(encode_request(question("second")) + HEALTH)
    check_refusal(second.answer(), (503,))
    assert 0.28 < time.monotonic() - started < 2
    assert second.answer().status == 200  # what stood behind it
    gated.gate.set()
    assert said(first.answer()) == "re: first"
    assert said(second.send(encode_request(question("third"))).answer()) == "re: third"
    assert gated.order == ["first", "third"]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_who_leaves_while_waiting_never_runs(quick, serving, gated, how):
    quick(TICK_S=0.02)
    made = serving(gated, served={"max_requests": 1})
    first = made.client().send(encode_request(question("first")))
    assert is_waiting(made, 1)
    second = made.client().send(encode_request(question("second")))
    assert is_waiting(made, 1, 1)
    if how == "reset":
        second.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    second.close()
    assert is_waiting(made, 1, 0)
    third = made.client().send(encode_request(question("third")))
    gated.gate.set()
    assert said(first.answer()) == "re: first" and said(third.answer()) == "re: third"
    assert gated.order == ["first", "third"]
    assert [line["status"] for line in made.logged(3)].count(499) == 1


def test_who_leaves_frees_the_place_for_the_next(serving, gated):
    made = serving(gated, served={"max_requests": 1})
    first = made.client().send(encode_request(question("first")))
    assert is_waiting(made, 1)
    second = made.client().send(encode_request(question("second")))
    assert until(lambda: made.front.waiting)
    first.close()
    assert until(lambda: gated.order == ["first", "second"], 2)
    assert made.up.posts()[0].wait_closed(2)
    gated.gate.set()
    assert said(second.answer()) == "re: second"


def test_a_server_that_stops_finishes_what_is_under_way_and_begins_nothing(quick, serving, gated):
    made = serving(gated, served={"max_requests": 2})
    whole = made.client().send(encode_request(question("whole")))
    stream = made.stream(question("stream"))
    assert is_waiting(made, 2)
    queued = made.client().send(encode_request(question("queued")))
    assert is_waiting(made, 2, 1)
    idle, used = made.client(), made.client()
    assert used.send(HEALTH).answer().status == 200
    early, early_get = made.client().send(HIDDEN[:20]), made.client().send(HEALTH[:20])
    has_come(made, early, 20)
    has_come(made, early_get, 20)
    made.front.drain()
    assert idle.is_closed() and used.is_closed() and not idle.raw
    with pytest.raises(ConnectionRefusedError):
        made.client()
    answer = early.send(HIDDEN[20:]).answer()
    check_refusal(answer, (503,))
    assert answer.headers["connection"] == "close" and early.is_closed()
    answer = early_get.send(HEALTH[20:]).answer()
    assert answer.json["status"] == "draining" and early_get.is_closed()
    assert made.thread.is_alive()
    gated.gate.set()
    for client, text in ((whole, "re: whole"), (queued, "re: queued")):
        answer = client.answer()
        assert said(answer) == text and answer.headers["connection"] == "close"
        assert client.is_closed()
    assert list(stream.frames())[-1] == b"data: [DONE]" and stream.is_closed()
    for client in (whole, queued, stream, early, early_get, idle, used):
        client.close()
    made.thread.join(5)
    assert not made.thread.is_alive() and not made.front.connections
    assert "hidden" not in gated.order


def test_a_request_behind_the_last_one_is_refused_when_the_server_stops(serving, gated):
    made = serving(gated)
    client = made.client().send(encode_request(question("last")))
    assert is_waiting(made, 1)
    client.send(HIDDEN)
    has_come(made, client, len(HIDDEN))
    made.front.drain()
    gated.gate.set()
    answer = client.answer()
    assert said(answer) == "re: last"
    if answer.headers.get("connection") != "close":
        check_refusal(client.answer(), (503,))
    assert client.is_closed()
    assert gated.order == ["last"]


# ---- what the system refuses ------------------------------------------------------------------

@pytest.fixture
def threadless(monkeypatch, fusion):
    """A list of how often the front's next attempts to start a thread fail; none waits for work."""
    monkeypatch.setattr(fusion, "CREW_S", 0.0)
    assert until(lambda: not fusion.spawn.__self__.idle)
    failures, start = [], threading.Thread.start

    def refusing(thread):
        if threading.current_thread().name == "front" and failures:
            if failures[0] <= 1:
                del failures[0]
            else:
                failures[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refusing)
    return failures


def test_without_threads_requests_are_refused_and_the_server_lives(serving, threadless):
    made = serving()
    threadless.append(3)
    client = made.client()
    for _ in range(3):
        answer = client.send(encode_request(question("a")) + HEALTH).answer()
        check_refusal(answer, (503,))
        assert client.answer().status == 200
    assert made.front.running == 0 and made.up.requests == []
    assert said(client.send(encode_request(question("a"))).answer()) == "re: a"


def test_what_stands_behind_a_request_without_a_thread_is_served(serving, gated, threadless):
    made = serving(gated, served={"max_requests": 1})
    first = made.client().send(encode_request(question("first")))
    assert is_waiting(made, 1)
    second = made.client().send(encode_request(question("second")) + HEALTH)
    assert is_waiting(made, 1, 1)
    has_come(made, second, len(HEALTH))
    threadless.append(1)
    gated.gate.set()
    assert said(first.answer()) == "re: first"
    check_refusal(second.answer(), (503,))
    second.sock.settimeout(2)
    assert second.answer().status == 200


def test_one_thread_that_fails_stops_nobody_else(serving, gated, threadless):
    made = serving(gated, served={"max_requests": 3})
    clients = [made.client().send(encode_request(question(str(n)))) for n in range(3)]
    assert is_waiting(made, 3)
    more = [made.client().send(encode_request(question(str(n)))) for n in range(3, 6)]
    assert is_waiting(made, 3, 3)
    threadless.append(1)
    gated.gate.set()
    assert all(said(client.answer()) for client in clients)
    assert sorted(client.answer().status for client in more) == [200, 200, 503]


@pytest.mark.parametrize("first", [True, False], ids=["at once", "later"])
def test_who_reads_slowly_does_not_end_a_server_without_threads(talkative, threadless, first):
    if first:
        threadless.append(1000)
    client = unread(talkative)
    assert is_quiet(talkative)
    if not first:
        threadless.append(1000)
    client.sock.settimeout(1)
    read_quietly(client, 200)
    other = talkative.client()
    other.sock.settimeout(2)
    assert other.send(HEALTH).answer().status == 200
    assert talkative.defects == []


def read_quietly(client, count):
    """Read so many answers, or as many as come."""
    with contextlib.suppress(OSError, EOFError):
        for _ in range(count):
            client.answer()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def no_descriptors():
    """No file or socket can be opened meanwhile."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            os.dup(0)
        assert error.value.errno == errno.EMFILE
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_descriptors_those_who_are_there_are_served_and_others_later(serving):
    made = serving()
    kept = made.client()
    assert kept.send(HEALTH).answer().status == 200
    sock = socket.socket()
    sock.settimeout(PATIENCE_S)
    with no_descriptors():
        sock.connect(("127.0.0.1", made.port))
        sock.sendall(HEALTH)
        for _ in range(20):
            assert kept.send(HEALTH).answer().status == 200
        assert len(made.front.connections) == 1
    assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    sock.close()


def test_without_descriptors_the_server_does_not_spin(serving):
    made = serving()
    kept = made.client()
    assert kept.send(HEALTH).answer().status == 200
    with socket.socket() as sock, no_descriptors():
        sock.connect(("127.0.0.1", made.port))
        assert kept.send(HEALTH).answer().status == 200
        started = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - started < 0.25


def test_at_the_limit_of_connections_the_idlest_makes_room(serving, gated):
    made = serving(gated)
    made.front.most = 8
    busy = [made.client().send(encode_request(question("q%d" % number))) for number in range(3)]
    assert is_waiting(made, 3)
    idle = []
    for _ in range(20):
        idle.append(made.client())
        assert idle[-1].send(HEALTH).answer().status == 200
        assert len(made.front.connections) <= 8
    assert all(client.is_closed() for client in idle[:-5])
    for client in idle[-4:]:  # the youngest are still there
        assert client.send(HEALTH).answer().status == 200
    gated.gate.set()
    assert [said(client.answer()) for client in busy] == ["re: q0", "re: q1", "re: q2"]


def test_nobody_makes_room_for_nobody(serving):
    made = serving()
    made.front.most = 4
    clients = [made.client() for _ in range(4)]
    assert [client.send(HEALTH).answer().status for client in clients] == [200] * 4


def test_at_the_limit_of_connections_nobody_at_work_makes_room(serving, gated):
    made = serving(gated)
    busy = [made.client().send(encode_request(question("q%d" % number))) for number in range(3)]
    assert is_waiting(made, 3)
    made.front.most = 3
    beyond = made.client().send(HEALTH)
    beyond.sock.settimeout(0.2)
    with pytest.raises(socket.timeout):  # all are at work, so it waits
        beyond.fill()
    beyond.sock.settimeout(PATIENCE_S)
    gated.gate.set()
    assert [said(client.answer()) for client in busy] == ["re: q0", "re: q1", "re: q2"]
    assert beyond.answer().status == 200


# ---- heartbeats keep out of the framing -------------------------------------------------------

def test_no_heartbeat_follows_the_end_of_a_stream(quick, serving):
    """A log that is slow for longer than BEAT_S, say, because a terminal is held."""
    quick(BEAT_S=0.1)
    made = serving()
    made.server.log = lambda fields: time.sleep(0.5)
    client = made.stream(question("a"))
    assert list(client.frames())[-1] == b"data: [DONE]"
    client.headers = None
    assert client.send(HEALTH).answer().status == 200
    assert not client.buffer


class Slow(tuple):
    """Allowed origins that a request's own thread takes a while to look through."""

    def __contains__(self, item):
        if threading.current_thread().name != "front":
            time.sleep(0.3)
        return super().__contains__(item)


def test_no_heartbeat_precedes_the_head_of_a_stream(quick, serving):
    """The connection was silent for longer than BEAT_S before the request."""
    quick(BEAT_S=0.1)
    made = serving(served={"origins": Slow(["https://app.example"])})
    client = made.client()
    time.sleep(0.2)
    client.request(dict(question("a"), stream=True), headers={"Origin": "https://app.example"})
    assert list(client.frames())[-1] == b"data: [DONE]"
    assert client.status == 200


# ---- slow clients -----------------------------------------------------------------------------

def slow_client(made, number):
    """A connection that drips a head or a body, sends half of one, or sits idle; what drips."""
    client = made.client()
    kind = number % 5
    if kind == 0:
        client.send(b"GET /health HTTP/1.1\r\nX: ")
    elif kind == 1:
        client.send(post(b"Content-Length: 9000000\r\n", b"{"))
    elif kind == 2:
        assert client.send(HEALTH).answer().status == 200
    elif kind == 3:
        client.send(in_chunks(b"5\r\nab"))
    return client if kind < 2 else None


def timed(work):
    started = time.monotonic()
    work()
    return time.monotonic() - started


def back_to(count, numbers):
    """Whether the numbers come back to where they were; a moment is allowed."""
    def there():
        gc.collect()
        return all(now <= before for now, before in zip(numbers(), count))
    return until(there), (count, numbers())


@pytest.mark.parametrize("count, seconds", [
    (100, 1.0), pytest.param(300, 25.0, marks=pytest.mark.slow)])
def test_slow_clients_cost_nobody_anything(serving, count, seconds):
    made = serving()
    chat = made.client()

    def ask():
        assert said(chat.send(encode_request(question("a"))).answer()) == "re: a"

    def numbers():
        return threading.active_count(), descriptors(), len(made.front.connections)

    alone = max(timed(ask) for _ in range(3))
    before = numbers()
    assert before[2] == 1
    slow = [slow_client(made, number) for number in range(count)]
    crowd = made.clients[1:]
    assert until(lambda: len(made.front.connections) == count + 1)
    assert threading.active_count() <= before[0]
    end, healths, chats = time.monotonic() + seconds, [], []
    while time.monotonic() < end:
        for client in filter(None, slow):
            with contextlib.suppress(OSError):
                client.sock.send(b"x")
        healths.append(timed(lambda: check_alive(made)))
        chats.append(timed(ask))
        time.sleep(0.02)
    assert max(healths) < 1 and max(chats) < alone + 1
    assert len(healths) > 5
    if seconds > 23:  # all but those who sit idle had their time
        assert until(lambda: len(made.front.connections) == 2 * count // 5 + 1)
    for client in crowd:
        client.close()
    good, seen = back_to(before, numbers)
    assert good, seen


def test_a_byte_of_a_head_costs_the_same_wherever_it_stands(shared, fusion):
    def costs(fill):
        connection = fusion.Connection(None, "127.0.0.1")
        connection.buffer += b"GET /health HTTP/1.1\r\nX: " + b"a" * fill
        started = time.process_time()
        for _ in range(500):
            connection.buffer += b"a"
            assert connection.next_request(shared.server) is None
        return time.process_time() - started

    assert costs(24_000) < 5 * costs(0) + 0.03


# ---- a long time ------------------------------------------------------------------------------

def faulty(seed):
    """Answers, with a fault in three of ten."""
    lot = random.Random(seed)
    faults = [
        lambda: error_reply(500, "boom"), lambda: error_reply(429, "later"),
        lambda: error_reply(400, "no"), lambda: Reply(raw=b""), lambda: Reply(raw=b"", cut="rst"),
        lambda: Reply("cut " * 20, cut_after=3), lambda: Reply("cut " * 20, cut_after=2, cut="rst"),
        lambda: Reply(""), lambda: Reply(body=b"{nonsense"), lambda: Reply("slow", delay=0.05),
        lambda: Reply(raw=b"HTTP/1.1 nonsense\r\n\r\n")]

    def script(request):
        if lot.random() < 0.3:
            return lot.choice(faults)()
        return Reply("re: " + request.messages[-1]["content"][:100])

    return script


def ask_many(made, numbers, failures):
    """Ask one question after the other on kept connections, every third as a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
    for number in iter(lambda: next(numbers, None), None):
        stream = number % 3 == 0
        body = json.dumps(dict(question("question %d" % number), stream=stream))
        try:
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            if stream and answer.status == 200:
                assert text.endswith(b"data: [DONE]\n\n"), text[-300:]
                if b'data: {"error": ' in text:  # such a stream ends its connection
                    connection.close()
            else:
                assert json.loads(text)["choices" if answer.status == 200 else "error"]
            assert answer.status in (200, 400, 429, 502, 503), answer.status
        except Exception as error:
            failures.append((number, error))
            connection.close()
    connection.close()


def ask_in_parallel(made, count, width=32):
    """Ask so many questions; returns what went wrong."""
    pending, lock, failures = iter(range(count)), threading.Lock(), []

    class Shared:
        def __next__(self):
            with lock:
                return next(pending)

        def __iter__(self):
            return self

    threads = [threading.Thread(target=ask_many, args=(made, Shared(), failures), daemon=True)
               for _ in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
            with made.up.lock:  # what the test itself gathers is no leak
                del made.up.requests[:]
                del made.up.billed[:]
            del made.lines[:]
    return failures


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
def test_ten_thousand_requests_with_faults_leave_nothing_behind(tmp_path):
    """In a process of its own, since client and backend use memory too."""
    config = tmp_path / "setup.json"
    config.write_text(json.dumps({"panel": ["a", "b", "c"], "judge": "j", "synthesizer": "w",
                                  "max_retries": 1, "retry_backoff": 0}))
    with Upstream(faulty(5)) as up, Program(
            tmp_path / "home", "serve", "--quiet", "--port", "0", "--config", str(config),
            env={"FUSION_BASE_URL": up.url}) as program:
        program.wait_for("/v1", "out")
        made = Faced(int(re.search(r":(\d+)/v1", program.text("out")).group(1)), up, [])
        proc = "/proc/%d" % program.process.pid

        def numbers():
            with open(proc + "/statm") as file:
                pages = int(file.read().split()[1])
            return len(os.listdir(proc + "/task")), pages * os.sysconf("SC_PAGE_SIZE")

        threads = numbers()[0]
        assert ask_in_parallel(made, 1000) == []  # whatever is made once is there now
        start = numbers()[1]
        assert ask_in_parallel(made, 10_000) == []
        assert until(lambda: numbers()[0] <= threads + 1)
        assert len(os.listdir(proc + "/fd")) < 100  # idle connections to the backend among them
        assert numbers()[1] - start < 30_000_000


class Faced(NamedTuple):
    """What asking in parallel needs to know of a server."""

    port: int
    up: Upstream
    lines: list
