"""The pipeline when things go wrong, and its variants: what still happens, and what is said of it.

The tables follow the contract: each row of what may fail, hygiene of drafts, the judge's JSON and
its quotes, votes and depth, cancel and interrupts, tools, the receipt.
"""

import contextlib
import json
import re
import threading
import time

import pytest

from test_wiring import (
    CONVERSATION, PANEL, PRICED, QUESTION, Rig, analysis_in, appended, begin, drafts_in, fences,
    judgement, last_text, price)
from upstream import Reply, error_reply

ANSWER = "Because of Rayleigh scattering."
SOON_S = 1.0  # what the contract allows for ending work that nobody waits for


@pytest.fixture
def rig(fusion, tmp_path):
    """Makes Rigs, and closes them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda script=None, **settings: stack.enter_context(
            Rig(fusion, tmp_path, script or cast(), **settings))


def cast(**models):
    """A script in which everything works, but for the models that are given."""
    script = {model: "draft of " + model for model in PRICED}
    script.update(judge=judgement(), writer=ANSWER)
    script.update(models)
    return script


def entries(made, code):
    return [entry for entry in made.run.degraded if entry["code"] == code]


def troubles(made):
    """What degraded, but for the usage of replies that never came to their end."""
    return [entry for entry in made.run.degraded if entry["code"] != "usage_estimated"]


def codes_and_models(made):
    return [(entry["code"], entry["model"]) for entry in troubles(made)]


def judged_drafts(made):
    """The drafts that reached the judge."""
    return sorted(drafts_in(last_text(made.up.posts("judge")[0])).values())


def letters_of(request):
    """{draft: letter} of what the judge got."""
    return {draft: letter for letter, draft in drafts_in(last_text(request)).items()}


def hangs(after=-1):
    """A reply that never comes to its end."""
    return Reply("a long answer", hang_after=after)


def listening(made, *rules):
    """A listener that keeps all events; (matches, count, action) acts at the count-th match."""
    def listen(event):
        made.events.append(event)
        for matches, count, action in rules:
            if matches(event) and sum(map(matches, made.events)) == count:
                action()
    return listen


def is_done(event):
    return event.kind == "slot" and event.fields["state"] == "done"


def third_speaks(event):
    return event.kind == "delta" and event.fields["slot"] == 2


def waiting_for_third(gate):
    """A cast whose third member begins and never ends; the others wait for its first words."""
    return cast(m1=Reply("draft of m1", delay=gate), m2=Reply("draft of m2", delay=gate),
                m3=hangs(2))


# ---- members that fail ------------------------------------------------------------------------

FAILURES = {
    "500": (error_reply(500, "boom"), ("500", "boom")),
    "401": (error_reply(401, "bad key"), ("401", "bad key")),
    "404": (error_reply(404, "boom: no such model"), ("404", "no such model")),
    "429": (error_reply(429, "boom: slow down"), ("429", "slow down")),
    "closed": (Reply(raw=b""), ("connection",)),
    "empty": (Reply(""), ("nothing",)),
    "blank": (Reply(" \n\t "), ("nothing",)),
    "reasoning": (Reply("", reasoning="boom"), ("reasoning",)),
    "page": (Reply(body=b"<html>boom</html>"), ("HTML",)),
    "cut": (Reply("boom, half of it", cut_after=3), ("cut",)),
    "in-stream": (Reply("boom, half of it", error="broke", error_after=2), ("broke",)),
}


@pytest.mark.parametrize("reply, words", FAILURES.values(), ids=FAILURES)
def test_a_failed_member_is_named_with_its_reason_and_the_others_go_on(rig, reply, words):
    made = rig(cast(m2=reply))
    result = made.fuse()
    failed, = troubles(made)
    assert (failed["code"], failed["stage"], failed["model"]) == ("member_failed", "panel", "m2")
    assert all(word in failed["detail"] for word in words)
    assert judged_drafts(made) == ["draft of m1", "draft of m3"]
    assert "boom" not in str([post.messages for post in made.up.posts()])
    assert (result.reply.text, result.receipt["panel_succeeded"]) == (ANSWER, ["m1", "m3"])
    assert result.receipt["panel_models"] == list(PANEL)
    assert result.receipt["degraded"] == made.run.degraded


def test_a_spare_takes_the_place_of_a_failed_member(rig):
    made = rig(cast(m2=error_reply(500, "boom")), spares=["s1", "s2"])
    result = made.fuse()
    assert made.calls() == {"m1": 1, "m2": 1, "m3": 1, "s1": 1, "judge": 1, "writer": 1}
    assert judged_drafts(made) == ["draft of m1", "draft of m3", "draft of s1"]
    assert [entry["model"] for entry in entries(made, "member_failed")] == ["m2"]
    assert sorted(result.receipt["panel_succeeded"]) == ["m1", "m3", "s1"]


def test_a_spare_that_fails_has_the_next_spare(rig):
    made = rig(cast(m2=error_reply(500, "boom"), s1=[error_reply(500, "bang"), "never asked"]),
               spares=["s1", "s2"])
    made.fuse()
    assert judged_drafts(made) == ["draft of m1", "draft of m3", "draft of s2"]
    assert [entry["model"] for entry in entries(made, "member_failed")] == ["m2", "s1"]


def test_each_spare_is_used_once(rig):
    broken = error_reply(500, "boom")
    made = rig(cast(m1=broken, m2=broken, m3=broken), spares=["s1", "s2"])
    made.fuse()
    assert judged_drafts(made) == ["draft of s1", "draft of s2"]
    assert len(entries(made, "member_failed")) == 3


def test_a_spare_has_its_own_temperature_and_cap(rig):
    made = rig(cast(m2=error_reply(500, "boom")),
               spares=[{"model": "s1", "temperature": 0.125, "max_tokens": 99}])
    made.fuse()
    body = made.up.posts("s1")[0].body
    assert (body["temperature"], body["max_tokens"]) == (0.125, 99)


def test_an_own_temperature_does_not_pass_on_to_the_spare(rig):
    made = rig(cast(m2=error_reply(500, "boom")), spares=["s1"], diversity=False,
               panel=["m1", {"model": "m2", "temperature": 1.75}, "m3"])
    made.fuse()
    assert made.up.posts("s1")[0].body["temperature"] == 0.7


def test_one_survivor_is_judged_and_synthesized_and_said_to_be_alone(rig):
    made = rig(cast(m1=error_reply(500, "boom"), m3=Reply("")))
    result = made.fuse()
    assert judged_drafts(made) == ["draft of m2"]
    assert made.codes().count("panel_thin") == 1
    assert result.reply.text == ANSWER


def test_a_panel_of_one_is_not_thin(rig):
    made = rig(panel=["m1"])
    made.fuse()
    assert made.run.degraded == []


def test_when_no_member_answers_each_reason_is_named_and_nothing_made_up(rig, fusion):
    made = rig(cast(m1=error_reply(500, "boom"), m2=error_reply(401, "bad key"), m3=Reply("")))
    with pytest.raises(fusion.BackendError) as failure:
        made.fuse()
    error = failure.value
    assert (error.status, error.code, error.exit_code) == (502, "panel_failed", 3)
    for word in PANEL + ("500", "boom", "401", "bad key", "nothing"):
        assert word in error.message
    assert made.calls() == {"m1": 1, "m2": 1, "m3": 1}
    assert len(entries(made, "member_failed")) == 3


def test_a_layer_that_fails_leaves_the_drafts_of_the_one_before(rig):
    made = rig(cast(**{model: ["first of " + model, error_reply(500, "boom")] for model in PANEL}),
               layers=2)
    assert made.fuse().reply.text == ANSWER
    assert judged_drafts(made) == ["first of m1", "first of m2", "first of m3"]
    assert len(entries(made, "member_failed")) == 3


def test_a_failure_in_one_layer_does_not_keep_the_member_from_the_next(rig):
    made = rig(cast(m2=[error_reply(500, "boom"), "second of m2"]), layers=2)
    made.fuse()
    assert "second of m2" in judged_drafts(made)


# ---- members that are late --------------------------------------------------------------------


def test_a_member_late_after_quorum_and_grace_is_cut_off(rig):
    gate = threading.Event()
    made = rig(waiting_for_third(gate), quorum=2, grace_s=0)
    result = made.fuse(listener=listening(made, (third_speaks, 1, gate.set)))
    late, = troubles(made)
    assert (late["code"], late["model"], late["stage"]) == ("member_late", "m3", "panel")
    assert judged_drafts(made) == ["draft of m1", "draft of m2"]
    assert made.up.posts("m3")[0].wait_closed(SOON_S)
    assert result.receipt["panel_succeeded"] == ["m1", "m2"]
    assert [row["prompt_tokens"] > 0 for row in result.receipt["cost_breakdown"]
            if row["model"] == "m3"] == [True], "what was accepted may be billed"


def test_a_member_within_the_grace_is_waited_for(rig):
    gate = threading.Event()
    made = rig(cast(m2=Reply("just in time", delay=gate)), panel=["m1", "m2"], quorum=1,
               grace_s=60)
    made.fuse(listener=listening(made, (is_done, 1, gate.set)))
    assert judged_drafts(made) == ["draft of m1", "just in time"]
    assert made.run.degraded == []


def test_grace_begins_when_the_quorum_is_in_and_ends(rig):
    made = rig(cast(m2=hangs(), m3=hangs()), quorum=1, grace_s=0.3)
    started = time.monotonic()
    made.fuse()
    assert 0.3 <= time.monotonic() - started < 3
    assert [entry["model"] for entry in entries(made, "member_late")] == ["m2", "m3"]


def test_a_member_that_works_at_the_deadline_is_late_and_the_rest_goes_on(rig):
    made = rig(cast(m3=hangs()), timeout_s=1.2)
    assert made.fuse().reply.text == ANSWER
    assert codes_and_models(made) == [("member_late", "m3")]
    assert made.up.posts("m3")[0].wait_closed(SOON_S)


def test_no_spare_is_started_when_the_time_is_over(rig):
    made = rig(cast(m3=hangs()), timeout_s=1.2, spares=["s1"])
    made.fuse()
    assert made.up.posts("s1") == []
    assert {entry["model"] for entry in made.run.degraded} == {"m3"}


def test_one_call_has_its_own_time_limit(rig):
    made = rig(cast(m3=hangs(3)), member_timeout_s=0.5)
    assert made.fuse().reply.text == ANSWER
    late, = troubles(made)
    assert late["model"] == "m3" and late["code"] in ("member_failed", "member_late")


def test_a_panel_that_is_late_as_a_whole_is_a_limit_that_names_all(rig, fusion):
    made = rig(cast(m1=hangs(), m2=hangs(), m3=error_reply(500, "boom")), timeout_s=0.6)
    with pytest.raises(fusion.LimitError) as failure:
        made.fuse()
    assert (failure.value.status, failure.value.exit_code) == (504, 4)
    assert all(word in failure.value.message for word in PANEL + ("boom",))
    assert "judge" not in made.calls() and "writer" not in made.calls()


# ---- the judge --------------------------------------------------------------------------------

JUDGES = {
    "500": (error_reply(500, "boom"), 1, "boom"),
    "401": (error_reply(401, "bad key"), 1, "bad key"),
    "prose twice": (Reply("They agree."), 2, ""),
    "wrong JSON twice": (Reply('{"answer": 42}'), 2, ""),
    "empty": (Reply(""), 1, "nothing"),
    "cut twice in prose": (Reply("They agree on", finish="length"), 3, ""),
}


@pytest.mark.parametrize("reply, calls, word", JUDGES.values(), ids=JUDGES)
def test_without_a_judge_the_writer_works_from_the_raw_drafts(rig, reply, calls, word):
    made = rig(cast(judge=reply))
    result = made.fuse()
    failed, = entries(made, "judge_failed")
    assert (failed["stage"], failed["model"]) == ("judge", "judge")
    assert failed["detail"] and word in failed["detail"]
    assert made.calls()["judge"] == calls
    writer = last_text(made.up.posts("writer")[0])
    assert analysis_in(writer) is None and len(drafts_in(writer)) == 3
    assert (result.reply.text, result.receipt["analysis"]) == (ANSWER, None)
    assert result.receipt["judge_unsupported"] == 0


def test_a_judge_that_hangs_is_given_up_in_time_for_the_writer(rig):
    made = rig(cast(judge=hangs(2)), member_timeout_s=0.5)
    assert made.fuse().reply.text == ANSWER
    assert codes_and_models(made) == [("judge_failed", "judge")]
    assert made.up.posts("judge")[0].wait_closed(SOON_S)


def test_the_judge_leaves_the_writer_a_part_of_the_time(rig):
    made = rig(cast(judge=hangs(2)), timeout_s=1.5)
    assert made.fuse().reply.text == ANSWER
    assert codes_and_models(made) == [("judge_failed", "judge")]


def test_prose_is_repaired_by_one_call(rig):
    made = rig(cast(judge=["They agree on {everything}.", judgement(consensus=["kept"])]))
    result = made.fuse()
    assert made.calls()["judge"] == 2
    more = appended(made.up.posts("judge")[1], QUESTION)
    assert len(more) == 1 and "They agree on {everything}." in more[0]["content"]
    assert made.codes() == ["judge_repaired"]
    assert analysis_in(last_text(made.up.posts("writer")[0]))["consensus"] == ["kept"]
    assert result.receipt["analysis"]["consensus"] == ["kept"]


PARTLY_BAD = {
    "string for list": {"consensus": "agreed", "must_include": ["kept"]},
    "number in list": {"must_include": ["kept", 5, None, {"a": 1}]},
    "string for object": {"errors": ["wrong"], "must_include": ["kept"]},
    "object for list": {"unique_insights": {"letter": "A"}, "must_include": ["kept"]},
    "no positions": {"contradictions": [{"topic": "t"}], "must_include": ["kept"]},
    "positions of text": {"contradictions": [{"topic": "t", "positions": ["A", "B"]}],
                          "must_include": ["kept"]},
}


@pytest.mark.parametrize("found", PARTLY_BAD.values(), ids=PARTLY_BAD)
def test_what_is_valid_of_partly_bad_json_is_used_and_said_to_be_repaired(rig, found):
    made = rig(cast(judge=json.dumps(found)))
    result = made.fuse()
    assert made.calls()["judge"] == 1
    assert set(made.codes()) == {"judge_repaired"}
    assert analysis_in(last_text(made.up.posts("writer")[0])) == {"must_include": ["kept"]}
    assert result.receipt["analysis"]["must_include"] == ["kept"]


def test_a_cut_judge_is_asked_once_more_with_more_room(rig):
    made = rig(cast(judge=[Reply('{"consensus": ["los', finish="length"),
                           judgement(consensus=["kept"])]))
    result = made.fuse()
    first, second = made.up.posts("judge")
    assert second.body["max_tokens"] > first.body["max_tokens"]
    assert second.messages == first.messages
    assert result.receipt["analysis"]["consensus"] == ["kept"]
    assert "judge_failed" not in made.codes()


def test_a_judge_that_is_cut_twice_is_used_as_far_as_it_came_and_says_so(rig):
    half = '{"consensus": ["kept", "also kept"], "blind_spots": ["los'
    made = rig(cast(judge=Reply(half, finish="length")))
    result = made.fuse()
    assert made.calls()["judge"] == 2
    assert result.receipt["analysis"]["consensus"] == ["kept", "also kept"]
    assert "judge_repaired" in made.codes()


KEPT = judgement(consensus=["kept"])
COATS = {
    "think": '<think>{"consensus": ["no"]}</think>' + KEPT,
    "code fence": "Here it is:\n```json\n" + KEPT + "\n```\nI hope it helps {you}.",
    "commas": '{"consensus": ["kept",], "errors": [],}',
    "single quotes": "{'consensus': ['kept'], 'best_draft': 'A'}",
    "comments": '{"consensus": ["kept"], // why\n "errors": [] /* none */ }',
    "NaN": '{"consensus": ["kept"], "best_draft": NaN}',
    "unclosed": '{"blind_spots": [], "consensus": ["kept"',
    "wrapped": json.dumps({"analysis": json.loads(KEPT)}),
    "encoded twice": json.dumps(KEPT),
    "repeated": '{"note": 1}\n' + judgement(consensus=["first try"]) + "\n" + KEPT,
}


@pytest.mark.parametrize("said", COATS.values(), ids=COATS)
def test_the_judges_json_is_read_in_its_usual_disguises_without_a_second_call(rig, said):
    made = rig(cast(judge=said))
    assert made.fuse().receipt["analysis"]["consensus"] == ["kept"]
    assert made.calls()["judge"] == 1
    assert "judge_failed" not in made.codes()


REFUSED_FORMS = {
    "schema": (("json_schema",), ["json_schema", "json_object"]),
    "both": (("json_schema", "json_object"), ["json_schema", "json_object", None]),
}
REFUSING_WORDS = [
    dict(message="Invalid parameter", param="response_format"),
    dict(message="This model does not support response_format"),
]


@pytest.mark.parametrize("words", REFUSING_WORDS, ids=["param", "message"])
@pytest.mark.parametrize("refused, forms", REFUSED_FORMS.values(), ids=REFUSED_FORMS)
def test_the_form_that_a_backend_takes_is_found_and_remembered(rig, refused, forms, words):
    def asked(request):
        return (request.body.get("response_format") or {}).get("type")

    def script(request):
        return error_reply(400, **words) if asked(request) in refused else Reply(KEPT)

    made = rig(cast(judge=script))
    for expected in (forms, forms[-1:]):
        before = len(made.up.posts("judge"))
        assert made.fuse().receipt["analysis"]["consensus"] == ["kept"]
        assert list(map(asked, made.up.posts("judge")[before:])) == expected
        assert set(made.codes()) == {"rewritten"}
        assert {entry["model"] for entry in made.run.degraded} == {"judge"}


# ---- quotes -----------------------------------------------------------------------------------

TOWER, BRIDGE = "The tower  is\n\n\t330 m high.", "It is 324 m, \u201csay\u201d the builders."
QUOTES = {
    "its own": (TOWER, "330 m", True),
    "white space": (TOWER, "The tower is 330 m", True),
    "other white space": (BRIDGE, "324\n m,", True),
    "in quotation marks": (BRIDGE, "\"It is 324 m\"", True),
    "of the other draft": (TOWER, "It is 324 m", False),
    "invented": (BRIDGE, "It is 325 m", False),
    "nearly": (TOWER, "The tower was 330 m", False),
    "empty": (TOWER, "", False),
    "missing": (TOWER, None, False),
}
PLACES = ("unique_insights", "errors")


def quoting(place, draft, quote):
    """A judge that gives this quote for this draft."""
    def judge(request):
        entry = {"letter": letters_of(request)[draft], "point": "p", "problem": "p", "keep": True}
        return Reply(judgement(**{place: [entry if quote is None else dict(entry, quote=quote)]}))
    return judge


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("draft, quote, holds", QUOTES.values(), ids=QUOTES)
def test_only_what_the_named_draft_says_counts_as_a_quote(rig, draft, quote, holds, place):
    made = rig(cast(m1=TOWER, m2=BRIDGE, judge=quoting(place, draft, quote)), panel=["m1", "m2"])
    receipt = made.fuse().receipt
    read = analysis_in(last_text(made.up.posts("writer")[0]))
    assert (place in read) == holds
    assert len(receipt["analysis"][place]) == holds
    assert receipt["judge_unsupported"] == (not holds)


def test_a_position_that_no_draft_supports_is_dropped_and_counted(rig):
    def judge(request):
        letters = letters_of(request)
        positions = [{"letters": [letters[TOWER]], "stance": "330", "quote": "330 m"},
                     {"letters": [letters[BRIDGE]], "stance": "324", "quote": "324 m"},
                     {"letters": [letters[BRIDGE]], "stance": "invented", "quote": "300 m"},
                     {"letters": ["Q"], "stance": "nobody's", "quote": "330 m"}]
        return Reply(judgement(contradictions=[
            {"topic": "height", "positions": positions, "verdict": "unknown"}]))

    made = rig(cast(m1=TOWER, m2=BRIDGE, judge=judge), panel=["m1", "m2"])
    receipt = made.fuse().receipt
    stances = receipt["analysis"]["contradictions"][0]["stances"]
    assert [stance["stance"] for stance in stances] == ["330", "324"]
    assert receipt["judge_unsupported"] == 2


def full_judgement(request):
    """One entry of everything, in letters, about the drafts of m1 and m2."""
    letters = letters_of(request)
    one, two = letters["draft of m1"], letters["draft of m2"]
    return Reply(json.dumps({
        "consensus": ["Draft %s agrees with draft %s" % (one, two)],
        "contradictions": [{"topic": "t", "verdict": "v", "positions": [
            {"letters": [one], "stance": "s1", "quote": "draft of m1"},
            {"letters": [two], "stance": "s2", "quote": "draft of m2"}]}],
        "partial_coverage": [{"letters": [one, two], "point": "p"}],
        "unique_insights": [{"letter": two, "point": "i", "quote": "draft of m2", "keep": True}],
        "errors": [{"letter": one, "quote": "of m1", "problem": "e"}],
        "blind_spots": ["b"], "must_include": ["m"], "best_draft": two}))


def only(entry, *keys):
    return {key: entry[key] for key in keys}


def test_the_analysis_that_leaves_has_openrouters_shape_and_models_for_letters(rig):
    made = rig(cast(judge=full_judgement))
    found = made.fuse().receipt["analysis"]
    assert found["consensus"] == ["m1 agrees with m2"]
    clash, = found["contradictions"]
    assert clash["topic"] == "t"
    assert [only(stance, "model", "stance") for stance in clash["stances"]] == [
        {"model": "m1", "stance": "s1"}, {"model": "m2", "stance": "s2"}]
    assert found["partial_coverage"] == [{"models": ["m1", "m2"], "point": "p"}]
    assert [only(entry, "model", "insight") for entry in found["unique_insights"]] == [
        {"model": "m2", "insight": "i"}]
    assert found["blind_spots"] == ["b"]
    json.dumps(found)


def test_our_own_keys_stand_beside_openrouters(rig):
    made = rig(cast(judge=full_judgement))
    found = made.fuse().receipt["analysis"]
    assert found["contradictions"][0]["verdict"] == "v"
    assert found["errors"] == [{"model": "m1", "quote": "of m1", "problem": "e"}]
    assert (found["must_include"], found["best_draft"]) == (["m"], "m2")


def test_the_analysis_event_is_the_analysis_of_the_receipt(rig):
    made = rig(cast(judge=full_judgement))
    receipt = made.fuse().receipt
    assert [event.fields["analysis"] for event in made.events if event.kind == "analysis"] == [
        receipt["analysis"]]


# ---- the writer -------------------------------------------------------------------------------

BROKEN = error_reply(500, "boom")


def best_is(draft):
    """A judge that calls this draft the best."""
    return lambda request: Reply(judgement(best_draft=letters_of(request)[draft]))


def test_the_next_writer_answers_when_the_first_one_fails(rig):
    made = rig(cast(writer=BROKEN, w2="second writer"), synthesizer=["writer", "w2"])
    result = made.fuse()
    assert (result.reply.text, result.receipt["synthesizer"]) == ("second writer", "w2")
    failed, = made.run.degraded
    assert (failed["code"], failed["model"]) == ("synthesizer_failed", "writer")
    assert "boom" in failed["detail"]
    first, second = made.up.posts("writer")[0], made.up.posts("w2")[0]
    assert first.messages == second.messages


STAND_INS = {
    "best draft": (dict(judge=best_is("draft of m2"), m1="much longer draft of m1"),
                   "draft of m2", "m2"),
    "longest draft": (dict(judge=BROKEN, m3="the longest draft of m3"),
                      "the longest draft of m3", "m3"),
    "longest whole draft": (dict(judge=BROKEN, m3=Reply("a long draft that is cut",
                                                        finish="length"), m1="draft one of m1"),
                            "draft one of m1", "m1"),
    "no best draft": (dict(judge=judgement(best_draft="Z"), m3="the longest draft of m3"),
                      "the longest draft of m3", "m3"),
}


@pytest.mark.parametrize("models, text, author", STAND_INS.values(), ids=STAND_INS)
def test_a_draft_stands_in_when_every_writer_fails(rig, models, text, author):
    made = rig(cast(writer=BROKEN, w2=Reply(""), **models), synthesizer=["writer", "w2"])
    result = made.fuse()
    assert (result.reply.text, result.receipt["synthesizer"]) == (text, author)
    assert [entry["model"] for entry in entries(made, "synthesizer_failed")] == ["writer", "w2"]


def test_a_lone_writer_that_fails_is_an_error(rig, fusion):
    made = rig(cast(writer=BROKEN), mode="solo")
    with pytest.raises(fusion.BackendError, match="boom"):
        made.fuse()


def test_a_writer_that_calls_tools_which_nobody_offered_has_not_answered(rig):
    made = rig(cast(writer=Reply("", tool_calls=[CALL]), w2="second writer"),
               synthesizer=["writer", "w2"])
    result = made.fuse()
    assert (result.reply.text, result.reply.tool_calls) == ("second writer", ())


LONG = "The answer is long enough."
CUTS = {
    "closed": Reply(LONG, cut_after=3),
    "reset": Reply(LONG, cut_after=3, cut="rst"),
    "unfinished": Reply(LONG, sse={"no_done": True, "no_finish": True}),
    "error": Reply(LONG, error="broke", error_after=3),
    "error that names a parameter": Reply(LONG, error_after=3, error={
        "message": "Unsupported parameter: temperature", "code": 400, "param": "temperature"}),
    "silence": Reply(LONG, hang_after=3),
}


@pytest.mark.parametrize("reply", CUTS.values(), ids=CUTS)
def test_a_live_answer_that_is_cut_ends_as_an_error_and_nothing_is_added(rig, fusion, reply):
    made = rig(cast(writer=[reply, "Something else."], w2="from w2"), max_retries=2,
               synthesizer=["writer", "w2"], member_timeout_s=1)
    with pytest.raises(fusion.BackendError) as failure:
        made.fuse(live=True)
    assert failure.value.code == "stream_cut"
    assert codes_and_models(made) == [("stream_cut", "writer")]
    assert made.calls()["writer"] == 1 and "w2" not in made.calls()
    assert made.shown() and LONG.startswith(made.shown())
    assert not [event for event in made.events if event.kind == "end"]


BEFORE_A_WORD = {
    "500": error_reply(500, "boom"),
    "closed": Reply(LONG, cut_after=0),
    "in its reasoning": Reply(LONG, reasoning="a long reasoning", cut_after=4),
    "error": Reply(LONG, error="broke"),
}


@pytest.mark.parametrize("retries", [0, 1], ids=["next writer", "again"])
@pytest.mark.parametrize("reply", BEFORE_A_WORD.values(), ids=BEFORE_A_WORD)
def test_a_live_answer_that_fails_before_its_first_word_is_tried_again(rig, reply, retries):
    made = rig(cast(writer=[reply, ANSWER], w2=ANSWER), synthesizer=["writer", "w2"],
               max_retries=retries)
    result = made.fuse(live=True)
    assert result.reply.text == made.shown() == ANSWER
    assert result.receipt["synthesizer"] == ("writer" if retries else "w2")


@pytest.mark.parametrize("reply", [CUTS["closed"], CUTS["error"]], ids=["closed", "error"])
def test_an_answer_that_nobody_watched_is_written_again_when_cut(rig, reply):
    made = rig(cast(writer=[reply, ANSWER]), max_retries=1)
    result = made.fuse()
    assert (result.reply.text, troubles(made)) == (ANSWER, [])
    assert made.calls()["writer"] == 2
    row = [row for row in result.receipt["cost_breakdown"] if row["role"] == "synth"]
    assert [one["attempts"] for one in row] == [2]


def test_an_answer_cut_by_its_cap_is_an_answer_and_marked(rig):
    made = rig(cast(writer=Reply("half of", finish="length")), max_retries=2)
    reply = made.fuse().reply
    assert (reply.text, reply.finish, made.calls()["writer"]) == ("half of", "length", 1)


SHOWN = {
    "plain": (dict(), dict()),
    "refined": (dict(writer=[ANSWER, ANSWER + " Refined."]), dict(refine=True)),
    "refine rejected": (dict(writer=[ANSWER, BROKEN]), dict(refine=True)),
    "solo": (dict(), dict(mode="solo")),
    "vote": (dict.fromkeys(PANEL, "So Answer: 4"), dict(vote=True)),
    "stand-in": (dict(writer=BROKEN), dict()),
    "stand-in with refine": (dict(writer=BROKEN), dict(refine=True)),
    "all refuse": (dict.fromkeys(PANEL, "I'm sorry, I can't help with that."), dict()),
    "thinks first": (dict(writer="<think>secret</think>\n\nThe answer."), dict()),
    "thinks in full": (dict(writer="<thinking>secret</thinking>\n\nThe answer."), dict()),
    "speaks of thinking": (dict(writer="It writes `<think>` first and `</think>` at the end."),
                           dict()),
}


@pytest.mark.parametrize("models, settings", SHOWN.values(), ids=SHOWN)
def test_who_watches_live_sees_the_answer_once_and_whole(rig, models, settings):
    made = rig(cast(**models), **settings)
    result = made.fuse(live=True)
    assert made.shown() == result.reply.text
    assert result.reply.text


# ---- refine -----------------------------------------------------------------------------------

CODE = "Run this:\n```\nls\n```\nand that is all."
REFINES = {
    "better": ("The answer is 41.", "The answer is 42.", True),
    "JSON kept": ('{"a": 1}', '{"a": 2}', True),
    "JSON lost": ('{"a": 1}', "The value of a is 1.", False),
    "JSON broken": ('[{"a": 1}]', '[{"a": 1}', False),
    "fences kept": (CODE, CODE.replace("ls", "ls -l"), True),
    "fences lost": (CODE, "Run ls: it lists the files, and that is all.", False),
    "one fence lost": (CODE, CODE.replace("ls\n```", "ls"), False),
    "38 % lost": ("x" * 100, "y" * 62, True),
    "42 % lost": ("x" * 100, "y" * 58, False),
    "failed": (ANSWER, BROKEN, False),
    "empty": (ANSWER, Reply(""), False),
    "cut": (ANSWER, Reply(ANSWER + " And", finish="length"), False),
    "refused": (ANSWER, Reply("I can't go on with this one.", finish="content_filter"), False),
}


@pytest.mark.parametrize("before, after, taken", REFINES.values(), ids=REFINES)
def test_a_refined_answer_is_taken_only_if_nothing_is_lost(rig, before, after, taken):
    made = rig(cast(writer=[before, after]), refine=True)
    result = made.fuse()
    assert result.reply.text == (after if taken else before)
    assert made.codes() == ([] if taken else ["refine_rejected"])
    assert made.calls()["writer"] == 2
    assert all(entry["detail"] and entry["model"] == "writer" for entry in made.run.degraded)


CALL = {"id": "call-1", "type": "function",
        "function": {"name": "look", "arguments": '{"at": "sky"}'}}
CLIENT_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("refine", [False, True], ids=["plain", "refine"])
def test_a_tool_call_of_the_writer_for_the_clients_tools_is_the_answer(rig, refine):
    made = rig(cast(writer=[Reply("", tool_calls=[CALL]), "I have looked."]), refine=refine)
    reply = made.fuse(params={"tools": [CLIENT_TOOL], "tool_choice": "auto"}).reply
    assert [call["function"] for call in reply.tool_calls] == [CALL["function"]]
    assert reply.finish == "tool_calls"
    for post in made.up.posts():
        assert ("tools" in post.body) == ("tool_choice" in post.body) == (post.model == "writer")


# ---- money ------------------------------------------------------------------------------------

LADDER = ("refine", "samples", "layers", "m4", "m3", "solo")
LADDER_CALLS = (19, 18, 10, 6, 5, 4, 1)


def test_a_budget_is_met_by_less_of_everything_in_a_fixed_order(rig, fusion):
    made = rig(panel=["m1", "m2", "m3", "m4"], samples=2, layers=2, refine=True, max_tokens=1000)
    plain, ceiling, reached = made.config, 4.0, []
    with pytest.raises(fusion.LimitError) as failure:
        while True:
            made.config = fusion.with_flags(plain, {"max_cost_usd": ceiling})
            before = len(made.up.posts())
            receipt = made.fuse().receipt
            reached.append(steps_taken(made.run.degraded))
            assert len(made.up.posts()) - before == LADDER_CALLS[reached[-1]]
            assert receipt["cost_usd"] <= ceiling
            ceiling *= 0.94
    error = failure.value
    assert (error.status, error.code, error.exit_code) == (402, "budget_exceeded", 4)
    assert len(made.up.posts()) == before, "no call beyond the budget"
    assert reached == sorted(reached) and set(reached) == set(range(len(LADDER) + 1))


def steps_taken(degraded):
    """How many steps down the ladder were taken; all that degraded must be these steps."""
    assert {entry["code"] for entry in degraded} <= {"budget_cut"}
    for entry, word in zip(degraded, LADDER):
        assert word in entry["detail"]
    return len(degraded)


def test_solo_gives_up_its_refine_before_it_gives_up(rig):
    made = rig(mode="solo", refine=True, max_tokens=1000, max_cost_usd=0.08)
    assert made.fuse().reply.text == ANSWER
    assert made.calls() == {"writer": 1}
    assert made.codes() == ["budget_cut"]


def unpriced(*models):
    return {model: price(model) for model in PRICED if model not in models}


def test_a_cost_that_is_not_known_is_null_and_never_zero(rig):
    made = rig(prices=unpriced("m2"))
    receipt = made.fuse().receipt
    costs = {row["model"]: (row["cost_usd"], row["source"]) for row in receipt["cost_breakdown"]}
    assert costs["m2"] == (None, "unknown") and costs["m1"][0] > 0
    assert (receipt["cost_usd"], receipt["cost_source"]) == (None, "unknown")
    unknown, = made.run.degraded
    assert (unknown["code"], unknown["model"]) == ("price_unknown", "m2")


def test_under_a_ceiling_a_model_without_a_price_is_not_called(rig):
    made = rig(prices=unpriced("m2"), max_cost_usd=5)
    result = made.fuse()
    assert made.up.posts("m2") == []
    assert judged_drafts(made) == ["draft of m1", "draft of m3"]
    assert ("price_unknown", "m2") in codes_and_models(made)
    assert 0 < result.receipt["cost_usd"] <= 5


def test_under_a_ceiling_nothing_runs_if_no_price_is_known(rig, fusion):
    made = rig(prices=None, max_cost_usd=5)
    with pytest.raises(fusion.FusionError, match="price"):
        made.fuse()
    assert made.up.posts() == []


def test_usage_that_is_not_reported_is_estimated_and_said_to_be(rig):
    made = rig(cast(m2=Reply("draft of m2 " * 40, usage=None)))
    receipt = made.fuse().receipt
    row, = [row for row in receipt["cost_breakdown"] if row["model"] == "m2"]
    assert row["source"] == "estimated" and row["cost_usd"] > 0
    assert row["prompt_tokens"] > 0 and 60 <= row["completion_tokens"] <= 240
    estimated, = made.run.degraded
    assert (estimated["code"], estimated["model"]) == ("usage_estimated", "m2")
    assert receipt["cost_source"] == "mixed"


USAGE_ROLES = {"total": PANEL + ("judge", "writer"), "answer": ("writer",)}


@pytest.mark.parametrize("scope", USAGE_ROLES)
def test_usage_counts_all_calls_or_the_answers_alone(rig, scope):
    made = rig(usage_scope=scope)
    usage = made.fuse().usage
    bills = [bill for bill in made.up.billed if bill[0] in USAGE_ROLES[scope]]
    assert (usage.prompt, usage.completion) == (sum(bill[1] for bill in bills),
                                                sum(bill[2] for bill in bills))


VOTERS = {
    "members": (dict(), dict.fromkeys(PANEL, "Answer: 4")),
    "samples": (dict(panel=["m1"], samples=3),
                dict(m1=["Answer: 4 or so", "Answer: 5", "Thus\nAnswer: 5"])),
    "samples that agree": (dict(panel=["m1"], samples=3), dict(m1="Answer: 5")),
}


@pytest.mark.parametrize("settings, models", VOTERS.values(), ids=VOTERS)
def test_the_usage_of_an_answer_that_a_vote_chose_is_that_of_one_call(rig, settings, models):
    made = rig(cast(**models), vote=True, usage_scope="answer", **settings)
    usage = made.fuse().usage
    assert usage[:2] in [bill[1:3] for bill in made.up.billed]


# ---- rewritten --------------------------------------------------------------------------------


def refuses_temperature(request):
    if "temperature" in request.body:
        return error_reply(400, "Unsupported value: 'temperature' does not support 0.7",
                           param="temperature")
    return Reply(ANSWER)


def refuses_max_tokens(request):
    if "max_tokens" in request.body:
        return error_reply(400, "Unsupported parameter: 'max_tokens' is not supported with this "
                                "model. Use 'max_completion_tokens' instead.", param="max_tokens")
    return Reply(ANSWER)


def refuses_neighbours(request):
    roles = [message["role"] for message in request.messages]
    if any(first == second for first, second in zip(roles, roles[1:])):
        return error_reply(400, "Conversation roles must alternate user/assistant/user/...")
    return Reply(ANSWER)


def refuses_developer(request):
    if any(message["role"] == "developer" for message in request.messages):
        return error_reply(400, "Invalid role: developer")
    return Reply(ANSWER)


REWRITES = [refuses_temperature, refuses_max_tokens, refuses_neighbours, refuses_developer]
DEVELOPED = ({"role": "developer", "content": "Be brief."},) + QUESTION


@pytest.mark.parametrize("script", REWRITES)
def test_a_form_that_is_refused_is_rewritten_once_remembered_and_noted(rig, script):
    made = rig(cast(writer=script), max_tokens=500)
    for calls in (2, 1):
        before = len(made.up.posts("writer"))
        assert made.fuse(DEVELOPED).reply.text == ANSWER
        assert len(made.up.posts("writer")) - before == calls
        noted, = made.run.degraded
        assert (noted["code"], noted["model"]) == ("rewritten", "writer")
    for model in PANEL:
        assert appended(made.up.posts(model)[-1], DEVELOPED) == [], "only where it was refused"
        assert {"temperature", "max_tokens"} < set(made.up.posts(model)[-1].body)


def test_a_refused_cap_is_renamed_and_keeps_its_value(rig):
    made = rig(cast(writer=refuses_max_tokens), max_tokens=500)
    made.fuse()
    assert made.up.posts("writer")[-1].body["max_completion_tokens"] == 500


def test_merged_messages_keep_their_words(rig):
    made = rig(cast(writer=refuses_neighbours))
    made.fuse(CONVERSATION[:4])
    first, second = made.up.posts("writer")
    assert appended(second, CONVERSATION[:3])[0]["content"][0] == CONVERSATION[3]["content"][0]
    assert last_text(first) in json.dumps(second.messages[-1]["content"], ensure_ascii=False) \
        or last_text(first) == second.messages[-1]["content"][-1]["text"]


# ---- hygiene of drafts ------------------------------------------------------------------------

REFUSALS = {
    "sorry": Reply("I'm sorry, but I can't help with that."),
    "cannot": Reply("I cannot assist with this request."),
    "unable": Reply("I am unable to provide that information."),
    "filter": Reply("The text up to here", finish="content_filter"),
    "field": Reply("", reasoning="I would rather not.", reasoning_field="refusal"),
}


@pytest.mark.parametrize("reply", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_not_a_draft(rig, reply):
    made = rig(cast(m2=reply))
    assert made.fuse().reply.text == ANSWER
    assert judged_drafts(made) == ["draft of m1", "draft of m3"]
    failed, = made.run.degraded
    assert (failed["code"], failed["model"]) == ("member_failed", "m2")
    assert "refus" in failed["detail"]


@pytest.mark.parametrize("reply", REFUSALS.values(), ids=REFUSALS)
def test_when_all_refuse_the_refusal_is_returned_as_it_is(rig, reply):
    made = rig(cast(**dict.fromkeys(PANEL, reply)))
    result = made.fuse()
    assert result.reply.text == (reply.text or reply.reasoning) and result.reply.refusal
    assert made.calls() == {"m1": 1, "m2": 1, "m3": 1}
    assert result.receipt["panel_succeeded"] == [] and result.receipt["judge"] is None


DISSENT = {
    "disagrees": "Sorry, but the premise is wrong: the sky is violet, our eyes are not.",
    "cannot confirm": "I am unable to confirm the usual 475 nm; measured, the peak is at 450 nm.",
    "condoles": "I'm sorry for your loss. She will be missed by everyone who knew her.",
    "says no": "No. I cannot agree with the question: at night the sky is black.",
    "short": "No.",
    "long refusal of an idea": "I can't support the usual explanation. " + "It fails. " * 60,
}


@pytest.mark.parametrize("text", DISSENT.values(), ids=DISSENT)
def test_a_dissenting_draft_is_never_dropped(rig, text):
    made = rig(cast(m1="It is blue.", m2=text, m3="It is blue, too."))
    made.fuse()
    assert text in judged_drafts(made)
    assert made.run.degraded == []


def test_a_truncated_draft_is_a_draft_and_marked_in_its_fence(rig):
    made = rig(cast(m2=Reply("half of a dr", finish="length")))
    made.fuse()
    for reader in ("judge", "writer"):
        found = fences(last_text(made.up.posts(reader)[0])).values()
        notes = {draft: note for draft, note in found}
        assert set(notes) == {"draft of m1", "half of a dr", "draft of m3"}
        assert "cut" in notes["half of a dr"]
        assert notes["draft of m1"] == notes["draft of m3"] == ""
    assert [draft.cut for draft in made_drafts(made)] == [False, False, True]


def made_drafts(made):
    """The drafts of another run of the same, by length of their text."""
    return sorted(made.fuse().drafts, key=lambda draft: len(draft.text))


@pytest.mark.parametrize("count", [2, 3])
def test_equal_drafts_are_one_with_their_count(rig, count):
    made = rig(cast(**dict.fromkeys(PANEL[:count], "the same draft")))
    result = made.fuse()
    for reader in ("judge", "writer"):
        notes = dict(fences(last_text(made.up.posts(reader)[0])).values())
        assert len(notes) == 4 - count
        assert str(count) in notes["the same draft"]
    assert result.receipt["panel_succeeded"] == list(PANEL)
    assert "panel_thin" not in made.codes()


def test_drafts_of_code_that_differ_in_indentation_are_not_equal(rig):
    inner, outer = "for x in y:\n    a(x)\n    b(x)", "for x in y:\n    a(x)\nb(x)"
    made = rig(cast(m1=inner, m2=outer))
    made.fuse()
    assert judged_drafts(made) == sorted(["draft of m3", inner, outer])


def test_both_models_of_a_merged_draft_are_named_in_the_analysis(rig):
    def judge(request):
        letter = letters_of(request)["the same draft"]
        return Reply(judgement(partial_coverage=[{"letters": [letter], "point": "p"}]))

    made = rig(cast(m1="the same draft", m3="the same draft", judge=judge))
    found = made.fuse().receipt["analysis"]["partial_coverage"]
    assert found == [{"models": ["m1", "m3"], "point": "p"}]


def test_a_member_that_only_calls_tools_gives_no_draft(rig):
    made = rig(cast(m2=Reply("", tool_calls=[CALL])))
    made.fuse()
    assert judged_drafts(made) == ["draft of m1", "draft of m3"]
    assert made.codes() == ["member_failed"]


# ---- reasoning --------------------------------------------------------------------------------

THOUGHTS = {
    "reasoning_content": dict(reasoning="SECRET plans"),
    "reasoning": dict(reasoning="SECRET plans", reasoning_field="reasoning"),
    "think": dict(before="<think>SECRET plans</think>\n\n"),
    "think in pieces": dict(before="\n<think>\nSECRET plans\n</think>\n", pieces=True),
    "twice": dict(before="<think>SECRET</think> <think>SECRET plans</think>"),
    "opened by the template": dict(before="SECRET plans\n</think>\n\n"),
    "not streamed": dict(before="<think>SECRET plans</think>", as_json=True),
}


def thinking(text, before="", pieces=False, **options):
    chunks = [text[at:at + 1] for at in range(len(text))] if pieces else None
    return Reply(before + text, chunks=list(before) + chunks if pieces else None, **options)


@pytest.mark.parametrize("way", THOUGHTS.values(), ids=THOUGHTS)
def test_reasoning_reaches_neither_judge_nor_writer_nor_answer(rig, way):
    made = rig(cast(m1=thinking("draft one", **way), judge=thinking(KEPT, **way),
                    writer=thinking(ANSWER, **way)))
    result = made.fuse()
    assert judged_drafts(made) == ["draft of m2", "draft of m3", "draft one"]
    assert "SECRET" not in str([post.messages for post in made.up.posts()])
    assert result.reply.text == ANSWER and "SECRET plans" in result.reply.reasoning
    assert result.receipt["analysis"]["consensus"] == ["kept"]
    assert "SECRET" not in json.dumps(result.receipt)
    assert made.run.degraded == []


@pytest.mark.parametrize("name", [name for name in THOUGHTS if "template" not in name])
def test_live_reasoning_is_not_shown_as_answer(rig, name):
    made = rig(cast(m1=thinking("draft one", **THOUGHTS[name]),
                    writer=thinking(ANSWER, **THOUGHTS[name])))
    made.fuse(live=True)
    assert made.shown() == ANSWER
    deltas = [event.fields for event in made.events if event.kind == "delta"]
    assert "SECRET" not in "".join(delta["text"] for delta in deltas)
    assert "SECRET plans" in "".join(delta["reasoning"] for delta in deltas)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_draft_that_speaks_of_think_tags_stays_whole(rig, stream):
    text = "A model writes `<think>` when it starts and `</think>` when it is done: then it speaks."
    made = rig(cast(m1=text), stream_members=stream)
    made.fuse()
    assert text in judged_drafts(made)


# ---- vote -------------------------------------------------------------------------------------

VOTES = {
    "majority": (("Answer: 42", "So it is.\nAnswer: 42", "x\nAnswer: 42", "Answer: 7"), 0),
    "two of three": (("Well.\nAnswer: 7", "Answer: 42", "Hm.\nAnswer: 42"), 1),
    "the same draft twice": (("Answer: 7", "Answer: 42", "Answer: 42"), 1),
    "commas": (("Answer: 1,000", "Thus\nAnswer: 1000", "Answer: 999"), 0),
    "decimals": (("Answer: 1000.0", "Thus\nAnswer: 1000", "Answer: 999"), 0),
    "case and stop": (("Answer: Paris.", "Thus\nAnswer: paris", "Answer: Rome"), 0),
    "markdown": (("**Answer: 42**", "Thus\nAnswer: `42`", "Answer: 7"), 0),
    "boxed": (("so \\boxed{42}", "Thus\nAnswer: $42$", "Answer: 7"), 0),
    "tie": (("Answer: 1", "Answer: 2"), None),
    "tie of pairs": (("Answer: 1", "a\nAnswer: 1", "Answer: 2", "b\nAnswer: 2"), None),
    "all differ": (("Answer: 1", "Answer: 2", "Answer: 3"), None),
    "plurality": (("Answer: 1", "a\nAnswer: 1", "Answer: 2", "Answer: 3"), None),
    "one voice": (("Answer: 1",), None),
    "near integers": (("Answer: 1234567", "Answer: 1234568", "Answer: 9"), None),
    "near decimals": (("Answer: 3.1415926", "Answer: 3.1415927", "Answer: 3"), None),
    "minus": (("Answer: -5", "Answer: 5", "Answer: 0"), None),
    "code": (("```\nx = 1\n```", "```\nx = 2\n```", "```\nx = 3\n```"), None),
    "a rule at the end": (("One.\n\n---", "Two.\n\n---", "Three.\n\n---"), None),
    "a pair": (("Answer: 1,2", "Answer: 12", "Answer: 3"), None),
    "a point in front": (("Answer: .5", "Answer: 5", "Answer: 3"), None),
}


@pytest.mark.parametrize("texts, winner", VOTES.values(), ids=VOTES)
def test_an_agreeing_majority_wins_without_judge_or_writer_else_it_is_judged(rig, texts, winner):
    models = ("m1", "m2", "m3", "m4")[:len(texts)]
    made = rig(cast(**dict(zip(models, texts))), panel=list(models), vote=True)
    result = made.fuse()
    won = winner is not None
    assert (result.reply.text, result.receipt["synthesizer"]) == (
        (texts[winner], models[winner]) if won else (ANSWER, "writer"))
    assert result.receipt["mode"] == ("vote" if won else "fuse")
    assert (made.calls()["judge"], made.calls()["writer"]) == ((0, 0) if won else (1, 1))
    assert set(draft.text for draft in result.drafts) == set(texts), "a minority is kept"
    assert result.receipt["panel_succeeded"] == list(models)


def test_a_vote_is_not_won_by_who_failed(rig):
    made = rig(cast(m1="Answer: 1", m2=BROKEN, m3=BROKEN), vote=True)
    assert made.fuse().reply.text == ANSWER
    assert made.calls()["judge"] == 1


# ---- depth ------------------------------------------------------------------------------------


def test_solo_is_the_writer_alone_with_the_clients_messages_alone(rig):
    made = rig(mode="solo")
    result = made.fuse(CONVERSATION, {"stop": ["x"]})
    assert made.calls() == {"writer": 1}
    post, = made.up.posts()
    assert appended(post, CONVERSATION) == [] and post.body["stop"] == ["x"]
    receipt = result.receipt
    assert (result.reply.text, receipt["mode"], receipt["synthesizer"]) == (
        ANSWER, "solo", "writer")
    assert (receipt["panel_models"], receipt["judge"], receipt["analysis"]) == ([], None, None)


CJK = "\u8bf7\u8be6\u7ec6\u89e3\u91ca\u91cf\u5b50\u7ea0\u7f20\u7684\u57fa\u672c\u539f\u7406\uff0c" \
    "\u5e76\u6bd4\u8f83\u51e0\u79cd\u4e3b\u8981\u7684\u89e3\u91ca\u3002"
DEPTHS = {
    "title": ("Generate a concise title for this conversation.", {}, "solo"),
    "tags": ("Generate 1-3 broad tags that categorize the chat.", {}, "solo"),
    "one word": ("Is water wet? Answer with one word.", {}, "solo"),
    "yes or no": ("Is it late? Reply only yes or no.", {}, "solo"),
    "64 tokens": ("Compare two protocols for mobile games.", {"max_tokens": 64}, "solo"),
    "new name": ("Compare two protocols for mobile games.", {"max_completion_tokens": 9}, "solo"),
    "question": ("Compare two protocols for mobile games.", {}, "fuse"),
    "65 tokens": ("Compare two protocols for mobile games.", {"max_tokens": 65}, "fuse"),
    "about tags": ("Write a parser for HTML tags in Python, with tests.", {}, "fuse"),
    "about titles": ("Write an essay on how a title shapes the reader of a novel.", {}, "fuse"),
    "about an answer": ("Is my answer ok, or where does this proof fall short?", {}, "fuse"),
    "without blanks": (CJK, {}, "fuse"),
    "two words": ("Explain entropy", {}, "fuse"),
}


@pytest.mark.parametrize("text, params, mode", DEPTHS.values(), ids=DEPTHS)
def test_auto_sends_what_is_trivial_to_the_writer_alone_and_says_why(rig, text, params, mode):
    made = rig(mode="auto")
    receipt = made.fuse([{"role": "user", "content": text}], params).receipt
    assert receipt["mode"] == mode
    assert receipt["mode_reason"]
    assert sum(made.calls().values()) == (1 if mode == "solo" else 5)


# ---- seats at the table -----------------------------------------------------------------------


def temperatures(made):
    return {post.model: post.body.get("temperature") for post in made.up.posts()}


SPREADS = {
    "default": (dict(), (0.4, 0.7, 1.0)),
    "off": (dict(diversity=False), (0.7, 0.7, 0.7)),
    "jitter": (dict(temperature=1.0, diversity_jitter=0.1), (0.9, 1.0, 1.1)),
    "not below zero": (dict(temperature=0.0, diversity_jitter=0.2), (0.0, 0.0, 0.2)),
    "not above two": (dict(temperature=2.0, diversity_jitter=0.2), (1.8, 2.0, 2.0)),
    "own": (dict(panel=["m1", {"model": "m2", "temperature": 1.75}, "m3"]), (0.4, 1.0, 1.75)),
    "own zero": (dict(panel=["m1", {"model": "m2", "temperature": 0}, "m3"]), (0.0, 0.4, 1.0)),
}


@pytest.mark.parametrize("settings, expected", SPREADS.values(), ids=SPREADS)
def test_temperatures_are_spread_and_an_own_one_is_kept(rig, settings, expected):
    made = rig(**settings)
    made.fuse()
    warm = temperatures(made)
    assert sorted(warm[model] for model in PANEL) == pytest.approx(expected)
    if "panel" in settings:
        assert warm["m2"] == settings["panel"][1]["temperature"]


def test_the_writer_has_the_configured_temperature_and_the_judge_none_of_it(rig):
    made = rig(temperature=1.25)
    made.fuse()
    assert temperatures(made)["writer"] == 1.25
    assert temperatures(made)["judge"] == 0


def test_a_label_is_the_name_in_the_receipt_and_the_slug_the_name_upstream(rig):
    made = rig(cast(m2=BROKEN, judge=full_judgement_of_one), panel=[
        {"model": "m1", "label": "Optimist"}, {"model": "m2", "label": "Broken"}, "m3"])
    receipt = made.fuse().receipt
    assert receipt["panel_models"] == ["Optimist", "Broken", "m3"]
    assert receipt["panel_succeeded"] == ["Optimist", "m3"]
    assert entries(made, "member_failed")[0]["model"] == "Broken"
    assert receipt["analysis"]["partial_coverage"] == [{"models": ["Optimist"], "point": "p"}]
    assert set(made.calls()) == {"m1", "m2", "m3", "judge", "writer"}


def full_judgement_of_one(request):
    letter = letters_of(request)["draft of m1"]
    return Reply(judgement(partial_coverage=[{"letters": [letter], "point": "p"}]))


def test_reasoning_effort_goes_to_its_member_alone(rig):
    made = rig(panel=["m1", {"model": "m2", "reasoning_effort": "high"}, "m3"])
    made.fuse()
    efforts = {post.model: post.body.get("reasoning_effort") for post in made.up.posts()}
    assert efforts == {"m1": None, "m2": "high", "m3": None, "judge": None, "writer": None}


PICTURE = ({"role": "user", "content": [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]},)


def test_images_go_to_the_models_that_take_them_alone(rig):
    blind = {"m2", "writer"}
    made = rig(panel=["m1", {"model": "m2", "vision": False}, "m3"],
               synthesizer={"model": "writer", "vision": False})
    made.fuse(PICTURE)
    for post in made.up.posts():
        assert ("image_url" in post.raw.decode()) == (post.model not in blind)
        assert post.messages[0]["content"][0] == PICTURE[0]["content"][0]
    for model in ("m1", "m3", "judge"):
        appended(made.up.posts(model)[0], PICTURE)
    assert {(entry["code"], entry["model"]) for entry in made.run.degraded} == {
        ("rewritten", model) for model in blind}


# ---- interrupts and cancel --------------------------------------------------------------------


def interrupted(rig, **settings):
    """A run that is interrupted when two drafts are in and the third is being written."""
    gate = threading.Event()
    made = rig(waiting_for_third(gate), **settings)
    return made, made.fuse(listener=listening(
        made, (third_speaks, 1, gate.set), (is_done, 2, lambda: made.run.hurry.set())))


def test_an_interrupt_goes_on_with_the_drafts_that_are_in(rig):
    made, result = interrupted(rig)
    assert judged_drafts(made) == ["draft of m1", "draft of m2"]
    assert codes_and_models(made) == [("member_late", "m3")]
    assert result.reply.text == ANSWER
    assert made.up.posts("m3")[0].wait_closed(SOON_S)


def test_an_interrupt_skips_the_layers_that_are_left(rig):
    made, _ = interrupted(rig, layers=3)
    assert made.calls() == {"m1": 1, "m2": 1, "m3": 1, "judge": 1, "writer": 1}


def test_an_interrupt_in_a_later_layer_goes_on_with_the_layer_before(rig):
    made = rig(cast(**{model: ["first of " + model, hangs()] for model in PANEL}), layers=2)
    future = made.begin()
    assert made.up.wait_for(lambda: len(made.up.posts()) == 6)
    made.run.hurry.set()
    assert future.result(5).reply.text == ANSWER
    assert judged_drafts(made) == ["first of m1", "first of m2", "first of m3"]
    assert len(entries(made, "member_late")) == 3


def test_an_interrupt_before_any_draft_ends_the_run(rig, fusion):
    made = rig(cast(**dict.fromkeys(PANEL, hangs())))
    future = made.begin()
    assert made.up.wait_for(lambda: len(made.up.posts()) == 3)
    made.run.hurry.set()
    with pytest.raises(fusion.Cancelled):
        future.result(SOON_S)
    assert all(post.wait_closed(SOON_S) for post in made.up.posts())
    assert made.calls() == {"m1": 1, "m2": 1, "m3": 1}


STAGES = {  # models that hang, how many calls there are by then, how many of them hang
    "panel": (dict(m2=hangs()), 3, 1),
    "panel in mid-answer": (dict(m1=hangs(3), m2=hangs(1), m3=hangs(0)), 3, 3),
    "judge": (dict(judge=hangs()), 4, 1),
    "judge in mid-answer": (dict(judge=hangs(2)), 4, 1),
    "writer": (dict(writer=hangs()), 5, 1),
    "writer in mid-answer": (dict(writer=hangs(2)), 5, 1),
    "refine": (dict(writer=[ANSWER, hangs(1)]), 6, 1),
}


@pytest.mark.parametrize("live", [False, True], ids=["whole", "live"])
@pytest.mark.parametrize("models, calls, hanging", STAGES.values(), ids=STAGES)
def test_a_cancel_closes_every_connection_and_starts_no_call(rig, fusion, models, calls, hanging,
                                                             live):
    made = rig(cast(**models), refine=True, spares=["s1"], synthesizer=["writer", "w2"],
               max_retries=2)
    future = made.begin(live=live)
    assert made.up.wait_for(lambda: (len(made.up.posts()), made.up.in_flight) == (calls, hanging))
    made.run.cancel.set("the client has left")
    with pytest.raises(fusion.Cancelled):
        future.result(SOON_S)
    assert made.up.wait_for(lambda: made.up.in_flight == 0, SOON_S)
    assert sum(post.closed_at is not None for post in made.up.posts()) == hanging
    assert not made.up.wait_for(lambda: len(made.up.posts()) > calls, 0.1)


def test_a_cancel_ends_the_wait_before_a_retry(rig, fusion):
    made = rig(cast(**dict.fromkeys(PANEL, BROKEN)), max_retries=2, retry_backoff=30)
    future = made.begin()
    assert made.up.wait_for(lambda: len(made.up.posts()) == 3 and not made.up.in_flight)
    made.run.cancel.set("the client has left")
    with pytest.raises(fusion.Cancelled):
        future.result(SOON_S)
    assert not made.up.wait_for(lambda: len(made.up.posts()) > 3, 0.1)


def test_a_run_that_was_cancelled_before_it_began_calls_nobody(rig, fusion):
    made = rig()
    run = made.start()
    run.cancel.set("the client has left")
    with pytest.raises(fusion.Cancelled):
        fusion.fuse(made.config, list(QUESTION), run)
    assert made.up.posts() == []


def test_a_cancel_of_one_run_leaves_another_one_alone(rig, fusion):
    gate = threading.Event()
    made = rig(cast(m1=Reply("draft of m1", delay=gate)))
    first, first_run = made.begin(), made.run
    second = made.begin()
    assert made.up.wait_for(lambda: made.up.in_flight == 2)
    first_run.cancel.set("the client has left")
    with pytest.raises(fusion.Cancelled):
        first.result(SOON_S)
    gate.set()
    assert second.result(5).reply.text == ANSWER


# ---- tools ------------------------------------------------------------------------------------


class Toolbox:
    """A registry with one tool, `look`, which remembers how it was used."""

    def __init__(self, fusion, result="it is blue"):
        self.used, self.result = [], result
        self.registry = fusion.Registry([fusion.Tool(
            "look", "Looks at something.", {"type": "object"}, self.look)])

    def look(self, arguments, run):
        self.used.append(arguments)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def calling(arguments='{"at": "sky"}', name="look", number=1):
    return {"id": "call-%d" % number, "type": "function",
            "function": {"name": name, "arguments": arguments}}


def converse(made, fusion, toolbox, **options):
    return fusion.converse(made.start(), made.config.panel[0], list(QUESTION), toolbox.registry,
                           **options)


def test_the_result_of_a_tool_goes_back_to_the_model(rig, fusion):
    toolbox, call = Toolbox(fusion), calling()
    made = rig(cast(m1=[Reply("Let me see.", tool_calls=[call]), "It is blue."]))
    assert converse(made, fusion, toolbox).text == "It is blue."
    first, second = made.up.posts("m1")
    assert first.body["tools"][0]["function"]["name"] == "look"
    assert first.messages == list(QUESTION)
    assert appended(second, QUESTION) == [
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "it is blue"}]
    assert toolbox.used == [{"at": "sky"}]


def test_each_call_of_a_turn_has_its_result_in_order(rig, fusion):
    toolbox = Toolbox(fusion)
    calls = [calling('{"at": %d}' % number, number=number) for number in range(3)]
    made = rig(cast(m1=[Reply("", tool_calls=calls), "done"]))
    converse(made, fusion, toolbox)
    results = appended(made.up.posts("m1")[1], QUESTION)[1:]
    assert [result["tool_call_id"] for result in results] == ["call-0", "call-1", "call-2"]
    assert toolbox.used == [{"at": 0}, {"at": 1}, {"at": 2}]


BAD_CALLS = {
    "unknown tool": (calling(name="lok"), "fine", ("lok", "look"), 0),
    "no JSON": (calling('{"at": '), "fine", ("valid",), 0),
    "no object": (calling("[1]"), "fine", ("object",), 0),
    "exception": (calling(), RuntimeError("kaputt"), ("RuntimeError", "kaputt"), 1),
    "wrong value": (calling(), ValueError("kaputt"), ("kaputt",), 1),
}


@pytest.mark.parametrize("call, result, words, used", BAD_CALLS.values(), ids=BAD_CALLS)
def test_what_goes_wrong_in_a_tool_is_told_to_the_model(rig, fusion, call, result, words, used):
    toolbox = Toolbox(fusion, result)
    made = rig(cast(m1=[Reply("", tool_calls=[call]), "I see."]))
    assert converse(made, fusion, toolbox).text == "I see."
    told = last_text(made.up.posts("m1")[1])
    assert "error" in told and all(word in told for word in words)
    assert len(toolbox.used) == used


def test_a_call_without_arguments_is_one_with_none(rig, fusion):
    toolbox = Toolbox(fusion)
    made = rig(cast(m1=[Reply("", tool_calls=[calling("")]), "done"]))
    converse(made, fusion, toolbox)
    assert toolbox.used == [{}]


@pytest.mark.parametrize("options, turns", [({}, 8), ({"turns": 2}, 2)], ids=["default", "two"])
def test_after_the_last_turn_the_model_must_answer_without_tools(rig, fusion, options, turns):
    def script(request):
        asked = request.body["tool_choice"] == "none"
        return Reply("I give up.") if asked else Reply("", tool_calls=[calling()])

    toolbox = Toolbox(fusion)
    made = rig(cast(m1=script))
    assert converse(made, fusion, toolbox, **options).text == "I give up."
    choices = [post.body["tool_choice"] for post in made.up.posts("m1")]
    assert choices == ["auto"] * turns + ["none"]
    assert len(toolbox.used) == turns


def test_a_long_result_is_cut_and_says_how_much_is_missing(rig, fusion):
    toolbox = Toolbox(fusion, "x" * 123_456)
    made = rig(cast(m1=[Reply("", tool_calls=[calling()]), "done"]))
    converse(made, fusion, toolbox)
    told = last_text(made.up.posts("m1")[1])
    kept = len(told) - len(told.lstrip("x"))
    assert 1000 <= kept < 123_456 and len(told) < kept + 200
    assert str(123_456 - kept) in told[kept:].replace(",", "")


WITH_TOOLS = ["m1", {"model": "m2", "tools": True}, "m3"]


def test_a_member_with_tools_uses_them_and_its_last_words_are_its_draft(rig, fusion):
    toolbox = Toolbox(fusion)
    made = rig(cast(m2=[Reply("Let me see.", tool_calls=[calling()]), "It is blue."]),
               panel=WITH_TOOLS, tools_enabled=True)
    result = made.fuse(registry=toolbox.registry)
    assert judged_drafts(made) == ["It is blue.", "draft of m1", "draft of m3"]
    assert all(("tools" in post.body) == (post.model == "m2") for post in made.up.posts())
    assert toolbox.used == [{"at": "sky"}]
    billed = sum(bill[1] for bill in made.up.billed if bill[0] == "m2")
    assert billed == sum(row["prompt_tokens"] for row in result.receipt["cost_breakdown"]
                         if row["model"] == "m2")


def test_tools_are_off_unless_they_are_enabled(rig, fusion):
    made = rig(panel=WITH_TOOLS)
    made.fuse(registry=Toolbox(fusion).registry)
    assert all("tools" not in post.body for post in made.up.posts())


def test_tools_that_are_enabled_and_not_there_are_missed_aloud(rig):
    made = rig(panel=WITH_TOOLS, tools_enabled=True)
    assert made.fuse().reply.text == ANSWER
    assert "tools" in made.run.degraded[0]["code"] + made.run.degraded[0]["detail"]


def test_a_member_that_never_stops_calling_tools_gives_no_draft(rig, fusion):
    made = rig(cast(m2=Reply("", tool_calls=[calling()])), panel=WITH_TOOLS, tools_enabled=True)
    made.fuse(registry=Toolbox(fusion).registry)
    assert judged_drafts(made) == ["draft of m1", "draft of m3"]
    assert made.codes() == ["member_failed"]


# ---- the receipt ------------------------------------------------------------------------------

RECEIPT = {
    "config", "mode", "panel_models", "panel_succeeded", "judge", "synthesizer", "cost_usd",
    "cost_source", "cost_breakdown", "timing_s", "degraded", "analysis", "judge_unsupported",
    "seed", "request_id"}
ROW = {"model", "role", "prompt_tokens", "completion_tokens", "cost_usd", "source", "latency_s",
       "attempts", "status"}


@pytest.mark.parametrize("settings", [dict(), dict(mode="solo"), dict(vote=True),
                                      dict(refine=True, layers=2, samples=2)], ids=str)
def test_the_receipt_has_all_its_keys_in_every_mode_and_is_json(rig, settings):
    made = rig(**settings)
    receipt = made.fuse().receipt
    assert RECEIPT <= set(receipt)
    assert all(ROW <= set(row) for row in receipt["cost_breakdown"])
    assert all({"code", "stage", "model", "detail"} == set(one) for one in receipt["degraded"])
    assert json.loads(json.dumps(receipt)) == receipt
    assert isinstance(receipt["seed"], int)
    assert made.events[-1].kind == "end" and made.events[-1].fields["receipt"] == receipt


def test_a_run_in_which_everything_works_degrades_nothing(rig):
    made = rig(refine=True, layers=2, samples=2)
    receipt = made.fuse().receipt
    assert receipt["degraded"] == []
    assert (receipt["judge"], receipt["synthesizer"], receipt["mode"]) == (
        "judge", "writer", "fuse")
    assert {(row["status"], row["attempts"]) for row in receipt["cost_breakdown"]} == {("stop", 1)}


def test_the_time_of_each_stage_is_in_the_receipt(rig):
    made = rig(cast(m1=Reply("slow", delay=0.2), judge=Reply(KEPT, delay=0.1)), refine=True)
    timing = made.fuse().receipt["timing_s"]
    assert set(timing) == {"panel", "judge", "synth", "refine", "total"}
    assert timing["panel"] >= 0.2 and timing["judge"] >= 0.1
    stages = timing["panel"] + timing["judge"] + timing["synth"] + timing["refine"]
    assert stages - 0.005 <= timing["total"] < stages + 0.5


def test_the_latency_of_a_call_is_its_own(rig):
    made = rig(cast(m1=Reply("slow", delay=0.2)))
    rows = {row["model"]: row["latency_s"] for row in made.fuse().receipt["cost_breakdown"]}
    assert rows["m1"] >= 0.2 and all(seconds >= 0 for seconds in rows.values())


def test_every_request_has_an_id_of_its_own(rig):
    made = rig(mode="solo")
    ids = {made.fuse().receipt["request_id"] for _ in range(3)}
    assert len(ids) == 3 and all(ids)


def test_a_failed_call_is_in_the_receipt_with_its_attempts(rig):
    made = rig(cast(m2=BROKEN), max_retries=2)
    rows = {row["model"]: row for row in made.fuse().receipt["cost_breakdown"]}
    assert (rows["m2"]["attempts"], rows["m2"]["cost_usd"]) == (3, 0)
    assert rows["m2"]["status"] not in ("stop", "length")


def test_two_runs_at_once_do_not_mix(rig):
    def script(request):
        asked = request.messages[0]["content"]
        if request.model == "judge":
            return Reply(judgement(consensus=[asked]), delay=0.01)
        return Reply("%s answers %s" % (request.model, asked), delay=0.01)

    made = rig(script)
    words = ["one", "two", "three", "four"]
    futures = [made.begin([{"role": "user", "content": word}]) for word in words]
    for word, future in zip(words, futures):
        result = future.result(10)
        assert result.reply.text == "writer answers " + word
        assert result.receipt["analysis"]["consensus"] == [word]
        assert sorted(draft.text for draft in result.drafts) == [
            "%s answers %s" % (model, word) for model in PANEL]


# ---- windows ----------------------------------------------------------------------------------


def windowed_judge(request):
    """A judge that says which letters it sees; its best is the last of them."""
    seen = re.findall(r'letter="([A-Z])"', last_text(request))
    return Reply(json.dumps({"consensus": ["seen " + "".join(seen)], "best_draft": seen[-1]}))


def test_a_judge_with_a_small_window_reads_many_drafts_three_at_a_time(rig):
    panel = ["p%d" % number for number in range(7)]
    made = rig(dict({model: model + " says " + "x" * 1800 for model in panel},
                    judge=windowed_judge, writer=ANSWER),
               panel=panel, judge={"model": "judge", "context": 4096}, max_tokens=1000)
    result = made.fuse()
    windows = [re.findall(r'letter="([A-Z])"', last_text(post)) for post in made.up.posts("judge")]
    assert [len(window) for window in windows] == [3, 3, 1]
    assert sorted(sum(windows, [])) == list("ABCDEFG")
    assert result.receipt["analysis"]["consensus"] == ["seen " + "".join(window)
                                                       for window in windows]
    assert ("context_trimmed", "judge") in codes_and_models(made)
    assert set(made.codes()) == {"context_trimmed", "price_unknown"}
    assert all("x" * 1800 in last_text(post) for post in made.up.posts("judge"))
