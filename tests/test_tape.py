"""Record and replay: what was paid for once is said again, for nothing and without a network."""
import json
import os
import stat
import threading

import pytest

from conftest import FUSION_PY, run_fusion
from test_talk import ANSWER, DRAFTS, ask, asked, command, lines_with, script, write_setup
from upstream import Reply, Upstream, error_reply

KEY = "sk-or-v1-0123456789abcdefghij"
QUESTION = "why is the sky blue?"
REAL_SOURCES = ("reported", "table", "local", "estimated", "mixed")


@pytest.fixture
def tape(tmp_path):
    return tmp_path / "run.tape"


def flaky():
    return [Reply(status=503), DRAFTS["m/b"]]


def broken_after_text():
    return Reply(ANSWER, cut_after=3)


def samples():
    return ["The first idea, at length.", "The second idea, at length.", "A third idea."]


# What happens upstream, the flags, and changes of the configuration.
RUNS = {
    "plain": ({}, (), {}),
    "stream": ({}, ("--stream",), {}),
    "json": ({}, ("--json",), {}),
    "whole members": ({}, (), {"stream_members": False}),
    "layers": ({}, ("--layers", "3"), {}),
    "samples": ({"a": samples()}, ("--samples", "3"), {}),
    "refine": ({"s": [ANSWER, ANSWER + " And at sunset it is red."]}, ("--refine",), {}),
    "vote": ({"a": "So it is.\nAnswer: 4", "b": "Yes.\nAnswer: 4"}, ("--vote",), {}),
    "no vote won": ({"a": "So it is.\nAnswer: 4", "b": "Yes.\nAnswer: 5"}, ("--vote",), {}),
    "solo": ({}, ("--mode", "solo"), {}),
    "failed member": ({"b": error_reply(500, "no luck today")}, (), {}),
    "refused key of a member": ({"b": error_reply(401, "who are you?")}, (), {}),
    "retried member": ({"b": flaky()}, (), {"max_retries": 2, "retry_backoff": 0}),
    "spare": ({"b": error_reply(500, "no luck"), "x": "The spare's idea."}, (),
              {"spares": ["m/x"]}),
    "failed judge": ({"j": error_reply(500, "no judge today")}, (), {}),
    "judge repaired": ({"j": ["no JSON at all", "{}"]}, (), {}),
    "writers in turn": ({"s": error_reply(500, "no pen"), "x": "The other pen's answer."}, (),
                        {"synthesizer": ["m/s", "m/x"]}),
    "refusal": ({"a": "I'm sorry, but I can't help with that."}, (), {}),
    "reasoning": ({"a": Reply(DRAFTS["m/a"], reasoning="hm, hm")}, (), {}),
    "cut by length": ({"a": Reply(DRAFTS["m/a"], finish="length")}, (), {}),
    "odd letters": ({"s": "snow\u2603 \U0001f600 \u2028 \ttab \\ \" </x>"}, (), {}),
    "equal drafts": ({"b": DRAFTS["m/a"]}, (), {}),
}


def recorded(ask, up, tape, *flags, **more):
    found = ask(up, QUESTION, "--record", str(tape), *flags, **more)
    assert tape.exists(), found.err
    return found


def replayed(ask, up, tape, *flags, **more):
    return ask(up, QUESTION, "--replay", str(tape), *flags, **more)


def timeless(receipt):
    """What a receipt says beside times, money and ids."""
    dropped = ("timing_s", "cost_usd", "cost_source", "cost_breakdown", "request_id")
    return {key: value for key, value in receipt.items() if key not in dropped}


def said(found):
    """The answer and what is said of it, without what differs from run to run."""
    if not found.out.startswith("{"):
        return found.out
    response = json.loads(found.out)
    return response["choices"], response["usage"], timeless(response["fusion"])


def words(lines):
    """The words of some lines in a fixed order: who failed first is named first."""
    return sorted(" ".join(lines).replace(",", " ").replace(":", " ").split())


def degraded(found):
    return lines_with("degraded: ", found.err)


@pytest.mark.parametrize("name", RUNS)
def test_a_replay_says_the_same_without_a_request_or_a_cent(ask, tape, name):
    changes, flags, config = RUNS[name]
    with Upstream(script(**changes)) as up:
        first = recorded(ask, up, tape, *flags, config=config)
        before = len(up.requests)
        again = replayed(ask, up, tape, *flags, config=config)
        assert len(up.requests) == before > 0
    assert first.code == again.code == 0, again.err
    assert said(again) == said(first) and degraded(again) == degraded(first)


@pytest.mark.parametrize("name", RUNS)
def test_a_replay_gives_the_same_receipt_and_costs_nothing(ask, tape, name):
    changes, flags, config = RUNS[name]
    flags = [flag for flag in flags if flag not in ("--stream", "--json")] + ["--json"]
    with Upstream(script(**changes)) as up:
        first = recorded(ask, up, tape, *flags, config=config)
        again = replayed(ask, up, tape, *flags, config=config)
    receipt = json.loads(again.out)["fusion"]
    assert timeless(receipt) == timeless(json.loads(first.out)["fusion"])
    assert json.loads(first.out)["fusion"]["cost_usd"] > 0
    assert receipt["cost_usd"] == 0 and receipt["cost_source"] not in REAL_SOURCES
    assert {row["cost_usd"] for row in receipt["cost_breakdown"]} == {0}


def test_a_replay_works_when_the_backend_is_gone(ask, tape):
    with Upstream(script()) as up:
        first = recorded(ask, up, tape)
    again = replayed(ask, up, tape)
    assert (again.code, again.out) == (0, first.out) == (0, ANSWER + "\n")


def test_a_replayed_stream_of_events_holds_the_same_events(ask, tape):
    def kinds(found):
        events = [json.loads(line) for line in found.out.splitlines()]
        return ({event["event"] for event in events},
                "".join(event["text"] for event in events if event["event"] == "answer"))

    with Upstream(script()) as up:
        first = recorded(ask, up, tape, "--json", "--stream")
        again = replayed(ask, up, tape, "--json", "--stream")
    assert kinds(again) == kinds(first) and kinds(again)[1] == ANSWER


def test_a_panel_that_failed_fails_again_with_the_same_words(ask, tape):
    refused = error_reply(401, "no such key here")
    with Upstream(script(a=refused, b=refused)) as up:
        first = recorded(ask, up, tape)
        again = replayed(ask, up, tape)
        assert asked(up) == {"m/a": 1, "m/b": 1}
    assert first.code == again.code == 3 and again.out == ""
    assert words(lines_with("error: ", again.err)) == words(lines_with("error: ", first.err))
    assert lines_with("hint: ", again.err) == lines_with("hint: ", first.err)


@pytest.mark.parametrize("flags", [("--stream",), ()], ids=["stream", "whole"])
def test_an_answer_that_broke_off_breaks_off_again(ask, tape, flags):
    config = {"synthesizer": ["m/s", "m/x"]}
    with Upstream(script(s=broken_after_text(), x="The other pen's answer.")) as up:
        first = recorded(ask, up, tape, *flags, config=config)
        before = len(up.requests)
        again = replayed(ask, up, tape, *flags, config=config)
        assert len(up.requests) == before
    assert (again.code, again.out) == (first.code, first.out)


# ---- which calls are known ------------------------------------------------------------------

# What is changed for the replay, and who is then asked.
CHANGES = {
    "another judge": (("--judge", "m/y"), {"m/y": 1, "m/s": 1}),
    "another writer": (("--synthesizer", "m/y"), {"m/y": 1}),
    "both": (("--judge", "m/x", "--synthesizer", "m/y"), {"m/x": 1, "m/y": 1}),
    "refined": (("--refine",), {"m/s": 1}),
    "another layer": (("--layers", "2"), {"m/a": 1, "second": 1, "m/j": 1, "m/s": 1}),
    "one member more": (("--panel", "m/a,second,m/x"), {"m/x": 1, "m/j": 1, "m/s": 1}),
    "nothing": ((), {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_pays_for_its_stage_and_what_depends_on_it_alone(ask, tape, name):
    flags, expected = CHANGES[name]
    other = json.dumps({"consensus": ["another judge was here"], "best_draft": "B"})
    changes = {"x": "Another idea altogether.", "y": "Another answer."}
    if name in ("another judge", "both"):
        changes["y" if name == "another judge" else "x"] = other
    with Upstream(script(**changes)) as up:
        recorded(ask, up, tape, config={"diversity": False})
        before = len(up.posts())
        again = replayed(ask, up, tape, *flags, "--json", config={"diversity": False})
        new = [request.model for request in up.posts()[before:]]
    assert again.code == 0, again.err
    names = {"m/b": "second"}
    assert {names.get(model, model): new.count(model) for model in new} == expected
    receipt = json.loads(again.out)["fusion"]
    paid = {row["model"] for row in receipt["cost_breakdown"] if row["cost_usd"]}
    assert paid == set(expected) and bool(receipt["cost_usd"]) == bool(expected)


def test_another_question_is_not_answered_from_the_recording(ask, tape):
    with Upstream(script()) as up:
        recorded(ask, up, tape)
        found = ask(up, "and why is it red?", "--replay", str(tape))
    assert found.code == 0
    assert asked(up) == {"m/a": 2, "m/b": 2, "m/j": 2, "m/s": 2}


def swapped():
    """Replies to two equal requests, of which the first one comes last."""
    first_done = threading.Event()

    def reply(request):
        if request.n == 0:
            return Reply("What the first sample said.", delay=first_done)
        first_done.set()
        return Reply("What the second sample said.")
    return reply


@pytest.mark.parametrize("attempt", range(3))
def test_samples_with_one_request_come_back_to_their_own_places(ask, tape, attempt):
    config = {"panel": ["m/a"], "samples": 2, "diversity": False}
    with Upstream(script(a=swapped())) as up:
        first = recorded(ask, up, tape, "--json", config=config)
        before = len(up.posts())
        again = replayed(ask, up, tape, "--json", config=config)
        assert len(up.posts()) == before, "the drafts came back in another order"
    assert said(again) == said(first)


def test_equal_calls_in_a_row_come_back_in_their_order(fusion, tape, tmp_path):
    def said_in_a_row(config, network, **options):
        run = fusion.start_run(config, network, tape=fusion.Tape(**options))
        return [fusion.complete(run, config.panel[0], [{"role": "user", "content": QUESTION}]).text
                for _ in range(3)]

    network = fusion.Network()
    with Upstream(script(a=samples())) as up:
        env = fusion.Env({"FUSION_BASE_URL": up.url})
        config = fusion.load_config(write_setup(tmp_path), env)
        assert said_in_a_row(config, network, record=str(tape)) == samples()
        assert said_in_a_row(config, network, replay=str(tape)) == samples()
        assert len(up.posts()) == 3
    network.close()


@pytest.mark.parametrize("late", [0, 1])
def test_one_model_at_two_backends_is_two_members_in_a_recording(ask, tape, late):
    gate = threading.Event()

    def second(text):
        def reply(request):
            gate.set()
            return Reply(text)
        return reply

    texts = ("What the first backend said.", "What the second backend said.")
    replies = [second(text) for text in texts]
    replies[late] = lambda request: Reply(texts[late], delay=gate)
    with Upstream(script(a=replies[0])) as up, Upstream({"m/a": replies[1]}) as other:
        panel = ["m/a", {"model": "m/a", "label": "twin", "base_url": other.url}]
        config = {"panel": panel, "diversity": False}
        first = recorded(ask, up, tape, "--json", config=config)
        before = len(up.posts()), len(other.posts())
        again = replayed(ask, up, tape, "--json", config=config)
        assert (len(up.posts()), len(other.posts())) == before
    assert said(again) == said(first)


def test_a_member_that_thinks_harder_is_another_call(ask, tape):
    def config(effort):
        return {"panel": [{"model": "m/a", "reasoning_effort": effort}, "m/b"]}

    with Upstream(script()) as up:
        recorded(ask, up, tape, config=config("low"))
        replayed(ask, up, tape, config=config("high"))
        assert asked(up)["m/a"] == 2 and asked(up)["m/b"] == 1


def test_an_automatic_panel_replays_without_a_network(command, tape):
    with Upstream({"*": "An idea of sorts."}, models=["m/a", "m/b"], owned_by="llamacpp") as up:
        first = command("ask", QUESTION, "--record", str(tape), FUSION_BASE_URL=up.url)
        before = len(up.requests)
        again = command("ask", QUESTION, "--replay", str(tape), FUSION_BASE_URL=up.url)
        assert len(up.requests) == before, [request.path for request in up.requests[before:]]
    assert first.code == again.code == 0 and again.out == first.out


def test_a_ceiling_does_not_bring_a_replay_to_the_network(command, tape, tmp_path):
    path = write_setup(tmp_path, prices=None)
    with Upstream(script(), owned_by="llamacpp") as up:
        argv = ("ask", QUESTION, "--config", path, "--max-cost", "1")
        first = command(*argv, "--record", str(tape), FUSION_BASE_URL=up.url)
        before = len(up.requests)
        again = command(*argv, "--replay", str(tape), FUSION_BASE_URL=up.url)
        assert len(up.requests) == before, [request.path for request in up.requests[before:]]
    assert first.code == again.code == 0 and again.out == first.out


def test_a_replay_under_a_small_ceiling_answers_since_it_costs_nothing(ask, tape):
    with Upstream(script()) as up:
        first = recorded(ask, up, tape)
        again = replayed(ask, up, tape, "--max-cost", "0.000001")
    assert (again.code, again.out) == (0, first.out), again.err


# ---- the file -------------------------------------------------------------------------------

@pytest.mark.parametrize("where, key", [
    ("draft", KEY), ("error", KEY), ("judge", KEY), ("answer", KEY), ("reasoning", KEY),
    ("draft", "gsk\"quo\\ted-0123456789"), ("draft", "short-7")])
def test_a_key_that_a_backend_echoes_is_not_in_the_file(ask, tape, where, key):
    echo = "You sent me %s, did you not?" % key
    changes = {"draft": {"a": echo}, "error": {"a": error_reply(400, echo)}, "answer": {"s": echo},
               "judge": {"j": json.dumps({"consensus": [echo], "best_draft": "A"})},
               "reasoning": {"a": Reply(DRAFTS["m/a"], reasoning=echo)}}[where]
    with Upstream(script(**changes)) as up:
        recorded(ask, up, tape, **{"FUSION_API_KEY": key})
        assert up.posts()[0].headers["authorization"] == "Bearer " + key
    written = tape.read_text()
    assert key not in written and json.dumps(key)[1:-1] not in written
    twice = json.dumps(json.dumps(key)[1:-1])[1:-1]
    assert twice not in written and "Bearer" not in written


def test_the_key_of_a_member_is_not_in_the_file_whoever_says_it(ask, tape):
    with Upstream(script()) as up, Upstream({"m/b": "I got %s." % KEY}) as other:
        member = {"model": "m/b", "base_url": other.url, "api_key_env": "FUSION_OTHER_KEY"}
        recorded(ask, up, tape, config={"panel": ["m/a", member]}, FUSION_OTHER_KEY=KEY)
        assert other.posts()[0].headers["authorization"] == "Bearer " + KEY
    assert KEY not in tape.read_text()  # in the draft, nor where judge and writer read it


def test_a_recording_in_which_a_key_was_echoed_still_replays(ask, tape):
    with Upstream(script(a="You sent me %s, did you not?" % KEY)) as up:
        recorded(ask, up, tape, FUSION_API_KEY=KEY)
        before = len(up.posts())
        again = replayed(ask, up, tape, FUSION_API_KEY=KEY)
        assert len(up.posts()) == before
    assert again.out == ANSWER + "\n"


def test_the_file_is_for_its_owner_alone_and_has_a_line_a_call(ask, tape):
    before = os.umask(0)
    try:
        with Upstream(script()) as up:
            recorded(ask, up, tape)
    finally:
        os.umask(before)
    assert stat.S_IMODE(tape.stat().st_mode) == 0o600
    models = [json.loads(line)["model"] for line in tape.read_text().splitlines()]
    assert sorted(models) == ["m/a", "m/b", "m/j", "m/s"]


@pytest.mark.parametrize("link", [False, True], ids=["file", "dangling link"])
def test_a_file_that_exists_is_never_overwritten(ask, tape, tmp_path, link):
    if link:
        tape.symlink_to(tmp_path / "elsewhere")
    else:
        tape.write_text("precious")
    with Upstream(script()) as up:
        found = ask(up, QUESTION, "--record", str(tape))
        assert up.posts() == []
    assert found.code == 2 and found.out == ""
    assert str(tape) in lines_with("error: ", found.err)[0]
    assert not (tmp_path / "elsewhere").exists() if link else tape.read_text() == "precious"


LINE = '{"key": "0", "role": "member", "model": "m/a"}\n'
BAD_FILES = {
    "empty": b"", "blank": b"\n\n", "text": b"hello there\n", "cut": LINE.encode()[:-20],
    "cut at the end": LINE.encode() * 2 + b'{"key": "1", "rol', "a list": b"[1, 2]\n",
    "a number": b"7\n", "a string": b'"key"\n', "null": b"null\n", "bytes": b"\xff\xfe\x00\x01",
    "other JSON": b'{"id": 1, "prompt": "hello"}\n', "a line with a key alone": b'{"key": "0"}\n',
    "a key that is none": b'{"key": ["m"], "reply": null, "error": null}\n',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_recording_is_refused_by_name(ask, tape, name):
    tape.write_bytes(BAD_FILES[name])
    with Upstream(script()) as up:
        found = replayed(ask, up, tape)
        assert up.posts() == [], "it asked, and paid, as if there were no recording"
    assert (found.code, found.out) == (2, ""), found.err
    errors = lines_with("error: ", found.err)
    assert len(errors) == 1 and tape.name in errors[0] and lines_with("hint: ", found.err)
    assert "Traceback" not in found.err and "defect" not in found.err


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_recording_that_is_not_there_is_refused_by_name(ask, tape, kind):
    if kind == "folder":
        tape.mkdir()
    with Upstream(script()) as up:
        found = replayed(ask, up, tape)
    assert found.code == 2 and tape.name in lines_with("error: ", found.err)[0]
    assert up.requests == []


def cut_replies(lines):
    """Recorded lines that are JSON, but whose replies are not as they were written."""
    entries = [json.loads(line) for line in lines]
    yield "no usage", [{**entry, "usage": None} for entry in entries]
    yield "odd reply", [{**entry, "reply": {"surprise": 1}} for entry in entries]
    yield "no error", [{key: entry[key] for key in entry if key != "error"} for entry in entries]
    yield "a text", [{**entry, "reply": "hello"} for entry in entries]


@pytest.mark.parametrize("index", range(4))
def test_a_recording_with_damaged_lines_is_one_error_line_and_no_defect(ask, tape, index):
    with Upstream(script()) as up:
        recorded(ask, up, tape)
        name, entries = list(cut_replies(tape.read_text().splitlines()))[index]
        tape.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        found = replayed(ask, up, tape)
    assert found.code == 2, (name, found.err)
    assert len(lines_with("error: ", found.err)) == 1 and "defect" not in found.err


def test_a_replay_needs_no_key(command, tape, tmp_path, monkeypatch):
    with Upstream(script()) as up:
        path = write_setup(tmp_path, panel=["m/a", {
            "model": "m/b", "base_url": up.url, "api_key_env": "FUSION_OTHER_KEY"}])
        argv = ("ask", "--config", path, QUESTION)
        env = {"FUSION_BASE_URL": up.url}
        command(*argv, "--record", str(tape), FUSION_OTHER_KEY=KEY, FUSION_API_KEY=KEY, **env)
        monkeypatch.delenv("FUSION_OTHER_KEY")
        monkeypatch.delenv("FUSION_API_KEY")
        again = command(*argv, "--replay", str(tape), **env)
        without = command(*argv, **env)
    assert (again.code, again.out) == (0, ANSWER + "\n"), again.err
    assert without.code == 2, "without the recording the key is missed"


def test_a_call_that_is_not_in_the_recording_misses_its_key_by_name(ask, tape, tmp_path):
    with Upstream(script()) as up:
        member = {"model": "m/j", "base_url": up.url, "api_key_env": "FUSION_OTHER_KEY"}
        recorded(ask, up, tape)
        before = len(up.posts())
        found = replayed(ask, up, tape, "--json",
                         config={"synthesizer": dict(member, model="m/y")})
        assert len(up.posts()) == before
    assert "FUSION_OTHER_KEY" in found.err and "Traceback" not in found.err


def test_recording_while_replaying_writes_a_whole_recording(ask, tape, tmp_path):
    second = tmp_path / "second.tape"
    with Upstream(script(y="Another answer.")) as up:
        recorded(ask, up, tape)
        found = replayed(ask, up, tape, "--record", str(second), "--synthesizer", "m/y")
        before = len(up.posts())
        again = ask(up, QUESTION, "--replay", str(second), "--synthesizer", "m/y")
        assert len(up.posts()) == before, "the second file does not stand for itself"
    assert again.out == found.out == "Another answer.\n"


def test_of_two_recordings_the_broken_one_is_named(ask, tape, tmp_path):
    tape.write_text("no recording")
    second = tmp_path / "second.tape"
    with Upstream(script()) as up:
        found = ask(up, QUESTION, "--replay", str(tape), "--record", str(second))
    assert found.code == 2 and tape.name in lines_with("error: ", found.err)[0]
    assert not second.exists()


def test_the_fake_backend_records_and_replays_as_a_program(tmp_path):
    tape = tmp_path / "tape"
    argv = ("ask", "--fake", "--quiet", QUESTION)
    first = run_fusion(*argv, "--record", tape, path=FUSION_PY)
    again = run_fusion(*argv, "--replay", tape, path=FUSION_PY)
    assert first.code == again.code == 0 and again.raw_out == first.raw_out != b""
