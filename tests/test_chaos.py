"""The engine holds when backends misbehave: a table of faults in every role, and mixes by lot.

A fault is what a model does where a good one would say its text. It either *holds* (what the
model said is used all the same) or not; what the receipt must then say follows from the role.
What a failing model says carries the mark BOOM, which must reach neither another model nor the
answer.
"""

import collections
import contextlib
import dataclasses
import email.utils
import json
import random
import re
import socket
import threading
import time
from typing import Any, NamedTuple

import pytest

from test_wiring import (
    PANEL, QUESTION, RESULT_S, Rig, analysis_in, begin, drafts_in, judgement, last_text, price)
from upstream import Reply, Upstream, context_overflow, error_reply, json_reply

ANSWER = "Because of Rayleigh scattering, says the writer."
SECOND = "Short waves are scattered most, says the second writer."
SHORT_S = 0.5  # the time of one call where a backend hangs
CALL_S = 5  # the time of one call where nothing hangs: never reached
YEARS = "Fri, 31 Dec 2199 23:59:59 GMT"


@pytest.fixture
def rig(fusion, tmp_path):
    """Makes Rigs, each in a folder of its own, and closes them after the test."""
    with contextlib.ExitStack() as stack:
        def made(script, **settings):
            folder = tmp_path / ("rig-%d" % len(list(tmp_path.iterdir())))
            folder.mkdir()
            return stack.enter_context(Rig(fusion, folder, script, **settings))
        yield made


def threads_are_back(count):
    """Whether no more threads run than before; a moment is allowed for the last ones."""
    end = time.monotonic() + 5
    while threading.active_count() > count and time.monotonic() < end:
        time.sleep(0.005)
    return threading.active_count() <= count


def text_of(model):
    """What a good model says."""
    return {"judge": judgement(consensus=["kept"]), "writer": ANSWER, "w2": SECOND}.get(
        model, "draft of %s, which is a little longer than a word" % model)


# ---- the faults -------------------------------------------------------------------------------


class Fault(NamedTuple):
    """`reply(request, text)` is the Reply of a model that would say `text` if it were good.

    `holds`: the answer is used. `calls`: requests for one stage when a call is retried once.
    `usage`: whether usage had to be estimated; None where both are right. `judge`: the codes if
    the judge does it, where they are others than the rule's. `roles` that can have the fault.
    `said(text)`: what the model has said then. `hangs`: the fault costs a call's whole time.
    """

    reply: Any
    holds: bool = False
    calls: int = 1
    usage: Any = False
    rewritten: Any = None
    judge: Any = None
    roles: tuple = ("member", "judge", "synth", "all")
    said: Any = str
    hangs: bool = False


def always(**options):
    """The text, said with these options of Reply."""
    return lambda request, text: Reply(text, **options)


def boom(**options):
    """The text behind the mark of what must not come through, said with these options."""
    return lambda request, text: Reply("BOOM " + text, **options)


def fixed(reply):
    """A reply that does not depend on the text."""
    return lambda request, text: reply


def once(first):
    """The first call of each model fails, the others are good."""
    return lambda request, text: first if request.n == 0 else Reply(text)


def refusing(refused, status=400, message="Unsupported parameter: '%s' is not supported. BOOM"):
    """A backend that knows one parameter not, and names it."""
    def reply(request, text):
        if refused in request.body:
            named = message % refused if "%s" in message else message
            return error_reply(status, named, "unsupported_parameter", param=refused)
        return Reply(text)
    return reply


def alternating(request, text):
    """A chat template that takes no two messages of one role in a row."""
    roles = [message["role"] for message in request.messages]
    if any(first == second for first, second in zip(roles, roles[1:])):
        return error_reply(400, "Conversation roles must alternate user/assistant. BOOM")
    return Reply(text)


def stale(request, text):
    """Each connection is good for one request; the next one on it is closed without a word."""
    if request.connection in request.used:
        return Reply(raw=b"")
    request.used.add(request.connection)
    return Reply(text)


def refused_status(status, calls, **options):
    message = "BOOM of status %d" % status
    return Fault(fixed(error_reply(status, message, **options)), calls=calls)


def retrying(after, calls):
    """A 429 that says when to come back."""
    return refused_status(429, calls, headers={"Retry-After": after})


def event(payload):
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def sloppy(request, text):
    """CRLF, comments, each event in several data lines, and a send for every byte or two."""
    return Reply(text + " \u00fc\u20ac\U0001f600", sse={
        "newline": "\r\n", "comments": True, "multi_line": True, "split_bytes": 37, "bom": True})


def with_usage_twice(request, text):
    """The usage comes on the content, and once more at the end."""
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    chunk = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}], "usage": usage}
    return Reply(body=event(chunk) + event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")


def with_signs(text):
    return text + " \u00fc\u20ac\U0001f600"


def usage_as(value):
    return Fault(always(usage=value), holds=True, usage=True)


def past_date():
    return email.utils.formatdate(time.time() - 100, usegmt=True)


NO_NUMBER = {"prompt_tokens": float("nan"), "completion_tokens": float("inf")}
WORDS = {"prompt_tokens": "many", "completion_tokens": -4, "cost": "free"}
HTML = b"<!doctype html><html><body>BOOM: sign in to the hotel's network</body></html>"
HALF = b'{"object": "chat.completion", "choices": [{"message": {"content": "BOOM, half of it'
LOADING = {"code": 503, "type": "unavailable_error", "message": "BOOM: Loading model"}
REFUSES = "I'm sorry, but I can't help with that."
BIG = "BOOM" * 8_300_000
STATUSES = {400: 1, 401: 1, 402: 1, 403: 1, 404: 1, 408: 2, 409: 2, 425: 2, 429: 2, 500: 2,
            502: 2, 503: 2, 529: 2}

FAULTS = {
    # What hangs.
    "hangs before the headers": Fault(boom(hang_after=-1), usage=None, hangs=True),
    "hangs in the body": Fault(boom(hang_after=3), usage=True, hangs=True),
    "drips": Fault(boom(drip=(1, 0.02)), usage=None, hangs=True),
    # What ends early.
    "reset in the middle": Fault(boom(cut_after=3, cut="rst"), calls=2, usage=True),
    "closed in the middle": Fault(boom(cut_after=3), calls=2, usage=True),
    "closed without a word": Fault(fixed(Reply(raw=b"")), calls=None, usage=None),
    "reset without a word": Fault(fixed(Reply(raw=b"", cut="rst")), calls=None, usage=None),
    "a stream without an end": Fault(boom(
        as_json=False, usage=None, sse={"no_done": True, "no_finish": True}), calls=2, usage=True),
    "cut, then good": Fault(once(Reply("BOOM, half of it", cut_after=3)), True, 2, usage=True),
    # What is said to be an error.
    "error in the stream": Fault(boom(error="BOOM", error_after=3), calls=2, usage=True),
    "error with status 200": Fault(
        fixed(json_reply({"error": {"message": "BOOM", "code": 500}})), calls=2, usage=True),
    "loading": Fault(fixed(Reply(status=503, error=LOADING)), calls=2),
    "busy, then good": Fault(once(error_reply(503, "BOOM")), True, 2),
    "redirect": Fault(fixed(Reply(status=302, body=b"BOOM", headers={"Location": "/v2"}))),
    "overflow of llama.cpp": Fault(
        fixed(context_overflow("llamacpp")), calls=None, roles=("member", "all")),
    "overflow of OpenAI": Fault(
        fixed(context_overflow("openai")), calls=None, roles=("member", "all")),
    # When to come back.
    "come back at once": retrying("0", 2),
    "come back at once, then good": Fault(
        once(error_reply(429, "BOOM", headers={"Retry-After": "0"})), True, 2),
    "come back when that was": retrying(past_date(), 2),
    "come back some day": retrying("some day, perhaps; -1e999", 2),
    "come back in years": retrying("99999999999999999999", 1),
    "come back on a far day": retrying(YEARS, 1),
    # What is no answer.
    "HTML": Fault(fixed(Reply(body=HTML, content_type="text/html")), usage=None),
    "prose for JSON": Fault(fixed(Reply(body=b"BOOM: it works!")), usage=None),
    "half a JSON body": Fault(fixed(Reply(body=HALF)), calls=None, usage=True),
    "garbage in the stream": Fault(
        fixed(Reply(body=b"data: {BOOM\n\n", content_type="text/event-stream")), calls=2,
        usage=True),
    "33 MB": Fault(fixed(Reply(body=BIG.encode())), usage=True, roles=("member", "synth")),
    "an empty body": Fault(fixed(Reply(body=b"")), calls=2, usage=None),
    "an empty answer": Fault(fixed(Reply("")), calls=2),
    "content null": Fault(
        lambda request, text: json_reply({"choices": [{"message": {"content": None}}],
                                          "usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
        calls=2),
    "empty, then good": Fault(once(Reply("")), True, 2),
    "reasoning only": Fault(fixed(Reply("", reasoning="BOOM")), calls=2),
    "no choices": Fault(fixed(json_reply({"choices": [], "usage": None})), calls=2, usage=True),
    "a list": Fault(fixed(json_reply(["BOOM"])), usage=None),
    "a refusal": Fault(
        fixed(Reply(REFUSES)), judge={"judge_failed"}, roles=("member", "judge")),
    # What is said in an odd way, and is an answer all the same.
    "no [DONE]": Fault(always(sse={"no_done": True}, close=True), True),
    "no finish": Fault(always(sse={"no_finish": True}), True),
    "wrong content type": Fault(always(content_type="text/plain"), True),
    "gzip unasked": Fault(always(gzip=True), True),
    "JSON for a stream": Fault(always(as_json=True), True),
    "a stream for JSON": Fault(always(as_json=False, sse={"usage_always": True}), True),
    "first null": Fault(always(sse={"null_first": True}), True),
    "sloppy events": Fault(sloppy, True, said=with_signs),
    "a byte at a time": Fault(always(sse={"split_bytes": 3}), True),
    "all in one": Fault(always(sse={"one_write": True}), True),
    "events in pairs": Fault(always(sse={"one_write": 2, "newline": "\r"}), True),
    "usage on the content": Fault(always(sse={"usage_on": "content"}), True),
    "usage of Groq": Fault(always(sse={"usage_on": "x_groq"}), True),
    "usage twice": Fault(with_usage_twice, True),
    "chunks twice": Fault(
        lambda request, text: Reply(text, chunks=[text], as_json=False, sse={
            "duplicate": True, "usage_always": True}), True, said=lambda text: text * 2),
    "reasoning first": Fault(always(reasoning="BOOM"), True),
    "thinks aloud": Fault(
        lambda request, text: Reply("<think>BOOM</think>\n" + text), True),
    "thinks before it opens": Fault(
        lambda request, text: Reply("BOOM, it thinks\n</think>\n" + text), True),
    "cut by length": Fault(always(finish="length"), True, judge={"judge_repaired"}),
    "another name": Fault(always(model="another/model"), True),
    "stale connections": Fault(stale, True),
    "keep-alive that is a lie": Fault(always(early_close=True), True),
    # What is counted oddly.
    "no usage": usage_as(None),
    "usage NaN": usage_as(NO_NUMBER),
    "usage in words": usage_as(WORDS),
    "usage is a list": usage_as([1, 2]),
    # What is refused by name.
    "no temperature": Fault(
        refusing("temperature"), True, 2, rewritten=("member", "judge", "synth", "all")),
    "no response_format": Fault(refusing("response_format"), True, None, rewritten=("judge",)),
    "no stream_options": Fault(refusing("stream_options"), True, None, usage=None,
                               rewritten=("member", "judge", "synth", "all")),
    "roles must alternate": Fault(alternating, True, None, rewritten=("judge", "synth")),
    # What only a judge can do.
    "a judge's prose": Fault(
        fixed(Reply("They agree.")), judge={"judge_failed"}, roles=("judge",)),
    "a judge's prose, then JSON": Fault(
        once(Reply("They agree.")), True, 2, judge={"judge_repaired"}, roles=("judge",)),
}
FAULTS.update(("status %d" % status, refused_status(status, calls))
              for status, calls in STATUSES.items())

CASES = [pytest.param(fault, role, id="%s-%s" % (name, role))
         for name, fault in FAULTS.items() for role in fault.roles]
MODELS = {"member": ("m2",), "judge": ("judge",), "synth": ("writer",), "all": PANEL}
STAGES = {"member": ("panel", "member"), "all": ("panel", "member"), "judge": ("judge",),
          "synth": ("synth",)}
FAILED = {"member": "member_failed", "all": "member_failed", "judge": "judge_failed",
          "synth": "synthesizer_failed"}


def acting(fault, models, plain):
    """A script in which these models have the fault; `plain`: no answer of theirs is streamed."""
    used = set()

    def script(request):
        request.used = used
        text = text_of(request.model)
        if request.model not in models:
            return Reply(text)
        reply = fault.reply(request, text)
        if plain and reply.as_json is None:
            vars(reply)["as_json"] = True
        return reply
    return script


def expected(fault, role, plain):
    """(what must be in `degraded`, what may be there too), each a set of (code, model)."""
    codes, may = set(), set()
    if role == "judge" and fault.judge:
        codes |= fault.judge
    elif not fault.holds:
        codes.add(FAILED[role])
    sends = not plain or role in ("judge", "synth") or fault is not FAULTS["no stream_options"]
    if fault.rewritten and role in fault.rewritten and sends:
        codes.add("rewritten")
    if fault.usage:
        codes.add("usage_estimated")
    elif fault.usage is None:
        may.add("usage_estimated")
    return tuple({(code, model) for code in kind for model in MODELS[role]}
                 for kind in (codes, may))


def check_degraded(made, fault, role, plain):
    must, may = expected(fault, role, plain)
    if role == "member" and not fault.holds:
        assert len(made.run.degraded) <= 2, "one of three is not a thin panel"
    found = {(entry["code"], entry["model"]) for entry in made.run.degraded}
    assert must <= found <= must | may
    assert all(entry["stage"] in STAGES[role] and entry["detail"] for entry in made.run.degraded)


def check_calls(made, fault, role):
    """How often the faulty models were asked, where the table says it."""
    if fault.calls is None or fault.judge or fault is FAULTS["stale connections"]:
        return
    asked = made.calls()
    assert {model: asked[model] for model in MODELS[role]} == dict.fromkeys(
        MODELS[role], fault.calls)


def check_answer(made, result, fault, role):
    """The answer is what its writer said, from the drafts of exactly those who answered."""
    author = "w2" if role == "synth" and not fault.holds else "writer"
    text = text_of(author)
    if role == "synth" and fault.holds:
        text = fault.said(text)
    assert (result.reply.text, result.receipt["synthesizer"]) == (text, author)
    out = MODELS[role] if role == "member" and not fault.holds else ()
    assert result.receipt["panel_succeeded"] == [name for name in PANEL if name not in out]
    said = {model: text_of(model) for model in PANEL if model not in out}
    if role in ("member", "all"):
        said.update((model, fault.said(said[model])) for model in MODELS[role] if model in said)
    reader = made.up.posts(author)[-1]
    assert sorted(drafts_in(last_text(reader)).values()) == sorted(said.values())
    assert (analysis_in(last_text(reader)) is None) == ("judge_failed" in made.codes())
    assert (result.receipt["analysis"] is None) == ("judge_failed" in made.codes())


def told(fault):
    """What a client is told when all members fail in one way: something it can act upon, or 502."""
    name = next(name for name, other in FAULTS.items() if other is fault)
    if name.startswith("come back") or name == "status 429":
        return 429, "rate_limit_exceeded"
    if name.startswith("overflow"):
        return 400, "context_length_exceeded"
    if name == "status 400":
        return 400, "invalid_request_error"
    return 502, "panel_failed"


def check_error(made, error, fault, role):
    """All members failed: an error with each one's reason, and nobody was asked to write."""
    assert role == "all", error
    assert isinstance(error, made.fusion.BackendError)
    assert (error.exit_code, error.status, error.code) == (3,) + told(fault)
    assert all(model in error.message for model in PANEL) and error.hint
    assert set(made.calls()) == set(PANEL)


def check_nothing_open(made):
    """Every connection is gone once the idle ones are closed."""
    made.network.close()
    assert made.up.wait_for(lambda: made.up.open_connections() == 0)


def outcome_of(future):
    """The Result of a run, or its FusionError; anything else that it raised is a bug."""
    error = future.exception(RESULT_S)
    if error is None:
        return future.result()
    if not hasattr(error, "exit_code"):
        raise error
    assert error.message
    return error


def settings_for(fault):
    return {"max_retries": 1, "synthesizer": ["writer", "w2"],
            "member_timeout_s": SHORT_S if fault.hangs else CALL_S}


@pytest.mark.parametrize("fault, role", CASES)
def test_a_fault_is_survived_and_named_and_never_an_answer(rig, fusion, fault, role):
    """Members plain and streamed run side by side, since what hangs takes its time."""
    before = threading.active_count()
    both = [rig(acting(fault, MODELS[role], plain), stream_members=not plain,
                **settings_for(fault)) for plain in (False, True)]
    for plain, (made, future) in enumerate([(made, made.begin()) for made in both]):
        outcome = outcome_of(future)
        if isinstance(outcome, fusion.FusionError):
            check_error(made, outcome, fault, role)
        else:
            assert role != "all" or fault.holds, "an answer was made up"
            check_answer(made, outcome, fault, role)
        check_degraded(made, fault, role, plain)
        check_calls(made, fault, role)
        assert "BOOM" not in json.dumps([post.messages for post in made.up.posts()])
        check_nothing_open(made)
        made.up.stop()
    assert threads_are_back(before)


def test_a_connection_that_went_stale_costs_no_retry(rig):
    """Each connection is good for one call; the next one on it is asked again, silently."""
    made = rig(acting(FAULTS["stale connections"], PANEL + ("judge", "writer"), False),
               max_retries=0)
    for _ in range(2):
        assert outcome_of(made.begin()).reply.text == ANSWER
        assert made.run.degraded == []
    assert len(made.up.posts()) > 10, "some were asked on a stale connection"


@pytest.fixture
def dead_url():
    """The URL of a port where nothing listens; it is held, so that nobody else gets it."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield "http://127.0.0.1:%d/v1" % sock.getsockname()[1]


DEAD = {
    "member": lambda dead: {"panel": ["m1", dead, "m3"]},
    "judge": lambda dead: {"judge": dead},
    "synth": lambda dead: {"synthesizer": [dead, "writer"]},
    "all": lambda dead: {"panel": [dead]},
}


@pytest.mark.parametrize("role", DEAD)
def test_a_backend_that_is_not_there_is_named_and_the_others_go_on(rig, fusion, dead_url, role):
    dead = {"model": "m4", "base_url": dead_url}
    made = rig(lambda request: Reply(text_of(request.model)), **DEAD[role](dead))
    outcome = outcome_of(made.begin())
    assert [(entry["code"], entry["model"]) for entry in made.run.degraded] == [
        (FAILED[role], "m4")]
    assert "m4" not in made.calls()
    if role == "all":
        assert isinstance(outcome, fusion.BackendError) and outcome.exit_code == 3
    else:
        assert outcome.reply.text == ANSWER


@pytest.mark.parametrize("half", ['{"consensus": ["kept"], "errors": [{"letter": "A", "quo',
                                  '{"best_draft": "A", "consensus": ["kept", "los'])
def test_half_of_a_judges_json_is_used_as_far_as_it_goes(rig, half):
    made = rig(lambda request: Reply(half if request.model == "judge" else text_of(request.model)))
    result = outcome_of(made.begin())
    assert result.reply.text == ANSWER
    assert result.receipt["analysis"]["consensus"][0] == "kept"
    assert set(made.codes()) <= {"judge_repaired"}


BAD_ENDS = {"key": (401, 3), "server": (500, 3), "busy": (429, 3)}


@pytest.mark.parametrize("status, code", BAD_ENDS.values(), ids=BAD_ENDS)
def test_the_program_ends_with_3_and_no_traceback_when_no_member_answers(
        run_fusion, tmp_path, status, code):
    done = program(run_fusion, tmp_path, lambda request: error_reply(status, "BOOM"))
    assert (done.code, done.out) == (code, "")
    assert "error:" in done.err and "hint:" in done.err and "Traceback" not in done.err


def test_the_program_answers_with_0_when_one_member_is_good(run_fusion, tmp_path):
    def script(request):
        return error_reply(500, "BOOM") if request.model in ("m1", "m3", "judge") else Reply(
            text_of(request.model))

    done = program(run_fusion, tmp_path, script)
    assert (done.code, done.out.strip()) == (0, ANSWER)
    assert all(name in done.err for name in ("m1", "m3", "judge"))


def program(run_fusion, folder, script):
    """`ask` as a person runs it, against this script."""
    values = {"panel": list(PANEL), "judge": "judge", "synthesizer": "writer", "max_retries": 0}
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    with Upstream(script) as up:
        return run_fusion("ask", "Why is the sky blue?", "--config", str(path),
                          env={"FUSION_BASE_URL": up.url, "FUSION_HISTORY": "0"})


# ---- mixes by lot -----------------------------------------------------------------------------

# Left out of the mixes: what only some roles can do. What hangs is in the last batch.
MIXED = [name for name, fault in sorted(FAULTS.items())
         if fault.roles == ("member", "judge", "synth", "all") and not fault.hangs]
HANGING = [name for name, fault in sorted(FAULTS.items()) if fault.hangs]
WRITERS = ("writer", "w2")
BATCH = 10
HANG_FROM = 60


class Mix:
    """One run by lot: who has which fault from which call on, and what each model has said."""

    def __init__(self, seed):
        rng = random.Random(seed)
        cast = PANEL + ("m4", "s1", "judge") + WRITERS
        self.faults = {model: FAULTS[rng.choice(MIXED)] for model in cast if rng.random() < 0.6}
        self.hangs = seed >= HANG_FROM
        if self.hangs:
            self.faults[rng.choice(cast)] = FAULTS[rng.choice(HANGING)]
        self.good = [model for model in PANEL if model not in self.faults]
        self.live = rng.random() < 0.5
        self.said = collections.defaultdict(set)
        self.used = set()
        self.settings = {
            "panel": list(PANEL[:rng.choice([2, 3, 3])]) + ["m4"], "spares": ["s1"],
            "synthesizer": list(WRITERS), "layers": rng.choice([1, 1, 2]),
            "samples": rng.choice([1, 1, 2]), "quorum": rng.choice([0, 0, 0, 1, 2]),
            "grace_s": 0.2, "max_retries": rng.randint(0, 2), "refine": rng.random() < 0.3,
            "vote": rng.random() < 0.1, "stream_members": rng.random() < 0.7,
            "max_concurrency": rng.choice([0, 0, 3]),
            "member_timeout_s": 1.5 if self.hangs else CALL_S, "timeout_s": 20}

    def script(self, request):
        """What a model says is its own, and different in each call."""
        request.used = self.used
        text = text_of(request.model)
        if request.model != "judge":
            text += " (%d)" % request.n
        fault = self.faults.get(request.model, FAULTS["wrong content type"])
        self.said[request.model] |= {text, fault.said(text)}
        return fault.reply(request, text)


def check_mix(made, mix, outcome):
    fusion = made.fusion
    if isinstance(outcome, fusion.FusionError):
        cut = outcome.code == "stream_cut" and mix.live
        panel = set(mix.settings["panel"])
        assert cut or not panel & set(mix.good), "a good member is enough: %s" % outcome.message
        assert cut or isinstance(outcome, fusion.BackendError)
    else:
        author = outcome.receipt["synthesizer"].split(" #")[0]
        refined = mix.said["writer"] if mix.settings["refine"] else set()
        assert outcome.reply.text in mix.said[author] | refined
        assert made.shown() == outcome.reply.text
        assert outcome.receipt["degraded"] == made.run.degraded
    assert "BOOM" not in json.dumps([post.messages for post in made.up.posts()])
    check_blame(made, mix)
    assert made.run.ledger.reserved == pytest.approx(0, abs=1e-9)


def check_blame(made, mix):
    """Only who had a fault is blamed, and what was cut by the quorum was late."""
    for entry in made.run.degraded:
        model = (entry["model"] or "").split(" #")[0]
        late = entry["code"] in ("member_late", "usage_estimated") and mix.settings["quorum"]
        fine = late or entry["code"] in ("panel_thin", "refine_rejected")
        assert fine or model in mix.faults, entry
        assert entry["detail"] and entry["stage"]


def run_mix(rig, seed):
    mix = Mix(seed)
    made = rig(mix.script, **mix.settings)
    return mix, made, made.begin(live=mix.live)


@pytest.mark.parametrize("batch", range(7))
def test_any_mix_of_faults_ends_in_an_answer_or_an_error_and_blames_the_right_ones(rig, batch):
    before = threading.active_count()
    running = [run_mix(rig, seed) for seed in range(batch * BATCH, (batch + 1) * BATCH)]
    for seed, (mix, made, future) in enumerate(running, batch * BATCH):
        try:
            check_mix(made, mix, outcome_of(future))
            check_nothing_open(made)
        except AssertionError as error:
            raise AssertionError("seed %d: %s" % (seed, error))
        made.up.stop()
    assert threads_are_back(before)


def test_the_receipt_names_who_wrote_the_answer_when_refine_replaces_a_stand_in(rig):
    """The writer fails at first, so that a draft stands in; then it refines that draft."""
    def script(request):
        if request.model == "writer" and request.n == 0:
            return error_reply(500, "BOOM")
        return Reply(text_of(request.model))

    result = outcome_of(rig(script, refine=True).begin())
    assert (result.reply.text, result.receipt["synthesizer"]) == (ANSWER, "writer")


# ---- what a hanging member costs --------------------------------------------------------------

HANGS = {"before the headers": {"hang_after": -1}, "in the body": {"hang_after": 2},
         "drips": {"drip": (1, 0.02)}}


def all_but(model, reply):
    """Everybody is good but for this model."""
    return lambda request: reply if request.model == model else Reply(text_of(request.model))


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
@pytest.mark.parametrize("options", HANGS.values(), ids=HANGS)
def test_a_hanging_member_costs_its_time_once_whatever_the_retries(rig, options, stream):
    made = rig(all_but("m2", Reply("BOOM, and more of it", **options)), member_timeout_s=SHORT_S,
               max_retries=5, stream_members=stream)
    started = time.monotonic()
    result = outcome_of(made.begin())
    assert SHORT_S <= time.monotonic() - started < SHORT_S + 1
    assert result.reply.text == ANSWER and result.receipt["panel_succeeded"] == ["m1", "m3"]
    hung, = made.up.posts("m2")
    assert hung.wait_closed(1) and hung.closed_at - hung.t < SHORT_S + 0.5


def test_all_attempts_of_a_call_share_its_time(rig):
    """Each attempt takes less than the time of a call, all of them would take three times it."""
    made = rig(all_but("m2", error_reply(500, "BOOM", delay=0.3)), member_timeout_s=SHORT_S,
               max_retries=4)
    started = time.monotonic()
    assert outcome_of(made.begin()).reply.text == ANSWER
    assert time.monotonic() - started < SHORT_S + 1 and made.calls()["m2"] <= 2


@pytest.mark.parametrize("options", HANGS.values(), ids=HANGS)
def test_with_a_quorum_in_a_hanging_member_costs_the_grace(rig, options):
    grace = 0.3
    made = rig(all_but("m2", Reply("BOOM, and more of it" * 50, **options)), member_timeout_s=60,
               quorum=2, grace_s=grace, max_retries=5, spares=["s1"])
    started = time.monotonic()
    result = outcome_of(made.begin())
    assert grace <= time.monotonic() - started < grace + 1
    assert result.reply.text == ANSWER and result.receipt["panel_succeeded"] == ["m1", "m3"]
    assert [(entry["code"], entry["stage"], entry["model"]) for entry in made.run.degraded
            if entry["code"] != "usage_estimated"] == [("member_late", "panel", "m2")]
    hung, = made.up.posts("m2")
    assert hung.wait_closed(1) and hung.closed_at - hung.t < grace + 1
    assert "s1" not in made.calls(), "who is late has no spare"


# ---- the breaker, and waiting for a turn ------------------------------------------------------


def model_of(made, name):
    """The member of the configuration with this name."""
    return next(member for member in made.config.panel if member.name == name)


def ask(made, member, run=None):
    """One call: the text of its reply, or the kind of its failure."""
    try:
        return made.fusion.complete(run or made.start(), member, list(QUESTION)).text
    except made.fusion.CallError as error:
        return error.kind


DOWN = {"500": (error_reply(500, "down"), "server"), "529": (error_reply(529, "down"), "server"),
        "closed": (Reply(raw=b""), "connection"),
        "reset": (Reply(raw=b"", cut="rst"), "connection"),
        "hangs": (Reply("x", hang_after=-1), "timeout")}


@pytest.mark.parametrize("reply, kind", DOWN.values(), ids=DOWN)
def test_after_five_failed_calls_in_a_row_a_model_is_left_alone(rig, reply, kind):
    made = rig(all_but("m1", reply), member_timeout_s=0.1 if kind == "timeout" else CALL_S)
    member = model_of(made, "m1")
    assert [ask(made, member) for _ in range(5)] == [kind] * 5
    asked = made.calls()["m1"]
    assert [ask(made, member) for _ in range(3)] == ["breaker"] * 3
    assert made.calls()["m1"] == asked == 5
    assert ask(made, model_of(made, "m2")) == text_of("m2"), "others there go on"


def test_retries_of_one_call_are_one_failure(rig):
    made = rig(all_but("m1", error_reply(500, "down")), max_retries=3)
    assert [ask(made, model_of(made, "m1")) for _ in range(5)] == ["server"] * 5
    assert made.calls()["m1"] == 20
    assert ask(made, model_of(made, "m1")) == "breaker"


def test_one_success_makes_the_count_begin_anew(rig):
    down = error_reply(500, "down")
    made = rig({"m1": [down] * 4 + ["up"] + [down] * 5 + ["never asked"]})
    member = model_of(made, "m1")
    told = [ask(made, member) for _ in range(11)]
    assert told == ["server"] * 4 + ["up"] + ["server"] * 5 + ["breaker"]


REFUSED = {"400": error_reply(400, "no"), "401": error_reply(401, "no"),
           "404": error_reply(404, "no"), "429": error_reply(429, "no")}


@pytest.mark.parametrize("reply", REFUSED.values(), ids=REFUSED)
def test_a_backend_that_says_no_is_not_down(rig, reply):
    made = rig({"m1": [reply] * 6 + ["here I am"]})
    told = [ask(made, model_of(made, "m1")) for _ in range(7)]
    assert "breaker" not in told and told[-1] == "here I am"


def test_the_breaker_is_of_one_backend_and_model(rig):
    """The same slug at two backends: one is down, the other goes on."""
    with Upstream({"m1": "from the other backend"}) as other:
        panel = ["m1", {"model": "m1", "label": "there", "base_url": other.url}]
        made = rig(all_but("m1", error_reply(500, "down")), panel=panel)
        for _ in range(5):
            ask(made, model_of(made, "m1"))
        assert ask(made, model_of(made, "m1")) == "breaker"
        assert ask(made, model_of(made, "there")) == "from the other backend"


def test_a_member_that_is_left_alone_is_named_and_its_spare_is_taken(rig):
    made = rig(all_but("m1", error_reply(500, "down")), spares=["s1"])
    for _ in range(5):
        ask(made, model_of(made, "m1"))
    result = outcome_of(made.begin())
    assert made.calls()["m1"] == 5, "no request was made"
    assert [(entry["code"], entry["model"]) for entry in made.run.degraded] == [
        ("member_failed", "m1")]
    assert sorted(result.receipt["panel_succeeded"]) == ["m2", "m3", "s1"]


EIGHT = [{"model": model, "label": "%s of %d" % (model, number)}
         for number in range(4) for model in ("m1", "m2")]


@pytest.mark.parametrize("setting", ["max_concurrency", "backend_concurrency"])
@pytest.mark.parametrize("limit", [1, 3])
def test_a_limit_of_concurrent_calls_is_kept_and_used_and_all_get_their_turn(rig, setting, limit):
    """The time of one call is shorter than the wait of the last one."""
    hold = 0.12
    made = rig(lambda request: Reply(text_of(request.model) + " %d" % request.n, delay=(
        hold if request.model in PANEL else 0)), panel=EIGHT, member_timeout_s=0.6,
        **{setting: limit})
    result = outcome_of(made.begin())
    assert made.up.peak_in_flight == limit
    assert len(result.receipt["panel_succeeded"]) == 8 and made.run.degraded == []


def test_two_runs_share_the_limit_of_their_network(rig):
    made = rig(lambda request: Reply(text_of(request.model), delay=0.05), max_concurrency=2)
    futures = [made.begin() for _ in range(4)]
    assert [outcome_of(future).reply.text for future in futures] == [ANSWER] * 4
    assert made.up.peak_in_flight == 2


def test_a_limit_of_one_backend_is_not_a_limit_of_another(rig):
    gate = threading.Event()
    with Upstream({"m2": Reply("there", delay=gate)}) as other:
        panel = ["m1", {"model": "m2", "base_url": other.url}]
        made = rig(lambda request: Reply(text_of(request.model), delay=(
            gate if request.model == "m1" else 0)), panel=panel, backend_concurrency=1)
        future = made.begin()
        assert made.up.wait_for(lambda: made.up.in_flight == other.in_flight == 1)
        gate.set()
        assert len(outcome_of(future).receipt["panel_succeeded"]) == 2


def test_a_failed_or_cut_off_call_gives_its_turn_back(rig):
    broken = [error_reply(500, "no"), Reply("x", cut_after=1), Reply("x", hang_after=-1)]
    made = rig({"m1": broken + ["good"]}, max_concurrency=1, member_timeout_s=0.2)
    told = [ask(made, model_of(made, "m1")) for _ in range(4)]
    assert told == ["server", "cut", "timeout", "good"]


def test_waiting_for_a_turn_before_a_retry_costs_no_time_of_the_call(rig, fusion):
    """The first attempt fails; before its retry, a call of another run has the only turn."""
    limit, held = 0.4, 0.8
    failing = threading.Event()
    first = [error_reply(500, "BOOM", delay=failing), text_of("m1")]
    made = rig({"m1": first, "m2": Reply("held", delay=held)}, max_concurrency=1, max_retries=1,
               retry_backoff=0.1, member_timeout_s=limit)
    patient = dataclasses.replace(made.config, member_timeout_s=RESULT_S)
    calling = begin(lambda: ask(made, model_of(made, "m1"), made.start()))
    assert made.up.wait_for(lambda: made.calls()["m1"] == 1)
    other = begin(lambda: ask(made, model_of(made, "m2"),
                              fusion.start_run(patient, made.network)))
    failing.set()
    assert other.result(RESULT_S) == "held"
    assert calling.result(RESULT_S) == text_of("m1")
    assert [post.model for post in made.up.posts()] == ["m1", "m2", "m1"]


# ---- context overflow -------------------------------------------------------------------------

WINDOW = 4096
TABLED = "openai/gpt-4o-mini"
TABLED_WINDOW = 128_000
MARK = re.compile(r"([\d,]+) \w+ left out")


def long_text(name, size):
    """A text whose every place is its own, with letters of two bytes in it."""
    words, length = [], 0
    while length < size:
        words.append("%s-\u00fc-%d" % (name, len(words)))
        length += len(words[-1].encode()) + 1
    return " ".join(words)


def overflow_reply(kind, tokens, window):
    if kind == "wordless":
        return error_reply(400, "The prompt is too long")
    return context_overflow(kind, tokens, window)


class Small:
    """A cast with long drafts, in which one model has a small window and knows it."""

    def __init__(self, model, window, kind, sizes, layered=False):
        self.model, self.window, self.kind, self.layered = model, window, kind, layered
        self.texts = {name: long_text(name, size) for name, size in zip(PANEL, sizes)}
        self.refused = 0

    def __call__(self, request):
        tokens = len(json.dumps(request.messages, ensure_ascii=False).encode()) // 3
        if request.model == self.model and tokens > self.window and (
                not self.layered or len(request.messages) > len(CLIENT)):
            self.refused += 1
            return overflow_reply(self.kind, tokens, self.window)
        name = "m1" if self.layered and request.model == self.model else request.model
        return Reply(self.texts.get(name) or text_of(
            "judge" if request.model == TABLED else name))


CLIENT = ({"role": "system", "content": "Be exact. " + long_text("system", 500)},
          {"role": "user", "content": "Why is the sky blue? " + long_text("client", 1500)})
KNOWN = {
    "by the configuration": ("judge", {"context": WINDOW}, "llamacpp", 0),
    "by llama.cpp's refusal": ("judge", {}, "llamacpp", 1),
    "by OpenAI's refusal": ("judge", {}, "openai", 1),
    "by a refusal without numbers": ("judge", {}, "wordless", None),
    "by a refusal, against the configuration": ("judge", {"context": 90_000}, "openai", 1),
}
READERS = {"judge": "judge", "writer": "synthesizer", "m1": "panel"}


def reading(name, member):
    """The settings in which this member is a judge, the writer or the first of the panel."""
    if name == "m1":
        return {"panel": [member, "m2", "m3"], "layers": 2}
    return {READERS[name]: member}


def check_cut(sent, texts):
    """The drafts that a model was sent: those that are cut keep head and tail and say so."""
    shown = sorted(drafts_in(last_text(sent)).values())
    assert len(shown) == len(texts)
    whole = [name for name, text in texts.items() if text in shown]
    for name in sorted(set(texts) - set(whole)):
        cut, = [text for text in shown if text.startswith(name) and MARK.search(text)]
        mark = MARK.search(cut)
        head, tail = re.split(r"\n[^\n]*left out[^\n]*\n", cut)
        assert texts[name].startswith(head) and texts[name].endswith(tail) and head and tail
        left = len(texts[name].encode()) - len((head + tail).encode())
        assert abs(int(mark.group(1).replace(",", "")) - left) <= 4
    return whole


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("way", KNOWN)
def test_long_drafts_are_cut_to_a_window_that_is_known_or_learnt(rig, name, way):
    _, known, kind, refused = KNOWN[way]
    small = Small(name, WINDOW, kind, (300, 9000, 14000), layered=name == "m1")
    made = rig(small, **reading(name, dict(known, model=name, max_tokens=500)))
    result = outcome_of(made.begin(CLIENT))
    assert result.reply.text == ANSWER
    assert {(entry["code"], entry["model"]) for entry in made.run.degraded} == {
        ("context_trimmed", name)}
    assert small.refused == refused or refused is None and 1 <= small.refused <= 2
    sent = [post for post in made.up.posts(name) if len(post.messages) > len(CLIENT)][-1]
    assert check_cut(sent, small.texts)[:1] == ["m1"], "the shortest one is whole"
    assert all(post.messages[:len(CLIENT)] == list(CLIENT) for post in made.up.posts())
    outcome_of(made.begin(CLIENT))
    assert small.refused == refused or refused is None, "what was learnt is remembered"


def test_what_short_drafts_leave_goes_to_the_longer_ones(rig):
    """An even share of the room would be less than the second draft; two of three fit whole."""
    small = Small("judge", WINDOW, "openai", (300, 2400, 14000))
    made = rig(small, judge={"model": "judge", "context": WINDOW, "max_tokens": 500})
    outcome_of(made.begin(CLIENT))
    assert check_cut(made.up.posts("judge")[-1], small.texts) == ["m1", "m2"]


def test_long_drafts_are_cut_to_the_window_of_the_price_table(rig):
    small = Small(TABLED, TABLED_WINDOW, "openai", (300, 300_000, 500_000))
    made = rig(small, judge=TABLED)
    outcome_of(made.begin(CLIENT))
    assert small.refused == 0 and made.codes() == ["context_trimmed"]
    assert check_cut(made.up.posts(TABLED)[-1], small.texts) == ["m1"]
    assert check_cut(made.up.posts("writer")[-1], small.texts) == list(PANEL), "no limit there"


NO_HELP = {"judge": ("judge_failed", ANSWER), "writer": ("synthesizer_failed", SECOND),
           "m1": ("member_failed", ANSWER)}


@pytest.mark.parametrize("kind", ["llamacpp", "openai", "wordless"])
@pytest.mark.parametrize("name", NO_HELP)
def test_where_cutting_does_not_help_the_run_still_ends(rig, fusion, name, kind):
    """The window is smaller than the client's own messages."""
    code, text = NO_HELP[name]
    small = Small(name, 64, kind, (3000, 5000, 9000))
    settings = dict(reading(name, {"model": name, "max_tokens": 500}), layers=1)
    settings.setdefault("synthesizer", ["writer"])
    if name == "writer":
        settings["synthesizer"] = [settings["synthesizer"], "w2"]
    made = rig(small, **settings)
    assert outcome_of(made.begin(CLIENT)).reply.text == text
    assert {entry["code"] for entry in made.run.degraded} - {"context_trimmed"} == {code}
    assert {entry["model"] for entry in made.run.degraded} == {name}
    assert small.refused <= 3
    assert all(post.messages[:len(CLIENT)] == list(CLIENT) for post in made.up.posts())


# ---- the ceiling ------------------------------------------------------------------------------

TINY = 1e-9
TOGETHER = 20
DEEDS = (["answers"] * 4 + ["at its cap"] * 8 + ["no usage", "empty", "error event", "cut"] * 2
         + ["reset", "refuses a parameter", "refuses", "busy", "cut by length"])
SLOW_DEEDS = DEEDS + ["hangs", "hangs in the body"] * 2
ACCEPTED = {
    "answers": {}, "at its cap": {}, "no usage": {"usage": None}, "empty": {},
    "error event": {"error": "overloaded", "error_after": 2}, "cut": {"cut_after": 2},
    "reset": {"cut_after": 1, "cut": "rst"}, "cut by length": {"finish": "length"},
    "hangs": {"hang_after": -1}, "hangs in the body": {"hang_after": 1},
}


class Bill:
    """An upstream that does a deed by lot with each call, and bills what it accepts.

    What it reports is billed so; what it cannot report is billed at the whole cap.
    """

    def __init__(self, seed, slow):
        self.rng, self.lock = random.Random(seed), threading.Lock()
        self.deeds, self.total, self.calls = SLOW_DEEDS if slow else DEEDS, 0.0, 0

    def __call__(self, request):
        with self.lock:
            deed, share = self.rng.choice(self.deeds), self.rng.random()
            self.calls += 1
        if deed == "refuses a parameter" and "temperature" in request.body:
            return error_reply(400, "Unsupported parameter", param="temperature")
        if deed in ("refuses", "busy"):
            return error_reply(400 if deed == "refuses" else 429, "no")
        deed = deed if deed in ACCEPTED else "at its cap"
        cap = request.body.get("max_completion_tokens") or request.body["max_tokens"]
        prompt = len(json.dumps(request.messages, ensure_ascii=False).encode()) // 4
        usage = {"prompt_tokens": prompt,
                 "completion_tokens": int(cap * share) if deed == "answers" else cap}
        self.charge(price(request.model), usage)
        text = "" if deed == "empty" else text_of(request.model) + " %s" % share
        return Reply(text, **dict({"usage": usage}, **ACCEPTED[deed]))

    def charge(self, rates, usage):
        with self.lock:
            self.total += (usage["prompt_tokens"] * rates["input"]
                           + usage["completion_tokens"] * rates["output"]) / 1e6


def money_settings(rng, slow):
    """A configuration by lot."""
    cast = ["m1", "m2", "m3", "m4"]
    panel = [rng.choice(cast) for _ in range(rng.randint(1, 4))]
    return {
        "panel": [{"model": model, "max_tokens": rng.randint(50, 900)} for model in panel],
        "synthesizer": ["writer", "w2"][:rng.randint(1, 2)], "spares": ["s1", "s2"],
        "max_tokens": rng.randint(50, 900), "samples": rng.choice([1, 1, 2, 3]),
        "layers": rng.choice([1, 1, 2]), "refine": rng.random() < 0.4,
        "vote": rng.random() < 0.2, "mode": rng.choice(["fuse"] * 6 + ["solo"]),
        "max_retries": rng.randint(0, 4), "quorum": rng.choice([0, 0, 1, 2]), "grace_s": 0.01,
        "max_concurrency": rng.choice([0, 0, 1, 2, 5]), "stream_members": rng.random() < 0.8,
        "member_timeout_s": 0.3 if slow else CALL_S, "timeout_s": 8}


def money_run(rig, fusion, seed):
    """A run by lot, begun; returns (its rig, its bill, its ceiling, its Future)."""
    rng = random.Random(seed)
    slow = seed % 5 == 0
    bill, settings = Bill(seed, slow), money_settings(rng, slow)
    made = rig(bill, **settings)
    whole = fusion.total_of(fusion.estimate(made.config, QUESTION))[1]
    alone = fusion.total_of(fusion.estimate(
        fusion.with_flags(made.config, {"mode": "solo", "refine": False}), QUESTION))[1]
    ceiling = rng.choice([0.9, 1, 1.5, 3]) * alone if rng.random() < 0.4 else \
        rng.choice([0.3, 0.5, 0.8, 1, 1.2]) * whole
    made.config = fusion.with_flags(made.config, {"max_cost_usd": ceiling})
    return made, bill, ceiling, made.begin(live=rng.random() < 0.3)


def check_money(made, bill, ceiling, outcome):
    ledger = made.run.ledger
    assert made.up.wait_for(lambda: made.up.in_flight == 0 and abs(ledger.reserved) < TINY)
    assert bill.total <= ceiling + TINY, "the ceiling was passed"
    assert ledger.spent + ledger.held >= bill.total - TINY, "something was not counted"
    assert ledger.committed() <= ceiling + TINY
    if isinstance(outcome, made.fusion.LimitError):
        assert (outcome.exit_code, outcome.status, outcome.code) == (4, 402, "budget_exceeded")
        assert outcome.hint


BATCHES = [pytest.param(batch, marks=[pytest.mark.slow] if batch >= 6 else [])
           for batch in range(25)]


@pytest.mark.parametrize("batch", BATCHES)
def test_no_run_by_lot_is_billed_more_than_its_ceiling(rig, fusion, batch):
    seeds = range(batch * TOGETHER, (batch + 1) * TOGETHER)
    running = [money_run(rig, fusion, seed) for seed in seeds]
    used = []
    for seed, (made, bill, ceiling, future) in zip(seeds, running):
        try:
            check_money(made, bill, ceiling, outcome_of(future))
        except AssertionError as error:
            raise AssertionError("seed %d: %s" % (seed, error))
        used.append(bill.total / ceiling)
    assert max(used) > 0.7 and sum(share > 0.3 for share in used) > 5, "the ceilings were near"


def test_a_ceiling_below_one_call_is_a_limit_that_asks_nobody(rig, fusion):
    made = rig(lambda request: Reply("never"), max_cost_usd=1e-6)
    error = outcome_of(made.begin())
    assert isinstance(error, fusion.LimitError) and not made.up.posts()
    assert (error.exit_code, error.status, error.code) == (4, 402, "budget_exceeded")


# What was accepted (status 200) and then failed, so that it is billed and its usage unknown.
LOST = {"cut": Reply("x" * 80, cut_after=3), "reset": Reply("x" * 80, cut_after=3, cut="rst"),
        "no end": Reply("x" * 80, usage=None, sse={"no_done": True, "no_finish": True}),
        "error event": Reply("x" * 80, error="broke", error_after=3),
        "no headers": Reply("x", hang_after=-1), "half a JSON body": Reply(body=HALF),
        "garbage event": Reply(body=b"data: {nonsense\n\n", content_type="text/event-stream"),
        "33 MB": Reply(body=BIG.encode())}


@pytest.mark.parametrize("reply", LOST.values(), ids=LOST)
def test_an_accepted_call_that_failed_may_be_billed_at_its_cap_so_that_is_held(rig, fusion, reply):
    made = rig({"m1": reply}, panel=["m1"], max_cost_usd=1, member_timeout_s=0.3)
    with pytest.raises(fusion.CallError):
        fusion.complete(made.start(), model_of(made, "m1"), list(QUESTION), max_tokens=100)
    worst = (100 * price("m1")["output"]) / 1e6
    ledger = made.run.ledger
    assert ledger.spent + ledger.held >= worst and abs(ledger.reserved) < TINY
