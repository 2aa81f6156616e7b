"""What mutants.py missed: each test kills a mutant that survived the others or made them hang."""

import contextlib
import time

import pytest

from test_engine import cast, hangs, letters_of
from test_wiring import QUESTION, Rig, analysis_in, begin, drafts_in, judgement, last_text
from upstream import Reply


@pytest.fixture
def rig(fusion, tmp_path):
    """Makes Rigs, and closes them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda script=None, **settings: stack.enter_context(
            Rig(fusion, tmp_path, script or cast(), **settings))


def test_a_very_long_draft_reaches_judge_and_writer_to_its_last_letter(rig):
    draft = "".join("Line %d of the draft.\n" % number for number in range(20_000))
    made = rig(cast(m2=draft))
    made.fuse()
    for model in ("judge", "writer"):
        assert draft in drafts_in(last_text(made.up.posts(model)[0])).values()


def test_what_one_side_alone_is_shown_to_say_is_no_contradiction(rig):
    def judge(request):
        letters = letters_of(request)
        return Reply(judgement(must_include=["kept"], contradictions=[{
            "topic": "t", "verdict": "v", "positions": [
                {"letters": [letters["draft of m1"]], "stance": "s", "quote": "draft of m1"},
                {"letters": [letters["draft of m2"]], "stance": "s", "quote": "made up"}]}]))

    made = rig(cast(judge=judge))
    receipt = made.fuse().receipt
    assert receipt["analysis"]["contradictions"] == []
    assert analysis_in(last_text(made.up.posts("writer")[0])) == {
        "must_include": ["kept"], "best_draft": "A"}
    assert receipt["judge_unsupported"] == 1


BROKEN = {
    "no messages": ([], {}, "messages"),
    "a cap of zero": (QUESTION, {"max_tokens": 0}, "max_tokens"),
    "the newer cap of zero": (QUESTION, {"max_completion_tokens": 0}, "max_completion_tokens"),
}


@pytest.mark.parametrize("messages, params, param", BROKEN.values(), ids=BROKEN)
def test_what_backends_take_for_something_else_is_refused_before_the_fan_out(
        rig, fusion, messages, params, param):
    made = rig()
    with pytest.raises(fusion.UsageError) as refusal:
        made.fuse(messages, params)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert made.up.posts() == []


def test_a_cancel_is_told_from_the_end_of_an_answer_that_only_its_connection_ends(rig, fusion):
    endless = Reply("a long answer in pieces", headers={"Transfer-Encoding": None}, hang_after=3)
    made = rig(cast(writer=endless), max_retries=0)
    run, pieces = made.start(), []
    future = begin(lambda: fusion.complete(run, made.config.writer, QUESTION,
                                           on_delta=lambda text, thought: pieces.append(text)))
    assert made.up.wait_for(lambda: len(pieces) >= 2)
    run.cancel.set("stop it")
    with pytest.raises(fusion.Cancelled, match="stop it"):
        future.result(5)


LEFT_BEHIND = {
    "a quorum without grace": {"quorum": 2, "grace_s": 0},
    "a quorum and its grace": {"quorum": 2, "grace_s": 0.2},
    "an interrupt": {},
}


@pytest.mark.parametrize("settings", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_who_hangs_is_left_behind_long_before_its_time_is_over(rig, settings):
    made, done = rig(cast(m3=hangs(2)), member_timeout_s=6, **settings), []

    def listen(event):
        if event.kind == "slot" and event.fields["state"] == "done":
            done.append(event)
            if len(done) == 2 and not settings:
                made.run.hurry.set()

    started = time.monotonic()
    made.fuse(listener=listen)
    assert time.monotonic() - started < 4
    assert made.codes().count("member_late") == 1
