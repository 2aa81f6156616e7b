"""Holds that the mutants fit the file, and that their runner tells a survivor from a kill.

The mutants themselves run for minutes: `python3 tests/mutants.py`, or `sh tests/run --slow`.
"""

import ast
import collections
import functools
import signal
import subprocess
import sys
import time

import pytest

import mutants
from conftest import FUSION_PY, ROOT, is_running
from test_layout import sections

SOURCE = FUSION_PY.read_bytes().decode()
AT_LEAST, OF_THE_ENGINE = 60, 25
SECTIONS = {"basics", "config", "money", "transport", "tools", "engine", "fake", "terminal",
            "talk", "cli"}
LEFT_S = 20


def twice(items):
    return [item for item, count in collections.Counter(items).items() if count > 1]


# ---- the list ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def statements():
    """(first line, last line) of each statement at the top level, decorators included."""
    return [(min([node.lineno] + [one.lineno for one in getattr(node, "decorator_list", ())]),
             node.end_lineno) for node in ast.parse(SOURCE).body]


def line_at(position):
    return SOURCE.count("\n", 0, position) + 1


def around(mutant):
    """The statements of the top level in which a snippet stands, as they are and as mutated."""
    start = SOURCE.index(mutant.old)
    first, last = line_at(start), line_at(start + len(mutant.old) - 1)
    touched = [lines for lines in statements() if lines[0] <= last and first <= lines[1]]
    if not touched:
        return "", ""
    text = "".join(SOURCE.splitlines(True)[touched[0][0] - 1:touched[-1][1]])
    return text, text.replace(mutant.old, mutant.new)


@functools.lru_cache(maxsize=None)
def tree(text):
    return ast.dump(ast.parse(text))


def fault(mutant):
    """What is wrong with a mutant that stands in the file, or None."""
    before, after = around(mutant)
    try:
        compile(after, mutant.name, "exec")
    except SyntaxError as error:
        return "%s: does not compile: %s" % (mutant.name, error)
    return "%s: changes no code" % mutant.name if tree(before) == tree(after) else None


def test_each_snippet_stands_in_the_file_exactly_once():
    assert mutants.misfits(SOURCE, mutants.MUTANTS) == []


def test_each_mutant_changes_the_code_and_compiles():
    found = [fault(mutant) for mutant in mutants.MUTANTS if mutant.old in SOURCE]
    assert [line for line in found if line] == []


@pytest.mark.parametrize("new, word", [("VERSION = (", "compile"), ("VERSION  = ", "no code")])
def test_what_is_no_mutant_would_be_noticed(new, word):
    assert word in fault(mutants.Mutant("made up", "VERSION = ", new, ""))


def test_no_name_and_no_breakage_is_there_twice():
    assert twice(mutant.name for mutant in mutants.MUTANTS) == []
    assert twice((mutant.old, mutant.new) for mutant in mutants.MUTANTS) == []


def test_each_section_has_mutants_and_the_engine_most():
    starts = sorted((section.line, section.noun) for section in sections(SOURCE))
    lines = [line_at(SOURCE.index(mutant.old)) for mutant in mutants.MUTANTS
             if mutant.old in SOURCE]
    found = collections.Counter(
        [noun for start, noun in starts if start <= line][-1] for line in lines)
    assert len(mutants.MUTANTS) >= AT_LEAST
    assert found.most_common(1)[0][0] == "engine" and found["engine"] >= OF_THE_ENGINE
    assert SECTIONS <= set(found)


def test_the_files_with_the_tests_that_are_to_kill_are_there():
    files = {name for mutant in mutants.MUTANTS for name in mutant.tests.split()}
    assert [name for name in sorted(files) if not (ROOT / name).is_file()] == []


# ---- the runner -------------------------------------------------------------------------------

MADE_UP = "import time\n\n\ndef add(first, second):\n    return first + second\n"
CHECK = """
import os

scope = {}
exec(open(os.environ["FUSION_PY"]).read(), scope)


def test_two_and_two():
    assert scope["add"](2, 2) == 4
"""
SHAKY = """

def test_that_fails_once():
    if "-" in open(os.environ["FUSION_PY"]).read() and not os.path.exists("seen"):
        open("seen", "w").close()
        assert False
"""


def mutant(name, old, new):
    return mutants.Mutant(name, old, new, "check.py")


KILLED = mutant("minus", "first + second", "first - second")
SURVIVOR = mutant("turned", "first + second", "second + first")


@pytest.fixture
def run(tmp_path):
    """Runs mutants of the made-up file; returns the exit code and what was said, less the time."""
    def run(*made_up, source=MADE_UP, check=CHECK, **options):
        (tmp_path / "check.py").write_text(check)
        said = []
        code = mutants.run(source, made_up, say=said.append, root=tmp_path, **options)
        return code, sorted(line.rpartition(" in ")[0] or line for line in said)
    return run


def test_a_kill_is_told_from_a_survivor(run):
    assert run(KILLED, SURVIVOR) == (1, [
        "1 killed, 1 survived", "minus: killed by check.py::test_two_and_two",
        "turned: SURVIVED check.py"])


def test_a_red_baseline_proves_nothing(run):
    code, said = run(KILLED, source=MADE_UP + "add = max\n")
    assert code == 1
    assert "nothing was mutated" in said[0] and "check.py::test_two_and_two" in said[1]


def test_a_snippet_that_is_lost_or_ambiguous_is_named_and_fails(run):
    code, said = run(mutant("gone", "third", "fourth"), mutant("many", "first", "second"))
    assert code == 1
    assert "gone" in said[1] and "lost" in said[1] and "many" in said[2] and "2 times" in said[2]


@pytest.mark.slow
def test_all_killed_is_0_and_no_tests_are_no_kill(run):
    assert run(KILLED)[0] == 0
    nowhere = KILLED._replace(tests="check.py::test_that_is_not_there")
    assert run(nowhere)[0] == 1


@pytest.mark.slow
def test_a_failure_that_does_not_come_again_is_no_kill(run):
    assert run(mutant("shaky", "first + second", "first --second"), check=CHECK + SHAKY) == (1, [
        "0 killed, 1 survived",
        "shaky: SURVIVED check.py, though check.py::test_that_fails_once failed once"])


@pytest.mark.slow
def test_a_mutant_that_hangs_is_killed_by_timeout(run):
    asleep = mutant("asleep", "return first", "time.sleep(600); return first")
    assert run(asleep, limit=5) == (0, ["1 killed, 0 survived", "asleep: killed by timeout"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_at_a_signal_and_leaves_no_process_and_no_file(tmp_path, number):
    command = [sys.executable, mutants.__file__, "-k", "test_engine"]
    program = subprocess.Popen(command, env=dict(mutants.os.environ, TMPDIR=str(tmp_path)),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + LEFT_S
    started = set()
    while not started and time.monotonic() < deadline:
        time.sleep(0.2)
        started = mutants.descendants(program.pid)
    program.send_signal(number)
    said, _ = program.communicate(timeout=LEFT_S)
    assert (program.returncode, said.decode().strip()) == (130, "interrupted")
    assert started and not any(is_running(pid) for pid in started)
    assert list(tmp_path.glob("mutant-*")) == []
