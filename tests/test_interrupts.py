"""Ctrl-C, SIGTERM and readers that left, at any moment: one exit code, and no word of Python's."""
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import interpreters
from test_talk import (
    ANSWER, DRAFTS, WITHIN_S, Program, asked, full_pipe, hanging, lines_with, press_until_it_ends,
    script, write_setup)
from upstream import Reply, Upstream

PYTHONS = sorted({interpreters()[0][1], interpreters()[-1][1]}) if interpreters() else []
OF_PYTHON = re.compile(r"Traceback|Fatal Python|Exception ignored|Exception in|defect|"
                       r'File "|Error\b.*:|KeyboardInterrupt|<_io|could not acquire')
MANY, FEW = 200, 20
AT_ONCE = 5                 # programs that run side by side
OFFSET_S = 0.03             # how long after its event a press comes, at most


class Started(Program):
    """A program under a Python of its own."""

    python = sys.executable

    def start(self, command, env, files):
        return super().start([self.python] + command[1:], env, files)

    def press(self, number):
        """Send a signal, though the program may have ended meanwhile."""
        if self.process.poll() is None:
            self.signal(number)

    def press_if_it_lives_on(self):
        """Press Ctrl-C once more if the program has not ended within a moment."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.4)
        self.press(signal.SIGINT)


@pytest.fixture
def program(tmp_path):
    """Starts `ask` of a scripted backend: with program(up, "--json", python=path) as running."""
    def start(up, *args, config=None, python=sys.executable, **more):
        kind = type("Started", (Started,), {"python": python})
        folder = tmp_path / str(up.port)
        folder.mkdir(exist_ok=True)
        path = write_setup(folder, **(config or {}))
        return kind(folder / "home", "ask", "--config", path, "hello there", *args,
                    env={"FUSION_BASE_URL": up.url}, **more)
    return start


def spin(seconds):
    """Let a fraction of a tick pass without giving the processor away."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def side_by_side(function, numbers):
    """Call a function with each number, some at a time; raises what it raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(function, numbers):
            pass


def hold(found, code=130, within=WITHIN_S):
    """Hold a program that was stopped to its exit code, its haste and its silence."""
    assert found.code == code, found
    assert found.seconds < within, found
    assert not OF_PYTHON.search(found.err), found.err


def hold_left(up):
    """Hold a program that has ended to leaving no connection open."""
    assert up.wait_for(lambda: up.open_connections() == 0), "a connection is still open"


# ---- one press ------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [(), ("--stream",), ("--layers", "2"), ("--samples", "2")],
                         ids="_".join)
def test_one_press_goes_on_with_the_drafts_that_are_in(program, flags):
    with Upstream(script(b=hanging())) as up:
        with program(up, *flags) as running:
            running.wait_for("m/a")
            running.signal(signal.SIGINT)
            found = running.end()
        assert all(request.wait_closed(WITHIN_S) for request in up.posts("m/b"))
        hold_left(up)
    hold(found, 0, within=3)
    assert found.out == ANSWER + "\n"
    assert lines_with("member_late", found.err) and asked(up)["m/s"] == 1


def test_one_press_with_half_a_draft_in_stops_since_half_is_none(program):
    half = Reply(DRAFTS["m/a"], hang_after=3)
    with Upstream(script(a=half, b=hanging())) as up:
        with program(up) as running:
            assert up.wait_for(lambda: len(up.posts()) == 2)
            running.signal(signal.SIGINT)
            found = running.end()
        hold_left(up)
    hold(found)
    assert found.out == "" and asked(up) == {"m/a": 1, "m/b": 1}


def test_one_press_while_a_retry_waits_stops(program):
    busy = Reply(status=503)
    with Upstream(script(a=busy, b=busy)) as up:
        with program(up, config={"max_retries": 3, "retry_backoff": 30}) as running:
            assert up.wait_for(lambda: len(up.posts()) == 2 and up.in_flight == 0)
            running.signal(signal.SIGINT)
            found = running.end()
        hold_left(up)
    hold(found)
    assert found.out == "" and len(up.posts()) == 2


def test_one_press_in_json_keeps_stdout_one_object_that_names_who_was_late(program):
    with Upstream(script(b=hanging())) as up:
        with program(up, "--json") as running:
            running.wait_for("m/a")
            running.signal(signal.SIGINT)
            found = running.end()
    hold(found, 0, within=3)
    assert re.search(r'"code": "member_late"', found.out) and found.out.rstrip().endswith("}")


def test_a_stop_is_said_in_one_error_line(program):
    with Upstream(script(a=hanging(), b=hanging())) as up:
        with program(up) as running:
            assert up.wait_for(lambda: len(up.posts()) == 2)
            running.signal(signal.SIGINT)
            found = running.end()
    hold(found)
    assert len(lines_with("error: ", found.err)) == 1


# ---- two presses at any moment --------------------------------------------------------------

def panel_hangs():
    return script(a=hanging(), b=hanging())


def one_draft_is_in():
    return script(b=hanging(), j=hanging())


def judge_hangs():
    return script(j=hanging())


def writer_hangs():
    return script(s=Reply(ANSWER, hang_after=2))


def drafts_drip():
    return script(a=Reply("x" * 4000, drip=(200, 0.005), hang_after=5), b=hanging(), j=hanging())


# What happens upstream, how many requests are awaited before the first press, the flags.
SCENES = [
    (panel_hangs, (1, 2), ()), (panel_hangs, (1, 2), ("--json",)),
    (panel_hangs, (1, 2), ("--samples", "4")), (one_draft_is_in, (1, 2), ()),
    (judge_hangs, (1, 2, 3), ("--stream",)), (writer_hangs, (3, 4), ("--stream",)),
    (writer_hangs, (2, 4), ("--json", "--stream")), (drafts_drip, (1, 2), ()),
]
# What the second press waits for, after the first one.
PAUSES = (
    lambda up, running: None,
    lambda up, running: up.wait_for(lambda: "interrupted" in running.text("err"), 0.5),
    lambda up, running: up.wait_for(lambda: up.in_flight < 2, 0.2),
    lambda up, running: up.wait_for(lambda: "error" in running.text("err"), 0.3),
)


def press_twice(program, python, number):
    """Press Ctrl-C twice at moments that `number` decides, and hold the end to its promises."""
    chance = random.Random(number)
    scene, counts, flags = chance.choice(SCENES)
    count, pause = chance.choice(counts), chance.choice(PAUSES)
    first, second = chance.random() * OFFSET_S, chance.random() * OFFSET_S
    with Upstream(scene()) as up:
        with program(up, *flags, python=python) as running:
            assert up.wait_for(lambda: len(up.posts()) >= count, 10), running.ending()
            spin(first)
            pressed = time.monotonic()
            running.press(signal.SIGINT)
            pause(up, running)
            spin(second)
            running.press(signal.SIGINT)
            if time.monotonic() - pressed < 0.15:  # two signals at one moment count as one
                running.press_if_it_lives_on()
            found = running.end()
        hold(found)
        hold_left(up)
    assert ANSWER not in found.out


def test_a_second_press_exits_at_once_whenever_it_comes(program):
    side_by_side(lambda number: press_twice(program, sys.executable, number), range(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_a_second_press_exits_at_once_on_every_python(program, python):
    side_by_side(lambda number: press_twice(program, python, number), range(MANY))


def hammer(program, python, number):
    """Press Ctrl-C again and again until the program has ended."""
    chance = random.Random(number)
    with Upstream(panel_hangs()) as up:
        with program(up, python=python) as running:
            assert up.wait_for(lambda: len(up.posts()) == 2)
            for _ in range(60):
                running.press(signal.SIGINT)
                time.sleep(chance.random() * 0.004)
            found = running.end()
        hold_left(up)
    hold(found)


def test_a_hammered_key_never_shows_the_insides(program):
    side_by_side(lambda number: hammer(program, sys.executable, number), range(6))


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_a_hammered_key_never_shows_the_insides_of_any_python(program, python):
    side_by_side(lambda number: hammer(program, python, number), range(60))


def press_at_the_end(program, python, number):
    """Press Ctrl-C when the answer is there, while the program is about to leave."""
    with Upstream(script()) as up:
        with program(up, python=python) as running:
            running.wait_for(ANSWER, "out")
            spin(random.Random(number).random() * OFFSET_S)
            for _ in range(2):
                running.press(signal.SIGINT)
            found = running.end()
        hold_left(up)
    assert found.code in (0, 130) and not OF_PYTHON.search(found.err), found
    assert found.out.rstrip("\n") == ANSWER and (found.code or found.out.endswith("\n"))


def test_a_press_while_the_program_leaves_shows_no_insides(program):
    side_by_side(lambda number: press_at_the_end(program, sys.executable, number), range(8))


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_a_press_while_the_program_leaves_shows_no_insides_on_any_python(program, python):
    side_by_side(lambda number: press_at_the_end(program, python, number), range(80))


# ---- terminated -----------------------------------------------------------------------------

def terminate(program, python, number):
    """Send SIGTERM at a moment that `number` decides."""
    chance = random.Random(number)
    scene, counts, flags = chance.choice(SCENES)
    count = chance.choice(counts)
    with Upstream(scene()) as up:
        with program(up, *flags, python=python) as running:
            assert up.wait_for(lambda: len(up.posts()) >= count, 10), running.ending()
            spin(chance.random() * OFFSET_S)
            for _ in range(chance.choice((1, 1, 2))):
                running.press(signal.SIGTERM)
            found = running.end()
        hold(found, 143)
        hold_left(up)


def test_a_termination_at_any_moment_is_143_and_silent(program):
    side_by_side(lambda number: terminate(program, sys.executable, number), range(10))


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_a_termination_at_any_moment_is_143_on_every_python(program, python):
    side_by_side(lambda number: terminate(program, python, number), range(100))


def test_a_termination_after_a_press_is_143(program):
    with Upstream(one_draft_is_in()) as up:
        with program(up) as running:
            running.wait_for("m/a")
            running.signal(signal.SIGINT)
            running.wait_for("interrupted")
            running.signal(signal.SIGTERM)
            found = running.end()
        hold_left(up)
    hold(found, 143)


# ---- nobody reads ---------------------------------------------------------------------------

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_whose_stderr_nobody_reads(program, number, code):
    reading, writing = full_pipe()
    try:
        with Upstream(script(b=hanging())) as up:
            with program(up, stderr=writing) as running:
                assert up.wait_for(lambda: len(up.posts()) == 2 and up.in_flight == 1)
                running.press(number)
                if number == signal.SIGINT:
                    assert up.wait_for(lambda: pending_signals(running) == 0)
                    running.press(number)
                found = running.end()
            hold_left(up)
    finally:
        os.close(reading)
        os.close(writing)
    assert found.code == code and found.seconds < WITHIN_S


def pending_signals(running):
    """The mask of signals that were sent and not yet taken (Linux; elsewhere 0)."""
    try:
        with open("/proc/%d/status" % running.process.pid) as file:
            found = re.search(r"^ShdPnd:\s*([0-9a-f]+)", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1), 16)


def said_later(running, reading):
    """Press Ctrl-C as people do, then read the full pipe: (exit code, what is said in it)."""
    code = press_until_it_ends(running)
    os.set_blocking(reading, True)
    said = b"".join(iter(lambda: os.read(reading, 65536), b""))
    return running.process.wait(5) if code is None else code, said.lstrip(b"x").decode()


@pytest.mark.parametrize("flags", [("--quiet",), ("--quiet", "--json")], ids=["text", "json"])
def test_presses_while_an_error_is_said_to_nobody_stop_without_insides(program, flags):
    refused = Reply(status=400)
    reading, writing = full_pipe()
    with Upstream(script(a=refused, b=refused)) as up:
        with program(up, *flags, stderr=writing) as running:
            os.close(writing)
            assert up.wait_for(lambda: len(up.posts()) == 2 and up.in_flight == 0)
            spin(0.1)  # it may be about to say so, or stuck in it; both must end
            code, said = said_later(running, reading)
    os.close(reading)
    assert code in (3, 130) and not OF_PYTHON.search(said), (code, said)


def test_presses_while_an_answer_goes_into_a_file_that_nobody_reads_stop(program, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(str(fifo))
    reading, writing = full_pipe()
    with Upstream(script()) as up:
        with program(up, "--quiet", "-o", fifo, stderr=writing) as running:
            os.close(writing)
            assert up.wait_for(lambda: up.posts("m/s") and up.in_flight == 0)
            spin(0.1)
            code, said = said_later(running, reading)
    os.close(reading)
    assert code == 130 and not OF_PYTHON.search(said), (code, said)


@pytest.mark.parametrize("flags", [(), ("--stream",), ("--json", "--stream")], ids="_".join)
def test_a_stdout_that_closes_in_the_middle_ends_quietly_and_frees_the_backend(program, flags):
    gate = threading.Event()
    late = Reply(ANSWER, first_delay=gate)
    reading, writing = os.pipe()
    with Upstream(script(s=late)) as up:
        with program(up, *flags, stdout=writing) as running:
            os.close(writing)
            assert up.wait_for(lambda: up.posts("m/s"))
            os.close(reading)
            gate.set()
            found = running.end()
        hold_left(up)
    assert found.code in (141, -signal.SIGPIPE) and not OF_PYTHON.search(found.err), found


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_after_stderr_was_closed_stops_all_the_same(program, number, code):
    reading, writing = os.pipe()
    with Upstream(panel_hangs()) as up:
        with program(up, stderr=writing) as running:
            os.close(writing)
            os.close(reading)
            assert up.wait_for(lambda: len(up.posts()) == 2)
            running.signal(number)
            found = running.end()
        hold_left(up)
    assert found.code == code and found.seconds < WITHIN_S and found.out == ""


def test_a_second_press_leaves_a_recording_of_whole_lines(program, tmp_path):
    tape = tmp_path / "tape"
    with Upstream(one_draft_is_in()) as up:
        with program(up, "--record", tape) as running:
            running.wait_for("m/a")
            running.signal(signal.SIGINT)
            running.wait_for("interrupted")
            running.signal(signal.SIGINT)
            found = running.end()
    hold(found)
    lines = tape.read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["model"] == "m/a"
