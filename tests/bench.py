"""How fast `fusion.py serve` is, next to the least that the same pipeline can cost.

    python3 tests/bench.py              about three minutes; prints a table
    python3 tests/bench.py --quick      about half a minute
    python3 tests/bench.py --only relay,help
    python3 tests/bench.py --against other/fusion.py      two versions of the program

The floor is a bare asyncio server of the same pipeline: three members in parallel, a judge, a
synthesizer, kept connections, and none of the checks, deadlines, receipts and prices. Both talk to
the same scripted upstream and take turns, round by round, in one run, so that what else the machine
does hits both. Times of a shared machine are noise, their ratios are not: the column `ratio` is the
median over the rounds of program / floor. FUSION_PY names another file to measure.

The load is made in this process; upstream, floor and program are processes of their own. What the
upstream does stands in the user's message: `<<member=80 judge=60 writer=60 tokens=8 rate=50>>` are
milliseconds before each answer, the tokens of the writer, and how many of them come in a second;
`hold=writer` keeps answers back until GET /release. Each token holds the moment at which it was
sent, on the clock that all processes share.

Exit code: 0; 1 when a row says MISS.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
FUSION_PY = Path(os.environ.get("FUSION_PY") or HERE.parent.parent / "fusion.py").resolve()
MEMBERS = ("member-1", "member-2", "member-3")
HEAVY = ("ssl", "urllib.request", "http.server", "asyncio", "concurrent.futures")
TICKS = os.sysconf("SC_CLK_TCK")
HEAD_END = b"\r\n\r\n"
STREAM_HEAD = (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
               b"transfer-encoding: chunked\r\n\r\n")
SCRIPT = re.compile(rb"<<([^>]*)>>")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
SENT_AT = re.compile(rb"@(\d+\.\d+)@")
DRAFT = "The sky is blue since air scatters short waves more. "
ANALYSIS = json.dumps({
    "consensus": ["air scatters short waves more"], "contradictions": [],
    "partial_coverage": [{"letters": ["A", "B"], "point": "the angle of the sun"}],
    "unique_insights": [{"letter": "A", "point": "short waves", "quote": "air scatters short waves",
                         "keep": True}],
    "errors": [], "blind_spots": ["violet"], "must_include": ["scattering"], "best_draft": "A"})


def port_of(url):
    return int(url.rsplit(":", 1)[1].split("/")[0])


def chunked(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(delta, finish=None, **more):
    """Return one event of a Chat Completions stream."""
    return b"data: %s\n\n" % json.dumps(dict({
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}, **more)).encode()


# ---- the upstream ---------------------------------------------------------------------------

FINISH = chunked(event({}, "stop")) + chunked(event({}, usage={
    "prompt_tokens": 100, "completion_tokens": 20})) + chunked(b"data: [DONE]\n\n") + chunked(b"")


def token():
    return chunked(event({"content": "@%.6f@ " % time.monotonic()}))


def told(text):
    """Return the whole stream of a member or the judge: a text in eight pieces."""
    size = -(-len(text) // 8)
    pieces = [text[at:at + size] for at in range(0, len(text), size)]
    return b"".join(chunked(event({"content": piece})) for piece in pieces) + FINISH


class Upstream(asyncio.Protocol):
    """One connection to the scripted backend."""

    connections = 0
    held = []
    texts = dict({name: told(DRAFT * 4 + name) for name in MEMBERS}, judge=told(ANALYSIS))

    def connection_made(self, transport):
        Upstream.connections += 1
        self.transport, self.buffer = transport, b""

    def data_received(self, data):
        self.buffer += data
        end = self.buffer.find(HEAD_END)
        length = LENGTH.search(self.buffer, 0, end + 2) if end >= 0 else None
        if end >= 0 and len(self.buffer) >= end + 4 + int(length.group(1) if length else 0):
            request, self.buffer = self.buffer, b""  # nobody here sends ahead
            self.answer(request)

    def answer(self, request):
        if request.startswith(b"POST"):
            name = re.search(rb'"model": ?"([a-z0-9-]+)"', request).group(1).decode()
            words = SCRIPT.search(request).group(1).decode().split()
            self.chat(name.partition("-")[0], name, dict(word.split("=") for word in words))
        elif b"/release" in request.split(b"\r\n")[0]:
            held, Upstream.held = Upstream.held, []
            for index, begin in enumerate(held):  # not all at the same moment
                asyncio.get_running_loop().call_later(0.02 * index / len(held), begin)
            self.json({})
        else:
            self.json({"connections": Upstream.connections, "held": len(Upstream.held),
                       "data": [{"id": name, "owned_by": "vllm"} for name in
                                MEMBERS + ("judge", "writer")]})

    def json(self, value):
        data = json.dumps(value).encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))

    def chat(self, role, name, script):
        def begin():
            if role == "writer" and "rate" in script:
                self.tokens(int(script["tokens"]), float(script["rate"]))
            else:
                told = self.texts.get(name) or token() * int(script.get("tokens", 8)) + FINISH
                self.transport.write(STREAM_HEAD + told)

        delay = float(script.get(role, 0))
        if script.get("hold") == role:
            Upstream.held.append(begin)
        elif delay:
            asyncio.get_running_loop().call_later(delay / 1000, begin)
        else:
            begin()

    def tokens(self, count, rate):
        loop = asyncio.get_running_loop()
        started = loop.time()

        def step(number):
            self.transport.write(token() if number < count else FINISH)
            if number < count and not self.transport.is_closing():
                loop.call_at(started + (number + 1) / rate, step, number + 1)

        self.transport.write(STREAM_HEAD)
        step(0)


# ---- the floor ------------------------------------------------------------------------------


class Floor:
    """The same pipeline in as little as asyncio streams take."""

    def __init__(self, port):
        self.port = port
        self.idle = []

    async def texts(self, model, messages, **params):
        """Yield the pieces of a model's answer."""
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(
            "127.0.0.1", self.port, limit=1 << 20)
        body = json.dumps(dict(params, model=model, messages=messages, stream=True,
                               stream_options={"include_usage": True})).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: floor\r\ncontent-type: "
                     b"application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await reader.readuntil(HEAD_END)
        while True:
            size = int(await reader.readline(), 16)
            data = (await reader.readexactly(size + 2))[:-2]
            if not size:
                break
            for line in data.splitlines():
                if line.startswith(b"data: {"):
                    text = json.loads(line[6:])["choices"][0]["delta"].get("content")
                    if text:
                        yield text
        self.idle.append((reader, writer))

    async def ask(self, model, messages, **params):
        return "".join([piece async for piece in self.texts(model, messages, **params)])

    async def connected(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(HEAD_END)
                body = await reader.readexactly(int(LENGTH.search(head).group(1)))
                await self.chat(json.loads(body), writer)
        writer.close()

    async def chat(self, request, writer):
        messages, stream = request["messages"], request.get("stream")
        if stream:
            writer.write(STREAM_HEAD + chunked(event({"role": "assistant", "content": ""})))
        drafts = await asyncio.gather(*[
            self.ask(name, messages, temperature=0.7, max_tokens=4096) for name in MEMBERS])
        shown = "\n\n".join("<draft>\n%s\n</draft>" % draft for draft in drafts)
        prompt = {"role": "user", "content": "Compare these drafts, as JSON.\n" + shown}
        analysis = json.loads(await self.ask("judge", messages + [prompt], max_tokens=4096))
        prompt = {"role": "user", "content": "Write one answer.\n%s\n%s" % (
            json.dumps(analysis), shown)}
        answer = self.texts("writer", messages + [prompt], max_tokens=4096)
        if stream:
            async for piece in answer:
                writer.write(chunked(event({"content": piece})))
                await writer.drain()
            writer.write(chunked(event({}, "stop")) + chunked(b"data: [DONE]\n\n") + chunked(b""))
            return
        text = "".join([piece async for piece in answer])
        data = json.dumps({"id": "chatcmpl-1", "object": "chat.completion", "choices": [{
            "index": 0, "message": {"role": "assistant", "content": text},
            "finish_reason": "stop"}]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                     b"content-length: %d\r\n\r\n%s" % (len(data), data))


async def serve(role, upstream):
    """Be one of the two servers, from the line that says where, until killed."""
    make = asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=4096) \
        if role == "upstream" else asyncio.start_server(
            Floor(port_of(upstream)).connected, "127.0.0.1", 0, limit=1 << 20, backlog=4096)
    async with await make as server:
        port = server.sockets[0].getsockname()[1]
        print(json.dumps({"url": "http://127.0.0.1:%d/v1" % port}), flush=True)
        await server.serve_forever()


# ---- processes ------------------------------------------------------------------------------


class Process:
    """A server that has said where it listens; what /proc knows of it."""

    def __init__(self, command, env, folder, name, stack):
        self.errors = open(os.path.join(folder, name + ".err"), "w+")
        self.popen = subprocess.Popen([sys.executable] + command, env=env, stderr=self.errors,
                                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        stack.callback(self.stop)
        line = self.popen.stdout.readline()
        if not line:
            self.errors.seek(0)
            sys.exit("%s does not start: %s" % (name, self.errors.read()))
        self.url = json.loads(line)["url"]
        self.port = port_of(self.url)

    def cpu(self):
        """Return user and system seconds of all its threads so far."""
        stat = Path("/proc/%d/stat" % self.popen.pid).read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / TICKS

    def status(self, field):
        """Return a number of /proc/PID/status: kilobytes for VmRSS, a count for Threads."""
        text = Path("/proc/%d/status" % self.popen.pid).read_text()
        return int(re.search(r"(?m)^%s:\s+(\d+)" % field, text).group(1))

    def stop(self):
        self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()
        self.errors.close()


def start_program(path, upstream, folder, name, stack):
    """Start `fusion.py serve` on a panel of the scripted models, logging as it does by default."""
    config = os.path.join(folder, name + ".json")
    Path(config).write_text(json.dumps({"panel": MEMBERS, "judge": "judge",
                                        "synthesizer": "writer"}))
    env = {"PATH": os.environ["PATH"], "HOME": folder, "FUSION_BASE_URL": upstream.url}
    return Process([str(path), "serve", "--port", "0", "--json", "--config", config], env, folder,
                   name, stack)


# ---- the load -------------------------------------------------------------------------------


class Client:
    """One connection that asks again and again; `failed` counts what was no whole answer."""

    failed = 0

    def __init__(self, port):
        self.port = port
        self.writer = None

    async def ask(self, script="", stream=False):
        """Return (seconds, seconds to the first token, seconds that each token was under way)."""
        tokens = int((re.search(r"tokens=(\d+)", script) or [0, 8])[1])
        body = json.dumps({"model": "fusion", "stream": stream, "messages": [
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "Why is the sky blue? <<%s>>" % script}]}).encode()
        started = time.monotonic()
        try:
            if self.writer is None:
                self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
            self.writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
                b"application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            head = await self.reader.readuntil(HEAD_END)
            if not head.startswith(b"HTTP/1.1 200"):
                raise ValueError(head)
            first, delays = await (self.events() if stream else self.whole(head))
            if len(delays) != tokens:
                raise ValueError("%d tokens of %d" % (len(delays), tokens))
        except (OSError, ValueError, EOFError) as error:
            Client.failed += 1
            print("error: %s" % str(error)[:200], file=sys.stderr)
            self.close()
            return None
        return time.monotonic() - started, first - started, delays

    async def events(self):
        first, delays, rest = 0.0, [], b""
        while not rest.endswith(b"0\r\n\r\n"):
            data = await self.reader.read(65536)
            now = time.monotonic()
            if not data:
                raise EOFError("the stream was cut")
            rest += data
            found = SENT_AT.findall(rest)
            if found:
                first = first or now
                delays += [now - float(sent) for sent in found]
                rest = rest[rest.rfind(b"@") + 1:]
        return first, delays

    async def whole(self, head):
        data = await self.reader.readexactly(int(LENGTH.search(head).group(1)))
        fusion = json.loads(data).get("fusion")
        if fusion and (fusion["degraded"] or len(fusion["cost_breakdown"]) != 5):
            raise ValueError("not as configured: %s" % fusion)
        return time.monotonic(), SENT_AT.findall(data)

    def close(self):
        if self.writer is not None:
            self.writer.close()
        self.writer = None


def get(server, path):
    """Return the JSON of a GET; it is short, so that the load may wait for it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", path)
    found = json.load(connection.getresponse())
    connection.close()
    return found


async def load(server, clients, each, script="", stream=False):
    """Have so many clients ask so many times each; return (what they saw, seconds, CPU)."""
    crowd = [Client(server.port) for _ in range(clients)]

    async def work(client):
        return [await client.ask(script, stream) for _ in range(each)]

    started, cpu = time.monotonic(), server.cpu()
    seen = await asyncio.gather(*map(work, crowd))
    seconds, cpu = time.monotonic() - started, server.cpu() - cpu
    for client in crowd:
        client.close()
    return [one for some in seen for one in some if one], seconds, cpu


@contextlib.asynccontextmanager
async def held(server, upstream, clients, stage, calls, script=""):
    """Have so many streams wait in one stage, all at once; let them go at the end."""
    asked = asyncio.ensure_future(load(server, clients, 1, "hold=%s %s" % (stage, script), True))
    deadline = time.monotonic() + 60
    while get(upstream, "/stats")["held"] < calls:
        if time.monotonic() > deadline or asked.done():
            Client.failed += 1
            break
        await asyncio.sleep(0.1)
    yield
    get(upstream, "/release")
    await asked


# ---- what is measured: each returns {row: number} for one server and one round ---------------


async def measure_one(server, upstream, quick):
    before = get(upstream, "/stats")["connections"]
    seen, _, cpu = await load(server, 1, 40 if quick else 150)
    made = get(upstream, "/stats")["connections"] - before - 1
    return {"overhead": 1000 * statistics.median(one[0] for one in seen),
            "cpu 1": 1000 * cpu / len(seen), "connections": made / len(seen)}


async def measure_busy(server, upstream, quick):
    seen, seconds, _ = await load(server, 64, 5 if quick else 12, "member=80 judge=60 writer=60")
    return {"rate": len(seen) / seconds}


async def measure_full(server, upstream, quick):
    seen, _, cpu = await load(server, 64, 2 if quick else 6)
    return {"cpu 64": 1000 * cpu / len(seen)}


async def measure_relay(server, upstream, quick):
    seen, _, _ = await load(server, 1, 5 if quick else 15, "tokens=40 rate=200", True)
    delays = [delay for _, _, delays in seen for delay in delays[1:]]
    return {"first": 1000 * statistics.median(first for _, first, _ in seen),
            "relay": 1000 * statistics.median(delays)}


async def measure_streams(server, upstream, quick):
    found = {}
    for count in (64, 256):
        script = "tokens=%d rate=50" % (50 if quick else 150)
        async with held(server, upstream, count, "writer", count, script):
            await asyncio.sleep(0.5)
            before = server.cpu()
        tokens = count * (50 if quick else 150)
        found["streams %d" % count] = 1000 * (server.cpu() - before) / tokens
    return found


async def measure_threads(server, upstream, quick):
    idle, clients = server.status("Threads"), 50
    async with held(server, upstream, clients, "member", clients * len(MEMBERS)):
        busy = server.status("Threads") - idle
    ends = time.monotonic() + 5
    while server.status("Threads") > idle and time.monotonic() < ends:
        await asyncio.sleep(0.1)
    return {"threads": (busy - 8) / clients, "threads left": server.status("Threads") - idle}


async def measure_crowd(server, upstream, quick):
    clients = 200 if quick else 1000
    failed, idle = Client.failed, server.status("VmRSS")
    async with held(server, upstream, clients, "writer", clients, "tokens=3"):
        grown = server.status("VmRSS") - idle
    return {"per stream": grown / clients, "crowd errors": Client.failed - failed}


def child_cpu(command):
    """Return user and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable] + command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(path=FUSION_PY, words=("--help",)):
    """Return which of the heavy modules a command imports."""
    done = subprocess.run([sys.executable, "-B", "-X", "importtime", str(path), *words],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True)
    names = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}
    assert "argparse" in names  # else the list is not what it seems to be
    return [name for name in HEAVY if name in names]


# ---- the table ------------------------------------------------------------------------------

# name, unit, what the number in `must` bounds: the ratio (x) or the program's own value, must
ROWS = {
    "overhead": ("overhead p50, one client", "ms", "x", "<=", 1.5),
    "rate": ("requests/s, 64 clients, path of 200 ms", "", "x", ">=", 0.9),
    "cpu 1": ("CPU per request, 1 client", "ms", "x", "<=", 2.0),
    "cpu 64": ("CPU per request, 64 clients", "ms", "x", "<=", 3.0),
    "first": ("first token", "ms", "x", "<=", 1.5),
    "relay": ("relay per token", "ms", "x", "<=", 1.2),
    "relay ms": ("relay per token, absolute", "ms", "own", "<", 1.0),
    "streams 64": ("CPU per token, 64 streams x 50/s", "ms", "x", "<=", 1.5),
    "streams 256": ("CPU per token, 256 streams x 50/s", "ms", "x", "<=", 3.0),
    "connections": ("new upstream connections per request", "", "own", "<=", 0.05),
    "idle": ("memory, idle", "MB", "own", "<=", 32),
    "per stream": ("memory per stream in flight", "kB", "own", "<=", 120),
    "crowd errors": ("errors with all those in flight", "", "own", "<=", 0),
    "threads": ("threads per request in flight, less 8", "", "own", "<=", len(MEMBERS) + 1),
    "threads left": ("threads left over", "", "own", "<=", 0),
    "errors": ("errors in all", "", "own", "<=", 0),
    "help": ("--help, CPU against a bare interpreter", "ms", "x", "<=", 8),
    "imports": ("heavy modules that --help imports", "", "own", "<=", 0),
}
MEASURES = {"one": (measure_one, 5), "busy": (measure_busy, 3), "full": (measure_full, 3),
            "relay": (measure_relay, 3), "streams": (measure_streams, 2),
            "threads": (measure_threads, 1), "crowd": (measure_crowd, 1)}


async def measure(servers, upstream, names, quick, say):
    """Return {row: {server: [number of each round]}}; the servers take turns in each round."""
    values = {}
    for server in servers.values():
        await load(server, 4, 5)
        await load(server, 1, 5, stream=True)
    values["idle"] = {side: [server.status("VmRSS") / 1000] for side, server in servers.items()}
    for name in names:
        function, rounds = MEASURES[name]
        for number in range(min(rounds, 2) if quick else rounds):
            say("%s, round %d" % (name, number + 1))
            for side in list(servers)[::-1 if number % 2 else 1]:
                found = await function(servers[side], upstream, quick)
                for row, value in found.items():
                    values.setdefault(row, {}).setdefault(side, []).append(value)
    if "relay" in values:
        values["relay ms"] = {"program": values["relay"]["program"]}
    values["errors"] = {"program": [Client.failed]}
    return values


def measure_help(tries):
    both = [(1000 * child_cpu([str(FUSION_PY), "--help"]), 1000 * child_cpu(["-c", "pass"]))
            for _ in range(tries)]
    return {"help": {"program": [one for one, _ in both], "floor": [one for _, one in both]},
            "imports": {"program": [len(imported())]}}


def judged(values):
    """Return the rows of the table as dicts, in the table's order."""
    rows = []
    for key, (what, unit, kind, sign, must) in ROWS.items():
        if key not in values:
            continue
        mine, other = values[key]["program"], values[key].get("floor")
        ratio = statistics.median(a / b for a, b in zip(mine, other)) if kind == "x" else None
        value = ratio if kind == "x" else statistics.median(mine)
        good = {"<=": value <= must, "<": value < must, ">=": value >= must}[sign]
        rows.append({"key": key, "what": what, "unit": unit, "program": statistics.median(mine),
                     "floor": other and statistics.median(other), "ratio": ratio, "ok": good,
                     "must": "%s %g%s" % (sign, must, "x" if kind == "x" else "")})
    return rows


def show(rows):
    line = "%-42s %10s %10s %7s %9s  %s"
    print(line % ("what", "program", "floor", "ratio", "must", ""))
    for row in rows:
        numbers = ["" if row[side] is None else ("%.4g %s" % (row[side], row["unit"])).strip()
                   for side in ("program", "floor")]
        ratio = "" if row["ratio"] is None else "%.2fx" % row["ratio"]
        print(line % (row["what"], *numbers, ratio, row["must"], "ok" if row["ok"] else "MISS"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default=",".join(MEASURES) + ",help", metavar="A,B",
                        help="of: %(default)s")
    parser.add_argument("--against", metavar="FILE", help="another fusion.py in the floor's place")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    args = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if args.role:
        asyncio.run(serve(args.role, args.upstream))
        return 0
    names = args.only.split(",")
    values = measure_help(5 if args.quick else 15) if "help" in names else {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        upstream = Process([str(HERE), "--role", "upstream"], None, folder, "upstream", stack)
        floor = start_program(args.against, upstream, folder, "floor", stack) if args.against else \
            Process([str(HERE), "--role", "floor", "--upstream", upstream.url], None, folder,
                    "floor", stack)
        program = start_program(FUSION_PY, upstream, folder, "program", stack)
        values.update(asyncio.run(measure(
            {"program": program, "floor": floor}, upstream,
            [name for name in names if name in MEASURES], args.quick,
            lambda words: print(words, file=sys.stderr))))
    rows = judged(values)
    print(json.dumps(rows, indent=1)) if args.json else show(rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
