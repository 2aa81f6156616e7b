"""The terminal: live lines that are redrawn, 80 columns, colours, and words that stay harmless."""
import json
import os
import re
import signal
import struct
import subprocess
import threading
import unicodedata

import pytest

from test_talk import ANALYSIS, ANSWER, Program, hanging, script, unharmed, write_setup
from upstream import Reply, Upstream, error_reply

fcntl = pytest.importorskip("fcntl")
pty = pytest.importorskip("pty")
termios = pytest.importorskip("termios")

COLUMNS, HEIGHT = 80, 24
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)

# What a hostile backend says: the visible words, and between them a title, a screen that is
# cleared, a cursor that moves, a colour, a reset, a string for the terminal, C1 controls, a
# carriage return, a backspace, a delete, and marks that turn text around.
HOSTILE = ("EV\x1b]0;owned\x07IL\x1b[2J\x1b[1;1H\x1b[5;35mWO\x1bcRD\x1bPq\x1b\\S\x9b31m\x9d0;x\x9c"
           "one\rtwo\x08\x7f \u202egnp.exe\u202c \u2066x\u2069 \x00\x1f\x0b\x0cend")
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Terminal(Program):
    """fusion.py on a terminal of 80 columns that passes every byte on as it comes."""

    def start(self, command, env, files):
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, COLUMNS, 0, 0))
        settings = termios.tcgetattr(slave)
        settings[1] &= ~termios.OPOST  # no \n becomes \r\n on the way
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        files = dict({"stdin": slave, "stdout": slave, "stderr": slave}, **files)
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **files)
        os.close(slave)
        pipes = {"piped out": self.process.stdout, "err": self.process.stderr}
        self.said.update({name: b"" for name in pipes})
        return dict({name: pipe for name, pipe in pipes.items() if pipe is not None},
                    out=os.fdopen(master, "rb", 0))


class Display:
    """What a terminal shows after some text; a control that it does not know is a failure."""

    def __init__(self, text, columns=COLUMNS):
        self.columns = columns
        self.rows = [{}]
        self.row = self.column = 0
        for number, letter, char in CONTROL.findall(text):
            if letter:
                self.control(number, letter)
            else:
                self.put(char)

    def control(self, number, letter):
        assert letter in "AFJKm" and not (letter in "JK" and number not in ("", "0")), \
            "the terminal got ESC [ %s %s" % (number, letter)
        if letter in "AF":
            top = max(0, len(self.rows) - HEIGHT)  # what has scrolled off is out of reach
            self.row = max(top, self.row - int(number or 1))
            self.column = 0 if letter == "F" else self.column
        elif letter in "JK":
            row = self.rows[self.row]
            self.rows[self.row] = {at: row[at] for at in row if at < self.column}
            if letter == "J":
                del self.rows[self.row + 1:]

    def put(self, char):
        assert char in "\n\t\r" or not UNSAFE.match(char), "the terminal got %r" % char
        width = width_of(char)
        if char == "\r":
            self.column = 0
            return
        if char == "\n" or self.column + width > self.columns:
            self.row, self.column = self.row + 1, 0
            self.rows += [{} for _ in range(self.row - len(self.rows) + 1)]
        if char != "\n":
            self.rows[self.row][self.column] = char
            self.column += width

    def lines(self):
        found = []
        for row in self.rows:
            end = max(row, default=-1)
            found.append("".join(row.get(at, " ") for at in range(end + 1)).rstrip())
        return found

    def starting(self, word):
        return [line for line in self.lines() if line.startswith(word)]


def width_of(char):
    """The columns that a character takes."""
    if unicodedata.combining(char) or unicodedata.category(char) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


@pytest.fixture
def terminal(tmp_path):
    """Starts the program on a terminal: with terminal(up, "ask", "hello") as running."""
    def start(up, command, *args, config=None, files=None, **env):
        if command == "ask":
            args = ("--config", write_setup(tmp_path, **(config or {}))) + args
        env = dict({"FUSION_BASE_URL": up.url, "TERM": "xterm-256color"}, **env)
        return Terminal(tmp_path / "home", command, *args, env=env, **(files or {}))
    return start


def drawn(name, times):
    """Whether a name has been drawn so many times: there are no sure seconds to wait for."""
    return lambda said: said.count(name) >= times


def run(terminal, up, *args, **more):
    """What the program says on a terminal when it is left alone."""
    with terminal(up, *args, **more) as running:
        found = running.end()
    assert unharmed(found), found
    return found


# ---- live lines -----------------------------------------------------------------------------

def in_progress(said):
    """Whether the terminal shows, and shows alone, one member that is done and one that is not."""
    said = re.sub(r"\x1b(\[[0-9;?]*)?\Z", "", said)  # the rest of it is still to come
    return [line.split()[:3] for line in Display(said).lines() if line] == [
        ["member", "ok", "m/a"], ["member", "...", "second"]]


def test_each_member_has_one_line_that_is_redrawn_in_its_place(terminal):
    gate = threading.Event()
    with Upstream(script(b=Reply("a late draft", delay=gate))) as up:
        with terminal(up, "ask", "hello there") as running:
            running.wait_for(drawn("second", 3), "out")
            running.wait_for(in_progress, "out")
            gate.set()
            found = running.end()
    shown = Display(found.out)
    assert [line.split()[1:3] for line in shown.starting("member")] == [
        ["ok", "m/a"], ["ok", "second"]]
    assert [line.split()[1:3] for line in shown.starting("judge")] == [["ok", "m/j"]]


def test_a_live_line_tells_seconds_tokens_and_dollars(terminal):
    with Upstream(script()) as up:
        shown = Display(run(terminal, up, "ask", "hello there").out)
    for line in shown.starting("member"):
        assert re.fullmatch(r"member ok +\S+ +\d+\.\d s, [\d,]+ tokens?, \$\d+\.\d+", line)


def test_a_live_line_counts_tokens_while_they_come(terminal):
    gate = threading.Event()
    slow = Reply(chunks=["four" * 10, "more"], chunk_delay=gate)
    with Upstream(script(b=slow)) as up:
        with terminal(up, "ask", "hello there") as running:
            running.wait_for(lambda said: re.search(r"second +\d\.\d s, 10 tokens", said), "out")
            gate.set()
            assert running.end().code == 0


def test_the_answer_and_then_the_receipt_come_below_the_lines(terminal):
    with Upstream(script(b=Reply(status=400))) as up:
        lines = Display(run(terminal, up, "ask", "hello there").out).lines()
    text = "\n".join(lines)
    order = [text.index(words) for words in ("member", "judge", ANSWER, "1 of 2 answered",
                                             "degraded: member_failed", "degraded: panel_thin")]
    assert order == sorted(order)
    assert ANSWER in lines, "the answer begins and ends its own lines"
    assert [line for line in lines if line.split()[1:2] == ["..."]] == [], "nothing is unfinished"


def test_the_answer_streams_to_a_terminal(terminal):
    gate = threading.Event()
    with Upstream(script(s=Reply(chunks=["first ", "second"], chunk_delay=gate))) as up:
        with terminal(up, "ask", "hello there") as running:
            running.wait_for("first ", "out")
            gate.set()
            found = running.end()
    assert "first second" in Display(found.out).lines()


@pytest.mark.parametrize("flags", [["--refine"], ["--vote"], ["--mode", "solo"]], ids="_".join)
def test_the_answer_is_written_once(terminal, flags):
    with Upstream(script()) as up:
        found = run(terminal, up, "ask", "hello there", *flags)
    assert Display(found.out).lines().count(ANSWER) == 1


def test_a_cut_answer_is_followed_by_its_error_on_a_line_of_its_own(terminal):
    with Upstream(script(s=Reply(chunks=["first ", "second"], cut_after=1))) as up:
        found = run(terminal, up, "ask", "hello there")
    shown = Display(found.out)
    assert found.code == 3 and "first" in shown.lines()
    assert len(shown.starting("error: ")) == len(shown.starting("hint: ")) == 1


def test_an_interrupt_leaves_whole_lines(terminal):
    with Upstream(script(b=hanging())) as up:
        with terminal(up, "ask", "hello there") as running:
            running.wait_for(lambda said: re.search("ok +m/a", said), "out")
            running.signal(signal.SIGINT)
            found = running.end()
    shown = Display(found.out)
    assert found.code == 0 and ANSWER in shown.lines()
    assert [line.split()[1:3] for line in shown.starting("member")] == [
        ["ok", "m/a"], ["late", "second"]]
    assert len(shown.starting("interrupted")) == 1


def test_a_panel_taller_than_the_terminal_does_not_fill_it_with_copies(terminal):
    gate = threading.Event()
    answers = script(a=lambda request: Reply("draft %d" % request.n),
                     b=lambda request: Reply("so %d" % request.n, delay=gate))
    with Upstream(answers) as up:
        panel = ["m/a"] * 3 + ["m/b"]
        flags = ["--samples", "8"]
        with terminal(up, "ask", "hello there", *flags, config={"panel": panel}) as running:
            running.wait_for(drawn("m/b", 30), "out")
            gate.set()
            found = running.end()
    assert found.code == 0
    assert len(Display(found.out).starting("member")) <= 32


@pytest.mark.parametrize("config, changes", [
    ({"panel": ["m/a", "m/" + "long" * 45]}, {}),
    ({}, {"b": error_reply(400, "no such luck, " * 30)}),
    ({}, {"b": error_reply(400, "\u6a21\u578b\u4e0d\u53ef\u7528\uff0c\u8bf7\u7a0d\u540e\u518d\u8bd5"
                           * 9)}),
    ({"panel": ["m/a", {"model": "m/b", "label": "\U0001f98a" * 50}]}, {}),
], ids=["slug", "error", "wide-error", "wide-label"])
def test_live_lines_fit_80_columns(terminal, config, changes):
    with Upstream(script(**changes)) as up:
        found = run(terminal, up, "ask", "hello there", config=config)
    said = re.split(r"\n|\x1b\[\d*[A-LN-Z]", COLOUR.sub("", found.out))
    live = [line for line in said if re.match("(member|judge|synth) ", line)]
    assert len(live) > 2
    assert max(sum(map(width_of, line)) for line in live) <= COLUMNS
    assert len(Display(found.out).starting("member")) == 2


def test_everything_fits_80_columns_when_names_are_short(terminal):
    with Upstream(script()) as up:
        found = run(terminal, up, "ask", "hello there")
    assert Display(found.out).lines() == Display(found.out, 1000).lines()


def test_quiet_leaves_only_the_answer_on_the_terminal(terminal):
    with Upstream(script(b=Reply(status=400))) as up:
        assert run(terminal, up, "ask", "hello there", "--quiet").out == ANSWER + "\n"


# ---- colours and escape sequences -----------------------------------------------------------

@pytest.mark.parametrize("flags, env, coloured", [
    ([], {}, True),
    ([], {"NO_COLOR": ""}, True),
    ([], {"NO_COLOR": "1"}, False),
    (["--no-color"], {}, False),
    (["--no-color"], {"NO_COLOR": "0"}, False),
], ids=["plain", "empty", "no-color-variable", "no-color-flag", "both"])
def test_colours_can_be_turned_off(terminal, flags, env, coloured):
    with Upstream(script(b=Reply(status=400))) as up:
        found = run(terminal, up, "ask", "hello there", *flags, **env)
    assert bool(COLOUR.search(found.out)) == coloured
    assert ANSWER in Display(found.out).lines()


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_no_escape_sequence_at_all(terminal, term):
    with Upstream(script(b=Reply(status=400, error=HOSTILE), s=HOSTILE)) as up:
        found = run(terminal, up, "ask", "hello there", TERM=term)
    assert not UNSAFE.search(found.out)
    words = [line.split()[:3] for line in found.out.splitlines()]
    assert words.count(["member", "ok", "m/a"]) == words.count(["member", "failed", "second"]) == 1


def test_a_pipe_gets_no_escape_sequence_at_all(terminal):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Upstream(script(b=Reply(status=400, error=HOSTILE))) as up:
        with terminal(up, "ask", "hello there", files=pipes) as running:
            assert running.end().code == 0
    assert running.text("piped out") == ANSWER + "\n"
    assert not UNSAFE.search(running.text("err")) and "degraded" in running.text("err")
    assert running.text("out") == ""


def test_a_terminal_for_talk_alone_gets_no_answer(terminal):
    with Upstream(script(s="all \x1b[31mscarlet")) as up:
        with terminal(up, "ask", "hello there", files={"stdout": subprocess.PIPE}) as running:
            assert running.end().code == 0
    assert running.text("piped out") == "all \x1b[31mscarlet\n", "a pipe gets it byte for byte"
    assert "scarlet" not in running.text("out")
    assert "2 of 2 answered" in Display(running.text("out")).lines()[-2]


def test_a_terminal_for_the_answer_alone_gets_clean_words(terminal):
    with Upstream(script(s=HOSTILE)) as up:
        with terminal(up, "ask", "hello there", files={"stderr": subprocess.PIPE}) as running:
            assert running.end().code == 0
    assert not UNSAFE.search(running.text("out")) and "EV" in running.text("out")
    assert "2 of 2 answered" in running.text("err") and not UNSAFE.search(running.text("err"))


def test_json_on_a_terminal_is_json(terminal):
    with Upstream(script(s=HOSTILE)) as up:
        with terminal(up, "ask", "hello there", "--json",
                      files={"stderr": subprocess.PIPE}) as running:
            assert running.end().code == 0
    found = json.loads(running.text("out"))
    assert found["choices"][0]["message"]["content"] == HOSTILE
    assert not UNSAFE.search(running.text("out"))


# ---- a hostile backend ----------------------------------------------------------------------

EVIL_ANALYSIS = json.dumps(dict(
    ANALYSIS, consensus=[HOSTILE], blind_spots=[HOSTILE], contradictions=[], unique_insights=[]))


@pytest.mark.parametrize("chunks", [None, list(HOSTILE)], ids=["whole", "letter-by-letter"])
@pytest.mark.parametrize("flags", [[], ["--refine"]], ids=["stream", "refine"])
def test_an_answer_cannot_control_the_terminal(terminal, chunks, flags):
    with Upstream(script(s=Reply(HOSTILE, chunks=chunks))) as up:
        found = run(terminal, up, "ask", "hello there", *flags)
    text = "\n".join(Display(found.out).lines())  # which fails at a control of any kind
    assert found.code == 0 and "EV]0;ownedIL" in text and "end" in text


def test_drafts_and_analysis_cannot_control_the_terminal_when_shown(terminal):
    with Upstream(script(a=HOSTILE, b="ok " + HOSTILE, s=HOSTILE, j=EVIL_ANALYSIS)) as up:
        assert run(terminal, up, "ask", HOSTILE.replace("\0", "")).code == 0
        for flags in ([], ["--drafts"], ["--analysis"], ["--json"]):
            found = run(terminal, up, "show", *flags)
            assert found.code == 0
            assert "EV" in "\n".join(Display(found.out).lines()), flags


@pytest.mark.parametrize("code, changes", [(0, {}), (3, {"a": error_reply(400, HOSTILE)})],
                         ids=["degraded", "failed"])
def test_errors_cannot_control_the_terminal(terminal, code, changes):
    with Upstream(script(b=error_reply(400, HOSTILE), **changes)) as up:
        found = run(terminal, up, "ask", "hello there")
    assert found.code == code
    assert "EV" in "\n".join(Display(found.out).lines())


def test_model_names_cannot_control_the_terminal(terminal):
    names = ["m/ok", "m/x" + HOSTILE]
    with Upstream({"m/ok": "fine", "*": Reply(status=400)}, models=names) as up:
        shown = Display(run(terminal, up, "ask", "hello there", config={
            "panel": "auto", "judge": None, "synthesizer": None}).out)
        assert "m/xEV" in "\n".join(shown.lines())
        listed = Display(run(terminal, up, "models", "--refresh").out)
    assert "m/xEV" in "\n".join(listed.lines())


def test_a_name_cannot_forge_a_line_of_ours(terminal):
    names = ["m/ok", "m/x\nerror: you lost\nhint: run this"]
    with Upstream({"m/ok": "fine", "*": Reply(status=400)}, models=names) as up:
        found = run(terminal, up, "ask", "hello there", TERM="dumb", config={
            "panel": "auto", "judge": None, "synthesizer": None})
        listed = run(terminal, up, "models", "--refresh")
    assert found.code == 0
    assert not re.search("^(error|hint): ", found.out + listed.out, re.MULTILINE)


# ---- terminals that know few letters --------------------------------------------------------

@pytest.mark.parametrize("env", [
    {"PYTHONIOENCODING": "ascii", "LANG": "C"},
    {"PYTHONIOENCODING": "cp437"},
    {"PYTHONIOENCODING": "cp1252:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "POSIX"},
], ids=["ascii", "cp437", "cp1252", "C-without-utf8", "POSIX"])
def test_letters_that_a_terminal_lacks_do_not_crash_it(terminal, env):
    answer = "caf\u00e9 \U0001f600 \u4e2d\u6587 \u2192 fin"
    with Upstream(script(b=error_reply(400, "\u4e2d\u6587 \U0001f600 mauvais"), s=answer)) as up:
        found = run(terminal, up, "ask", "hello there", **env)
        shown = run(terminal, up, "show", **env)
    for text in (found.out, shown.out):
        assert re.search("caf.+ fin", text) and "mauvais" in text
    assert found.code == shown.code == 0


def test_a_file_gets_every_letter_whatever_the_terminal_knows(terminal, tmp_path):
    answer = "caf\u00e9 \U0001f600 \u4e2d\u6587"
    with Upstream(script(s=answer)) as up:
        env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0",
               "PYTHONCOERCECLOCALE": "0"}
        found = run(terminal, up, "ask", "hello there", "-o", tmp_path / "answer.md", **env)
    assert found.code == 0
    assert (tmp_path / "answer.md").read_bytes() == (answer + "\n").encode()
