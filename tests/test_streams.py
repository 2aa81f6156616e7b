"""What /v1/chat/completions sends: streams to the byte, whole answers, and clients that leave.

The server runs in process between a scripted upstream and clients on raw sockets.
"""

import contextlib
import json
import re
import socket
import struct
import sys
import threading
import time

import pytest

from serving import CHAT, MEMBERS, QUESTION, Serving, Steps, encode_request, until
from test_wiring import judgement
from upstream import Reply, error_reply, json_reply

USAGE = {"prompt_tokens": 10, "completion_tokens": 5}
SOON_S = 1.0  # the contract: a client that left costs nothing more after one second


@pytest.fixture
def serve(fusion, tmp_path):
    """Starts servers, and stops them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda script=None, **options: stack.enter_context(
            Serving(fusion, tmp_path, script or cast(), **options))


@pytest.fixture
def quick(fusion, monkeypatch):
    """Heartbeats after a tenth of a second."""
    monkeypatch.setattr(fusion, "BEAT_S", 0.1)
    monkeypatch.setattr(fusion, "TICK_S", 0.02)


def said(text="", **options):
    """A reply that bills 10 and 5 tokens."""
    options.setdefault("usage", USAGE)
    return Reply(text, **options)


def cast(**models):
    """A script in which everything works, but for the models that are given."""
    script = {model: said("draft of " + model) for model in MEMBERS}
    script.update(judge=said(judgement()), writer=said(chunks=["One ", "two."]), w2=said("2"))
    script.update(models)
    return script


def asking(**fields):
    return dict({"messages": QUESTION}, **fields)


def function(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def calling(name, arguments, call_id):
    return {"id": call_id, "type": "function",
            "function": {"name": name, "arguments": arguments}}


TOOLS = [function("look"), function("count")]
CALLS = [calling("look", '{"at": "sky"}', "call_1"), calling("count", '{"to": 3}', "call_2")]
SOLO = {"fusion": {"mode": "solo"}}


# ---- reading a stream -------------------------------------------------------------------------


def frames_of(body):
    """The events of a body, which has to end with the end of one."""
    assert body.endswith(b"\n\n")
    return body[:-2].split(b"\n\n")


def chunk_in(frame):
    """The JSON of a frame that is data; None for a comment. Nothing else may stand there."""
    if frame.startswith(b":"):
        assert b"\n" not in frame
        return None
    assert frame.startswith(b"data: ") and b"\n" not in frame and b"\r" not in frame, frame
    return json.loads(frame[6:].decode("utf-8"))


def chunks_of(body):
    """The chunks of a stream that ends as it should."""
    *frames, last = frames_of(body)
    assert last == b"data: [DONE]"
    return [chunk for chunk in map(chunk_in, frames) if chunk is not None]


def choices_of(body):
    return [choice for chunk in chunks_of(body) for choice in chunk["choices"]]


def joined(body, field="content", index=0):
    """What a client has once it has put one field of the deltas of a choice together."""
    return "".join(choice["delta"].get(field) or "" for choice in choices_of(body)
                   if choice["index"] == index)


def is_beat(chunk):
    return bool(chunk) and "progress" in chunk.get("fusion", {})


def content_frame(client):
    """The delta of the next frame that is data and no heartbeat."""
    while True:
        chunk = chunk_in(client.frame())
        if chunk is not None and not is_beat(chunk):
            return chunk["choices"][0]["delta"]


# ---- every byte -------------------------------------------------------------------------------

PLACEHOLDERS = (
    (rb'chatcmpl-[0-9a-f]{24}"', b'ID"'), (rb'"run-[0-9a-f]{24}"', b'"RUN"'),
    (rb'"created": \d{10}\b', b'"created": 1'), (rb'"seed": \d+', b'"seed": 7'),
    (rb'"(latency_s|panel|judge|synth|refine|total|t)": \d+\.\d+(e-\d+)?', rb'"\1": 0.1'),
    (rb'"(cost_usd|cost)": \d+(\.\d+)?(e-\d+)?', rb'"\1": 0.2'))


def plain(body):
    """A body with placeholders for what is different each time."""
    for pattern, new in PLACEHOLDERS:
        body = re.sub(pattern, new, body)
    return body.decode("utf-8")


HEAD = '{"id": "ID", "object": "chat.completion.chunk", "created": 1, "model": "fusion", '


def delta(said, index=0, finish="null", more=""):
    return 'data: %s"choices": [{"index": %d, "delta": %s, "logprobs": null, ' \
        '"finish_reason": %s}]%s}\n\n' % (HEAD, index, said, finish, more)


def row(model, role, status="stop"):
    return '{"model": "%s", "role": "%s", "prompt_tokens": 10, "completion_tokens": 5, ' \
        '"cost_usd": 0.2, "source": "table", "latency_s": 0.1, "attempts": 1, "status": "%s"}' \
        % (model, role, status)


ANALYSIS = '{"consensus": [], "contradictions": [], "partial_coverage": [], ' \
    '"unique_insights": [], "blind_spots": [], "errors": [], "must_include": [], ' \
    '"best_draft": "m1"}'
ROLE = delta('{"role": "assistant", "content": ""}')
DONE = "data: [DONE]\n\n"


def receipt(*writers, extra=""):
    rows = [row("m1", "member"), row("judge", "judge")] + list(writers or [row("writer", "synth")])
    return '{"config": "config.json", "mode": "fuse", "mode_reason": "", ' \
        '"panel_models": ["m1"], "panel_succeeded": ["m1"], "judge": "judge", ' \
        '"synthesizer": "writer", "cost_usd": 0.2, "cost_source": "table", ' \
        '"cost_breakdown": [%s], %s"timing_s": {"panel": 0.1, "judge": 0.1, "synth": 0.1, ' \
        '"refine": 0.1, "total": 0.1}, "degraded": [], "analysis": %s, "judge_unsupported": 0, ' \
        '"seed": 7, "request_id": "RUN"}' % (", ".join(rows), extra, ANALYSIS)


def closing(*writers, finish="stop", index=0, usage=""):
    return delta("{}", index, '"%s"' % finish, usage + ', "fusion": ' + receipt(*writers))


ANSWER = delta('{"content": "One "}') + delta('{"content": "two."}')
PLAIN = ROLE + ANSWER + closing() + DONE


def test_a_plain_stream_to_the_byte(serve):
    answer = serve(panel=["m1"]).post(asking(stream=True))
    assert plain(answer.body) == PLAIN


def test_a_stream_with_usage_to_the_byte(serve):
    answer = serve(panel=["m1"]).post(asking(stream=True, stream_options={"include_usage": True}))
    totals = '"usage": {"prompt_tokens": 30, "completion_tokens": 15, "total_tokens": 45, ' \
        '"prompt_tokens_details": {"cached_tokens": 0}, ' \
        '"completion_tokens_details": {"reasoning_tokens": 0}}'
    none = ', "usage": null'
    wanted = [delta(text, more=none) for text in (
        '{"role": "assistant", "content": ""}', '{"content": "One "}', '{"content": "two."}')]
    wanted += [closing(usage=none), 'data: %s"choices": [], %s}\n\n' % (HEAD, totals), DONE]
    assert plain(answer.body) == "".join(wanted)


def test_a_stream_with_two_parallel_tool_calls_to_the_byte(serve):
    made = serve(cast(writer=said("", chunks=["Let me see."], tool_calls=CALLS)), panel=["m1"])
    answer = made.post(asking(stream=True, tools=TOOLS))

    def opening(index, call_id, name):
        return '{"tool_calls": [{"id": "%s", "type": "function", "function": {"name": "%s", ' \
            '"arguments": ""}, "index": %d}]}' % (call_id, name, index)

    def rest(index, arguments):
        return '{"tool_calls": [{"index": %d, "function": {"arguments": %s}}]}' \
            % (index, json.dumps(arguments))

    wanted = ROLE + delta('{"content": "Let me see."}') + delta(opening(0, "call_1", "look")) \
        + delta(rest(0, '{"at": "sky"}')) + delta(opening(1, "call_2", "count")) \
        + delta(rest(1, '{"to": 3}')) \
        + closing(row("writer", "synth", "tool_calls"), finish="tool_calls") + DONE
    assert plain(answer.body) == wanted


def test_a_stream_of_two_choices_to_the_byte(serve):
    gate = threading.Event()

    def second(request):  # the second choice speaks after the first one
        return said(chunks=["two"], delay=gate) if request.n else said(chunks=["one"])

    made = serve(cast(writer=second), panel=["m1"])
    client = made.stream(asking(n=2))
    wanted = [delta('{"role": "assistant", "content": ""}', index) for index in (0, 1)]
    frames = [client.frame() + b"\n\n" for _ in range(3)]
    gate.set()
    frames += [frame + b"\n\n" for frame in client.frames()]
    early = json.loads(frames[2][6:])["choices"][0]["index"]
    wanted += [delta('{"content": "one"}', early), delta('{"content": "two"}', 1 - early),
               delta("{}", 0, '"stop"'),
               closing(row("writer", "synth"), row("writer", "synth"), index=1), DONE]
    assert plain(b"".join(frames)) == "".join(wanted)


@pytest.mark.parametrize("cut", ["fin", "rst"])
def test_a_stream_whose_writer_is_cut_off_to_the_byte(serve, cut):
    gate = threading.Event()
    broken = said(chunks=["One ", "two ", "three"], cut_after=2, cut=cut, chunk_delay=gate)
    made = serve(cast(writer=broken), panel=["m1"], max_retries=2)
    client = made.stream(asking())
    frames = [client.frame(), client.frame()]
    gate.set()
    frames += client.frames()
    body = b"".join(frame + b"\n\n" for frame in frames)
    assert re.sub(r": the [^\"]* was cut( in mid-answer)?", ": CUT", plain(body)) == (
        ROLE + delta('{"content": "One "}') + delta('{"content": "two "}')
        + 'data: {"error": {"message": "the answer was cut off in the middle: CUT", "type": '
        '"api_error", "param": null, "code": "stream_cut"}, "fusion": {"degraded": [{"code": '
        '"usage_estimated", "stage": "synth", "model": "writer", "detail": "the backend reported '
        'no usage"}, {"code": "stream_cut", "stage": "synth", "model": "writer", "detail": '
        '"the %s"}]}}\n\n' % re.search(r"middle: the ([^\"]*)\"", plain(body)).group(1) + DONE)
    assert client.is_closed()
    assert "stream_cut" in made.logged()[0]["error"]
    assert len(made.up.posts("writer")) == 1, "what was said is not said again"


def test_a_stream_whose_panel_fails_to_the_byte(serve):
    made = serve(cast(m1=error_reply(500, "boom \u2028 \"1\""), m2=Reply("")), panel=["m1", "m2"])
    client = made.stream(asking())
    body = b"".join(frame + b"\n\n" for frame in client.frames())
    one = '{"code": "member_failed", "stage": "panel", "model": "m1", ' \
        '"detail": "500: boom \\"1\\""}'
    two = '{"code": "member_failed", "stage": "panel", "model": "m2", ' \
        '"detail": "answered with nothing"}'
    wanted = [ROLE + 'data: {"error": {"message": "no member of the panel answered: %s", '
              '"type": "api_error", "param": null, "code": "panel_failed"}, '
              '"fusion": {"degraded": [%s]}}\n\n' % (said, ", ".join(codes)) + DONE
              for said, codes in (
                  ('m1: 500: boom \\"1\\"; m2: answered with nothing', (one, two)),
                  ('m2: answered with nothing; m1: 500: boom \\"1\\"', (two, one)))]
    noted = ', {"code": "usage_estimated", "stage": "member", "model": "m2", ' \
        '"detail": "the backend reported no usage"}'
    assert plain(body).replace(noted, "") in wanted
    assert client.is_closed()
    assert made.logged()[0]["status"] == 200


@pytest.mark.parametrize("headers", [{}, {"Connection": "keep-alive"}], ids=["plain", "keeps"])
def test_a_stream_of_http_1_0_is_the_same_without_chunks_and_ends_with_the_connection(
        serve, headers):
    client = serve(panel=["m1"]).stream(asking(), version="1.0", headers=headers)
    answer = client.answer()
    assert answer.headers["connection"] == "close"
    assert not {"transfer-encoding", "content-length"} & set(answer.headers)
    assert plain(answer.raw_body) == PLAIN
    assert client.is_closed()


def test_head_and_framing_of_a_stream_to_the_byte(serve):
    made = serve(panel=["m1"])
    client = made.stream(asking())
    answer = client.answer()
    head = re.sub(rb"date: [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", b"date: D",
                  re.sub(rb"run-[0-9a-f]{24}", b"RUN", answer.raw_head))
    assert head == (
        b"HTTP/1.1 200 OK\r\nx-request-id: RUN\r\ndate: D\r\n"
        b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        b"x-accel-buffering: no\r\ntransfer-encoding: chunked\r\n\r\n")
    pieces, rest = [], answer.raw_body
    while rest:
        size, rest = rest.split(b"\r\n", 1)
        assert size == b"%x" % int(size, 16)
        pieces.append(rest[:int(size, 16)])
        assert rest[len(pieces[-1]):][:2] == b"\r\n"
        rest = rest[len(pieces[-1]) + 2:]
    assert pieces.pop() == b"" and plain(b"".join(pieces)) == PLAIN
    assert len(pieces) == 4 and all(piece.endswith(b"\n\n") for piece in pieces)
    assert client.request(asking(stream=True)).answer().status == 200, "the connection goes on"


def test_a_stream_with_events_to_the_byte(serve):
    made = serve(cast(m1=said(chunks=["a draft"], reasoning="")), panel=["m1"])
    answer = made.post(asking(stream=True, fusion={"events": True}))

    def event(kind, fields):
        return "event: fusion.%s\ndata: {%s, \"t\": 0.1}\n\n" % (kind, fields)

    def stage(name, model, state):
        return event("stage", '"stage": "%s", "state": "%s", "model": "%s"' % (name, state, model))

    wanted = [
        ROLE, event("slot", '"slot": 0, "layer": 1, "model": "m1", "state": "running"'),
        event("delta", '"slot": 0, "layer": 1, "text": "a draft", "reasoning": ""'),
        event("slot", '"slot": 0, "layer": 1, "model": "m1", "state": "done", "tokens": 5, '
              '"cost": 0.2'),
        stage("judge", "judge", "running"), stage("judge", "judge", "done"),
        event("analysis", '"analysis": ' + ANALYSIS), stage("synth", "writer", "running"),
        ANSWER, stage("synth", "writer", "done"),
        event("end", '"receipt": ' + receipt(extra='"tokens": 45, ')), closing(), DONE]
    assert plain(answer.body) == "".join(wanted)


def test_a_stream_with_readable_progress_to_the_byte(serve):
    made = serve(panel=["m1"])
    answer = made.post(asking(stream=True, fusion={"progress": "reasoning"}))

    def line(text):
        return delta('{"reasoning_content": "%s\\n"}' % text)

    assert plain(answer.body) == ROLE + "".join(map(line, (
        "m1: running", "m1: done", "judge: running", "judge: done", "writer: running"))) \
        + ANSWER + line("writer: done") + closing() + DONE


def test_progress_names_why_a_member_failed(serve):
    made = serve(cast(m2=error_reply(500, "boom")), panel=["m1", "m2"])
    answer = made.post(asking(stream=True, fusion={"progress": "reasoning"}))
    assert "m2: failed, 500: boom\n" in joined(answer.body, "reasoning_content")


def test_events_tell_of_what_degraded(serve):
    made = serve(cast(judge=error_reply(500, "out")), panel=["m1"])
    answer = made.post(asking(stream=True, fusion={"events": True}))
    frames = [frame for frame in frames_of(answer.body)
              if frame.startswith(b"event: fusion.degraded\n")]
    assert [json.loads(frame.split(b"\ndata: ")[1])["code"] for frame in frames] == [
        "judge_failed"]


# ---- rules of every stream --------------------------------------------------------------------

STREAMS = {
    "plain": ({}, {}),
    "usage": ({}, {"stream_options": {"include_usage": True}}),
    "two choices": ({}, {"n": 2}),
    "two choices and usage": ({}, {"n": 2, "stream_options": {"include_usage": True}}),
    "tools": ({"writer": said("", tool_calls=CALLS)}, {"tools": TOOLS}),
    "tools twice": ({"writer": said("", tool_calls=CALLS)}, {"tools": TOOLS, "n": 2}),
    "reasoning": ({"writer": said("So.", reasoning="thinking it over")}, {}),
    "progress": ({}, {"fusion": {"progress": "reasoning"}}),
    "refined": ({}, {"fusion": {"refine": True}}),
    "solo": ({}, SOLO),
    "by name": ({}, {"model": "m2"}),
    "stand-in": ({"writer": error_reply(500, "out")}, {}),
    "a JSON form": ({"writer": said('{"a": 1}')}, {"response_format": {"type": "json_object"}}),
    "a backend that does not stream": ({"writer": said("An answer.", as_json=True)}, {}),
    "refusal": ({"writer": json_reply({"choices": [{"index": 0, "finish_reason": "stop",
                 "message": {"content": None, "refusal": "No."}}], "usage": USAGE})}, {}),
}


@pytest.mark.parametrize("models, fields", STREAMS.values(), ids=STREAMS)
def test_the_rules_of_every_stream(serve, models, fields):
    answer = serve(cast(**models)).post(asking(stream=True, **fields))
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(answer.body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for key, kind in (("id", str), ("created", int), ("model", str)):
        first, = {chunk[key] for chunk in chunks}
        assert isinstance(first, kind)
    assert abs(chunks[0]["created"] - time.time()) < 60
    assert chunks[0]["id"] == "chatcmpl-" + answer.headers["x-request-id"][4:]
    assert chunks[0]["model"] == fields.get("model", "fusion")
    wants_usage = "stream_options" in fields
    assert [not chunk["choices"] for chunk in chunks] == \
        [False] * (len(chunks) - wants_usage) + [True] * wants_usage
    assert [bool(chunk.get("usage")) for chunk in chunks] == \
        [not chunk["choices"] for chunk in chunks]
    spoken = [chunk for chunk in chunks if chunk["choices"]]
    assert ["fusion" in chunk for chunk in spoken] == [False] * (len(spoken) - 1) + [True]
    assert all("fusion" not in chunk for chunk in chunks if not chunk["choices"])
    assert spoken[-1]["fusion"]["request_id"] == answer.headers["x-request-id"]
    assert all(len(chunk["choices"]) == 1 for chunk in spoken)
    for index in range(fields.get("n", 1)):
        check_choice([chunk["choices"][0] for chunk in spoken
                      if chunk["choices"][0]["index"] == index])
    assert {chunk["choices"][0]["index"] for chunk in spoken} == set(range(fields.get("n", 1)))


def check_choice(choices):
    """One choice of a stream: the role once and first, something said, the finish once, last."""
    deltas = [choice["delta"] for choice in choices]
    assert ["role" in found for found in deltas] == [True] + [False] * (len(deltas) - 1)
    assert deltas[0]["role"] == "assistant"
    finishes = [choice["finish_reason"] for choice in choices]
    assert finishes[-1] and not any(finishes[:-1])
    calls = [call for found in deltas for call in found.get("tool_calls", [])]
    assert any(found.get("content") or found.get("refusal") for found in deltas) or calls
    assert (finishes[-1] == "tool_calls") == bool(calls)
    seen = {}
    for call in calls:
        fresh = call["index"] not in seen
        assert ("id" in call, "type" in call, "name" in call["function"]) == (fresh,) * 3
        seen[call["index"]] = seen.get(call["index"], "") + call["function"]["arguments"]
    assert sorted(seen) == list(range(len(seen)))
    for number, arguments in seen.items():
        assert arguments == CALLS[number]["function"]["arguments"]


@pytest.mark.parametrize("models, fields", STREAMS.values(), ids=STREAMS)
def test_a_whole_answer_says_what_the_stream_says(serve, models, fields):
    made = serve(cast(**models))
    streamed = made.post(asking(stream=True, **fields)).body
    for choice in made.post(asking(**fields)).json["choices"]:
        found, index = choice["message"], choice["index"]
        assert (found["content"] or "") == joined(streamed, "content", index)
        assert (found["refusal"] or "") == joined(streamed, "refusal", index)
        if "progress" not in str(fields):
            assert found.get("reasoning_content", "") == joined(
                streamed, "reasoning_content", index)
        assert choice["finish_reason"] == [
            part["finish_reason"] for part in choices_of(streamed)
            if part["index"] == index][-1]
        assert found.get("tool_calls", []) == (CALLS if "tools" in fields else [])


FAILURES = {
    "writer cut": ({"writer": said("one two", cut_after=3)}, {}, "stream_cut"),
    "writer's error in the stream": (
        {"writer": said("one two", error="overloaded", error_after=3)}, {}, "stream_cut"),
    "one choice of two": ({"writer": [said("one"), said("one two", cut_after=3)]}, {"n": 2},
                          "stream_cut"),
    "panel": (dict.fromkeys(MEMBERS, Reply("")), {}, "panel_failed"),
    "panel of two choices": (dict.fromkeys(MEMBERS, Reply("")), {"n": 2}, "panel_failed"),
    "panel and usage": (dict.fromkeys(MEMBERS, Reply("")),
                        {"stream_options": {"include_usage": True}}, "panel_failed"),
    "time": ({"writer": said(hang_after=-1)}, SOLO, "timeout"),
    "a tool call cut": ({"writer": said("Well.", tool_calls=CALLS, cut_after=10)},
                        {"tools": TOOLS}, "stream_cut"),
}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("models, fields, code", FAILURES.values(), ids=FAILURES)
def test_a_stream_that_fails_never_looks_complete(serve, models, fields, code, version):
    made = serve(cast(**models), timeout_s=0.5 if code == "timeout" else 60)
    client = made.stream(asking(**fields), version=version)
    *frames, error, done = client.frames()
    assert (client.status, done) == (200, b"data: [DONE]")
    failed = chunk_in(error)
    assert set(failed) == {"error", "fusion"}
    assert set(failed["error"]) == {"message", "type", "param", "code"}
    assert (failed["error"]["code"], failed["error"]["type"]) == (code, "api_error")
    assert failed["fusion"]["degraded"] and all(
        set(entry) == {"code", "stage", "model", "detail"}
        for entry in failed["fusion"]["degraded"])
    left = [chunk["choices"][0] for chunk in map(chunk_in, frames)]
    assert not any(choice["finish_reason"] for choice in left)
    assert not any("fusion" in chunk or chunk.get("usage") for chunk in map(chunk_in, frames))
    assert not any("tool_calls" in choice["delta"] for choice in left)
    assert client.is_closed()
    assert code in made.logged()[0]["error"]


# ---- refusals come before the stream ----------------------------------------------------------

KEY = {"Authorization": "Bearer secret"}
REFUSALS = {
    "bad JSON": (b'{"messages": [', 400, None, None),
    "no object": (b"[]", 400, None, None),
    "no messages": ({"stream": True}, 400, "messages", None),
    "no message": (asking(messages=[]), 400, "messages", None),
    "unknown field of the fusion block": (
        asking(fusion={"base_url": "http://x"}), 400, "fusion.base_url", None),
    "wrong value in the fusion block": (asking(fusion={"layers": 9}), 400, "fusion.layers", None),
    "nested in the fusion block": (
        asking(fusion={"panel": [{"model": "m1"}]}), 400, "fusion.panel[0]", None),
    "unknown preset": (asking(fusion={"preset": "frontier"}), 400, "fusion.preset", None),
    "too many calls": (asking(fusion={"samples": 8, "layers": 4}), 400, "fusion", None),
    "unknown model": (asking(model="gpt-9"), 404, "model", "model_not_found"),
    "budget too small": (asking(fusion={"max_cost_usd": 1e-9}), 402, None, "budget_exceeded"),
    "no token": (asking(max_tokens=0), 400, "max_tokens", None),
    "five choices": (asking(n=5), 400, "n", None),
    "stream is no flag": (asking(stream="yes"), 400, "stream", None),
}


def check_refusal(answer, status, param, code):
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"] and error["type"]
    assert answer.headers["x-request-id"]
    assert b"data:" not in answer.body


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("body, status, param, code", REFUSALS.values(), ids=REFUSALS)
def test_what_can_be_refused_is_refused_with_its_status(
        serve, body, status, param, code, streamed):
    made = serve(served={"tokens": ("secret",)})
    if isinstance(body, dict):
        body = dict({"stream": streamed}, **body)
    client = made.client()
    answer = client.request(body, headers=KEY).answer()
    check_refusal(answer, status, param, code)
    assert answer.headers["x-should-retry"] == "false"
    assert made.up.posts() == []
    again = client.request(asking(stream=True), headers=KEY).answer()
    assert joined(again.body) == "One two.", "the connection goes on"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer other"}, {"x-api-key": ""}])
def test_a_stream_without_the_key_is_refused_with_401(serve, headers):
    made = serve(served={"tokens": ("secret",)})
    answer = made.stream(asking(), headers=headers).answer()
    check_refusal(answer, 401, None, "invalid_api_key")
    assert answer.headers["x-should-retry"] == "false" and made.up.posts() == []


def trip(made, *models):
    """Have so many calls to these models fail that they are left alone."""
    for model in models:
        for _ in range(made.fusion.BREAKER_CALLS):
            assert made.post(asking(model=model)).status == 502


def down(*models):
    return cast(**dict.fromkeys(models, error_reply(500, "down")))


@pytest.mark.parametrize("fields", [{}, {"model": "m1"}], ids=["panel", "by name"])
def test_a_stream_is_refused_with_503_while_all_breakers_are_open(serve, fields):
    made = serve(down(*MEMBERS))
    trip(made, *MEMBERS)
    asked = len(made.up.posts())
    answer = made.post(asking(stream=True, **fields))
    check_refusal(answer, 503, None, "overloaded")
    assert answer.headers["x-should-retry"] == "true"
    assert 2 <= int(answer.headers["retry-after"]) <= made.fusion.BREAKER_S
    assert len(made.up.posts()) == asked


def test_a_solo_stream_is_refused_with_503_while_the_writers_breaker_is_open(serve):
    made = serve(down("writer"))
    trip(made, "writer")
    check_refusal(made.post(asking(stream=True, **SOLO)), 503, None, "overloaded")


TOOL_TURN = {"tools": TOOLS, "messages": QUESTION + [
    {"role": "assistant", "content": None, "tool_calls": CALLS[:1]},
    {"role": "tool", "tool_call_id": "call_1", "content": "blue"}]}


@pytest.mark.parametrize("fields", [SOLO, TOOL_TURN], ids=["solo", "tool turn"])
def test_what_needs_no_panel_is_answered_while_the_panels_breakers_are_open(serve, fields):
    made = serve(down(*MEMBERS))
    trip(made, *MEMBERS)
    answer = made.post(asking(**fields))
    assert (answer.status, answer.json["choices"][0]["message"]["content"]) == (200, "One two.")


def test_a_whole_answer_that_fails_has_its_status_and_what_degraded(serve):
    made = serve(down(*MEMBERS))
    answer = made.post(asking())
    check_refusal(answer, 502, None, "panel_failed")
    assert all("%s" % model in answer.json["error"]["message"] for model in MEMBERS)
    assert "500: down" in answer.json["error"]["message"]
    assert sorted(entry["model"] for entry in answer.json["fusion"]["degraded"]) == list(MEMBERS)


# ---- when it comes ----------------------------------------------------------------------------


def test_headers_and_a_first_frame_come_before_any_upstream_has_answered(serve):
    made = serve(cast(**dict.fromkeys(MEMBERS, said(hang_after=-1))))
    made.post(asking(model="w2"))  # warm
    started = time.monotonic()
    client = made.stream(asking())
    frame = client.frame()
    assert time.monotonic() - started < 1.0
    assert chunk_in(frame)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert until(lambda: made.up.in_flight == 3)


def test_the_first_frame_does_not_wait_for_prices_of_a_hung_backend(serve):
    known = dict.fromkeys(("judge", "writer"), {"input": 1, "output": 1})
    made = serve(cast(m1=said(hang_after=-1)), panel=["m1"], prices=known)
    made.up.models_reply = Reply(hang_after=-1)
    started = time.monotonic()
    client = made.stream(asking(fusion={"max_cost_usd": 1}))
    client.head()
    assert time.monotonic() - started < 0.5


def test_tokens_are_relayed_one_by_one_as_the_writer_says_them(serve):
    steps = Steps()
    tokens = ["The ", "sky", " ", "is\n\n", "blue."]
    made = serve(cast(writer=said(chunks=tokens, first_delay=steps, chunk_delay=steps)))
    client = made.stream(asking())
    assert chunk_in(client.frame())["choices"][0]["delta"]["role"] == "assistant"
    assert until(lambda: made.up.posts("writer"))
    for token in tokens:
        steps.release()
        assert content_frame(client) == {"content": token}
        assert not client.buffer and not client.events, "one frame for each"
    steps.release(10)
    assert [frame for frame in client.frames()][-1] == b"data: [DONE]"


# stage: (models that wait, request, what the progress of the heartbeat says)
SILENT = {
    "panel": (MEMBERS, {}, {"stage": "panel", "ready": 0, "members": 3}),
    "one member": (("m2",), {}, {"stage": "panel", "ready": 2, "members": 3}),
    "judge": (("judge",), {}, {"stage": "judge", "ready": 3, "members": 3}),
    "writer": (("writer",), {}, {"stage": "synth", "ready": 3, "members": 3}),
    "solo": (("writer",), SOLO, {"stage": "synth", "ready": 0, "members": 0}),
}


@pytest.mark.parametrize("silent, fields, progress", SILENT.values(), ids=SILENT)
def test_heartbeats_come_as_data_and_comment_while_a_stage_is_silent(
        serve, quick, silent, fields, progress):
    gate = threading.Event()
    models = {model: said("a text", delay=gate) for model in silent}
    if "judge" in silent:
        models["judge"] = said(judgement(), delay=gate)
    made = serve(cast(**models))
    client = made.stream(asking(**fields))
    first = chunk_in(client.frame())
    beats, frames = [], []
    while len(beats) < 3:
        assert len(frames) < 20, frames
        frames += [client.frame(), client.frame()]
        assert frames[-2].startswith(b": ") and chunk_in(frames[-2]) is None
        beat = chunk_in(frames[-1])
        assert is_beat(beat)
        if beat["fusion"] == {"progress": progress}:
            beats.append(beat)
    for beat in beats:
        assert (beat["id"], beat["created"]) == (first["id"], first["created"])
        assert beat["choices"] == [{"index": 0, "delta": {"content": ""}, "logprobs": None,
                                    "finish_reason": None}]
    assert progress["stage"].encode() in frames[-2]
    assert b"%(ready)d of %(members)d" % {k.encode(): v for k, v in progress.items()
                                         if k != "stage"} in frames[-2]
    gate.set()
    chunks = [chunk for chunk in map(chunk_in, list(client.frames())[:-1])
              if chunk is not None and not is_beat(chunk)]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == ("a text" if "writer" in silent else "One two.")
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def next_beats(client, stage, count=2):
    """Read on until so many heartbeats of a stage have come; returns what else came as data."""
    others, ends = [], time.monotonic() + 5
    while count:
        assert time.monotonic() < ends, "no heartbeat of " + stage
        chunk = chunk_in(client.frame())
        if is_beat(chunk):
            count -= chunk["fusion"]["progress"]["stage"] == stage
        elif chunk is not None:
            others.append(chunk["choices"][0]["delta"])
    return others


def test_heartbeats_come_while_the_writer_pauses(serve, quick):
    steps = Steps()
    made = serve(cast(writer=said(chunks=["One ", "two."], chunk_delay=steps)), panel=["m1"])
    client = made.stream(asking())
    assert next_beats(client, "synth")[-1] == {"content": "One "}
    steps.release(10)
    assert content_frame(client) == {"content": "two."}
    assert list(client.frames())[-1] == b"data: [DONE]"


def test_heartbeats_come_while_the_answer_is_refined(serve, quick):
    gate = threading.Event()
    made = serve(cast(writer=[said("One two."), said("One two!", delay=gate)]), panel=["m1"])
    client = made.stream(asking(fusion={"refine": True}))
    assert [delta.get("content") for delta in next_beats(client, "refine")] == [""]
    gate.set()
    assert content_frame(client) == {"content": "One two!"}
    assert list(client.frames())[-1] == b"data: [DONE]"


def test_no_heartbeat_comes_while_data_flows(serve, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "BEAT_S", 0.5)
    monkeypatch.setattr(fusion, "TICK_S", 0.02)
    made = serve(cast(writer=said(chunks=["x"] * 40, chunk_delay=0.025)))
    frames = frames_of(made.post(asking(stream=True)).body)
    assert not [frame for frame in frames if frame.startswith(b":")]
    assert not any(map(is_beat, map(chunk_in, frames[:-1])))


def test_a_whole_answer_has_no_heartbeat(serve, quick):
    made = serve(cast(m1=said("late", delay=0.5)))
    answer = made.post(asking())
    assert answer.raw_body.startswith(b"{") and answer.json["choices"]


def test_a_heartbeat_never_goes_out_before_the_headers(serve, fusion, monkeypatch):
    """A connection that had been idle for longer than the rhythm, and a front that looks often."""
    monkeypatch.setattr(fusion, "BEAT_S", 0.02)
    monkeypatch.setattr(fusion, "TICK_S", 0.00001)
    made = serve(panel=["m1"])
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(30):
            clients = [made.client() for _ in range(10)]
            time.sleep(0.025)
            for client in clients:
                client.request(asking(stream=True, **SOLO))
            for client in clients:
                assert client.answer().status == 200
                client.close()
    finally:
        sys.setswitchinterval(interval)


class Slow(list):
    """A log that takes its time for each line."""

    def append(self, line):
        time.sleep(0.3)
        super().append(line)


def test_no_heartbeat_follows_the_end_of_a_stream(fusion, tmp_path, quick):
    made = Serving(fusion, tmp_path, cast())
    made.lines = Slow()
    with made:
        client = made.client()
        for _ in range(2):
            answer = client.request(asking(stream=True)).answer()
            assert joined(answer.body) == "One two."
            assert until(lambda: not made.front.running)
            assert client.raw.count(b"HTTP/1.1") == 1 and client.raw.endswith(b"\r\n0\r\n\r\n")
            client.sock.settimeout(0.05)
            with pytest.raises(socket.timeout):
                client.fill()
            client.sock.settimeout(10)
            client.raw.clear()


@pytest.mark.slow
def test_no_heartbeat_slips_in_behind_the_end_of_a_stream(serve, fusion, monkeypatch):
    """Streams that end after a silence which is just as long as the rhythm of heartbeats."""
    monkeypatch.setattr(fusion, "BEAT_S", 0.02)
    monkeypatch.setattr(fusion, "TICK_S", 0.00001)
    made = serve(cast(m1=said('{"a": 1}', delay=0.03)))
    clients = [made.client() for _ in range(10)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            for client in clients:
                client.request(asking(stream=True, model="m1",
                                      response_format={"type": "json_object"}))
            for client in clients:
                assert client.answer().status == 200
                client.raw.clear()
    finally:
        sys.setswitchinterval(interval)


def test_a_slow_panel_keeps_a_client_that_allows_some_silence(serve, fusion, monkeypatch):
    """The contract's 10 s for clients that allow 60, scaled down: data at least each second."""
    monkeypatch.setattr(fusion, "BEAT_S", 0.25)
    monkeypatch.setattr(fusion, "TICK_S", 0.05)
    slow = {model: said("late", delay=1.2) for model in MEMBERS}
    made = serve(cast(judge=said(judgement(), delay=0.9), **slow))
    client = made.stream(asking())
    client.sock.settimeout(0.8)  # of silence; the whole takes more than two seconds
    last, gaps = time.monotonic(), []
    for frame in client.frames():
        if frame.startswith(b"data:"):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
    assert frame == b"data: [DONE]" and max(gaps) < 0.8


# ---- reasoning --------------------------------------------------------------------------------

THINKING = {
    "field": said("An answer.", reasoning="first thoughts"),
    "other field": said("An answer.", reasoning="first thoughts", reasoning_field="reasoning"),
    "block": said("<think>first thoughts</think>An answer."),
    "block of another name": said("<thinking>first thoughts</thinking>\nAn answer."),
    "block in pieces": said(chunks=["\n<", "thi", "nk>first", " thoughts</th", "ink", ">An ",
                                    "answer."]),
    "block letter by letter": said(chunks=list("<think>first thoughts</think>An answer.")),
}


@pytest.mark.parametrize("fields", [{}, SOLO, {"tools": TOOLS}], ids=["panel", "solo", "tools"])
@pytest.mark.parametrize("reply", THINKING.values(), ids=THINKING)
def test_the_writers_reasoning_is_reasoning_content_and_never_content(serve, reply, fields):
    made = serve(cast(writer=reply), panel=["m1"])
    body = made.post(asking(stream=True, **fields)).body
    assert (joined(body).strip(), joined(body, "reasoning_content")) == (
        "An answer.", "first thoughts")
    message = made.post(asking(**fields)).json["choices"][0]["message"]
    assert (message["content"].strip(), message["reasoning_content"]) == (
        "An answer.", "first thoughts")


def test_reasoning_comes_while_it_is_thought(serve):
    steps = Steps()
    made = serve(cast(writer=said("", reasoning="12345678", chunks=["answer"], first_delay=steps,
                                  chunk_delay=steps)), panel=["m1"])
    client = made.stream(asking())
    assert "role" in content_frame(client)
    for letter in "12345678":
        steps.release()
        assert content_frame(client) == {"reasoning_content": letter}
    steps.release(10)
    assert content_frame(client) == {"content": "answer"}


@pytest.mark.parametrize("fields", [
    {"fusion": {"refine": True}}, {"response_format": {"type": "json_object"}}],
    ids=["refine", "JSON form"])
def test_the_reasoning_of_an_answer_that_is_held_back_is_sent_too(serve, fields):
    made = serve(cast(writer=said('{"a": 1}', reasoning="thoughts")), panel=["m1"])
    whole = made.post(asking(**fields)).json["choices"][0]["message"]
    assert whole["reasoning_content"] == "thoughts"
    body = made.post(asking(stream=True, **fields)).body
    assert joined(body) == '{"a": 1}'
    assert joined(body, "reasoning_content") == "thoughts"


def test_the_reasoning_of_members_and_judge_stays_inside(serve):
    made = serve(cast(m1=said("a draft", reasoning="HIDDEN"), judge=said(
        judgement(), reasoning="HIDDEN")), panel=["m1"])
    assert b"HIDDEN" not in made.post(asking(stream=True)).body
    assert b"HIDDEN" not in made.post(asking()).body


# ---- odd texts --------------------------------------------------------------------------------

TEXTS = {
    "line ends": "a\nb\r\nc\rd\n\ne\r\n\r\nf",
    "line separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei",
    "looks like a stream": "\n\ndata: [DONE]\n\nevent: x\ndata: {}\n\nretry: 1\n: hm\n",
    "quotes": "\"double\" 'single' \\ \\\\ \\n \\u0041 / </script>",
    "emoji": "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00e9 \uffff \ufeff",
    "control characters": "a\x00b\x1b[31mc\x7fd\x08e",
    "a megabyte": "0123456789\u00e9\n" * 80_000,
    "blanks": "  leading and trailing  \n\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_odd_texts_arrive_as_they_are_and_never_break_the_stream(serve, text):
    made = serve(cast(writer=said(chunks=[text])), panel=["m1"])
    answer = made.post(asking(stream=True))
    assert joined(answer.body) == text
    assert not re.search("[\r\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029]",
                         answer.body.decode("utf-8").replace("\x7f", ""))
    assert len(answer.body.decode("utf-8").splitlines()) == answer.body.count(b"\n")
    assert made.post(asking()).json["choices"][0]["message"]["content"] == text


def test_half_a_surrogate_pair_spoils_nothing_but_itself(serve):
    made = serve(cast(writer=said(chunks=["a \ud83d b"])), panel=["m1"])
    for answer in (made.post(asking(stream=True)), made.post(asking())):
        answer.body.decode("utf-8")
        content = joined(answer.body) if answer.body.startswith(b"data") else \
            answer.json["choices"][0]["message"]["content"]
        assert re.fullmatch("a (.) b", content)


def test_an_emoji_that_the_backend_splits_over_two_deltas_arrives(serve):
    made = serve(cast(writer=said(chunks=["a \ud83d", "\ude00 b"])), panel=["m1"])
    assert made.post(asking()).json["choices"][0]["message"]["content"] == "a \U0001f600 b"
    content = joined(made.post(asking(stream=True)).body)
    assert content.encode("utf-16", "surrogatepass").decode("utf-16") == "a \U0001f600 b"


def test_a_question_with_odd_characters_is_answered(serve):
    made = serve(panel=["m1"])
    odd = [{"role": "user", "content": "".join(TEXTS.values())[:5000]}]
    assert joined(made.post(asking(stream=True, messages=odd)).body) == "One two."
    assert made.up.posts("m1")[0].messages == odd


# ---- logprobs, refusals, length ---------------------------------------------------------------


def spoken(token):
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


def streamed(*choices):
    """A reply in events, with these fields of its choice."""
    events = [{"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "writer",
               "choices": [dict({"index": 0, "delta": {}, "finish_reason": None}, **choice)]}
              for choice in choices] + [{"choices": [], "usage": USAGE}]
    return Reply(body=b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
                 + b"data: [DONE]\n\n", content_type="text/event-stream")


def test_logprobs_of_the_writer_arrive_whole_and_in_the_stream(serve):
    made = serve(cast(writer=streamed(*(
        {"delta": {"content": token}, "logprobs": {"content": [spoken(token)]}}
        for token in ("a", "b")), {"finish_reason": "stop"})), panel=["m1"])
    wanted = [spoken("a"), spoken("b")]
    whole = made.post(asking(logprobs=True, top_logprobs=2)).json["choices"][0]
    assert whole["logprobs"]["content"] == wanted
    body = made.post(asking(logprobs=True, stream=True)).body
    assert [entry for choice in choices_of(body) if choice["logprobs"]
            for entry in choice["logprobs"]["content"]] == wanted
    assert made.up.posts("writer")[0].body["top_logprobs"] == 2
    assert not any("logprobs" in post.body for post in made.up.posts("m1"))


def test_a_refusal_of_the_writer_is_a_refusal(serve):
    made = serve(cast(writer=streamed(
        {"delta": {"refusal": "I will "}}, {"delta": {"refusal": "not."}},
        {"finish_reason": "stop"})), panel=["m1"])
    whole = made.post(asking()).json["choices"][0]
    assert (whole["message"]["refusal"], whole["finish_reason"]) == ("I will not.", "stop")
    assert joined(made.post(asking(stream=True)).body, "refusal") == "I will not."


def test_when_all_members_refuse_the_refusal_is_returned_as_it_is(serve):
    text = "I'm sorry, but I can't help with that."
    made = serve(cast(**dict.fromkeys(MEMBERS, said(text))))
    whole = made.post(asking()).json
    assert whole["choices"][0]["message"]["refusal"] == text
    assert joined(made.post(asking(stream=True)).body, "refusal") == text
    assert not made.up.posts("writer") and not made.up.posts("judge")


@pytest.mark.parametrize("fields", [{}, SOLO], ids=["panel", "solo"])
def test_an_answer_cut_by_length_says_so(serve, fields):
    made = serve(cast(writer=said("half of an ans", finish="length")), panel=["m1"])
    body = made.post(asking(stream=True, max_tokens=70, **fields)).body
    assert joined(body) == "half of an ans"
    assert choices_of(body)[-1]["finish_reason"] == "length"
    whole = made.post(asking(max_tokens=70, **fields)).json
    assert whole["choices"][0]["finish_reason"] == "length"
    assert made.up.posts("writer")[0].body["max_tokens"] == 70


# ---- whole answers ----------------------------------------------------------------------------

RECEIPT_KEYS = {
    "config", "mode", "panel_models", "panel_succeeded", "judge", "synthesizer", "cost_usd",
    "cost_source", "cost_breakdown", "timing_s", "degraded", "analysis", "judge_unsupported",
    "seed", "request_id"}
ROW_KEYS = {"model", "role", "prompt_tokens", "completion_tokens", "cost_usd", "source",
            "latency_s", "attempts", "status"}
COST = 5 * (10 * 1 + 5 * 10) / 1e6  # five calls


def test_a_whole_answer_has_every_field_of_openais_object(serve):
    answer = serve().post(asking())
    found = answer.json
    assert {key: found[key] for key in ("object", "model", "choices")} == {
        "object": "chat.completion", "model": "fusion", "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "One two.", "refusal": None},
            "logprobs": None, "finish_reason": "stop"}]}
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", found["id"])
    assert isinstance(found["created"], int) and abs(found["created"] - time.time()) < 60
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        50, 25, 75)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


def test_a_whole_answer_has_every_field_of_the_receipt(serve):
    made = serve()
    answer = made.post(asking())
    found = answer.json["fusion"]
    assert RECEIPT_KEYS <= set(found)
    assert (found["config"], found["mode"], found["degraded"]) == ("config.json", "fuse", [])
    assert found["panel_models"] == found["panel_succeeded"] == list(MEMBERS)
    assert (found["judge"], found["synthesizer"]) == ("judge", "writer")
    assert (found["cost_usd"], found["cost_source"]) == (pytest.approx(COST), "table")
    rows = found["cost_breakdown"]
    assert all(set(row) == ROW_KEYS for row in rows)
    assert sorted((row["model"], row["role"]) for row in rows) == [
        ("judge", "judge"), ("m1", "member"), ("m2", "member"), ("m3", "member"),
        ("writer", "synth")]
    assert {(row["prompt_tokens"], row["completion_tokens"], row["attempts"], row["status"],
             row["source"]) for row in rows} == {(10, 5, 1, "stop", "table")}
    assert all(row["cost_usd"] == pytest.approx(COST / 5) for row in rows)
    timing = found["timing_s"]
    assert set(timing) == {"panel", "judge", "synth", "refine", "total"}
    parts = sum(timing[stage] for stage in ("panel", "judge", "synth", "refine"))
    assert timing["total"] >= parts - 0.005 and timing["refine"] == 0
    assert isinstance(found["seed"], int) and found["judge_unsupported"] == 0
    assert set(found["analysis"]) >= {"consensus", "contradictions", "partial_coverage",
                                      "unique_insights", "blind_spots"}
    assert "drafts" not in found and "trace" not in found
    assert made.post(asking()).json["fusion"]["seed"] == found["seed"]


def test_a_whole_answer_has_the_headers_of_cost_time_and_tokens(serve):
    answer = serve().post(asking())
    found, headers = answer.json["fusion"], answer.headers
    assert float(headers["x-fusion-cost-usd"]) == pytest.approx(COST)
    assert headers["x-litellm-response-cost"] == headers["x-fusion-cost-usd"]
    assert float(headers["x-fusion-latency-s"]) == found["timing_s"]["total"]
    assert headers["x-litellm-total-tokens"] == "75"
    assert headers["x-request-id"] == found["request_id"]
    assert headers["content-type"] == "application/json"
    assert int(headers["content-length"]) == len(answer.body)


def test_a_small_cost_is_a_plain_number_in_the_header(serve):
    made = serve(cast(m1=said("x", cost=0.0000001234)), panel=["m1"])
    answer = made.post(asking(model="m1"))
    assert float(answer.headers["x-fusion-cost-usd"]) == 0.0000001234
    assert answer.json["fusion"]["cost_source"] == "reported"


def test_an_unknown_price_is_null_and_has_no_header(serve):
    made = serve(prices={"m1": {"input": 1, "output": 1}})
    answer = made.post(asking())
    found = answer.json["fusion"]
    assert found["cost_usd"] is None
    assert {row["model"]: row["cost_usd"] is None for row in found["cost_breakdown"]} == {
        "m1": False, "m2": True, "m3": True, "judge": True, "writer": True}
    assert "price_unknown" in {entry["code"] for entry in found["degraded"]}
    assert not {"x-fusion-cost-usd", "x-litellm-response-cost"} & set(answer.headers)
    assert {"x-fusion-latency-s", "x-litellm-total-tokens", "x-request-id"} <= set(answer.headers)


def test_two_choices_are_two_syntheses_of_one_panel(serve):
    made = serve(cast(writer=[said("one"), said("two", finish="length")]))
    answer = made.post(asking(n=2))
    choices = answer.json["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    assert sorted((choice["message"]["content"], choice["finish_reason"])
                  for choice in choices) == [("one", "stop"), ("two", "length")]
    assert len(made.up.posts("writer")) == 2 and len(made.up.posts()) == 6
    assert answer.json["usage"]["total_tokens"] == 90


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_drafts_and_trace_are_in_the_receipt_if_asked_for(serve, streams):
    made = serve(cast(m2=said("cut off", finish="length")))
    answer = made.post(asking(stream=streams, fusion={"include": ["drafts", "trace"]}))
    found = (chunks_of(answer.body)[-1] if streams else answer.json)["fusion"]
    assert RECEIPT_KEYS <= set(found)
    drafts = {draft["models"][0]: draft for draft in found["drafts"]}
    assert {name: (draft["text"], draft["cut"]) for name, draft in drafts.items()} == {
        "m1": ("draft of m1", False), "m2": ("cut off", True), "m3": ("draft of m3", False)}
    assert sorted(draft["letter"] for draft in found["drafts"]) == ["A", "B", "C"]
    kinds = [entry["event"] for entry in found["trace"]]
    assert kinds[0] == "start" and {"slot", "stage", "analysis"} <= set(kinds)
    assert not {"delta", "answer"} & set(kinds)
    times = [entry["t"] for entry in found["trace"]]
    assert times == sorted(times) and 0 <= times[0] and times[-1] < 30
    for one in ("drafts", "trace"):
        body = made.post(asking(fusion={"include": [one]})).json["fusion"]
        assert {"drafts", "trace"} & set(body) == {one}


def test_the_path_may_have_a_query_and_a_slash(serve):
    made = serve(panel=["m1"])
    for path in (CHAT + "/", CHAT + "?beta=true", CHAT + "/?api-version=1"):
        assert joined(made.post(asking(stream=True), path=path).body) == "One two."


def test_requests_that_are_sent_ahead_are_answered_in_order(serve):
    client = serve(cast(m2=said("2"))).client()
    client.send(encode_request(asking(stream=True)) + encode_request(asking(model="m2"))
                + encode_request(asking(stream=True, model="m3")))
    assert joined(client.answer().body) == "One two."
    assert client.answer().json["choices"][0]["message"]["content"] == "2"
    assert joined(client.answer().body) == "draft of m3"


# ---- a client that leaves ---------------------------------------------------------------------

HANGS = said("a long answer", hang_after=-1)
# stage: (models, settings and request fields, the model whose call has to have come)
STAGES = {
    "panel": (dict.fromkeys(MEMBERS, HANGS), {}, "m3"),
    "one member": ({"m2": HANGS}, {}, "m2"),
    "a member in mid answer": ({"m2": said("a long draft", hang_after=3)}, {}, "m2"),
    "judge": ({"judge": HANGS}, {}, "judge"),
    "judge in mid answer": ({"judge": said("{ a long one", hang_after=2)}, {}, "judge"),
    "writer": ({"writer": HANGS}, {}, "writer"),
    "writer after its headers": ({"writer": said("one two", hang_after=0)}, {}, "writer"),
    "writer after its first word": ({"writer": said("one two", hang_after=2)}, {}, "writer"),
    "two writers": ({"writer": HANGS}, {"n": 2}, "writer"),
    "solo": ({"writer": HANGS}, SOLO, "writer"),
    "by name": ({"m1": HANGS}, {"model": "m1"}, "m1"),
    "refine": ({"writer": [said("a text"), HANGS]}, {"fusion": {"refine": True}}, "writer"),
    "a repair": ({"writer": [said("no JSON"), HANGS]},
                 {"response_format": {"type": "json_object"}}, "writer"),
}


def leave(client, way):
    """Close a connection as a client does, or as one that dies."""
    if way == "reset":
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return time.monotonic()


def check_ended(made, left_at, calls):
    """All upstream calls ended within a second, no other one began, and the log says so."""
    assert made.up.wait_for(lambda: made.up.in_flight == 0, SOON_S + 1)
    line = made.logged()[0]
    assert time.monotonic() - left_at < SOON_S + 1
    for post in made.up.posts():
        assert post.wait_closed(1) or not post.closed_at
        assert post.closed_at is None or post.closed_at - left_at < SOON_S
    assert any(post.closed_at for post in made.up.posts())
    assert len(made.up.posts()) == calls
    assert line["error"] == "cancelled: the client left"
    assert line["status"] == 499
    assert len(made.lines) == 1


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("models, fields, waits", STAGES.values(), ids=STAGES)
def test_when_a_client_leaves_its_calls_end_and_none_begins(
        serve, models, fields, waits, streams):
    made = serve(cast(w2=said("next"), **models), max_retries=2, synthesizer=["writer", "w2"],
                 spares=["w2"])
    client = made.client().request(asking(stream=streams, **fields))
    wanted = 2 if isinstance(models.get("writer"), list) or "n" in fields else 1
    assert until(lambda: len(made.up.posts(waits)) == wanted)
    if waits in MEMBERS and "model" not in fields:
        assert until(lambda: len(made.up.posts()) == 3)
    if waits == "writer" and streams and "first word" in str(models):
        while b'"content": "o' not in client.raw:
            client.fill()
    calls = len(made.up.posts())
    left_at = leave(client, "reset" if streams else "close")
    check_ended(made, left_at, calls)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_while_the_panel_is_looked_up_ends_that(serve, streams):
    made = serve(panel="auto")
    made.up.models_reply = Reply(hang_after=-1)
    client = made.client().request(asking(stream=streams))
    assert until(lambda: made.up.requests)
    left_at = leave(client, "close")
    assert made.up.requests[0].wait_closed(SOON_S)
    assert made.logged()[0]["status"] == 499
    assert time.monotonic() - left_at < SOON_S and len(made.up.requests) == 1


def test_a_client_that_leaves_before_a_retry_starts_none(serve):
    busy = error_reply(429, "slow down", headers={"Retry-After": "30"})
    made = serve(cast(m1=busy), max_retries=3)
    client = made.stream(asking(model="m1"))
    assert client.frame() and until(lambda: made.up.posts("m1"))
    assert until(lambda: made.up.in_flight == 0)
    left_at = leave(client, "close")
    assert "cancelled" in made.logged()[0]["error"]
    assert time.monotonic() - left_at < SOON_S and len(made.up.posts()) == 1


def test_a_client_that_leaves_while_its_call_waits_for_a_turn_starts_none(serve):
    made = serve(cast(m1=HANGS), backend_concurrency=1)
    first = made.stream(asking(model="m1"))
    assert first.frame() and until(lambda: made.up.posts("m1"))
    second = made.stream(asking(model="m2"))
    assert second.frame()
    left_at = leave(second, "close")
    assert "cancelled" in made.logged()[0]["error"]
    assert time.monotonic() - left_at < SOON_S
    first.close()
    made.logged(2)
    assert [post.model for post in made.up.posts()] == ["m1"]


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_while_it_is_queued_costs_nothing(serve, streams):
    gate = threading.Event()
    made = serve(cast(m1=said("first", delay=gate)), served={"max_requests": 1})
    first = made.client().request(asking(model="m1"))
    assert until(lambda: made.up.posts("m1"))
    second = made.client().request(asking(model="m2", stream=streams))
    assert until(lambda: made.front.waiting)
    left_at = leave(second, "close")
    assert (made.logged()[0]["status"], len(made.lines)) == (499, 1)
    assert time.monotonic() - left_at < SOON_S
    third = made.client().request(asking(model="m3", stream=streams))
    assert until(lambda: made.front.waiting)
    gate.set()
    assert first.answer().json["choices"][0]["message"]["content"] == "first"
    assert third.answer().status == 200
    assert [post.model for post in made.up.posts()] == ["m1", "m3"]


def test_a_client_that_left_while_it_was_queued_is_not_served_when_its_turn_comes(
        serve, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "TICK_S", 10.0)  # the clock does not take it out of the queue
    gate = threading.Event()
    made = serve(cast(m1=said("first", delay=gate)), served={"max_requests": 1})
    first = made.client().request(asking(model="m1"))
    assert until(lambda: made.up.posts("m1"))
    second = made.client().request(asking(model="m2"))
    assert until(lambda: made.front.waiting)
    second.close()
    assert until(lambda: made.front.waiting[0].connection.gone)
    gate.set()
    assert first.answer().status == 200
    assert {line["status"] for line in made.logged(2)} == {200, 499}
    assert [post.model for post in made.up.posts()] == ["m1"]


def test_a_client_that_leaves_takes_no_other_one_along(serve):
    steps = Steps()
    made = serve(cast(writer=said(chunks=["One ", "two."], chunk_delay=steps)), panel=["m1"])
    staying, leaving = made.stream(asking()), made.stream(asking())
    assert until(lambda: len(made.up.posts("writer")) == 2)
    left_at = leave(leaving, "reset")
    assert until(lambda: any(post.closed_at for post in made.up.posts("writer")), SOON_S)
    assert time.monotonic() - left_at < SOON_S
    steps.release(10)
    text = [chunk_in(frame) for frame in list(staying.frames())[:-1]]
    assert "two." in str(text) and text[-1]["choices"][0]["finish_reason"] == "stop"
    assert sum(bool(post.closed_at) for post in made.up.posts("writer")) == 1


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_has_sent_much_ahead_is_seen_to_leave(serve, streams):
    made = serve(cast(m1=HANGS))
    client = made.client().request(asking(model="m1", stream=streams))
    assert until(lambda: made.up.posts("m1"))
    ahead = asking(messages=[{"role": "user", "content": "x" * 1_500_000}])
    client.request(ahead)
    mine, = made.front.connections.values()
    assert until(lambda: len(mine.buffer) > 1_000_000 or mine.gone)
    left_at = leave(client, "close")
    assert made.up.posts("m1")[0].wait_closed(SOON_S)
    assert made.up.posts("m1")[0].closed_at - left_at < SOON_S
    made.logged()
    assert len(made.up.posts()) == 1


def test_the_connection_to_the_backend_is_closed_and_not_used_again(serve):
    made = serve(cast(m1=[HANGS, said("afresh")]))
    client = made.stream(asking(model="m1"))
    assert client.frame() and until(lambda: made.up.posts("m1"))
    client.close()
    made.logged()
    assert joined(made.post(asking(model="m1", stream=True)).body) == "afresh"
    first, second = made.up.posts("m1")
    assert first.closed_at and first.connection != second.connection


# ---- a client that stops reading --------------------------------------------------------------


def test_a_client_that_stops_reading_is_given_up_without_hurting_another(
        serve, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "WRITE_S", 0.5)
    big = said(chunks=["x" * 100_000] * 200, chunk_delay=0.001)
    made = serve(cast(m1=big))
    stuck = made.stream(asking(model="m1"), receive_buffer=4096)
    assert stuck.frame()
    other = made.stream(asking(model="m2"))
    started = time.monotonic()
    assert joined(other.answer().body) == "draft of m2"
    assert time.monotonic() - started < 1.0
    assert made.up.posts("m1")[0].wait_closed(8), "its call upstream is closed"
    lines = made.logged(2)
    assert lines[-1]["error"] == "cancelled: the client left"
    assert until(lambda: made.front.running == 0)
    assert until(lambda: len(made.front.connections) <= 1), "its connection is closed"


def test_a_client_that_takes_no_whole_answer_is_given_up(serve, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "WRITE_S", 0.3)
    made = serve(cast(m1=said("x" * 8_000_000)))
    made.client(receive_buffer=4096).request(asking(model="m1"))
    assert until(lambda: made.up.posts("m1")) and made.logged()
    assert until(lambda: not made.front.connections)
    assert made.front.running == 0


def test_a_client_that_reads_slowly_and_steadily_is_kept(serve, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "WRITE_S", 0.4)
    text = "0123456789" * 100_000
    made = serve(cast(m1=said(chunks=[text])))
    client = made.stream(asking(model="m1"), receive_buffer=4096)
    started = time.monotonic()
    while time.monotonic() - started < 1.0:
        time.sleep(0.01)
        client.fill()
    assert joined(client.answer().body) == text


def test_heartbeats_to_a_client_that_does_not_read_hold_up_nobody(serve, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "BEAT_S", 0.0)
    monkeypatch.setattr(fusion, "TICK_S", 0.0)
    gate = threading.Event()
    made = serve(cast(m1=said(chunks=["the end"], delay=gate)))
    stuck = made.stream(asking(model="m1"), receive_buffer=2048)
    assert stuck.frame()
    mine, = made.front.connections.values()
    mine.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    assert until(lambda: not fusion.ready(mine.sock, True)), "its buffer is full"
    for _ in range(20):
        started = time.monotonic()
        assert made.get("/health").status == 200
        assert time.monotonic() - started < 1.0
    gate.set()
    *frames, done = stuck.frames()
    assert done == b"data: [DONE]" and "the end" in str(list(map(chunk_in, frames)))
