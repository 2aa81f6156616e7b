"""The exact numbers of speed: connections, TLS contexts, imports, threads, descriptors.

Times are measured by bench.py, which is a program and no test: on a shared machine they are noise.
"""

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import threading

import bench
import pytest
from conftest import FUSION_PY
from serving import QUESTION, Serving, until
from upstream import Reply

ASK = {"messages": QUESTION}
BURST = 50


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def contexts(monkeypatch):
    """A list that grows by one with each TLS context that is made."""
    made, real = [], ssl.SSLContext.__new__

    def counted(kind, *args, **kwargs):
        made.append(kind)
        return real(kind, *args, **kwargs)

    monkeypatch.setattr(ssl.SSLContext, "__new__", counted)
    return made


@contextlib.contextmanager
def no_tls_here():
    """The port of a listener that closes each connection, having read what came first."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        def work():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.recv(1 << 16)
                    sock.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_warm_requests_open_no_upstream_connections(fusion, tmp_path, stream):
    with Serving(fusion, tmp_path) as made:
        client = made.client()
        assert client.request(ASK).answer().status == 200
        before = made.up.connections
        for _ in range(40):
            assert client.request(dict(ASK, stream=stream)).answer().status == 200
        assert (made.up.connections - before) / 40 <= 0.05
        assert len(made.up.posts()) >= 41 * 5


def test_a_first_request_opens_a_connection_for_each_parallel_call(fusion, tmp_path):
    everyone = threading.Barrier(3)

    def script(request):
        if request.model.startswith("m"):
            everyone.wait(10)
        return "hello from " + request.model

    with Serving(fusion, tmp_path, script) as made:
        assert made.post(ASK).status == 200
        assert made.up.connections == 3


def test_http_makes_no_tls_context(fusion, tmp_path, contexts):
    with Serving(fusion, tmp_path) as made:
        assert made.post(ASK).status == 200
    assert contexts == []


def test_https_makes_one_tls_context(fusion, tmp_path, contexts):
    with no_tls_here() as port:
        panel = [{"model": name, "base_url": "https://127.0.0.1:%d" % port}
                 for name in ("m1", "m2", "m3")]
        with Serving(fusion, tmp_path, panel=panel) as made:
            clients = [made.stream(ASK) for _ in range(4)]
            for client in clients:
                assert b"error" in client.answer().body
    assert len(contexts) == 1


def test_http_alone_never_imports_ssl(tmp_path):
    """In a process of its own, since other tests import it."""
    code = """if 1:
        import pathlib, sys
        sys.path.insert(0, sys.argv[1])
        import conftest, serving
        fusion = conftest.load()
        with serving.Serving(fusion, pathlib.Path(sys.argv[2])) as made:
            sys.modules["ssl"] = None  # an import of it would fail
            assert made.post({"messages": serving.QUESTION}).status == 200
        """
    subprocess.run([sys.executable, "-B", "-c", code, os.path.dirname(__file__), str(tmp_path)],
                   check=True, timeout=30)


@pytest.mark.parametrize("words", [("--help",), ("serve", "--help"), ("--version",)], ids=" ".join)
def test_help_imports_nothing_heavy(words):
    assert bench.imported(FUSION_PY, words) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts in /proc")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_burst_leaves_no_thread_and_no_descriptor(fusion, tmp_path, stream):
    together, freed = threading.Semaphore(0), threading.Event()

    def script(request):
        if request.model == "m1" and stuck:
            together.release()
            return Reply("hello", delay=freed)
        return "hello from " + request.model

    stuck = False
    with Serving(fusion, tmp_path, script) as made:
        made.post(ASK)
        made.network.close()
        assert until(lambda: not made.front.connections)
        assert until(lambda: not made.up.live)
        before, threads = descriptors(), threading.active_count()
        stuck = True
        clients = [made.client().request(dict(ASK, stream=stream)) for _ in range(BURST)]
        for _ in range(BURST):
            assert together.acquire(timeout=10)
        assert made.front.running == BURST
        freed.set()
        assert all(client.answer().status == 200 for client in clients)
        for client in clients:
            client.close()
        made.network.close()
        assert until(lambda: threading.active_count() <= threads), threading.enumerate()
        assert until(lambda: descriptors() <= before), (descriptors(), before)
        assert not made.front.connections and not made.front.running


def test_threads_in_flight_are_bounded(fusion, tmp_path):
    """At most one for each member and one for the request."""
    inside, freed = threading.Semaphore(0), threading.Event()

    def script(request):
        if request.model.startswith("m"):
            inside.release()
            return Reply("hello from " + request.model, delay=freed)
        return "hello"

    with Serving(fusion, tmp_path, script) as made:
        before = threading.active_count()
        clients = [made.client().request(ASK) for _ in range(10)]
        for _ in range(30):
            assert inside.acquire(timeout=10)
        upstream = sum(thread.name == "upstream" for thread in threading.enumerate()) - 1
        assert threading.active_count() - before - upstream <= 10 * (3 + 1) + 8
        freed.set()
        assert all(client.answer().status == 200 for client in clients)
