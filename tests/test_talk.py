"""Asking: what reaches the backend, what is written where, and what Ctrl-C does."""
import base64
import fcntl
import json
import os
import re
import signal
import stat
import subprocess
import sys
import termios
import threading
import time

import pytest

from conftest import FUSION_PY, Finished, clean_environment, kill_group
from upstream import Reply, Upstream, error_reply, json_reply

WITHIN_S = 1.0              # what Ctrl-C promises
DRAFTS = {"m/a": "The sky is blue. Air scatters it.", "m/b": "The sky is blue. Nobody knows why."}
ANSWER = "It is the air: short waves scatter most."
ANALYSIS = {
    "consensus": ["the sky is blue"],
    "contradictions": [{"topic": "the cause", "verdict": "draft A is right", "positions": [
        {"letters": ["A", "B"], "stance": "scattering", "quote": "Air scatters it"},
        {"letters": ["A", "B"], "stance": "a riddle", "quote": "Nobody knows why"}]}],
    "partial_coverage": [{"letters": ["A"], "point": "the colour"}],
    "unique_insights": [], "errors": [], "blind_spots": ["the sunset"],
    "must_include": ["scattering"], "best_draft": "A"}
PRICE = {"input": 1000, "output": 2000}
SETUP = {
    "panel": ["m/a", {"model": "m/b", "label": "second"}], "judge": "m/j", "synthesizer": "m/s",
    "max_retries": 0, "prices": {"m/" + letter: PRICE for letter in "abjsxy"}}
PNG = b"\x89PNG\r\n\x1a\n\x00\x00pixels"


def script(**changes):
    """A script in which all goes well; changes are named by the letter of the model."""
    found = dict(DRAFTS, **{"m/j": json.dumps(ANALYSIS), "m/s": ANSWER})
    found.update(("m/" + letter, reply) for letter, reply in changes.items())
    return found


def hanging(**options):
    return Reply("never", hang_after=-1, **options)


def write_setup(folder, **changes):
    """Write SETUP with changes to a file and return its path; None leaves a key out."""
    values = dict(SETUP, **changes)
    path = folder / "setup.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return str(path)


@pytest.fixture
def command(fusion, capfd, monkeypatch, tmp_path):
    """Runs the command line in this process, with a HOME that lasts for the test."""
    def run(*argv, stdin=None, **env):
        for name, value in clean_environment(tmp_path / "home", env).items():
            monkeypatch.setenv(name, value)
        path = os.devnull
        if stdin is not None:
            path = tmp_path / "stdin"
            path.write_bytes(stdin)
        started = time.monotonic()
        with open(path) as opened, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", opened)
            code = fusion.main(list(argv))
        out, err = capfd.readouterr()
        return Finished(code, out.encode(), err.encode(), time.monotonic() - started)
    return run


@pytest.fixture
def ask(command, tmp_path):
    """Asks a scripted backend by the command line: ask(up, "hello", "--json")."""
    def run(up, *argv, config=None, **more):
        path = write_setup(tmp_path, **(config or {}))
        return command("ask", "--config", path, *argv, FUSION_BASE_URL=up.url, **more)
    return run


class Program:
    """fusion.py at work: what it writes can be waited for, and signals can be sent to it."""

    def __init__(self, home, *args, env=None, **files):
        self.said = {"out": b"", "err": b""}
        self.grown = threading.Condition()
        self.since = time.monotonic()
        command = [sys.executable, str(FUSION_PY)] + [str(arg) for arg in args]
        streams = self.start(command, clean_environment(home, env), files)
        self.pumps = [threading.Thread(target=self.pump, args=pair, daemon=True)
                      for pair in streams.items()]
        for pump in self.pumps:
            pump.start()

    def start(self, command, env, files):
        """Start the process; returns the files to read from, by name."""
        files = dict({"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                      "stderr": subprocess.PIPE}, **files)
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **files)
        pipes = {"out": self.process.stdout, "err": self.process.stderr}
        return {name: pipe for name, pipe in pipes.items() if pipe is not None}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        kill_group(self.process.pid)
        self.process.wait()
        for pump in self.pumps:
            pump.join(5)

    def pump(self, name, stream):
        """Collect what one stream says until it ends, which a terminal tells by an error."""
        with stream:
            while True:
                try:
                    data = os.read(stream.fileno(), 65536)
                except OSError:
                    data = b""
                with self.grown:
                    self.said[name] += data
                    self.grown.notify_all()
                if not data:
                    return

    def text(self, name):
        return self.said[name].decode("utf-8", "replace")

    def ending(self):
        """The end of all that was said, for messages."""
        return {name: data[-2000:] for name, data in self.said.items()}

    def wait_for(self, condition, name="err"):
        """Wait until a text stands in what was said, or a function of it is true."""
        holds = condition if callable(condition) else lambda said: condition in said
        with self.grown:
            if self.grown.wait_for(lambda: holds(self.text(name)), 10):
                return
        pytest.fail("waited in vain; it said %s" % self.ending())

    def signal(self, number):
        self.since = time.monotonic()
        os.kill(self.process.pid, number)

    def end(self, timeout=10):
        """Wait for the end; returns Finished, with the seconds since the last signal."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail("not done after %s s; it said %s" % (timeout, self.ending()))
        seconds = time.monotonic() - self.since
        for pump in self.pumps:
            pump.join(5)
        return Finished(code, self.said["out"], self.said["err"], seconds)


@pytest.fixture
def program(tmp_path):
    """Starts `ask` of a scripted backend as a process: with program(up, "hello") as running."""
    def start(up, *args, config=None, **more):
        path = write_setup(tmp_path, **(config or {}))
        return Program(tmp_path / "home", "ask", "--config", path, *args,
                       env={"FUSION_BASE_URL": up.url}, **more)
    return start


def sent_text(request):
    return request.messages[-1]["content"]


def asked(up):
    """How often each model was asked."""
    models = [request.model for request in up.posts()]
    return {model: models.count(model) for model in sorted(set(models))}


def lines_with(word, text):
    return [line for line in text.splitlines() if word in line]


# ---- what is asked --------------------------------------------------------------------------

@pytest.mark.parametrize("argv, stdin, expected", [
    (["why?"], None, "why?"),
    (["--", "--why?"], None, "--why?"),
    (["-"], b"from the pipe", "from the pipe"),
    ([], b"from the pipe", "from the pipe"),
    (["why?"], b"from the pipe", "from the pipe\n\nwhy?"),
    (["why?"], b" \n", "why?"),
    ([], "\ufeffcaf\u00e9 \U0001f600\r\n\tx".encode(), "caf\u00e9 \U0001f600\r\n\tx"),
], ids=["argument", "argument-like-a-flag", "dash", "pipe", "pipe-before-argument", "blank-pipe",
        "bytes-stay-as-they-are"])
def test_the_prompt_is_the_pipe_and_then_the_argument(ask, argv, stdin, expected):
    with Upstream(script()) as up:
        found = ask(up, "--mode", "solo", *argv, stdin=stdin)
    assert found.code == 0, found.err
    assert up.posts()[0].messages == [{"role": "user", "content": expected}]


def test_files_come_first_then_the_pipe_then_the_argument(ask, tmp_path):
    (tmp_path / "one.txt").write_text("ONE\n")
    (tmp_path / "two.md").write_text("TWO")
    files = ["--file", str(tmp_path / "two.md"), "--file", str(tmp_path / "one.txt")]
    with Upstream(script()) as up:
        ask(up, "--mode", "solo", *files, "ARGUMENT", stdin=b"PIPE")
    content = sent_text(up.posts()[0])
    order = [content.index(word) for word in ("two.md", "TWO", "one.txt", "ONE", "PIPE",
                                              "ARGUMENT")]
    assert order == sorted(order)
    assert str(tmp_path) not in content, "only the file's own name goes out"


@pytest.mark.parametrize("data, kind", [
    (PNG, "image/png"), (b"\xff\xd8\xff\xe0JFIF", "image/jpeg"), (b"GIF89a...", "image/gif"),
    (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image/webp")])
def test_an_image_becomes_an_image_part_whatever_its_name(ask, tmp_path, data, kind):
    (tmp_path / "picture.txt").write_bytes(data)
    (tmp_path / "words.txt").write_text("WORDS")
    with Upstream(script()) as up:
        found = ask(up, "--mode", "solo", "--file", str(tmp_path / "picture.txt"),
                    "--file", str(tmp_path / "words.txt"), "what is it?")
    assert found.code == 0, found.err
    image, text = sent_text(up.posts()[0])
    url = "data:%s;base64,%s" % (kind, base64.b64encode(data).decode())
    assert image == {"type": "image_url", "image_url": {"url": url}}
    assert text["type"] == "text"
    assert text["text"].index("WORDS") < text["text"].index("what is it?")


def test_every_stage_gets_the_system_prompt_and_the_question_as_they_are(ask):
    with Upstream(script()) as up:
        ask(up, "--system", "Be brief.", "why?")
    start = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    assert asked(up) == {"m/a": 1, "m/b": 1, "m/j": 1, "m/s": 1}
    assert all(request.messages[:2] == start for request in up.posts())


@pytest.mark.parametrize("flags, expected", [
    (["--panel", "m/x,m/y"], {"m/x": 1, "m/y": 1, "m/j": 1, "m/s": 1}),
    (["--panel", " second , m/x"], {"m/b": 1, "m/x": 1, "m/j": 1, "m/s": 1}),
    (["--judge", "m/x"], {"m/a": 1, "m/b": 1, "m/x": 1, "m/s": 1}),
    (["--judge", "second"], {"m/a": 1, "m/b": 2, "m/s": 1}),
    (["--synthesizer", "m/x"], {"m/a": 1, "m/b": 1, "m/j": 1, "m/x": 1}),
    (["--synthesizer", "m/gone,m/x"], {"m/a": 1, "m/b": 1, "m/j": 1, "m/gone": 1, "m/x": 1}),
    (["--refine"], {"m/a": 1, "m/b": 1, "m/j": 1, "m/s": 2}),
    (["--layers", "2"], {"m/a": 2, "m/b": 2, "m/j": 1, "m/s": 1}),
    (["--samples", "3"], {"m/a": 3, "m/b": 3, "m/j": 1, "m/s": 1}),
    (["--mode", "solo"], {"m/s": 1}),
    (["--mode", "auto"], {"m/s": 1}),
    (["--max-cost", "100000"], {"m/a": 1, "m/b": 1, "m/j": 1, "m/s": 1}),
    (["--timeout", "100"], {"m/a": 1, "m/b": 1, "m/j": 1, "m/s": 1}),
], ids=lambda value: "_".join(value).replace("/", "") if isinstance(value, list) else "")
def test_a_flag_decides_who_is_asked(ask, flags, expected):
    answers = script(x=json.dumps(ANALYSIS), y=DRAFTS["m/b"], gone=Reply(status=404),
                     b=[DRAFTS["m/b"], json.dumps(ANALYSIS)])
    with Upstream(answers) as up:
        found = ask(up, "hello there", *flags)
    assert found.code == 0, found.err
    assert asked(up) == dict(expected)


def test_no_refine_turns_off_what_the_configuration_turns_on(ask):
    with Upstream(script()) as up:
        ask(up, "hello there", config={"refine": True})
        ask(up, "hello there", "--no-refine", config={"refine": True})
    assert asked(up)["m/s"] == 3


def test_a_vote_that_agrees_asks_no_judge_and_no_writer(ask):
    with Upstream(script(a="So many.\nAnswer: 42", b="I counted.\nAnswer: 42")) as up:
        found = ask(up, "how many are there?", "--vote")
    assert asked(up) == {"m/a": 1, "m/b": 1}
    assert found.out.endswith("Answer: 42\n") and "judge none" in found.err


def test_a_flag_replaces_a_panel_and_the_roles_that_follow_from_it(ask):
    with Upstream({"*": "said"}) as up:
        ask(up, "hello there", "--panel", "m/x,m/y", config={"judge": None, "synthesizer": None})
    assert set(asked(up)) == {"m/x", "m/y"}


# ---- what is written where ------------------------------------------------------------------

VARIANTS = [
    [], ["--stream"], ["--quiet"], ["--stream", "--quiet"], ["--refine"], ["--refine", "--stream"],
    ["--layers", "2"], ["--samples", "2"], ["--mode", "solo"], ["--mode", "solo", "--stream"],
    ["--mode", "auto"], ["--vote"], ["--no-history"], ["--no-color"], ["--debug"],
    ["--max-cost", "100000"], ["--max-cost", "100"], ["--panel", "m/a,m/gone"],
    ["--judge", "m/gone"], ["--synthesizer", "m/gone,m/s"]]


@pytest.mark.parametrize("flags", VARIANTS, ids="_".join)
def test_stdout_is_the_answer_and_nothing_else(ask, flags):
    with Upstream(script()) as up:
        found = ask(up, "hello there", *flags)
    assert (found.code, found.out) == (0, ANSWER + "\n"), found.err
    assert bool(found.err) != ("--quiet" in flags)


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["whole", "stream"])
@pytest.mark.parametrize("answer", ["ends so\n", "caf\u00e9 \U0001f600\r\n\r\n\ttab", "a\n\n\n"])
def test_the_answer_reaches_a_pipe_byte_for_byte(ask, answer, flags):
    with Upstream(script(s=answer)) as up:
        found = ask(up, "hello there", *flags)
    expected = answer if answer.endswith("\n") else answer + "\n"
    assert found.raw_out == expected.encode()


def test_reasoning_is_not_part_of_the_answer(ask):
    with Upstream(script(s=Reply(ANSWER, reasoning="SECRET MUSINGS"))) as up:
        found = ask(up, "hello there", "--stream")
    assert found.out == ANSWER + "\n" and "MUSINGS" not in found.err


def test_the_receipt_is_one_line_of_who_ran_and_what_it_took(ask):
    with Upstream(script()) as up:
        found = ask(up, "hello there")
    last = found.err.splitlines()[-1]
    match = re.fullmatch(r"2 of 2 answered, judge m/j, writer m/s, ([\d,]+) tokens, \$(\d+\.\d\d), "
                         r"\d+\.\d s", last)
    assert match, last
    tokens = [(given, out) for _, given, out, _ in up.billed]
    assert int(match.group(1).replace(",", "")) == sum(map(sum, tokens))
    cost = sum(given * PRICE["input"] + out * PRICE["output"] for given, out in tokens) / 1e6
    assert match.group(2) == "%.2f" % cost


@pytest.mark.parametrize("flags, head", [
    (["--mode", "solo"], "solo, writer m/s, "),
    (["--panel", "m/a,m/gone"], "1 of 2 answered, judge m/j, writer m/s, "),
    (["--samples", "2"], "4 of 4 answered, judge m/j, writer m/s, "),
    (["--synthesizer", "m/gone,m/s"], "2 of 2 answered, judge m/j, writer m/s, "),
    (["--judge", "m/free"], "2 of 2 answered, judge m/free, writer m/s, ")],
    ids=["solo", "one-failed", "samples", "failover", "unpriced"])
def test_the_receipt_tells_who_really_ran(ask, flags, head):
    with Upstream(script(free=json.dumps(ANALYSIS))) as up:
        found = ask(up, "hello there", *flags)
    line = lines_with(", writer ", found.err)
    assert len(line) == 1 and line[0].startswith(head), found.err
    assert ("cost unknown" in line[0]) == ("m/free" in flags)


@pytest.mark.parametrize("changes, flags, expected", [
    ({"b": Reply(status=418, error="I am a teapot")}, [],
     [("member_failed", "second", "teapot"), ("panel_thin", "m/a", "")]),
    ({"j": "I would rather write prose."}, [],
     [("judge_failed", "m/j", "JSON")]),
    ({"j": Reply(status=400)}, [], [("judge_failed", "m/j", "400")]),
    ({}, ["--synthesizer", "m/gone,m/s"], [("synthesizer_failed", "m/gone", "404")]),
    ({"s": [ANSWER, "no"]}, ["--refine"], [("refine_rejected", "m/s", "length")]),
], ids=["member", "judge-prose", "judge-refused", "synthesizer", "refine"])
def test_each_thing_that_degraded_has_its_line_and_the_answer_comes(ask, changes, flags, expected):
    with Upstream(script(**changes)) as up:
        found = ask(up, "hello there", *flags)
    assert (found.code, found.out) == (0, ANSWER + "\n")
    lines = [line for line in found.err.splitlines() if line.startswith("degraded: ")]
    assert len(lines) == len(expected)
    for line, (code, model, detail) in zip(lines, expected):
        assert line.startswith("degraded: %s %s" % (code, model)) and detail in line


def test_nothing_degraded_says_nothing_of_it(ask):
    with Upstream(script()) as up:
        assert "degraded" not in ask(up, "hello there").err


def test_each_member_and_stage_is_reported_once(ask):
    with Upstream(script(b=Reply(status=400))) as up:
        found = ask(up, "hello there")
    words = [line.split()[:3] for line in found.err.splitlines()]
    assert sorted(words[:2]) == [["member", "failed", "second"], ["member", "ok", "m/a"]]
    assert words[2:4] == [["judge", "ok", "m/j"], ["synth", "ok", "m/s"]]


# ---- as JSON --------------------------------------------------------------------------------

FUSION_KEYS = {
    "config", "mode", "panel_models", "panel_succeeded", "judge", "synthesizer", "cost_usd",
    "cost_source", "cost_breakdown", "timing_s", "degraded", "analysis", "judge_unsupported",
    "seed", "request_id"}
CALL_KEYS = {"model", "role", "prompt_tokens", "completion_tokens", "cost_usd", "source",
             "latency_s", "attempts", "status"}
TEXT_OR_NONE = (str, type(None))


def check_shape(found, shape, where="$"):
    """Hold an object to {key: type, tuple of types, shape, or [shape of each entry]}."""
    for key, wanted in shape.items():
        assert key in found, "%s.%s is missing" % (where, key)
        value = found[key]
        if isinstance(wanted, dict):
            check_shape(value, wanted, where + "." + key)
        elif isinstance(wanted, list):
            assert isinstance(value, list), where + "." + key
            for entry in value:
                check_shape(entry, wanted[0], where + "." + key)
        else:
            right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
            assert right, "%s.%s is %r" % (where, key, value)


COMPLETION = {
    "id": str, "object": str, "created": int, "model": str,
    "choices": [{"index": int, "finish_reason": str, "logprobs": (dict, type(None)),
                 "message": {"role": str, "content": TEXT_OR_NONE, "refusal": TEXT_OR_NONE}}],
    "usage": {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}}
TOOL_CALL = {"id": str, "type": str, "function": {"name": str, "arguments": str}}


def check_completion(found):
    """Hold an object to OpenAI's chat.completion, written down here without its library."""
    check_shape(found, COMPLETION)
    assert found["object"] == "chat.completion" and found["id"]
    (choice,), usage = found["choices"], found["usage"]
    assert choice["index"] == 0 and choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length", "tool_calls", "content_filter")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    if "tool_calls" in choice["message"]:
        check_shape(choice["message"], {"tool_calls": [TOOL_CALL]})
        assert choice["message"]["tool_calls"], "an empty list is not allowed"
    json.dumps(found, allow_nan=False)


CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]


OFFERED = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("reply, finish, content", [
    (Reply("hi"), "stop", "hi"),
    (Reply("hi", finish="length"), "length", "hi"),
    (Reply("hi", finish="content_filter"), "content_filter", "hi"),
    (Reply("hi", finish=None), "stop", "hi"),
    (Reply("hi", finish="max_tokens"), "length", "hi"),
    (Reply("hi", finish="eos_token"), "stop", "hi"),
    (Reply("hi", reasoning="hm"), "stop", "hi"),
    (Reply("hi", usage=None), "stop", "hi"),
    (Reply("hi", usage={"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 99}), "stop",
     "hi"),
    (Reply("", tool_calls=CALLS), "tool_calls", None),
    (Reply("hi", tool_calls=CALLS), "tool_calls", "hi"),
], ids=["stop", "length", "filter", "null", "max-tokens", "odd-word", "reasoning", "no-usage",
        "wrong-total", "call", "text-and-call"])
def test_an_answer_is_openais_object(fusion, tmp_path, reply, finish, content):
    network = fusion.Network()
    with Upstream(script(s=reply)) as up:
        env = fusion.Env({"FUSION_BASE_URL": up.url})
        config = fusion.with_flags(fusion.load_config(write_setup(tmp_path), env), {"mode": "solo"})
        run = fusion.start_run(config, network)
        params = {"tools": OFFERED} if reply.tool_calls else {}
        result = fusion.fuse(config, [{"role": "user", "content": "hello there"}], run, params)
        found = fusion.chat_completion(result, config.name, 1700000000)
        network.close()
    check_completion(found)
    choice = found["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == (finish, content)
    assert (found["created"], found["model"]) == (1700000000, "fusion")
    assert ("tool_calls" in choice["message"]) == (finish == "tool_calls")


def test_json_is_the_servers_object_with_the_whole_receipt(ask):
    with Upstream(script()) as up:
        found = json.loads(ask(up, "hello there", "--json", "--refine").out)
    check_completion(found)
    receipt = found["fusion"]
    assert found["choices"][0]["message"]["content"] == ANSWER
    assert FUSION_KEYS <= set(receipt)
    assert [row["role"] for row in receipt["cost_breakdown"]].count("member") == 2
    assert all(CALL_KEYS <= set(row) for row in receipt["cost_breakdown"])
    assert set(receipt["timing_s"]) == {"panel", "judge", "synth", "refine", "total"}
    assert receipt["panel_models"] == receipt["panel_succeeded"] == ["m/a", "second"]
    assert (receipt["mode"], receipt["judge"], receipt["synthesizer"]) == ("fuse", "m/j", "m/s")
    assert receipt["cost_source"] == "table" and receipt["degraded"] == []
    assert receipt["cost_usd"] == pytest.approx(
        sum(row["cost_usd"] for row in receipt["cost_breakdown"]))
    assert receipt["analysis"]["consensus"] == ["the sky is blue"]
    assert {stance["model"] for entry in receipt["analysis"]["contradictions"]
            for stance in entry["stances"]} == {"m/a", "second"}


def test_what_degraded_is_in_the_json_with_its_four_fields(ask):
    with Upstream(script(b=Reply(status=400))) as up:
        found = json.loads(ask(up, "hello there", "--json").out)
    entry = found["fusion"]["degraded"][0]
    assert set(entry) == {"code", "stage", "model", "detail"}
    assert (entry["code"], entry["model"]) == ("member_failed", "second")
    assert found["fusion"]["panel_succeeded"] == ["m/a"]


def test_json_stream_is_an_event_a_line_and_the_response_comes_last(ask):
    with Upstream(script()) as up:
        found = ask(up, "hello there", "--json", "--stream")
    events = [json.loads(line) for line in found.out.splitlines()]
    assert all(isinstance(event["event"], str) for event in events)
    kinds = [event["event"] for event in events]
    assert {"start", "slot", "delta", "stage", "analysis", "end"} <= set(kinds)
    said = "".join(event["text"] for event in events
                   if event["event"] == "delta" and event["slot"] == 0)
    assert said == DRAFTS["m/a"]
    check_completion(events[-1]["response"])
    assert events[-1]["response"]["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("flags", [["--json"], ["--json", "--stream"]], ids=["whole", "stream"])
def test_a_failure_is_an_error_object_in_json(ask, flags):
    with Upstream(script(a=Reply(status=400), b=Reply(status=400))) as up:
        found = ask(up, "hello there", *flags)
    assert found.code == 3 and len(lines_with("error: ", found.err)) == 1
    last = [json.loads(line) for line in found.out.splitlines()][-1]
    check_shape(last, {"error": {"message": str, "type": str, "param": TEXT_OR_NONE,
                                 "code": TEXT_OR_NONE}, "fusion": {"degraded": [
                                     {"code": str, "model": str}]}})
    assert "m/a" in last["error"]["message"] and "choices" not in last


def test_json_of_an_ascii_terminal_still_holds_every_letter(ask):
    answer = "caf\u00e9 \U0001f600 \u202e"
    with Upstream(script(s=answer)) as up:
        found = ask(up, "hello there", "--json")
    assert found.raw_out.isascii()
    assert json.loads(found.out)["choices"][0]["message"]["content"] == answer


# ---- to a file ------------------------------------------------------------------------------

@pytest.mark.parametrize("before", [None, "an old answer"])
def test_output_goes_to_the_file_and_not_to_stdout(ask, tmp_path, before):
    folder = tmp_path / "out"
    folder.mkdir()
    if before:
        (folder / "answer.md").write_text(before)
    with Upstream(script(s="caf\u00e9 \U0001f600")) as up:
        found = ask(up, "hello there", "--stream", "-o", str(folder / "answer.md"))
    assert (found.code, found.out) == (0, "")
    assert (folder / "answer.md").read_bytes() == "caf\u00e9 \U0001f600\n".encode()
    assert os.listdir(folder) == ["answer.md"]
    assert "2 of 2 answered" in found.err


def test_output_takes_json_too(ask, tmp_path):
    path = tmp_path / "answer.json"
    with Upstream(script()) as up:
        found = ask(up, "hello there", "--json", "-o", str(path))
    assert found.out == ""
    check_completion(json.loads(path.read_text()))


@pytest.mark.parametrize("before", [{}, {"answer.md": "an old answer"}], ids=["new", "old"])
def test_a_run_that_fails_leaves_the_folder_as_it_was(ask, tmp_path, before):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, words in before.items():
        (folder / name).write_text(words)
    with Upstream({"*": Reply(status=400)}) as up:
        assert ask(up, "hello there", "-o", str(folder / "answer.md")).code == 3
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


@pytest.mark.parametrize("signals, code", [([signal.SIGTERM], 143),
                                           ([signal.SIGINT, signal.SIGINT], 130)])
def test_a_run_that_is_stopped_leaves_no_half_file(program, tmp_path, signals, code):
    folder = tmp_path / "out"
    folder.mkdir()
    with Upstream(script(b=hanging(), j=hanging())) as up:
        with program(up, "hello there", "-o", folder / "answer.md") as running:
            running.wait_for("m/a")
            for number in signals:
                running.signal(number)
                if number == signal.SIGINT:
                    running.wait_for("interrupted")
            assert running.end().code == code
    assert os.listdir(folder) == []


# ---- what it would cost ---------------------------------------------------------------------

def test_an_estimate_sends_nothing_and_needs_no_key(ask, command):
    with Upstream(script()) as up:
        found = ask(up, "hello there", "--estimate", "--refine", "--samples", "2")
    assert found.code == 0 and up.requests == []
    rows = [re.split(r"\s{2,}", line.strip()) for line in found.out.splitlines()]
    assert rows[0] == ["role", "model", "calls", "low", "high"]
    calls = {(row[0], row[1]): int(row[2]) for row in rows[1:-1]}
    assert calls == {("member", "m/a"): 2, ("member", "second"): 2, ("judge", "m/j"): 1,
                     ("synth", "m/s"): 1, ("refine", "m/s"): 1}
    assert rows[-1][:2] == ["total", "7"] and "$" in rows[-1][2]
    assert command("ask", "--estimate", "--config", "budget", "hello").code == 0


def test_an_estimate_in_json_adds_up_and_bounds_the_real_cost(ask):
    with Upstream(script()) as up:
        plan = json.loads(ask(up, "hello there", "--estimate", "--json").out)
        real = json.loads(ask(up, "hello there", "--json").out)["fusion"]["cost_usd"]
    assert plan["high_usd"] == pytest.approx(sum(row["high"] for row in plan["calls"]))
    assert plan["low_usd"] == pytest.approx(sum(row["low"] for row in plan["calls"]))
    assert 0 < plan["low_usd"] < plan["high_usd"] and real < plan["high_usd"]


def test_an_unknown_price_makes_the_estimate_unknown_and_not_zero(ask):
    with Upstream(script()) as up:
        found = ask(up, "hello there", "--estimate", "--json", "--judge", "m/free")
        words = ask(up, "hello there", "--estimate", "--judge", "m/free").out
    plan = json.loads(found.out)
    assert (plan["low_usd"], plan["high_usd"]) == (None, None)
    assert "unknown" in words.splitlines()[-1] and "$0" not in words.splitlines()[-1]


# ---- the last run again ---------------------------------------------------------------------

def test_show_prints_the_last_answer_and_its_receipt(ask, command):
    with Upstream(script()) as up:
        first = ask(up, "an earlier question")
        ask(up, "why is it so?", config={"judge": "m/x"})
    found = command("show")
    assert found.code == 0 and first.code == 0
    assert "why is it so?" in found.out and ANSWER in found.out and "earlier" not in found.out
    assert "writer m/s" in found.err and "degraded: judge_failed m/x" in found.err


@pytest.mark.parametrize("flag, expected", [
    ("--drafts", ["m/a", "second", DRAFTS["m/a"], DRAFTS["m/b"]]),
    ("--analysis", ["the sky is blue", "the cause", "Nobody", "the sunset", "a riddle"])])
def test_show_has_what_each_member_and_the_judge_said(ask, command, flag, expected):
    with Upstream(script()) as up:
        ask(up, "hello there")
    found = command("show", flag)
    assert found.code == 0 and ANSWER not in found.out
    assert [words for words in expected if words not in found.out] == []


def test_show_as_json_holds_the_response_and_the_drafts(ask, command):
    with Upstream(script()) as up:
        response = json.loads(ask(up, "hello there", "--json").out)
    found = json.loads(command("show", "--json").out)
    assert found["response"] == response
    assert {draft["text"] for draft in found["drafts"]} == set(DRAFTS.values())


def test_show_says_so_when_there_was_no_judge(ask, command):
    with Upstream(script()) as up:
        ask(up, "hello there", "--mode", "solo")
    assert "no analysis" in command("show", "--analysis").out.lower()


@pytest.mark.parametrize("content", ["[]", "{}", "{", "", '{"response": {}}'])
def test_show_does_not_stumble_over_a_broken_file(command, tmp_path, content):
    folder = tmp_path / "home" / "state" / "fusion"
    folder.mkdir(parents=True)
    (folder / "last.json").write_text(content)
    found = command("show")
    assert found.code == 2 and "defect" not in found.err and found.out == ""


def test_the_last_run_is_readable_by_its_owner_alone(ask, tmp_path):
    before = os.umask(0)
    try:
        with Upstream(script()) as up:
            ask(up, "hello there")
    finally:
        os.umask(before)
    folder = tmp_path / "home" / "state" / "fusion"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o700, {"last.json": 0o600})


@pytest.mark.parametrize("flags, env", [(["--no-history"], {}), ([], {"FUSION_HISTORY": "0"})])
def test_without_history_nothing_is_kept(ask, command, tmp_path, flags, env):
    with Upstream(script()) as up:
        assert ask(up, "hello there", *flags, **env).code == 0
    assert not (tmp_path / "home").exists()
    assert command("show").code == 2


def test_a_place_that_cannot_be_written_costs_a_note_and_not_the_answer(ask, tmp_path):
    (tmp_path / "occupied").write_text("a file where a folder belongs")
    with Upstream(script()) as up:
        found = ask(up, "hello there", XDG_STATE_HOME=str(tmp_path / "occupied"))
        quiet = ask(up, "hello there", "--quiet", XDG_STATE_HOME=str(tmp_path / "occupied"))
    assert (found.code, found.out) == (quiet.code, quiet.out) == (0, ANSWER + "\n")
    assert len(lines_with("note: ", found.err)) == 1 and quiet.err == ""


# ---- pipes that flow and pipes that close ----------------------------------------------------

def test_a_stream_in_a_pipe_flows_before_the_answer_is_whole(program):
    gate = threading.Event()
    with Upstream(script(s=Reply(chunks=["first ", "second"], chunk_delay=gate))) as up:
        with program(up, "hello there", "--stream") as running:
            running.wait_for("first", "out")
            assert running.text("out") == "first "
            gate.set()
            found = running.end()
    assert (found.code, found.out) == (0, "first second\n")


def test_json_events_tell_the_answer_as_it_is_written(program):
    gate = threading.Event()
    with Upstream(script(s=Reply(chunks=["first ", "second"], chunk_delay=gate))) as up:
        with program(up, "hello there", "--json", "--stream") as running:
            running.wait_for('"first "', "out")
            gate.set()
            events = [json.loads(line) for line in running.end().out.splitlines()]
    assert [event["text"] for event in events if event["event"] == "answer"] == ["first ", "second"]


def test_json_events_in_a_pipe_flow_before_the_panel_is_done(program):
    gate = threading.Event()
    with Upstream(script(b=Reply(DRAFTS["m/b"], delay=gate))) as up:
        with program(up, "hello there", "--json", "--stream") as running:
            running.wait_for('"done"', "out")
            assert not up.posts("m/j")
            gate.set()
            assert running.end().code == 0


def test_a_cut_stream_ends_as_an_error_after_what_was_written(program):
    with Upstream(script(s=Reply(chunks=["first ", "second"], cut_after=1))) as up:
        with program(up, "hello there", "--stream") as running:
            found = running.end()
    assert (found.code, found.out) == (3, "first \n")
    assert len(lines_with("error: ", found.err)) == len(lines_with("hint: ", found.err)) == 1


@pytest.mark.parametrize("flags", [[], ["--stream"], ["--json"], ["--json", "--stream"]],
                         ids="_".join)
def test_a_reader_that_leaves_ends_the_program_without_a_word(program, flags):
    big = Reply("a line of the answer\n" * 20000)
    reading, writing = os.pipe()
    with Upstream(script(s=big)) as up:
        with program(up, "hello there", "--quiet", *flags, stdout=writing) as running:
            os.close(writing)
            os.read(reading, 1)
            os.close(reading)
            found = running.end()
    assert found.code in (141, -signal.SIGPIPE) and found.err == ""


def test_a_reader_that_leaves_a_stream_frees_the_backend(program):
    gate = threading.Event()
    reading, writing = os.pipe()
    with Upstream(script(a=Reply(DRAFTS["m/a"], delay=gate), b=hanging())) as up:
        with program(up, "hello there", "--json", "--stream", stdout=writing) as running:
            os.close(writing)
            assert up.wait_for(lambda: len(up.posts()) == 2)
            os.read(reading, 1)
            os.close(reading)
            gate.set()
            found = running.end()
            assert up.posts("m/b")[0].wait_closed(WITHIN_S)
    assert found.code in (141, -signal.SIGPIPE) and "Traceback" not in found.err


# ---- signals --------------------------------------------------------------------------------

def unharmed(found):
    return not re.search("Traceback|Fatal Python error|Exception ignored|defect", found.err)


def check_stopped(found, code=130):
    """Hold the end of a stopped program to its exit code, its haste and its silence."""
    assert found.code == code and found.seconds < WITHIN_S, found
    assert unharmed(found), found.err


def test_an_interrupt_of_the_panel_goes_on_with_the_drafts_that_are_in(program):
    with Upstream(script(b=hanging())) as up:
        with program(up, "hello there") as running:
            running.wait_for("m/a")
            running.signal(signal.SIGINT)
            found = running.end()
        assert up.posts("m/b")[0].wait_closed(WITHIN_S)
    assert (found.code, found.out) == (0, ANSWER + "\n") and unharmed(found)
    assert lines_with("degraded: member_late second", found.err)
    assert "1 of 2 answered" in found.err


def test_an_interrupt_before_any_draft_stops(program):
    with Upstream(script(a=hanging(), b=hanging())) as up:
        with program(up, "hello there") as running:
            assert up.wait_for(lambda: len(up.posts()) == 2)
            running.signal(signal.SIGINT)
            found = running.end()
        assert all(request.wait_closed(WITHIN_S) for request in up.posts())
    check_stopped(found)
    assert found.out == "" and asked(up) == {"m/a": 1, "m/b": 1}


@pytest.mark.parametrize("attempt", range(10))
def test_a_second_interrupt_stops_at_once(program, attempt):
    with Upstream(script(b=hanging(), j=hanging())) as up:
        with program(up, "hello there", *["--stream"] * (attempt % 2)) as running:
            running.wait_for("m/a")
            running.signal(signal.SIGINT)
            running.wait_for("interrupted")
            if attempt > 4:
                assert up.wait_for(lambda: up.posts("m/j"))
            running.signal(signal.SIGINT)
            found = running.end()
    check_stopped(found)
    assert found.out == ""


@pytest.mark.parametrize("changes, model, flags", [
    ({"j": hanging()}, "m/j", []),
    ({"s": hanging()}, "m/s", []),
    ({"s": Reply("a long answer", hang_after=2)}, "m/s", ["--stream"]),
    ({"s": hanging()}, "m/s", ["--mode", "solo"]),
], ids=["judge", "synthesizer", "stream", "solo"])
def test_an_interrupt_after_the_panel_stops(program, changes, model, flags):
    with Upstream(script(**changes)) as up:
        with program(up, "hello there", *flags) as running:
            if "--stream" in flags:
                running.wait_for("a", "out")
            assert up.wait_for(lambda: up.posts(model))
            running.signal(signal.SIGINT)
            found = running.end()
        assert up.posts(model)[0].wait_closed(WITHIN_S)
    check_stopped(found)
    assert len(lines_with("error: ", found.err)) == 1


def test_an_interrupt_while_the_backend_is_asked_for_its_models_stops(tmp_path):
    with Upstream(script()) as up:
        up.models_reply = json_reply({"data": [{"id": "m/a"}]}, hang_after=-1)
        env = {"FUSION_BASE_URL": up.url}
        with Program(tmp_path / "home", "ask", "hello there", env=env) as running:
            assert up.wait_for(lambda: up.requests)
            running.signal(signal.SIGINT)
            found = running.end(15)
    check_stopped(found)
    assert up.posts() == []


def unread(pipe):
    """How many bytes wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4), sys.byteorder)


def test_an_interrupt_while_standard_input_is_read_stops(tmp_path):
    reading, writing = os.pipe()
    try:
        os.write(writing, b"half a quest")
        with Program(tmp_path / "home", "ask", "--fake", "-", stdin=reading) as running:
            with Upstream() as up:
                assert up.wait_for(lambda: unread(writing) == 0)
            running.signal(signal.SIGINT)
            check_stopped(running.end())
    finally:
        os.close(reading)
        os.close(writing)


def full_pipe():
    """A pipe into which not one more byte goes."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x")
    except BlockingIOError:
        os.set_blocking(writing, True)
    return reading, writing


def press_until_it_ends(running):
    """Press Ctrl-C every tenth of a second, as people do; returns the exit code or None."""
    for _ in range(10):
        running.signal(signal.SIGINT)
        try:
            return running.process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    return None


def test_interrupts_stop_though_nobody_reads_what_is_said(program):
    reading, writing = full_pipe()
    try:
        with Upstream(script(b=hanging())) as up:
            with program(up, "hello there", stderr=writing) as running:
                assert up.wait_for(lambda: len(up.posts()) == 2 and up.in_flight == 1)
                assert press_until_it_ends(running) == 130
    finally:
        os.close(reading)
        os.close(writing)


def test_an_interrupt_stops_though_nobody_reads_the_answer(program):
    reading, writing = os.pipe()
    try:
        with Upstream(script(s="x" * 1000000)) as up:
            with program(up, "hello there", stdout=writing) as running:
                running.wait_for("synth")
                assert up.wait_for(lambda: unread(reading) > 4095)
                for _ in range(2):
                    running.signal(signal.SIGINT)
                found = running.end()
    finally:
        os.close(reading)
        os.close(writing)
    check_stopped(found)


@pytest.mark.parametrize("changes, flags", [
    ({"a": hanging(), "b": hanging()}, []),
    ({"s": Reply("a long answer", hang_after=2)}, ["--stream"])], ids=["panel", "stream"])
def test_a_termination_ends_with_143(program, changes, flags):
    with Upstream(script(**changes)) as up:
        with program(up, "hello there", *flags) as running:
            assert up.wait_for(lambda: len(up.posts()) == (4 if flags else 2))
            running.signal(signal.SIGTERM)
            found = running.end()
        assert up.wait_for(lambda: up.open_connections() == 0)
    check_stopped(found, 143)


# ---- limits ---------------------------------------------------------------------------------

def test_a_ceiling_that_not_even_one_call_fits_is_exit_4_and_calls_nobody(ask):
    with Upstream(script()) as up:
        found = ask(up, "hello there", "--max-cost", "0.000001")
    assert (found.code, found.out, up.posts()) == (4, "", [])
    assert "--max-cost" in lines_with("hint: ", found.err)[0]


def test_time_that_is_over_is_exit_4(ask):
    with Upstream(script(a=hanging(), b=hanging())) as up:
        found = ask(up, "hello there", "--timeout", "0.4")
    assert (found.code, found.out) == (4, "") and found.seconds < 2
    assert "--timeout" in lines_with("hint: ", found.err)[0]


def test_a_run_that_did_not_fit_its_ceiling_says_what_was_cut(ask):
    with Upstream(script()) as up:
        plan = json.loads(ask(up, "hello there", "--estimate", "--json").out)
        found = ask(up, "hello there", "--samples", "2", "--refine",
                    "--max-cost", str(plan["high_usd"]))
    assert found.code == 0 and asked(up) == {"m/a": 1, "m/b": 1, "m/j": 1, "m/s": 1}
    assert len(lines_with("degraded: budget_cut", found.err)) == 2


def test_a_refused_key_and_a_refusal_are_told_apart(ask):
    with Upstream({"*": error_reply(401, "no such key")}) as up:
        assert ask(up, "hello there", FUSION_API_KEY="sk-secret-12345678").code == 3
    with Upstream({"*": "I'm sorry, I can't help with that."}) as up:
        found = ask(up, "hello there")
    assert (found.code, found.out) == (0, "I'm sorry, I can't help with that.\n")
