"""Section 05: what complete() makes of everything that a backend, a network and a clock can do."""

import contextlib
import dataclasses
import email.utils
import gzip
import itertools
import json
import random
import socket
import threading
import time
from typing import NamedTuple

import pytest

from upstream import Reply, Upstream, encode, error_reply, json_reply, split

HELLO = [{"role": "user", "content": "hello"}]
KEY = "sk-test-0123456789abcdef"
PRICES = {"m": {"input": 1, "output": 2}}
LONG = "the quick brown fox " * 400
AT_ONCE_S = 0.6
SEED = 20_240_117


# ---- calling --------------------------------------------------------------------------------


class Caller:
    """A configuration, a network and a run: all that it takes to call a scripted backend."""

    def __init__(self, fusion, folder, url, key="", network=None, depth=0, **settings):
        env = {"FUSION_BASE_URL": url, "FUSION_API_KEY": key}
        values = {"panel": ["m"], "retry_backoff": 0, "prices": PRICES}
        path = folder / "config.json"
        path.write_text(json.dumps(dict(values, **settings)))
        self.fusion, self.depth = fusion, depth
        self.config = fusion.load_config(str(path), fusion.Env(env))
        self.network = network or fusion.Network()
        self.start_run()

    def start_run(self):
        self.events = []
        self.run = self.fusion.start_run(self.config, self.network, listener=self.events.append,
                                         depth=self.depth)
        return self.run

    def ask(self, messages=HELLO, model="m", **options):
        member = dataclasses.replace(self.config.panel[0], model=model)
        return self.fusion.complete(self.run, member, messages, **options)

    def fail(self, *args, **options):
        """The CallError in which a call must end."""
        with pytest.raises(self.fusion.CallError) as caught:
            self.ask(*args, **options)
        return caught.value

    @property
    def record(self):
        return self.run.ledger.records[-1]

    @property
    def codes(self):
        return [entry["code"] for entry in self.run.degraded]


class Background:
    """A call on a thread of its own: its result or error, and how long it took."""

    def __init__(self, fn, *args, **options):
        self.result = self.error = None
        self.started = self.ended = time.monotonic()
        self.thread = threading.Thread(target=self.work, args=(fn, args, options), daemon=True)
        self.thread.start()

    def work(self, fn, args, options):
        try:
            self.result = fn(*args, **options)
        except Exception as error:
            self.error = error
        self.ended = time.monotonic()

    def join(self, timeout=15):
        self.thread.join(timeout)
        assert not self.thread.is_alive(), "the call did not end"
        return self

    @property
    def seconds(self):
        return self.ended - self.started


def script_of(replies):
    """One callable or dict as it is; else the replies in turn, for every model."""
    if len(replies) == 1 and (callable(replies[0]) or isinstance(replies[0], dict)):
        return replies[0]
    return {"*": list(replies)} if replies else None


@pytest.fixture
def serve():
    """Starts scripted backends: serve(reply, reply, ...) or serve(function)."""
    with contextlib.ExitStack() as stack:
        yield lambda *replies, **options: stack.enter_context(
            Upstream(script_of(replies), **options))


@pytest.fixture
def caller(fusion, tmp_path):
    """Makes a Caller of an Upstream or a URL; settings are those of a configuration."""
    made = []

    def make(up, **settings):
        made.append(Caller(fusion, tmp_path, getattr(up, "url", up), **settings))
        return made[-1]

    yield make
    for one in made:
        one.network.close()


def table(rows):
    """Parameters of which the first of each row is the id."""
    return [pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in rows]


def gaps(up):
    """The seconds between the chat calls that came."""
    times = [request.t for request in up.posts()]
    return [after - before for before, after in zip(times, times[1:])]


# ---- answers: every kind of event stream ----------------------------------------------------

TEXT = 'snow\u2603 \U0001f600 caf\u00e9\r\n\u2028\u0085\ttab "data: [DONE]" </x> & end'
REASONING = "why? \u00e9\n\nso"
CALLS = [{"id": "c1", "type": "function",
          "function": {"name": "find", "arguments": '{"a": "\u00e9 \\n", "b": [1, 2]}'}},
         {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{}"}}]
USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18,
         "prompt_tokens_details": {"cached_tokens": 3},
         "completion_tokens_details": {"reasoning_tokens": 2}}

SLOPPY = [
    ("newline", "\r\n"), ("newline", "\r"), ("comments", True), ("multi_line", True),
    ("no_done", True), ("no_finish", True), ("no_space", True), ("one_write", True),
    ("one_write", 3), ("split_bytes", 1), ("split_bytes", 5), ("null_first", True),
    ("usage_on", "content"), ("usage_on", "x_groq"), ("usage_always", True),
    ("duplicate", True), ("bom", True)]


def one_of_each(rng):
    """A seeded mix of sloppy habits, at most one value of each."""
    return dict(rng.sample(SLOPPY, rng.randrange(3, 9)))


def mixes(count):
    rng = random.Random(SEED)
    return [one_of_each(rng) for _ in range(count)]


def pairs():
    return [dict(pair) for pair in itertools.combinations(SLOPPY, 2) if pair[0][0] != pair[1][0]]


def label(flags):
    return "+".join("%s=%s" % (name, repr(value).strip("'\"").replace("\\", ""))
                    for name, value in flags.items()) or "tidy"


def repeated(text, count, times):
    return "".join(piece * times for piece in split(text, count))


def expected_calls(times):
    return tuple(dict(call, function=dict(call["function"], arguments=repeated(
        call["function"]["arguments"], 3, times))) for call in CALLS)


def check_sloppy(fusion, one, flags, **options):
    """Everything that such a stream says has arrived, and nothing else."""
    if flags.get("no_done") and flags.get("no_finish"):
        assert one.fail(**options).kind == "cut"
        return
    seen = []
    reply = one.ask(on_delta=lambda text, thought: seen.append((text, thought)), **options)
    times = 2 if flags.get("duplicate") else 1
    assert reply.text == repeated(TEXT, 8, times)
    assert reply.reasoning == repeated(REASONING, 8, times)
    assert reply.tool_calls == expected_calls(times)
    assert reply.finish == "tool_calls" or flags.get("no_finish") and reply.finish == "stop"
    assert reply.usage == fusion.Usage(11, 7, 3, 2, 0.25)
    assert ["".join(pieces) for pieces in zip(*seen)] == [reply.text, reply.reasoning]
    assert (reply.model, one.run.degraded) == ("m", [])


def sloppy_reply(flags, **options):
    return Reply(TEXT, reasoning=REASONING, tool_calls=CALLS, usage=USAGE, cost=0.25, sse=flags,
                 **options)


@pytest.mark.parametrize("flags", [{}] + [dict([one]) for one in SLOPPY] + pairs() + mixes(40),
                         ids=label)
def test_a_sloppy_stream_says_exactly_what_it_says(fusion, serve, caller, flags):
    one = caller(serve(sloppy_reply(flags)), max_retries=0)
    check_sloppy(fusion, one, flags)


@pytest.mark.parametrize("flags", [{}] + [dict([one]) for one in SLOPPY] + mixes(8), ids=label)
def test_a_stream_that_nobody_asked_for_is_read_too(fusion, serve, caller, flags):
    flags = dict(flags, usage_always=True)
    one = caller(serve(sloppy_reply(flags, as_json=False)), max_retries=0)
    check_sloppy(fusion, one, flags, stream=False)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize("options", [
    {}, {"gzip": True}, {"as_json": True}, {"close": True}, {"early_close": True},
    {"reasoning_field": "reasoning"}, {"role_first": False}, {"content_type": "text/plain"},
    {"content_type": "text/html; charset=utf-8"}, {"content_type": "text/event-stream"},
    {"content_type": "application/json"}, {"headers": {"content-type": None}},
    {"headers": {"transfer-encoding": None, "content-length": None}},
    {"headers": {"transfer-encoding": "chunked", "content-length": None}},
    {"gzip": True, "chunk_delay": 0.001}], ids=str)
def test_an_answer_is_exact_however_it_is_wrapped(fusion, serve, caller, options, stream):
    one = caller(serve(sloppy_reply({}, **options)), max_retries=0)
    check_sloppy(fusion, one, {}, stream=stream)


def chunk(**delta):
    finish = delta.pop("finish", None)
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


START, END = "data: %s\n\n" % chunk(content="one "), "data: %s\n\n" % chunk(content="two")
STOP = "data: %s\n\n" % chunk(finish="stop")
STREAMS = [
    ("event and id lines", "event: x\nid: 1\nretry: 9\n" + START + END + STOP + "data: [DONE]\n\n"),
    ("heartbeats as comments", ": PROCESSING\n\n" * 3 + START + ":\n\n" + END + STOP),
    ("unknown events", 'data: {"type": "ping"}\n\n' + START + 'data: {}\n\n' + END + STOP),
    ("empty choices", START + 'data: {"choices": []}\n\n' + END + STOP),
    ("deltas of null", START + 'data: {"choices": [{"delta": null}]}\n\n' + END + STOP),
    ("no blank line at the end", START + END + "data: [DONE]"),
    ("no newline after the finish", START + END + STOP.rstrip("\n")),
    ("blank lines in front", "\n\n\r\n" + START + END + STOP),
    ("content in parts", START + "data: %s\n\n" % chunk(
        content=[{"type": "text", "text": "two"}]) + STOP),
    ("a whole message at the end", 'data: {"choices": [{"message": {"content": "one two"}, '
                                   '"finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'),
]


@pytest.mark.parametrize("body", table(STREAMS))
def test_a_stream_of_the_wild_is_read(serve, caller, body):
    up = serve(Reply(body=body.encode(), content_type="text/event-stream"))
    assert caller(up).ask().text == "one two" and len(up.posts()) == 1


def completion(message, finish="stop", **more):
    return dict({"choices": [{"index": 0, "message": message, "finish_reason": finish}]}, **more)


ANSWERS = [
    # (name, message, finish_reason, the fields of the Reply that matter)
    ("parts", {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "stop",
     {"text": "ab"}),
    ("refusal field", {"content": None, "refusal": "I can't."}, "stop",
     {"text": "I can't.", "refusal": True}),
    ("content filter", {"content": "half"}, "content_filter", {"text": "half", "refusal": True}),
    ("cut by length", {"content": "half"}, "length", {"text": "half", "cut": True}),
    ("cut by length, otherwise named", {"content": "half"}, "max_tokens", {"cut": True}),
    ("no finish", {"content": "x"}, None, {"text": "x", "finish": "stop"}),
    ("think block", {"content": "<think>hm</think>\n\nx"}, "stop",
     {"text": "x", "reasoning": "hm"}),
    ("think block unopened", {"content": "hm\n</think>\n\nx"}, "stop",
     {"text": "x", "reasoning": "hm"}),
    ("space around", {"content": "\n x \n"}, "stop", {"text": "\n x \n"}),
    ("looks like a thought", {"content": "  <thirsty> x"}, "stop", {"text": "  <thirsty> x"}),
    ("null and a call", {"content": None, "tool_calls": CALLS}, "tool_calls",
     {"text": "", "tool_calls": tuple(CALLS)}),
    ("arguments as an object", {"content": "", "tool_calls": [
        {"id": "c", "function": {"name": "f", "arguments": {"a": 1}}}]}, "tool_calls",
     {"tool_calls": ({"id": "c", "type": "function",
                      "function": {"name": "f", "arguments": '{"a": 1}'}},)}),
]


@pytest.mark.parametrize("message, finish, expected", table(ANSWERS))
def test_a_whole_answer_means_what_it_says(serve, caller, message, finish, expected):
    up = serve(json_reply(completion(message, finish)))
    reply = caller(up).ask(stream=False)
    assert {name: getattr(reply, name) for name in expected} == expected
    assert len(up.posts()) == 1


def test_whole_tool_calls_without_ids_stay_apart_and_get_ids(serve, caller):
    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}},
             {"function": {"name": "g", "arguments": '{"b": 2}'}}]
    up = serve(json_reply(completion({"content": None, "tool_calls": calls}, "tool_calls")))
    found = caller(up).ask(stream=False).tool_calls
    assert [call["function"] for call in found] == [call["function"] for call in calls]
    assert len({call["id"] for call in found} - {""}) == 2


def test_streamed_tool_calls_without_an_index_stay_apart(serve, caller):
    deltas = [{"tool_calls": [{key: value for key, value in call.items()}]} for call in CALLS]
    body = "".join("data: %s\n\n" % chunk(**delta) for delta in deltas) + STOP
    found = caller(serve(Reply(body=body.encode()))).ask().tool_calls
    assert found == tuple(CALLS)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize("text", [
    "Open a thought with `<think>` and say so.",
    "re.sub(r'<think>.*?</think>', '', text) takes them out.",
    "# Tags\n\n<thinking>\nlike this\n</thinking>\n\nThat was one."])
def test_an_answer_about_thinking_tags_keeps_its_words(serve, caller, text, stream):
    shown = []
    reply = caller(serve(text)).ask(stream=stream, on_delta=lambda new, _: shown.append(new))
    assert reply.text == text
    assert "".join(shown) == text


@pytest.mark.parametrize("chunks", [
    ["<think>hm", " so</think>", "\n\none", " two"], list("<think>hm so</think>\none two"),
    ["\n<think>", "hm</think><think> so</think>one two"]])
def test_a_thought_at_the_start_of_a_stream_is_never_shown_as_answer(serve, caller, chunks):
    seen = []
    reply = caller(serve(Reply(chunks=chunks))).ask(
        on_delta=lambda text, thought: seen.append((text, thought)))
    assert (reply.text, reply.reasoning) == ("one two", "hm so")
    assert "".join(text for text, _ in seen) == "one two"


# ---- answers: usage -------------------------------------------------------------------------

REPORTED = [
    # (name, usage as reported, (prompt, completion, cached, reasoning) or None for an estimate)
    ("whole", USAGE, (11, 7, 3, 2)),
    ("other names", {"input_tokens": 5, "output_tokens": 6}, (5, 6, 0, 0)),
    ("floats", {"prompt_tokens": 5.0, "completion_tokens": 6.0}, (5, 6, 0, 0)),
    ("cached at the top", {"prompt_tokens": 9, "completion_tokens": 1,
                           "prompt_cache_hit_tokens": 4}, (9, 1, 4, 0)),
    ("more cached than there is", {"prompt_tokens": 9, "completion_tokens": 1,
                                   "prompt_tokens_details": {"cached_tokens": 99}}, (9, 1, 9, 0)),
    ("details of null", {"prompt_tokens": 9, "completion_tokens": 1,
                         "prompt_tokens_details": None}, (9, 1, 0, 0)),
    ("missing", None, None),
    ("zeros", {"prompt_tokens": 0, "completion_tokens": 0}, None),
    ("NaN", float("nan"), None),
    ("NaN inside", {"prompt_tokens": float("nan"), "completion_tokens": 7}, None),
    ("infinite", {"prompt_tokens": float("inf"), "completion_tokens": 7}, None),
    ("negative", {"prompt_tokens": -11, "completion_tokens": 7}, None),
    ("strings", {"prompt_tokens": "11", "completion_tokens": "7"}, None),
    ("huge", {"prompt_tokens": 10**30, "completion_tokens": 7}, None),
    ("half", {"prompt_tokens": 11}, None),
    ("booleans", {"prompt_tokens": True, "completion_tokens": True}, None),
    ("a list", [11, 7], None),
]


@pytest.mark.parametrize("place", ["last_chunk", "content", "x_groq", "plain"])
@pytest.mark.parametrize("usage, expected", table(REPORTED))
def test_usage_is_taken_as_reported_or_marked_as_estimated(serve, caller, place, usage, expected):
    sse = {} if place == "plain" else {"usage_on": place}
    one = caller(serve(Reply(LONG, usage=usage, sse=sse)))
    found = one.ask(stream=place != "plain").usage
    assert found.estimated == (expected is None) == ("usage_estimated" in one.codes)
    if expected is not None:
        assert found[:4] == expected
    else:
        assert 0 < found.prompt < 100 and len(LONG) / 8 < found.completion < len(LONG)
    assert one.record.usage[:4] == found[:4]


@pytest.mark.parametrize("cost", [float("nan"), -0.5, "0.5", True, 1e300, [0.5], {"usd": 1}],
                         ids=repr)
def test_a_cost_that_is_nonsense_gives_way_to_the_price(serve, caller, cost):
    one = caller(serve(Reply("x", usage=USAGE, cost=cost)))
    one.ask()
    assert one.record.source == "table"
    assert one.record.cost_usd == pytest.approx((11 * 1 + 7 * 2) / 1e6)


@pytest.mark.parametrize("cost", [0, 0.0, 0.0123, 2])
def test_a_reported_cost_is_believed(serve, caller, cost):
    one = caller(serve(Reply("x", usage=USAGE, cost=cost)))
    reply = one.ask()
    assert (one.record.source, one.record.cost_usd, reply.usage.cost) == ("reported", cost, cost)


# ---- no answer: said in its words, and again where that helps -------------------------------


def sse_error(error, **options):
    return Reply(LONG, error=error, **options)


RST = {"cut": "rst", "first_delay": 0.01}
NO_ANSWER = [
    # (name, the reply, kind, whether it is tried again, a word that the error says)
    ("empty text", Reply(""), "empty", True, "nothing"),
    ("blank text", Reply(" \n\t"), "empty", True, "nothing"),
    ("content null", json_reply(completion({"content": None})), "empty", True, "nothing"),
    ("no choices", json_reply({"id": "x", "choices": []}), "empty", True, "nothing"),
    ("choices null", json_reply({"choices": None}), "empty", True, "nothing"),
    ("an empty object", json_reply({}), "empty", True, "nothing"),
    ("reasoning only", Reply("", reasoning="hm"), "empty", True, "reasoning"),
    ("a thought only", Reply("<think>hm</think>"), "empty", True, "reasoning"),
    ("reasoning up to the cap", Reply("", reasoning="hm", finish="length"), "empty", False,
     "max_tokens"),
    ("a thought up to the cap", Reply("<think>hm", finish="length"), "empty", False, "max_tokens"),
    ("HTML", Reply(body=b"<!DOCTYPE html><p>hello", content_type="text/html"), "protocol", False,
     "html"),
    ("prose", Reply(body=b"It works!", content_type="text/plain"), "protocol", False, "json"),
    ("prose like a field", Reply(body=b"default backend - 404"), "protocol", False, "json"),
    ("prose like an event", Reply(body=b"error: no model is loaded\n"), "protocol", False, "json"),
    ("a list", json_reply([1]), "protocol", False, "json"),
    ("an empty body", Reply(body=b""), "protocol", True, "empty"),
    ("blank space", Reply(body=b" \n \n"), "protocol", True, "empty"),
    ("an error for an answer", sse_error("it broke"), "server", True, "it broke"),
    ("an error in a JSON answer", sse_error("it broke", as_json=True), "server", True, "it broke"),
    ("an error in mid-stream", sse_error("it broke", error_after=3), "server", True, "it broke"),
    ("a late rate limit", sse_error({"code": 429, "message": "slow down"}, error_after=2), "rate",
     True, "slow down"),
    ("a late lack of credit", sse_error({"code": 402, "message": "pay up"}, error_after=2),
     "credit", False, "pay up"),
    ("an error that is a word", json_reply({"error": "it broke"}), "server", True, "it broke"),
    ("given up", Reply("half", finish="error"), "server", True, "gave up"),
    ("a stream without an end", Reply(LONG, sse={"no_done": True, "no_finish": True}), "cut", True,
     "cut"),
    ("heartbeats and no event", Reply(body=b": PROCESSING\n\n" * 3), "cut", True, "cut"),
    ("a cut stream", Reply(LONG, cut_after=3), "cut", True, "cut"),
    ("a stream cut after the headers", Reply(LONG, cut_after=0), "cut", True, "cut"),
    ("a reset stream", Reply(LONG, cut_after=3, **RST), "cut", True, "cut"),
    ("a cut JSON answer", Reply(LONG, cut_after=3, as_json=True), "cut", True, "cut"),
    ("a reset JSON answer", Reply(LONG, cut_after=3, as_json=True, **RST), "cut", True, "cut"),
    ("a Content-Length too long", Reply(LONG, as_json=True, close=True,
                                        headers={"Content-Length": "9999"}), "cut", True, "cut"),
    ("no word at all", Reply(raw=b""), "connection", True, "127.0.0.1"),
    ("a reset for a word", Reply(raw=b"", cut="rst"), "connection", True, "127.0.0.1"),
    ("no HTTP", Reply(raw=b"SSH-2.0-OpenSSH_9.6\r\n"), "connection", True, "127.0.0.1"),
    ("half of a head", Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Le"), None, True, ""),
    ("an event that is no JSON", Reply(body=b"data: {oops\n\n"), "protocol", True, "json"),
    ("false gzip", Reply(body=b'{"a": 1}', headers={"Content-Encoding": "gzip"}), "protocol", None,
     "gzip"),
]


@pytest.mark.parametrize("reply, kind, again, word", table(NO_ANSWER))
def test_no_answer_is_an_error_and_tried_again_where_that_helps(serve, caller, reply, kind, again,
                                                                word):
    up = serve(reply)
    error = caller(up, max_retries=2).fail()
    assert kind in (None, error.kind)
    assert word in ("%s %s" % (error.message, error.hint)).lower()
    assert again is None or len(up.posts()) == (3 if again else 1)
    assert error.exit_code == 3


@pytest.mark.parametrize("reply", [
    pytest.param(row[1], id=row[0].replace(" ", "-")) for row in NO_ANSWER if row[3]])
def test_after_a_failed_attempt_only_the_answer_counts(serve, caller, reply):
    up = serve(reply, "the answer")
    one = caller(up)
    reply = one.ask()
    assert (reply.text, reply.reasoning, reply.finish) == ("the answer", "", "stop")
    assert (one.record.attempts, one.record.status, len(up.posts())) == (2, "stop", 2)


@pytest.mark.parametrize("options", [
    {"cut_after": 99}, {"cut_after": 99, "sse": {"no_done": True}},
    {"close": True, "headers": {"Transfer-Encoding": None, "Content-Length": "99999"}}], ids=str)
def test_a_stream_whose_answer_is_complete_needs_no_tidy_end(serve, caller, options):
    up = serve(Reply(LONG, usage=USAGE, **options))
    reply = caller(up).ask()
    assert reply.text == LONG and reply.usage.prompt == 11 and len(up.posts()) == 1


def test_an_answer_cut_by_length_is_an_answer_and_not_retried(serve, caller):
    up = serve(Reply("half of", finish="length"))
    assert caller(up).ask().cut and len(up.posts()) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_an_answer_of_33_megabytes_is_refused(serve, caller, stream):
    up = serve(Reply("x" * 33_000_000, sse={"split_bytes": 1 << 20}))
    error = caller(up).fail(stream=stream)
    assert error.kind == "protocol" and "MB" in error.message and len(up.posts()) == 1


def test_an_answer_of_3_megabytes_in_one_event_is_read(serve, caller):
    text = "x" * 3_000_000
    assert caller(serve(Reply(chunks=[text]))).ask().text == text


def test_gzip_that_unpacks_to_more_than_any_answer_is_refused(serve, caller):
    packed = gzip.compress(b" " * 200_000_000, 1)
    up = serve(Reply(body=packed, headers={"Content-Encoding": "gzip"}))
    error = caller(up).fail(stream=False)
    assert "MB" in error.message and len(up.posts()) == 1


JUNK = [None, 0, -1, 5, 2.5, True, "", "x", [], {}, [None], [[]], [5], ["x"], {"a": 1}, [{}],
        {"role": {}}, float("nan"), 10**40, "\ud800"]


def places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else \
        enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, path + (key,))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


WHOLE = completion({"role": "assistant", "content": "x", "reasoning_content": "y",
                    "refusal": None, "tool_calls": CALLS[:1]}, model="m", usage=USAGE,
                   x_groq={"usage": USAGE}, error=None)
PIECE = {"choices": [{"index": 0, "delta": {
    "role": "assistant", "content": "x", "reasoning": "y", "tool_calls": [dict(CALLS[0], index=0)]},
    "logprobs": {"content": [{"token": "x"}]}, "finish_reason": "stop"}], "usage": USAGE}


def spoilt_bodies():
    """(what was put where, the body of an answer or of a stream): each junk in each place."""
    for new in JUNK:
        for path in places(WHOLE):
            yield (path, new), encode(replaced(WHOLE, path, new))
        for path in places(PIECE):
            yield (path, new), b"data: " + encode(replaced(PIECE, path, new)) + b"\n\n"


def test_no_shape_of_an_answer_crashes_the_call(fusion, serve, caller):
    bodies = list(spoilt_bodies())
    up = serve(lambda request: Reply(body=bodies[int(request.model)][1]))
    one, crashed = caller(up, max_retries=0), []
    for number, (what, _) in enumerate(bodies):
        try:
            one.ask(model=str(number))
        except fusion.CallError:
            continue
        except Exception as error:
            crashed.append((what, repr(error)))
    assert crashed == [] and len(up.posts()) == len(bodies) > 800


def wire_bytes(body, kind, chunked):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n" % kind.encode()
    if not chunked:
        return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in split(body, 3))
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"


WIRES = [wire_bytes(encode(WHOLE), "application/json", False),
         wire_bytes(b"data: %s\n\ndata: [DONE]\n\n" % encode(PIECE), "text/event-stream", True)]


def spoilt_wire(rng):
    """The bytes of a good answer with a few of them lost, changed or added."""
    wire = bytearray(rng.choice(WIRES))
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(wire))
        wire[at:at + rng.randrange(4)] = rng.choice([
            b"", b"\r\n", b"\x00", b"\xff", b":", b"9", b"-", b"\n\n", b"data:", b"{", b'"'])
    return bytes(wire)


def test_no_bytes_of_an_answer_crash_the_call(fusion, serve, caller):
    rng = random.Random(SEED)
    up = serve(lambda request: Reply(raw=spoilt_wire(rng)))
    one, crashed, answered = caller(up, max_retries=0), [], 0
    for number in range(400):
        try:
            answered += one.ask(model=str(number)).text == "x"
        except fusion.CallError:
            continue
        except Exception as error:
            crashed.append((number, repr(error)))
    assert crashed == [] and len(up.posts()) == 400 and 0 < answered < 400


# ---- connections ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_twenty_calls_in_turn_use_one_connection(serve, caller, stream):
    up = serve("hello")
    one = caller(up)
    for _ in range(20):
        one.ask(stream=stream)
    assert (len(up.posts()), up.connections) == (20, 1)


def test_a_refusal_leaves_the_connection_usable(serve, caller):
    up = serve(Reply(status=400), Reply(status=503), "hello")
    one = caller(up, max_retries=1)
    one.fail()
    assert one.ask().text == "hello" and up.connections == 1


@pytest.mark.parametrize("options", [{"close": True}, {"early_close": True}], ids=str)
def test_a_connection_that_the_backend_closes_is_replaced_silently(serve, caller, options):
    up = serve(Reply("hello", **options))
    one = caller(up, max_retries=0)
    for _ in range(3):
        assert one.ask().text == "hello"
        assert up.wait_for(lambda: up.open_connections() == 0)
    assert up.connections == 3
    assert {record.attempts for record in one.run.ledger.records} == {1}
    assert one.run.degraded == []


@pytest.mark.parametrize("cut", ["fin", "rst"])
def test_a_stale_connection_is_retried_once_and_nothing_is_said(serve, caller, cut):
    up = serve("first", Reply(raw=b"", cut=cut), "second")
    one = caller(up, max_retries=0)
    assert [one.ask().text, one.ask().text] == ["first", "second"]
    assert [request.connection for request in up.posts()] == [0, 0, 1]
    assert (one.record.attempts, one.record.status, one.run.degraded) == (1, "stop", [])


def test_a_fresh_connection_that_fails_is_a_failed_attempt(serve, caller):
    up = serve(Reply(raw=b""), "hello")
    one = caller(up, max_retries=1)
    assert one.ask().text == "hello" and one.record.attempts == 2


@pytest.mark.parametrize("later", [False, True], ids=["with-the-answer", "while-idle"])
def test_what_a_backend_says_on_an_idle_connection_is_no_answer(serve, caller, later):
    body = encode(completion({"content": "first"}))
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"
    drip = (len(answer), 0.05) if later else None
    up = serve(Reply(raw=answer + late, drip=drip, keep=True), "second")
    one = caller(up, max_retries=0)
    assert one.ask().text == "first"
    assert up.posts()[0].over.wait(5), "all that it says has been said"
    assert one.ask().text == "second"


def test_concurrent_calls_get_their_own_answers_and_share_connections(serve, caller):
    up = serve(lambda request: Reply("to " + request.messages[0]["content"], first_delay=0.01))
    one = caller(up)

    def ask(number):
        return one.ask([{"role": "user", "content": "caller %d" % number}]).text

    for _ in range(3):
        calls = [Background(ask, number) for number in range(12)]
        answers = [call.join().result for call in calls]
        assert answers == ["to caller %d" % number for number in range(12)]
    assert len(up.posts()) == 36 and up.connections <= 12


@pytest.mark.parametrize("limit", ["max_concurrency", "backend_concurrency"])
def test_no_more_calls_run_at_once_than_allowed(serve, caller, limit):
    up = serve(Reply("hello", first_delay=0.01))
    one = caller(up, **{limit: 2})
    calls = [Background(one.ask, model="m%d" % number) for number in range(8)]
    assert {call.join().result.text for call in calls} == {"hello"}
    assert up.peak_in_flight == 2


def test_a_limit_per_backend_leaves_other_backends_free(serve, caller):
    gate = threading.Event()
    first, second = serve(Reply("hello", delay=gate)), serve(Reply("hello", delay=gate))
    one = caller(first, backend_concurrency=1)
    other = caller(second, backend_concurrency=1, network=one.network)
    calls = [Background(each.ask) for each in (one, one, other, other)]
    assert first.wait_for(lambda: first.in_flight == second.in_flight == 1)
    gate.set()
    assert {call.join().result.text for call in calls} == {"hello"}
    assert first.peak_in_flight == second.peak_in_flight == 1


def test_cancel_ends_the_wait_for_a_turn(fusion, serve, caller):
    up = serve(Reply("hello", hang_after=-1))
    one = caller(up, max_concurrency=1)
    first = Background(one.ask)
    assert up.wait_for(lambda: up.in_flight == 1)
    second = Background(one.ask)
    cancelled(fusion, one, second)
    assert isinstance(first.join().error, fusion.Cancelled)
    assert len(up.posts()) == 1 and len(one.run.ledger.records) == 1


def test_closing_the_network_closes_the_idle_connections(serve, caller):
    up = serve("hello")
    one = caller(up)
    one.ask()
    assert up.open_connections() == 1
    one.network.close()
    assert up.wait_for(lambda: up.open_connections() == 0)


@pytest.mark.parametrize("path", ["/v1", "/api/openai/v1", "/v1/", "/v1/chat/completions"])
def test_the_path_of_the_base_url_is_kept(serve, caller, path):
    up = serve("hello")
    caller("http://127.0.0.1:%d%s" % (up.port, path)).ask()
    prefix = path.replace("/chat/completions", "").rstrip("/")
    assert up.posts()[0].path == prefix + "/chat/completions"


def test_a_host_name_with_several_addresses_is_reached(serve, caller):
    up = serve("hello")
    assert caller("http://localhost:%d/v1" % up.port).ask().text == "hello"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_the_key_stays_here(serve, caller, status):
    other = serve("stolen")
    up = serve(Reply(status=status, headers={"Location": other.url + "/chat/completions"}))
    error = caller(up, key=KEY).fail()
    assert "redirect" in error.message and str(other.port) in error.message
    assert (len(up.posts()), other.requests, other.connections) == (1, [], 0)


def test_a_redirect_of_the_list_of_models_is_not_followed(fusion, serve, caller):
    other, up = serve("stolen", models=["x"]), serve()
    up.models_reply = Reply(status=302, headers={"Location": other.url + "/models"})
    one = caller(up, key=KEY, panel="auto")
    with pytest.raises(fusion.FusionError, match="redirect"):
        fusion.fuse(one.config, HELLO, one.run)
    assert other.connections == 0


# ---- statuses and retries -------------------------------------------------------------------

STATUSES = [(400, "request", False), (401, "auth", False), (402, "credit", False),
            (403, "auth", False), (404, "model", False), (408, "server", True),
            (409, "server", True), (422, "request", False), (425, "server", True),
            (429, "rate", True), (500, "server", True), (502, "server", True),
            (503, "server", True), (504, "server", True), (529, "server", True)]


@pytest.mark.parametrize("status, kind, again", STATUSES)
def test_each_status_has_its_kind_and_is_retried_or_not(serve, caller, status, kind, again):
    up = serve(error_reply(status, "scripted"))
    one = caller(up, max_retries=2)
    error = one.fail()
    assert (error.kind, error.retryable, error.upstream_status) == (kind, again, status)
    assert str(status) in error.message and "scripted" in error.message
    assert len(up.posts()) == one.record.attempts == (3 if again else 1)
    assert one.record.status == "failed" and one.record.cost_usd == 0


OVERFLOWS = [
    ("llamacpp", {"code": 400, "type": "exceed_context_size_error", "n_ctx": 4096,
                  "message": "request (9000 tokens) exceeds the available context size"}),
    ("openai", {"code": "context_length_exceeded", "message": "maximum context length is 4096"}),
    ("anthropic", {"type": "invalid_request_error", "message": "prompt is too long: 9 > 4"}),
]


@pytest.mark.parametrize("status", [400, 413, 500])
@pytest.mark.parametrize("error", table(OVERFLOWS))
def test_a_prompt_that_is_too_long_is_told_apart_and_not_retried(serve, caller, error, status):
    up = serve(Reply(status=status, error=error))
    assert caller(up).fail().kind == "context" and len(up.posts()) == 1


BODIES = [
    ("OpenAI", b'{"error": {"message": "the reason", "type": "t", "code": null}}'),
    ("a bare string", b'{"error": "the reason"}'),
    ("FastAPI", b'{"detail": "the reason"}'),
    ("FastAPI's list", b'{"detail": [{"loc": ["body"], "msg": "the reason"}]}'),
    ("vLLM", b'{"object": "error", "message": "the reason", "code": 400}'),
    ("OpenRouter", b'{"error": {"code": 400, "message": "Provider returned error", '
                   b'"metadata": {"raw": "the reason"}}}'),
    ("text", b"the reason"),
    ("text in lines", b"the\n   reason\n"),
    ("Latin-1", b"the reason \xe9"),
]


@pytest.mark.parametrize("body", table(BODIES))
def test_the_reason_of_a_refusal_is_found(serve, caller, body):
    error = caller(serve(Reply(status=400, body=body))).fail()
    assert "the reason" in error.message and "\n" not in error.message


@pytest.mark.parametrize("body", [
    b"", b"null", b"[]", b"[[1]]", b'"x"', b"{}", b"<html><h1>Bad Gateway</h1></html>",
    b'{"error": null}', b'{"error": 7}', b'{"error": {"message": 7}}', b"\xff\xfe\x00",
    b'{"error": [{"message": "x"}]}', b"x" * 100_000], ids=repr)
def test_a_refusal_without_a_reason_is_told_in_one_short_line(serve, caller, body):
    error = caller(serve(Reply(status=400, body=body))).fail()
    assert "400" in error.message and len(error.message) < 400 and "<h1>" not in error.message


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_max_retries_is_honoured(serve, caller, retries):
    up = serve(error_reply(503, "busy"))
    caller(up, max_retries=retries).fail()
    assert len(up.posts()) == retries + 1


def test_the_last_retry_may_bring_the_answer(serve, caller):
    up = serve(*[error_reply(503, "busy")] * 2 + [Reply("hello")])
    one = caller(up, max_retries=2)
    assert one.ask().text == "hello"
    assert (one.record.attempts, len(one.run.ledger.records)) == (3, 1)


def test_a_model_that_keeps_failing_is_left_alone_and_others_are_not(serve, caller):
    up = serve({"m": error_reply(503, "busy"), "n": "hello"})
    one = caller(up, max_retries=0)
    for _ in range(20):
        one.fail()
    asked = len(up.posts("m"))
    assert 2 <= asked < 20 and one.ask(model="n").text == "hello"
    records = len(one.run.ledger.records)
    one.fail()
    assert len(up.posts("m")) == asked and len(one.run.ledger.records) == records


@pytest.mark.parametrize("answer, refusal", [
    (Reply("hello"), error_reply(503, "busy")),
    (error_reply(400, "no"), error_reply(401, "no"))], ids=["answers", "refuses"])
def test_a_model_that_answers_now_and_then_is_asked_again(fusion, serve, caller, answer, refusal):
    up = serve(lambda request: answer if request.n % 3 == 2 else refusal)
    one = caller(up, max_retries=0)
    for _ in range(20):
        with contextlib.suppress(fusion.CallError):
            one.ask()
    assert len(up.posts()) == 20


def test_the_pause_before_a_retry_doubles(serve, caller):
    up = serve(error_reply(503, "busy"))
    caller(up, max_retries=3, retry_backoff=0.1).fail()
    first, second, third = gaps(up)
    assert 0.1 <= first < second < third and 0.2 <= second and 0.4 <= third < 0.8


def test_a_pause_beyond_the_deadline_is_not_begun(serve, caller):
    up = serve(error_reply(503, "busy"))
    call = Background(caller(up, retry_backoff=30, member_timeout_s=5).ask).join()
    assert call.error.kind == "server" and call.seconds < AT_ONCE_S and len(up.posts()) == 1


# ---- time ------------------------------------------------------------------------------------
# Calls that take a second or two each are made side by side, once for the module.


class Case(NamedTuple):
    """A call to make: the replies or a URL, settings of the configuration, options of the call."""

    to: object
    settings: dict = {}
    options: dict = {}
    models: object = None  # the reply to GET /models


class Outcome(NamedTuple):
    call: Background
    up: object
    record: object


def start_case(fusion, stack, folder, case):
    """Start one case; returns (call, backend, caller)."""
    up = None
    if not isinstance(case.to, str):
        replies = case.to if isinstance(case.to, list) else [case.to]
        up = stack.enter_context(Upstream(script_of(replies)))
        up.models_reply = case.models
    one = Caller(fusion, folder, up.url if up else case.to, **case.settings)
    stack.callback(one.network.close)
    return Background(one.ask, **case.options), up, one


def outcomes(fusion, stack, folder, cases):
    """Make all calls side by side; {name: Outcome}."""
    running = {name: start_case(fusion, stack, folder, case) for name, case in cases.items()}
    found = {}
    for name, (call, up, one) in running.items():
        call.join(30)
        found[name] = Outcome(call, up, (one.run.ledger.records or [None])[-1])
    return found


@contextlib.contextmanager
def silent_port():
    """The URL of a port that takes connections and never reads from them."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield "http://127.0.0.1:%d/v1" % listener.getsockname()[1]


@contextlib.contextmanager
def full_port():
    """The URL of a port whose queue is full: a connection to it neither stands nor fails.

    None where the system takes more connections than the queue holds.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        probe = stack.enter_context(socket.socket())
        probe.settimeout(0.2)
        url = None
        try:
            probe.connect(listener.getsockname())
        except socket.timeout:
            url = "http://127.0.0.1:%d/v1" % listener.getsockname()[1]
        yield url


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def told(value):
    """A backend that says when to come again, and then answers."""
    return [error_reply(429, "slow down", headers={"Retry-After": value}), Reply("hello")]


def http_date(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


BIG = [{"role": "user", "content": "x" * 20_000_000}]
PLAIN = {"stream": False}
LIMIT = {"member_timeout_s": 1, "max_retries": 5}
OVERDUE = {
    "before the headers": Case(Reply("x", hang_after=-1)),
    "before the headers, plain": Case(Reply("x", hang_after=-1), options=PLAIN),
    "after the headers": Case(Reply("x", hang_after=0)),
    "in the stream": Case(Reply(LONG, hang_after=3)),
    "after the reasoning": Case(Reply("x", reasoning=LONG, hang_after=8)),
    "in the JSON": Case(Reply(LONG, hang_after=3), options=PLAIN),
    "headers drip": Case(Reply("x", drip=(1, 0.2))),
    "headers drip, plain": Case(Reply("x", drip=(1, 0.2)), options=PLAIN),
    "tokens drip": Case(Reply(chunks=["x"] * 99, chunk_delay=0.2)),
    "bytes of the stream drip": Case(Reply(LONG, drip=(150, 0.2))),
    "bytes of the JSON drip": Case(Reply(LONG, drip=(150, 0.2)), options=PLAIN),
    "heartbeats only": Case(Reply(chunks=[""] * 99, chunk_delay=0.1, sse={"comments": True})),
    "a refusal drips": Case(Reply(status=400, body=b"x" * 9999, drip=(99, 0.2))),
    "the second attempt hangs": Case([error_reply(503, "busy"), Reply("x", hang_after=-1)]),
    "a port that never answers": Case("silent"),
    "a port that never reads": Case("silent", options={"messages": BIG}),
    "a port that never connects": Case("full"),
}
HELD = {
    # Chunks of the reply: 8 of text, the finish, the usage, [DONE].
    "after [DONE]": Case(Reply(LONG, usage=USAGE, hang_after=11)),
    "after the usage": Case(Reply(LONG, usage=USAGE, hang_after=10, sse={"no_done": True})),
    "after the finish": Case(Reply(LONG, usage=USAGE, hang_after=9, sse={"no_done": True})),
    "after the finish, lines in CR": Case(Reply(LONG, usage=USAGE, hang_after=9, sse={
        "no_done": True, "newline": "\r"}), {"member_timeout_s": 5}),
}
HANGING_LIST = Case(Reply("hello"), {"prices": {}, "member_timeout_s": 0.5}, {},
                    Reply(hang_after=-1))


@pytest.fixture(scope="module")
def timed(fusion, tmp_path_factory):
    """{name: Outcome} of all calls that take long."""
    five = {"member_timeout_s": 5}
    cases = dict(HELD, number=Case(told("1"), five), date=Case(told(http_date(2.5)), five),
                 models=HANGING_LIST)
    with contextlib.ExitStack() as stack:
        ports = {"silent": stack.enter_context(silent_port()),
                 "full": stack.enter_context(full_port())}
        for name, case in OVERDUE.items():
            to = ports[case.to] if isinstance(case.to, str) else case.to
            if to is not None:
                cases[name] = case._replace(to=to, settings=LIMIT)
        yield outcomes(fusion, stack, tmp_path_factory.mktemp("timed"), cases)


@pytest.mark.parametrize("name", OVERDUE)
def test_the_time_of_a_call_is_total_wherever_it_hangs(fusion, timed, name):
    if name not in timed:
        pytest.skip("this system takes more connections than a queue holds")
    call, up, record = timed[name]
    assert isinstance(call.error, fusion.CallError) and call.error.kind == "timeout"
    assert 0.9 < call.seconds < 2.5
    assert record.status == "failed" and 0.9 < record.latency_s < 2.5
    assert call.error.accepted == (name != "a port that never connects")
    if up is not None:
        assert len(up.posts()) == record.attempts == (2 if "second" in name else 1)
        assert up.wait_for(lambda: up.in_flight == 0, 1), "its connection was closed"


def test_retries_end_with_the_time_of_the_call(serve, caller):
    up = serve(error_reply(503, "busy"))
    one = caller(up, member_timeout_s=0.5, max_retries=10, retry_backoff=0.1)
    call = Background(one.ask).join()
    assert call.error.kind == "server" and call.seconds < 1.5 and 2 <= len(up.posts()) <= 3


def test_the_time_of_the_request_ends_a_call_too(fusion, serve, caller):
    up = serve(Reply("x", hang_after=-1))
    call = Background(caller(up, timeout_s=0.4).ask).join()
    assert isinstance(call.error, (fusion.CallError, fusion.LimitError))
    assert 0.3 < call.seconds < 1.5


def test_no_call_begins_after_the_time_of_the_request(fusion, serve, caller):
    up = serve("hello")
    one = caller(up, timeout_s=0.1)
    assert up.wait_for(lambda: one.run.clock() >= one.run.deadline)
    with pytest.raises(fusion.LimitError) as caught:
        one.ask()
    assert caught.value.exit_code == 4 and up.requests == []


def test_a_list_of_models_that_hangs_does_not_prolong_the_call(timed):
    assert timed["models"].call.seconds < 1.5


@pytest.mark.parametrize("name", HELD)
def test_a_finished_answer_ends_though_the_connection_is_held_open(timed, name):
    call, up, record = timed[name]
    assert call.error is None and call.result.text == LONG and call.result.finish == "stop"
    assert call.seconds < 4 and record.attempts == 1
    assert call.result.usage.estimated == ("finish" in name)
    assert up.wait_for(lambda: up.in_flight == 0, 1), "its connection was closed"


@pytest.mark.parametrize("name, least, most", [("number", 1.0, 2.5), ("date", 1.0, 4.0)])
def test_retry_after_is_honoured_when_it_fits(timed, name, least, most):
    call, up, record = timed[name]
    assert call.result.text == "hello" and record.attempts == 2
    assert least <= gaps(up)[0] < most


@pytest.mark.parametrize("value", ["0", "soon", "-5", "", "1;2", "nan", "Tue, 99 Foo 2025 25:61:61",
                                   "Wed, 21 Oct 2015 07:28:00 GMT", "\u00e9"])
def test_a_retry_after_that_says_nothing_is_passed_over(serve, caller, value):
    up = serve(*told(value))
    assert caller(up).ask().text == "hello"
    assert gaps(up)[0] < AT_ONCE_S


@pytest.mark.parametrize("value", ["3", "3600", "99999999", "315360000", "1" + "0" * 30,
                                   "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_retry_after_beyond_the_deadline_fails_at_once(fusion, serve, caller, value):
    up = serve(*told(value))
    call = Background(caller(up, member_timeout_s=2).ask).join()
    assert isinstance(call.error, fusion.CallError) and call.error.kind == "rate"
    assert call.seconds < AT_ONCE_S and len(up.posts()) == 1


# ---- nobody there ---------------------------------------------------------------------------


def test_a_dead_port_says_so_with_a_hint(caller):
    port = free_port()
    error = caller("http://127.0.0.1:%d/v1" % port).fail()
    assert "127.0.0.1:%d" % port in error.message and "FUSION_BASE_URL" in error.hint
    assert error.kind == "connection" and error.retryable and not error.accepted


def test_an_unknown_host_says_so(caller):
    one = caller("http://name.invalid/v1", key=KEY, max_retries=0, member_timeout_s=8)
    error = one.fail()
    assert "name.invalid" in error.message and error.hint and not error.accepted


def test_a_backend_that_comes_up_late_is_reached_by_a_retry(caller):
    port = free_port()
    one = caller("http://127.0.0.1:%d/v1" % port, max_retries=9, retry_backoff=0.05)
    call = Background(one.ask)
    with Upstream(script_of(["hello"])) as up:
        up.listener.close()
        up.listener = socket.create_server(("127.0.0.1", port))
        up.listener.settimeout(0.2)
        assert call.join().result.text == "hello"


# ---- cancel ---------------------------------------------------------------------------------

BUSY = error_reply(503, "busy")
CANCELLED_IN = {
    "the wait for headers": Case(Reply("x", hang_after=-1)),
    "dripping headers": Case(Reply("x", drip=(1, 0.1))),
    "the wait for a body": Case(Reply("x", hang_after=0)),
    "a stream that pauses": Case(Reply(LONG, hang_after=4)),
    "a stream that runs": Case(Reply(chunks=["x"] * 999, chunk_delay=0.01)),
    "a JSON answer that pauses": Case(Reply(LONG, hang_after=4), options=PLAIN),
    "the pause before a retry": Case(BUSY, {"retry_backoff": 30}),
    "the pause of Retry-After": Case(told("60")[0]),
}


def cancelled(fusion, one, call, reason="stop it"):
    """Cancel a run from here; its call must end in time and say why."""
    before = time.monotonic()
    one.run.cancel.set(reason)
    call.join()
    assert isinstance(call.error, fusion.Cancelled) and call.error.message == reason
    assert call.ended - before < 1


@pytest.mark.parametrize("name", CANCELLED_IN)
def test_cancel_ends_a_call_within_a_second(fusion, serve, caller, name):
    case = CANCELLED_IN[name]
    up, pause = serve(case.to), "retry_backoff" in case.settings or case.to.status == 429
    one = caller(up, max_retries=2 if pause else 0, **case.settings)
    call = Background(one.ask, **case.options)
    assert up.wait_for(lambda: len(up.posts()) == 1 and (not pause or up.in_flight == 0))
    cancelled(fusion, one, call)
    assert pause or up.posts()[0].wait_closed(1), "the backend sees that the client left"
    assert len(up.requests) == 1 and one.record.attempts == 1
    assert one.record.status == "stop it"


def test_cancel_ends_the_wait_for_a_connection(fusion, caller):
    with full_port() as url:
        if url is None:
            pytest.skip("this system takes more connections than a queue holds")
        one = caller(url)
        call = Background(one.ask)
        call.thread.join(0.2)
        cancelled(fusion, one, call)
    assert one.run.ledger.spent == 0, "what was never sent costs nothing"


def test_cancel_ends_an_upload_that_nobody_reads(fusion, caller):
    with silent_port() as url:
        one = caller(url)
        call = Background(one.ask, BIG)
        call.thread.join(0.3)
        cancelled(fusion, one, call)


def test_cancel_ends_the_wait_for_a_list_of_models(serve, caller):
    up = serve("hello")
    up.models_reply = Reply(hang_after=-1)
    one = caller(up, prices={})
    call = Background(one.ask)
    assert up.wait_for(lambda: len(up.requests) == 2)
    before = time.monotonic()
    one.run.cancel.set("stop it")
    assert call.join().ended - before < 1
    assert one.record.usage.prompt > 0 < one.record.usage.completion, "it was answered"


def test_a_cancelled_run_makes_no_call(fusion, serve, caller):
    up = serve("hello")
    one = caller(up)
    one.run.cancel.set("too late")
    with pytest.raises(fusion.Cancelled, match="too late"):
        one.ask()
    assert up.connections == 0 and one.run.ledger.records == []


def test_cancelling_one_branch_leaves_the_others(fusion, serve, caller):
    gate = threading.Event()
    up = serve(Reply("hello", delay=gate))
    one = caller(up)
    member = one.config.panel[0]
    views = [one.run.branch(cancel=fusion.Cancel(one.run.cancel)) for _ in range(2)]
    calls = [Background(fusion.complete, view, member, HELLO) for view in views]
    assert up.wait_for(lambda: up.in_flight == 2)
    views[0].cancel.set("late")
    assert isinstance(calls[0].join().error, fusion.Cancelled)
    gate.set()
    assert calls[1].join().result.text == "hello"


def test_what_a_cancelled_call_had_received_is_counted(fusion, serve, caller):
    up = serve(Reply(LONG, hang_after=4))
    one = caller(up)
    arrived = threading.Event()
    call = Background(one.ask, on_delta=lambda text, _: arrived.set())
    assert arrived.wait(5) and up.wait_for(lambda: up.billed)
    cancelled(fusion, one, call)
    assert one.record.usage.estimated and one.record.usage.prompt > 0 < one.record.cost_usd


# ---- an answer that is shown while it comes -------------------------------------------------


def relayed(one, **options):
    """Make a relayed call; returns (its error, what was shown)."""
    shown = []
    error = one.fail(relayed=True, on_delta=lambda text, _: shown.append(text), **options)
    return error, "".join(shown)


@pytest.mark.parametrize("reply", [
    Reply(LONG, cut_after=3), Reply(LONG, cut_after=3, **RST), sse_error("broke", error_after=3),
    Reply(LONG, finish="error"), Reply(LONG, sse={"no_done": True, "no_finish": True})],
    ids=["cut", "reset", "error", "given-up", "endless"])
def test_after_the_first_shown_text_there_is_no_second_attempt(serve, caller, reply):
    up = serve(reply, "again")
    error, shown = relayed(caller(up))
    assert shown and LONG.startswith(shown) and len(up.posts()) == 1
    assert error.retryable and error.accepted


def test_not_even_a_lesson_is_worth_a_second_attempt_after_shown_text(serve, caller):
    late = sse_error({"code": 400, "message": "temperature is not supported"}, error_after=3)
    up = serve(late, "again")
    _, shown = relayed(caller(up), temperature=0.5)
    assert LONG.startswith(shown) and len(up.posts()) == 1


@pytest.mark.parametrize("reply", [
    Reply("", reasoning="hm"), Reply(LONG, cut_after=0), Reply("x", reasoning=LONG, cut_after=4),
    error_reply(503, "busy"), Reply(raw=b"")], ids=["empty", "cut", "reasoning", "busy", "closed"])
def test_before_the_first_shown_text_a_relayed_call_is_retried(serve, caller, reply):
    shown = []
    up = serve(reply, "again")
    found = caller(up).ask(relayed=True, on_delta=lambda text, _: shown.append(text))
    assert found.text == "".join(shown) == "again" and len(up.posts()) == 2


# ---- nothing is left behind -----------------------------------------------------------------


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name != "upstream"]


def test_threads_and_sockets_return_to_their_idle_number(serve, caller):
    before = len(own_threads())
    up = serve({"good": "hello", "cut": Reply(LONG, cut_after=2), "refused": Reply(status=400),
                "hangs": Reply(LONG, hang_after=2)})
    one = caller("http://localhost:%d/v1" % up.port, max_retries=1)
    calls = [Background(one.ask, model=model) for model in ("good", "cut", "refused", "hangs") * 3]
    assert up.wait_for(lambda: sum(not call.thread.is_alive() for call in calls) == 9)
    one.run.cancel.set("over")
    assert [call.join().error for call in calls].count(None) == 3
    assert up.wait_for(lambda: len(own_threads()) <= before)
    assert up.wait_for(lambda: up.open_connections() <= 6), "at most those that can be used again"
    one.network.close()
    assert up.wait_for(lambda: up.open_connections() == 0)


def test_a_run_forgets_the_exchanges_that_are_over(serve, caller):
    one = caller(serve("hello", Reply(LONG, cut_after=1), Reply(status=400)), max_retries=0)
    one.ask()
    one.fail()
    one.fail()
    assert not one.run.cancel.attached


# ---- headers and the key --------------------------------------------------------------------


def test_the_key_goes_into_its_header_exactly(serve, caller):
    up = serve("hello")
    caller(up, key=KEY).ask()
    assert up.posts()[0].headers["authorization"] == "Bearer " + KEY
    assert KEY.encode() not in up.posts()[0].raw


def test_without_a_key_there_is_no_such_header(serve, caller):
    up = serve("hello")
    caller(up).ask()
    assert "authorization" not in up.posts()[0].headers


def test_headers_say_what_they_must(serve, caller):
    up = serve("hello")
    caller(up).ask()
    headers = up.posts()[0].headers
    assert headers["accept-encoding"] == "identity"
    assert headers["content-type"] == "application/json"
    assert headers["host"] == "127.0.0.1:%d" % up.port
    assert headers["x-fusion-depth"] == "1" and up.malformed == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_depth_header_counts_the_fusion_servers(serve, caller, depth):
    up = serve("hello")
    caller(up, depth=depth).ask()
    assert up.posts()[0].headers["x-fusion-depth"] == str(depth + 1)


ECHOES = [
    ("a refusal", error_reply(401, "Incorrect API key provided: %s." % KEY)),
    ("another refusal", error_reply(400, "no: Bearer %s" % KEY, param=KEY, code=KEY, type=KEY)),
    ("HTML", Reply(status=403, body=b"<p>%s</p>" % KEY.encode())),
    ("text", Reply(status=502, body=KEY.encode() * 3)),
    ("a redirect", Reply(status=302, headers={"Location": "http://x/?key=" + KEY})),
    ("a 200 in prose", Reply(body=b"your key is " + KEY.encode())),
    ("a 200 of JSON", json_reply([KEY])),
    ("a late error", sse_error("bad key " + KEY, error_after=2)),
    ("an event that is no JSON", Reply(body=b"data: oops " + KEY.encode() + b"\n\n")),
    ("a header", Reply("x", status=500, headers={"X-Key": KEY, "Retry-After": KEY})),
    ("no HTTP", Reply(raw=KEY.encode() + b"\r\n\r\n")),
    ("a status line", Reply(raw=b"HTTP/1.1 999 %s\r\n\r\n" % KEY.encode())),
    ("a length", Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                           b"%s\r\n" % KEY.encode())),
]


@pytest.mark.parametrize("reply", table(ECHOES))
def test_the_key_is_in_no_error_even_if_the_backend_echoes_it(serve, caller, reply):
    one = caller(serve(reply), key=KEY, max_retries=0)
    error = one.fail()
    said = "%s %r %s %s %s" % (error, error, error.hint, one.run.degraded, one.record)
    assert KEY not in said


@pytest.mark.parametrize("reply", table(ECHOES))
def test_the_key_is_in_no_error_about_a_list_of_models(fusion, serve, caller, reply):
    up = serve("hello")
    up.models_reply = reply
    one = caller(up, key=KEY, panel="auto")
    with pytest.raises(fusion.FusionError) as caught:
        fusion.fuse(one.config, HELLO, one.run)
    assert KEY not in "%s %s" % (caught.value, caught.value.hint)


def test_the_key_is_in_no_lesson_that_the_receipt_shows(serve, caller):
    up = serve(error_reply(400, "temperature is not allowed with %s" % KEY), "hello")
    one = caller(up, key=KEY)
    one.ask(temperature=1)
    assert one.codes == ["rewritten"] and KEY not in repr(one.run.degraded)


@pytest.mark.parametrize("key", ["sk-first-line\nsk-second-line", "sk-caf\u00e9\u2026-0123456789",
                                 "sk-with-\x00-inside-0123456789"],
                         ids=["newline", "not-ASCII", "NUL"])
def test_a_key_that_fits_no_header_fails_without_being_shown(fusion, serve, caller, key):
    up = serve("hello")
    with pytest.raises(fusion.FusionError) as caught:
        caller(up, key=key).ask()
    error = caught.value
    said = "%s %r %s" % (error, error, error.hint)
    assert up.posts() == []
    assert not any(part in said for part in key.split("\n")) and key[4:12] not in said


def test_the_key_is_not_in_the_repr_of_the_configuration(caller):
    assert KEY not in repr(caller("http://127.0.0.1:1/v1", key=KEY).config)


# ---- lessons --------------------------------------------------------------------------------


class Lesson(NamedTuple):
    """A backend that refuses something, and what is sent in its place."""

    refused: object                  # body -> whether it is refused
    message: str
    sent: dict = {}                  # parameters of the call
    becomes: dict = {}               # what is left of them in the accepted body
    messages: list = HELLO
    rewritten: list = HELLO          # the accepted messages
    error: dict = {}                 # more of the refusal: param, status ...
    refusals: int = 1


def has(*names):
    return lambda body: any(name in body for name in names)


def has_role(role):
    return lambda body: any(message["role"] == role for message in body["messages"])


def does_not_alternate(body):
    roles = [message["role"] for message in body["messages"]]
    return any(one == other for one, other in zip(roles, roles[1:]))


def ends_otherwise(body):
    return body["messages"][-1]["role"] != "user"


def dropped(name, value, message, **error):
    return Lesson(has(name), message, {name: value, "max_tokens": 9}, {"max_tokens": 9},
                  error=error)


def said(role, content, **more):
    return dict({"role": role, "content": content}, **more)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
TWICE = [said("system", "s"), said("user", "one"), said("user", "two\n"), said("assistant", "a"),
         said("assistant", ""), said("user", "three")]
MERGED = [said("system", "s"), said("user", "one\n\ntwo\n"), said("assistant", "a\n\n"),
          said("user", "three")]
PREFILLED = [said("user", "say"), said("assistant", "well,")]
DEVELOPED = [said("developer", "be brief"), said("user", "say")]
ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
LESSONS = {
    "json_schema": Lesson(
        lambda body: body.get("response_format", {}).get("type") == "json_schema",
        "response_format type json_schema is not supported", {"response_format": SCHEMA},
        {"response_format": {"type": "json_object"}}),
    "any response_format": Lesson(
        has("response_format"), "'response_format' is not supported", {"response_format": SCHEMA},
        refusals=2),
    "response_format as a param": Lesson(
        has("response_format"), "unsupported", {"response_format": {"type": "json_object"}},
        error={"param": "response_format.type"}),
    "max_tokens": Lesson(
        has("max_tokens"), "Unsupported parameter: 'max_tokens' is not supported with this model. "
        "Use 'max_completion_tokens' instead.", {"max_tokens": 9}, {"max_completion_tokens": 9}),
    "max_completion_tokens": Lesson(
        has("max_completion_tokens"), "max_completion_tokens is unknown, use max_tokens",
        {"max_completion_tokens": 9}, {"max_tokens": 9}),
    "max_completion_tokens alone": Lesson(
        has("max_completion_tokens"),
        "Unrecognized request argument supplied: max_completion_tokens",
        {"max_completion_tokens": 9}, {"max_tokens": 9}, error={"param": "max_completion_tokens"}),
    "temperature": dropped("temperature", 0.7, "Unsupported value: 'temperature' does not support "
                           "0.7 with this model. Only the default (1) value is supported."),
    "temperature, 422": dropped("temperature", 0.7, "temperature: extra inputs are not permitted",
                                status=422),
    "top_p by its param": dropped("top_p", 0.5, "unsupported value", param="top_p"),
    "seed": dropped("seed", 7, "Unrecognized request argument supplied: seed"),
    "stop": dropped("stop", ["x"], "'stop' is not supported with this model"),
    "logit_bias": dropped("logit_bias", {"5": 1}, "logit_bias is not available"),
    "reasoning_effort": dropped("reasoning_effort", "low", "unknown field reasoning_effort"),
    "tool_choice": dropped("tool_choice", "auto", "tool_choice is not allowed here"),
    "alternating roles": Lesson(does_not_alternate, ALTERNATE, messages=TWICE, rewritten=MERGED),
    "alternating roles, 500": Lesson(
        does_not_alternate, "Jinja template error: " + ALTERNATE, messages=TWICE, rewritten=MERGED,
        error={"status": 500}),
    "a user at the end": Lesson(
        ends_otherwise, "The last message must be from the user", messages=PREFILLED,
        rewritten=None),
    "no prefill": Lesson(
        ends_otherwise, "This model does not support assistant message prefill. The conversation "
        "must end with a user message.", messages=PREFILLED, rewritten=None),
    "a user at the end, and a user field": Lesson(
        ends_otherwise, "The last message must be from the user", {"user": "u-1"}, {"user": "u-1"},
        messages=PREFILLED, rewritten=None),
    "developer": Lesson(
        has_role("developer"), "Unexpected role: developer", messages=DEVELOPED,
        rewritten=[said("system", "be brief"), said("user", "say")]),
    "developer, 422": Lesson(
        has_role("developer"), "unknown variant `developer`, expected one of `system`, `user`",
        messages=DEVELOPED, rewritten=[said("system", "be brief"), said("user", "say")],
        error={"status": 422}),
}


def refusing(lesson):
    """The script of a backend that refuses what the lesson is about."""
    error = dict({"status": 400}, **lesson.error)
    refusal = error_reply(message=lesson.message, **error)
    return lambda request: refusal if lesson.refused(request.body) else Reply("learnt")


def parameters(body):
    return {name: value for name, value in body.items()
            if name not in ("model", "messages", "stream", "stream_options")}


@pytest.mark.parametrize("name", LESSONS)
def test_what_a_backend_refuses_by_name_is_rewritten(serve, caller, name):
    lesson = LESSONS[name]
    up = serve(refusing(lesson))
    one = caller(up, max_retries=0)
    assert one.ask(lesson.messages, **lesson.sent).text == "learnt"
    first, last = up.posts()[0].body, up.posts()[-1].body
    assert len(up.posts()) == one.record.attempts == lesson.refusals + 1
    assert (first["messages"], parameters(first)) == (lesson.messages, lesson.sent)
    assert parameters(last) == lesson.becomes
    assert lesson.rewritten in (None, last["messages"])
    if lesson.rewritten is None:
        assert last["messages"][:-1] == lesson.messages and last["messages"][-1]["role"] == "user"


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_learnt_once_and_noted_in_each_run(serve, caller, name):
    lesson = LESSONS[name]
    up = serve(refusing(lesson))
    one = caller(up, max_retries=0)
    one.ask(lesson.messages, role="synth", **lesson.sent)
    count = len(up.posts())
    assert set(one.codes) == {"rewritten"}
    one.start_run()
    one.ask(lesson.messages, role="synth", **lesson.sent)
    assert len(up.posts()) == count + 1 and one.record.attempts == 1
    assert up.posts()[-1].body == up.posts()[-2].body
    assert set(one.codes) == {"rewritten"}
    assert {(entry["stage"], entry["model"]) for entry in one.run.degraded} == {("synth", "m")}


@pytest.mark.parametrize("name", ["json_schema", "temperature", "alternating roles", "developer"])
def test_a_lesson_is_not_applied_to_another_model_or_backend(serve, caller, name):
    lesson = LESSONS[name]
    up, other = serve(refusing(lesson)), serve("hello")
    one = caller(up)
    one.ask(lesson.messages, **lesson.sent)
    up.script = {"*": "hello"}
    caller(other, network=one.network).ask(lesson.messages, **lesson.sent)
    one.start_run()
    one.ask(lesson.messages, model="n", **lesson.sent)
    for request in (up.posts("n")[0], other.posts()[0]):
        assert request.messages == lesson.messages and parameters(request.body) == lesson.sent
    assert one.codes.count("rewritten") == 0


def test_a_run_that_a_lesson_does_not_touch_has_no_note_of_it(serve, caller):
    up = serve(refusing(LESSONS["temperature"]))
    one = caller(up)
    one.ask(temperature=0.7)
    one.start_run()
    one.ask()
    assert one.run.degraded == []


def test_usage_is_asked_for_in_another_way_when_that_is_refused(serve, caller):
    up = serve(lambda request: error_reply(400, "unknown field: stream_options")
               if "stream_options" in request.body else Reply("hello"))
    one = caller(up, max_retries=0)
    assert one.ask().text == "hello" and len(up.posts()) == 2
    assert set(one.codes) == {"rewritten", "usage_estimated"}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize("first, second, parts", [
    ("one", [{"type": "text", "text": "two"}, IMAGE], ["one", "two", IMAGE]),
    ([IMAGE], "two", [IMAGE, "two"]),
    ([IMAGE, {"type": "text", "text": "one"}], [IMAGE], [IMAGE, "one", IMAGE]),
    (None, "two", ["two"]),
    ("one", None, ["one"])], ids=["text-image", "image-text", "images", "null-text", "text-null"])
def test_merged_messages_keep_words_and_images_in_order(serve, caller, first, second, parts):
    up = serve(refusing(LESSONS["alternating roles"]))
    caller(up).ask([said("user", first), said("user", second)])
    (message,) = up.posts()[-1].messages
    content = message["content"]
    found = [content] if isinstance(content, str) else [
        part["text"] if part["type"] == "text" else part for part in content]
    assert message["role"] == "user" and found == parts


CALLED = [said("user", "what is it?"),
          said("assistant", "I look it up.", tool_calls=CALLS),
          said("tool", "it is 42", tool_call_id="c1"),
          said("tool", [{"type": "text", "text": "or 43"}], tool_call_id="c2"),
          said("user", "so?")]


def test_tool_turns_become_text_with_all_their_words(serve, caller):
    up = serve(lambda request: error_reply(400, "role 'tool' is not supported")
               if has_role("tool")(request.body) else Reply("hello"))
    one = caller(up)
    one.ask(CALLED)
    messages = up.posts()[-1].messages
    assert messages[0] == CALLED[0] and messages[-1]["content"].endswith("so?")
    assert all(isinstance(message["content"], str) and "tool_calls" not in message and
               message["role"] in ("user", "assistant") for message in messages)
    words = "\n".join(message["content"] for message in messages)
    told = [call["function"]["name"] for call in CALLS] + [
        call["function"]["arguments"] for call in CALLS]
    assert all(word in words for word in told + ["I look it up.", "it is 42", "or 43"])
    assert one.codes[:1] == ["rewritten"]


def test_merging_leaves_the_results_of_tools_apart(serve, caller):
    messages = CALLED + [said("user", "or not?")]
    up = serve(refusing(Lesson(lambda body: len(body["messages"]) == len(messages), ALTERNATE)))
    caller(up).ask(messages)
    assert up.posts()[-1].messages == CALLED[:-1] + [said("user", "so?\n\nor not?")]


def alternates(request):
    """Reply as a chat template does that knows user and assistant in turns, and nothing else."""
    roles = [message["role"] for message in request.messages]
    strict = roles == (["user", "assistant"] * len(roles))[:len(roles)]
    return Reply("hello") if strict else error_reply(400, ALTERNATE)


def test_a_template_of_two_roles_gets_tool_turns_as_text_in_turns(serve, caller):
    up = serve(alternates)
    one = caller(up)
    assert one.ask(CALLED).text == "hello"
    words = "\n".join(message["content"] for message in up.posts()[-1].messages)
    told = ("what is it?", "I look it up.", "it is 42", "or 43", "so?")
    assert all(word in words for word in told)
    assert one.codes.count("rewritten") == 2


@pytest.mark.parametrize("status, message", [
    (400, "Bad Request"), (400, ""), (422, "Unprocessable Entity"), (400, "messages: too short"),
    (400, "unknown field: frequency_penalty"), (403, "temperature is not for you"),
    (400, "max_tokens is too large: 9. This model supports at most 8.")])
def test_a_refusal_that_names_nothing_that_was_sent_is_final(serve, caller, status, message):
    up = serve(error_reply(status, message))
    one = caller(up)
    one.fail(max_tokens=9, temperature=0.5)
    assert len(up.posts()) == 1


@pytest.mark.parametrize("messages, sent", [([], {}), (HELLO, {"response_format": "json"})],
                         ids=["no-messages", "no-object"])
def test_a_refusal_of_a_broken_request_is_told_as_it_is(serve, caller, messages, sent):
    up = serve(error_reply(400, "messages or response_format are broken"))
    one = caller(up)
    assert "broken" in one.fail(messages, **sent).message


def test_a_lesson_that_did_not_help_is_not_kept(serve, caller):
    up = serve(lambda request: Reply("hello") if request.n > 1 else
               error_reply(400, "The image is too large; temperature and messages are fine"))
    one = caller(up)
    one.fail(temperature=0.5)
    assert one.ask(temperature=0.5).text == "hello"
    assert ["temperature" in post.body for post in up.posts()] == [True, False, True]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_behind_any_number_of_think_blocks_comes_whole(serve, caller, stream):
    up = serve(Reply("<think>a</think>\n" * 3000 + "the answer"))
    reply = caller(up).ask(stream=stream)
    assert (reply.text, reply.reasoning.count("a")) == ("the answer", 3000)


def test_the_parameters_that_make_an_answer_right_are_never_dropped(serve, caller):
    tools = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
    up = serve(error_reply(400, "tools, n, model and messages are not supported"))
    caller(up).fail(tools=tools, n=2)
    assert {json.dumps(request.body["tools"]) for request in up.posts()} == {json.dumps(tools)}
    assert {request.body["n"] for request in up.posts()} == {2}


def test_a_backend_that_refuses_without_end_ends(serve, caller):
    sent = {"temperature": 1, "top_p": 1, "seed": 1, "max_tokens": 9, "response_format": SCHEMA,
            "stop": ["x"], "user": "u", "tool_choice": "auto", "reasoning_effort": "low"}
    everything = " ".join(sent) + " max_completion_tokens stream_options. Roles must alternate, " \
        "the last message must be the user's, unknown roles: developer, tool"
    up = serve(error_reply(400, everything))
    call = Background(caller(up).ask, DEVELOPED + CALLED, **sent).join()
    assert call.error.kind == "request" and len(up.posts()) <= 25


def test_calls_at_once_learn_the_same_lesson(serve, caller):
    gate = threading.Event()
    up = serve(lambda request: error_reply(400, "temperature is not supported", delay=gate)
               if "temperature" in request.body else Reply("learnt"))
    one = caller(up)
    calls = [Background(one.ask, temperature=1) for _ in range(6)]
    assert up.wait_for(lambda: up.in_flight == 6)
    gate.set()
    assert {call.join().result.text for call in calls} == {"learnt"}
    assert len(up.posts()) == 12


# ---- the receipt of a call ------------------------------------------------------------------


def test_usage_and_cost_of_all_attempts_are_one_record(serve, caller):
    empty = Reply("", usage={"prompt_tokens": 100, "completion_tokens": 20})
    one = caller(serve(empty, empty, Reply("hello", usage=USAGE)), prices={
        "m": {"input": 10, "output": 100}})
    reply = one.ask(role="judge")
    record, = one.run.ledger.records
    assert record[:2] == ("m", "judge") and record.attempts == 3 and record.status == "stop"
    assert (record.usage.prompt, record.usage.completion) == (211, 47)
    assert record.cost_usd == pytest.approx((211 * 10 + 47 * 100) / 1e6)
    assert record.source == "table" and not record.usage.estimated
    assert reply.usage[:2] == (211, 47) and reply.usage.cost == record.cost_usd
    assert one.run.ledger.spent == pytest.approx(record.cost_usd)


def test_an_accepted_attempt_that_failed_is_estimated(serve, caller):
    one = caller(serve(Reply(LONG, cut_after=4), Reply("hello", usage=USAGE)))
    one.ask([{"role": "user", "content": LONG}])
    usage = one.record.usage
    assert usage.estimated and one.record.source == "mixed" and one.record.attempts == 2
    assert usage.prompt > 11 + len(LONG) / 8 and usage.completion > 7 + len(LONG) / 16
    assert one.record.cost_usd == pytest.approx((usage.prompt + 2 * usage.completion) / 1e6)
    assert one.codes == ["usage_estimated"]


def test_usage_that_came_before_the_cut_counts_exactly(serve, caller):
    cut = Reply(LONG, usage=USAGE, cut_after=8, sse={"usage_on": "content"})
    one = caller(serve(cut, Reply("hello", usage=USAGE)))
    one.ask()
    assert one.record.usage[:4] == (22, 14, 6, 4) and one.run.degraded == []


@pytest.mark.parametrize("reply", [error_reply(503, "busy"), error_reply(429, "slow down")],
                         ids=["503", "429"])
def test_an_attempt_that_was_refused_costs_nothing(serve, caller, reply):
    one = caller(serve(reply, Reply("hello", usage=USAGE)))
    one.ask()
    assert one.record.usage[:4] == (11, 7, 3, 2) and one.record.source == "table"


def test_a_call_that_failed_for_good_is_in_the_receipt(serve, caller):
    one = caller(serve(Reply(LONG, cut_after=4)), max_retries=1)
    one.fail()
    record, = one.run.ledger.records
    assert (record.status, record.attempts, record.source) == ("failed", 2, "estimated")
    assert record.cost_usd > 0


def test_a_price_that_is_unknown_makes_the_cost_unknown(serve, caller):
    one = caller(serve(Reply("hello", usage=USAGE), owned_by="somebody"), prices={})
    one.ask()
    assert (one.record.cost_usd, one.record.source) == (None, "unknown")
    assert one.codes == ["price_unknown"]


@pytest.mark.parametrize("owner", ["llamacpp", "library", "vllm"])
def test_a_local_engine_costs_nothing(serve, caller, owner):
    up = serve(Reply("hello", usage=USAGE), owned_by=owner, models=["m"])
    one = caller(up, prices={})
    for _ in range(3):
        one.ask()
    assert (one.record.cost_usd, one.record.source) == (0, "local")
    assert one.run.degraded == []
    assert len([request for request in up.requests if request.method == "GET"]) == 1


def test_a_configured_price_comes_before_a_local_engine(serve, caller):
    one = caller(serve(Reply("hello", usage=USAGE), owned_by="llamacpp", models=["m"]))
    one.ask()
    assert one.record.source == "table" and one.record.cost_usd > 0


def test_a_backend_without_a_list_of_models_is_asked_for_it_once(serve, caller):
    up = serve(Reply("hello", usage=USAGE))
    up.models_reply = Reply(status=404)
    one = caller(up, prices={})
    for _ in range(3):
        one.ask()
    assert (one.record.cost_usd, one.record.source) == (None, "unknown")
    assert [request.method for request in up.requests].count("GET") == 1


def test_a_list_of_models_that_failed_once_is_asked_again(serve, caller):
    up = serve(Reply("hello", usage=USAGE), owned_by="llamacpp", models=["m"])
    up.models_reply = error_reply(503, "loading")
    one = caller(up, prices={})
    one.ask()
    up.models_reply = None
    one.start_run()
    one.ask()
    assert (one.record.cost_usd, one.record.source) == (0, "local")


# ---- prompts --------------------------------------------------------------------------------


def test_a_prompt_of_5_megabytes_is_sent_intact(serve, caller):
    up = serve("hello")
    messages = [said("user", "\u00e9\U0001f600\u2028\r\n\t\"\\</x>x" * 250_000)]
    assert len(encode(messages)) > 5_000_000
    assert caller(up).ask(messages).text == "hello"
    assert up.posts()[0].messages == messages and up.malformed == []


ODD_MESSAGES = [
    ("null content", [said("user", "x"), said("assistant", None), said("user", "y")]),
    ("empty content", [said("user", "")]),
    ("parts", [said("user", [{"type": "text", "text": "x"}, IMAGE, {"type": "odd", "a": [1]}])]),
    ("unknown fields", [said("user", "x", name="n", cache_control={"type": "ephemeral"})]),
    ("tool turns", CALLED),
    ("lone surrogates", [said("user", "half \ud83d of \udc00 it \U0001f600")]),
    ("control characters", [said("user", "\x00\x01\x7f\x85\ufffe")]),
    ("numbers", [said("user", "x", a=1e300, b=-0.0, c=12345678901234567890)]),
]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize("messages", table(ODD_MESSAGES))
def test_messages_arrive_as_they_were_given(serve, caller, messages, stream):
    up = serve("hello")
    before = json.dumps(messages)
    assert caller(up).ask(messages, stream=stream).text == "hello"
    assert json.dumps(up.posts()[0].messages) == before == json.dumps(messages)


def test_parameters_arrive_as_they_were_given_and_null_ones_do_not(serve, caller):
    up = serve("hello")
    sent = {"temperature": 0, "max_tokens": 5, "stop": ["\u00e9"], "logit_bias": {}, "x": None}
    caller(up).ask(stream=False, **sent)
    body = up.posts()[0].body
    assert body == dict(model="m", messages=HELLO, temperature=0, max_tokens=5, stop=["\u00e9"],
                        logit_bias={})


def test_a_stream_asks_for_usage(serve, caller):
    up = serve("hello")
    caller(up).ask()
    assert up.posts()[0].body["stream_options"] == {"include_usage": True}


def test_half_an_emoji_in_an_answer_gets_through_the_whole_pipeline(fusion, serve, caller):
    body = b'{"choices": [{"message": {"content": "half \\ud83d of it"}, "finish_reason": "stop"}]}'
    up = serve(Reply(body=body))
    one = caller(up, panel=["m", "n"])
    result = fusion.fuse(one.config, [said("user", "also \udc00 half")], one.run)
    assert "half" in result.reply.text and "of it" in result.reply.text


# ---- the panel that is found ----------------------------------------------------------------


def fused(fusion, up, caller, **settings):
    one = caller(up, panel="auto", **settings)
    return fusion.fuse(one.config, HELLO, one.run)


def test_panel_auto_is_what_the_backend_lists_without_what_cannot_answer(fusion, serve, caller):
    models = ["llama-3.2-3b", "qwen3", "nomic-embed-text", "text-embedding-3-small",
              "bge-reranker", "whisper-1", "tts-1"]
    up = serve(lambda request: Reply("I am " + request.model), models=models, owned_by="library")
    result = fused(fusion, up, caller)
    assert result.receipt["panel_models"] == ["llama-3.2-3b", "qwen3"]
    assert {request.model for request in up.posts()} == {"llama-3.2-3b", "qwen3"}


def test_panel_auto_takes_sixteen_at_most(fusion, serve, caller):
    up = serve("hello", models=["m%d" % number for number in range(40)], owned_by="library")
    assert len(fused(fusion, up, caller).receipt["panel_models"]) == 16


@pytest.mark.parametrize("members", [[], ["member"], [{"id": "member", "owned_by": "vendor"}]],
                         ids=["alone", "its-own", "of-others"])
def test_panel_auto_refuses_another_fusion_server(fusion, serve, caller, members):
    up = serve("hello", models=["fusion"] + members, owned_by="fusion")
    with pytest.raises(fusion.BackendError, match="fusion") as caught:
        fused(fusion, up, caller)
    assert "FUSION_BASE_URL" in caught.value.hint and up.posts() == []


LISTS = [
    ("empty", json_reply({"data": []}), "no model"),
    ("null", json_reply({"data": None}), "no model"),
    ("no data", json_reply({"object": "list"}), "no model"),
    ("rows of nonsense", json_reply({"data": [1, "x", None, {}, {"id": 5}]}), "no model"),
    ("embeddings only", json_reply({"data": [{"id": "nomic-embed-text"}]}), "no model"),
    ("HTML", Reply(body=b"<html>hello</html>", content_type="text/html"), "list of models"),
    ("prose", Reply(body=b"Ollama is running"), "list of models"),
    ("no bytes", Reply(body=b""), "list of models"),
    ("a number", json_reply({"data": 5}), "list of models"),
    ("a bare number", json_reply(5), ""),
    ("refused", error_reply(401, "who are you?"), "who are you"),
    ("failing", error_reply(500, "it broke"), "it broke"),
    ("closed", Reply(raw=b""), "connection"),
    ("cut", Reply(body=b'{"data": []}' * 9, cut_after=3), "cut"),
]


@pytest.mark.parametrize("reply, words", table(LISTS))
def test_panel_auto_without_a_list_is_a_clear_error(fusion, serve, caller, reply, words):
    up = serve("hello")
    up.models_reply = reply
    with pytest.raises(fusion.BackendError) as caught:
        fused(fusion, up, caller)
    assert words in caught.value.message and caught.value.exit_code == 3
    assert up.posts() == []


def test_panel_auto_of_a_dead_backend_is_a_clear_error(fusion, caller):
    port = free_port()
    with pytest.raises(fusion.BackendError, match="127.0.0.1:%d" % port) as caught:
        fused(fusion, "http://127.0.0.1:%d/v1" % port, caller)
    assert caught.value.hint and caught.value.exit_code == 3


def test_panel_auto_costs_nothing_on_a_local_engine(fusion, serve, caller):
    up = serve("hello", models=["a", "b"], owned_by="llamacpp")
    receipt = fused(fusion, up, caller).receipt
    assert (receipt["cost_usd"], receipt["cost_source"]) == (0, "local")
