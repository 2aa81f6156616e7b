"""Proxies of the environment: http and CONNECT, who gets which secret, and how they fail."""
import base64
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from conftest import FUSION_PY, run_in
from test_talk import command, lines_with
from test_transport import Caller
from upstream import Reply, Upstream

KEY = "sk-or-v1-0123456789abcdefghij"
NAME = "backend.test"       # a name that only the proxy can resolve
ANSWER = "It came a long way."
ABSOLUTE = re.compile(rb"\A(GET|POST) http://[^/ ]+")


class Forwarder:
    """A server whose every connection is led on to a port of this machine; no thread outlives it.

    `lead` sees the client's socket first, and returns the socket to read from, or None to close.
    """

    def __init__(self, target):
        self.target, self.connections, self.sockets = target, 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *exception):
        for sock in [self.listener] + self.sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            self.sockets.append(sock)
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        try:
            near = self.lead(sock)
            if near is None:
                return
            far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            far.settimeout(None)
            self.sockets += [near, far]
            threading.Thread(target=self.pump, args=(far, near, bytes), daemon=True).start()
            self.pump(near, far, self.request)
        except OSError:
            pass
        finally:
            sock.close()

    def lead(self, sock):
        return sock

    def request(self, data):
        return data

    def pump(self, source, sink, change):
        """Copy from one socket to the other until one of them ends."""
        try:
            for data in iter(lambda: source.recv(65536), b""):
                sink.sendall(change(data))
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Proxy(Forwarder):
    """An HTTP proxy that leads every name to one port. `heads` are the requests that it saw.

    `answer` (bytes) is sent in place of whatever was asked for; b"" is silence.
    """

    def __init__(self, target, answer=None):
        super().__init__(target)
        self.heads, self.answer, self.seen = [], answer, threading.Event()
        self.url = "http://127.0.0.1:%d" % self.port

    def lead(self, sock):
        first = sock.recv(65536, socket.MSG_PEEK)
        if self.answer is not None:
            self.heads.append(sock.recv(65536).partition(b"\r\n\r\n")[0].decode())
            self.seen.set()
            sock.sendall(self.answer)
            if not self.answer:
                while sock.recv(65536):
                    pass  # until the client leaves, or the proxy ends
            return None
        if first.startswith(b"CONNECT "):
            self.heads.append(sock.recv(65536).partition(b"\r\n\r\n")[0].decode())
            sock.sendall(b"HTTP/1.1 200 Connection established\r\nVia: a test\r\n\r\n")
        return sock

    def request(self, data):
        """Note the request of a client, and give it the form that a backend wants."""
        if ABSOLUTE.match(data):
            self.heads.append(data.partition(b"\r\n\r\n")[0].decode())
            return ABSOLUTE.sub(rb"\1 ", data)
        return data

    def header(self, name, index=0):
        """The values of a header of the request with this number."""
        lines = [line.partition(":") for line in self.heads[index].split("\r\n")[1:]]
        return [value.strip() for key, _, value in lines if key.lower() == name]

    def line(self, index=0):
        return self.heads[index].split("\r\n")[0]


class Tls(Forwarder):
    """An https server in front of a plain one."""

    def __init__(self, target, certificate):
        super().__init__(target)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(str(certificate))

    def lead(self, sock):
        near = self.context.wrap_socket(sock, server_side=True)
        self.sockets.append(near)
        return near


@pytest.fixture
def up():
    with Upstream({"*": ANSWER}, models=["m"]) as server:
        yield server


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A file with a self-signed certificate and its key."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:%s,DNS:localhost,IP:127.0.0.1" % NAME
    done = subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", "key",
         "-out", "crt", "-subj", "/CN=" + NAME, "-addext", names],
        cwd=str(folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    if done.returncode != 0:
        pytest.skip("openssl makes no certificate: %r" % done.stdout[-200:])
    whole = folder / "both.pem"
    whole.write_text((folder / "key").read_text() + (folder / "crt").read_text())
    return whole


@pytest.fixture
def caller(fusion, tmp_path):
    """Makes callers of a backend by its URL; their connections are closed at the end."""
    made = []

    def make(url, **settings):
        settings.setdefault("max_retries", 0)
        settings.setdefault("member_timeout_s", 5)
        made.append(Caller(fusion, tmp_path, url, KEY, **settings))
        return made[-1]

    yield make
    for one in made:
        one.network.close()


def basic(pair):
    return ["Basic " + base64.b64encode(pair.encode()).decode()]


def words_of(error):
    return "%s %s" % (error.message, error.hint)


def refusal(status, reason):
    body = b"<html>no</html>"
    head = "HTTP/1.1 %d %s\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"
    return (head % (status, reason, len(body))).encode() + body


def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# ---- http -----------------------------------------------------------------------------------

@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("port", ["", ":8123"])
def test_an_http_backend_is_asked_by_its_whole_address(caller, up, monkeypatch, variable, port):
    with Proxy(up.port) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        reply = caller("http://%s%s/v1" % (NAME, port)).ask()
    assert reply.text == ANSWER and len(proxy.heads) == 1
    method, url, version = proxy.line().split()
    assert (method, version) == ("POST", "HTTP/1.1")
    assert url.replace(":80/", "/") == "http://%s%s/v1/chat/completions" % (NAME, port)
    assert proxy.header("host")[0] in (NAME + (port or ":80"), NAME + port)
    assert proxy.header("proxy-authorization") == []
    assert up.posts()[0].headers["authorization"] == "Bearer " + KEY


def test_a_proxy_may_be_named_without_its_scheme(caller, up, monkeypatch):
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", "127.0.0.1:%d" % proxy.port)
        assert caller("http://%s/v1" % NAME).ask().text == ANSWER
    assert len(proxy.heads) == 1


@pytest.mark.parametrize("userinfo, pair", [("user:pass", "user:pass"), ("user", "user:"),
                                            ("us%40er:p%3Aa%2Fss%20", "us@er:p:a/ss ")])
def test_user_and_password_of_the_url_go_to_the_proxy(caller, up, monkeypatch, userinfo, pair):
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//%s@" % userinfo))
        caller("http://%s/v1" % NAME).ask()
    assert proxy.header("proxy-authorization") == basic(pair)


def test_a_kept_connection_is_used_again_with_the_same_headers(caller, up, monkeypatch):
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//user:pass@"))
        one = caller("http://%s/v1" % NAME)
        assert [one.ask().text for _ in range(3)] == [ANSWER] * 3
    assert proxy.connections == 1 and len(proxy.heads) == 3
    for index in range(3):
        assert proxy.line(index).startswith("POST http://")
        assert proxy.header("proxy-authorization", index) == basic("user:pass")


def test_a_connection_that_went_stale_is_opened_again_by_the_proxy(caller, up, monkeypatch):
    up.script = {"*": Reply(ANSWER, early_close=True)}
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        one = caller("http://%s/v1" % NAME)
        assert [one.ask().text for _ in range(3)] == [ANSWER] * 3
    assert all(head.startswith("POST http://") for head in proxy.heads) and proxy.connections > 1


def test_an_address_of_ip_6_stands_in_brackets(caller, up, monkeypatch):
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        caller("http://[2001:db8::7]:8123/v1").ask()
    assert proxy.line().split()[1] == "http://[2001:db8::7]:8123/v1/chat/completions"
    assert proxy.header("host") == ["[2001:db8::7]:8123"]


def test_the_doctor_looks_through_the_proxy(command, up):
    with Proxy(up.port) as proxy:
        found = command("doctor", "--panel", "m", "--judge", "m", "--synthesizer", "m",
                        FUSION_BASE_URL="http://%s/v1" % NAME, http_proxy=proxy.url)
    assert found.code == 0, found.out
    assert proxy.line().startswith("GET http://") and lines_with("1 model", found.out)


# ---- https ----------------------------------------------------------------------------------

@pytest.fixture
def tls(up, certificate):
    with Tls(up.port, certificate) as server:
        yield server


def test_an_https_backend_is_reached_by_connect_and_the_key_stays_inside(
        caller, up, tls, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Proxy(tls.port) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//user:p%40ss@"))
        one = caller("https://%s/v1" % NAME)
        assert [one.ask().text for _ in range(2)] == [ANSWER] * 2
    assert proxy.line() == "CONNECT %s:443 HTTP/1.1" % NAME and proxy.connections == 1
    assert proxy.header("host") == [NAME + ":443"]
    assert proxy.header("proxy-authorization") == basic("user:p@ss")
    assert KEY not in "".join(proxy.heads) and proxy.header("authorization") == []
    assert [request.headers["authorization"] for request in up.posts()] == ["Bearer " + KEY] * 2
    assert all("proxy-authorization" not in request.headers for request in up.posts())
    assert up.posts()[0].path == "/v1/chat/completions"


def test_a_certificate_that_nobody_vouches_for_is_refused_with_what_helps(
        caller, up, tls, monkeypatch):
    with Proxy(tls.port) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        error = caller("https://%s:8443/v1" % NAME).fail()
    assert "certificate" in error.message and NAME in error.message
    assert "SSL_CERT_FILE" in error.hint and not error.retryable
    assert proxy.line() == "CONNECT %s:8443 HTTP/1.1" % NAME and up.posts() == []


def test_a_certificate_of_another_name_is_refused(caller, up, tls, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Proxy(tls.port) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        error = caller("https://other.test/v1").fail()
    assert "certificate" in error.message and up.posts() == []


def test_https_on_this_machine_needs_no_proxy(caller, up, tls, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Proxy(tls.port) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        assert caller("https://localhost:%d/v1" % tls.port).ask().text == ANSWER
    assert proxy.connections == 0


def test_a_connect_to_an_address_of_ip_6_stands_in_brackets(caller, up, monkeypatch):
    with Proxy(up.port, refusal(403, "Forbidden")) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        caller("https://[2001:db8::7]:8443/v1").fail()
    assert proxy.line() == "CONNECT [2001:db8::7]:8443 HTTP/1.1"


# ---- proxies that refuse --------------------------------------------------------------------

@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status, reason", [(407, "Proxy Authentication Required"),
                                            (502, "Bad Gateway"), (403, "Forbidden")])
def test_a_refusal_of_the_proxy_is_told_with_its_status(caller, up, monkeypatch, scheme, status,
                                                        reason):
    with Proxy(up.port, refusal(status, reason)) as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        error = caller("%s://%s/v1" % (scheme, NAME)).fail()
    assert str(status) in error.message and KEY not in words_of(error)
    if scheme == "https" or status == 407:
        assert "proxy" in words_of(error).lower()
    assert up.posts() == []


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_password_is_told_with_where_it_belongs(caller, up, monkeypatch,
                                                                     scheme):
    with Proxy(up.port, refusal(407, "Proxy Authentication Required")) as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url.replace("//", "//user:geheim@"))
        error = caller("%s://%s/v1" % (scheme, NAME)).fail()
    assert scheme + "_proxy" in error.hint.lower() and "geheim" not in words_of(error)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200", b"\0\1\2\r\n\r\n"],
                         ids=["ssh", "cut", "binary"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_is_no_proxy_is_an_error_and_no_defect(caller, up, monkeypatch, scheme, answer):
    with Proxy(up.port, answer) as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        error = caller("%s://%s/v1" % (scheme, NAME)).fail()
    assert error.message and len(proxy.heads) == 1 and KEY not in words_of(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_does_not_listen_is_named_and_not_the_backend_blamed(caller, monkeypatch,
                                                                          scheme):
    place = "127.0.0.1:%d" % closed_port()
    monkeypatch.setenv(scheme + "_proxy", "http://user:geheim@" + place)
    error = caller("%s://%s/v1" % (scheme, NAME)).fail()
    assert place in words_of(error) and "proxy" in words_of(error).lower()
    assert "geheim" not in words_of(error)


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["socks5", "socks5h", "socks4", "https"])
def test_other_kinds_of_proxies_are_refused_in_words(caller, monkeypatch, scheme, kind):
    monkeypatch.setenv(scheme + "_proxy", "%s://user:geheim@127.0.0.1:%d" % (kind, closed_port()))
    error = caller("%s://%s/v1" % (scheme, NAME)).fail()
    assert kind + "://" in error.message and "http://" in error.message
    assert "NO_PROXY" in error.hint or "_proxy" in error.hint
    assert "geheim" not in words_of(error) and not error.retryable


@pytest.mark.parametrize("value", ["http://", "http://127.0.0.1:99999", "http://[::1", "://"])
def test_a_proxy_setting_that_makes_no_sense_is_an_error_and_no_defect(caller, monkeypatch, value):
    monkeypatch.setenv("http_proxy", value)
    error = caller("http://%s/v1" % NAME).fail()
    assert "proxy" in words_of(error).lower()


# ---- who needs no proxy ---------------------------------------------------------------------

@pytest.mark.parametrize("value", [NAME, "." + "test", "x.y, " + NAME, "*", NAME + ":8123"])
@pytest.mark.parametrize("variable", ["no_proxy", "NO_PROXY"])
def test_no_proxy_is_honoured(caller, up, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        error = caller("http://%s:8123/v1" % NAME, member_timeout_s=1).fail()
        assert proxy.connections == 0
    assert error.kind in ("connection", "timeout")  # nobody knows that name


@pytest.mark.parametrize("value", ["other.test", "backend", "ackend.test", NAME + ":9"])
def test_no_proxy_is_not_stretched_to_other_names(caller, up, monkeypatch, value):
    monkeypatch.setenv("no_proxy", value)
    with Proxy(up.port) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert caller("http://%s:8123/v1" % NAME).ask().text == ANSWER
    assert proxy.connections == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_this_machine_is_never_asked_by_the_proxy(caller, up, monkeypatch, host):
    with Proxy(up.port) as proxy:
        for variable in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        assert caller("http://%s:%d/v1" % (host, up.port)).ask().text == ANSWER
    assert proxy.connections == 0


@pytest.mark.parametrize("kind", ["http", "socks5"])
def test_the_fake_backend_works_whatever_proxy_is_set(command, kind):
    with Proxy(closed_port()) as proxy:
        url = "%s://127.0.0.1:%d" % (kind, proxy.port)
        found = command("ask", "--fake", "hello there", http_proxy=url, https_proxy=url,
                        all_proxy=url)
    assert found.code == 0 and "fake" in found.out and proxy.connections == 0


# ---- time -----------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_hangs_ends_at_the_deadline(caller, up, monkeypatch, scheme):
    with Proxy(up.port, b"") as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        one = caller("%s://%s/v1" % (scheme, NAME), member_timeout_s=0.8)
        started = time.monotonic()
        error = one.fail()
        spent = time.monotonic() - started
        assert proxy.seen.wait(5)
    assert 0.7 < spent < 3
    assert error.kind == "timeout" and len(proxy.heads) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_cancel_ends_the_wait_for_a_proxy(fusion, caller, up, monkeypatch, scheme):
    with Proxy(up.port, b"") as proxy:
        monkeypatch.setenv(scheme + "_proxy", proxy.url)
        one = caller("%s://%s/v1" % (scheme, NAME), member_timeout_s=30)
        stop = threading.Thread(target=lambda: proxy.seen.wait(5) and one.run.cancel.set("enough"))
        stop.start()
        started = time.monotonic()
        with pytest.raises(fusion.Cancelled):
            one.ask()
        stop.join()
    assert time.monotonic() - started < 2


# ---- a Python without ssl -------------------------------------------------------------------

WITHOUT_SSL = """
import runpy, sys
sys.modules["ssl"] = sys.modules["_ssl"] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_ssl(home, *argv, **env):
    return run_in(home, [sys.executable, "-c", WITHOUT_SSL, FUSION_PY, *argv], env=env)


@pytest.mark.parametrize("proxied", [False, True], ids=["direct", "proxied"])
def test_a_python_without_ssl_works_with_http(up, tmp_path, proxied):
    argv = ("ask", "--panel", "m", "--judge", "m", "--synthesizer", "m", "hello there")
    with Proxy(up.port) as proxy:
        env = {"FUSION_BASE_URL": up.url}
        if proxied:
            env = {"FUSION_BASE_URL": "http://%s/v1" % NAME, "http_proxy": proxy.url}
        found = without_ssl(tmp_path, *argv, **env)
    assert (found.code, found.out) == (0, ANSWER + "\n"), found.err
    assert bool(proxy.connections) == proxied


def test_a_python_without_ssl_says_so_in_one_line_for_https(up, tmp_path):
    with Forwarder(up.port) as far:
        found = without_ssl(tmp_path, "ask", "--mode", "solo", "hello there",
                            FUSION_BASE_URL="https://127.0.0.1:%d/v1" % far.port)
    assert found.code in (2, 3) and found.out == "" and "Traceback" not in found.err
    errors = lines_with("error: ", found.err)
    assert len(errors) == 1 and "ssl" in errors[0] and lines_with("hint: ", found.err)
    assert up.requests == []
