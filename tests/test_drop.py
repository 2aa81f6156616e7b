"""The file alone, dropped into an empty folder, on every Python that is found."""

import os
import re
import shutil
import stat

import pytest

from conftest import FUSION_PY, interpreters, old_interpreters, run_fusion as run

ALONE = ("-I", "-S")
RECEIPT = re.compile(
    r"\d+ of \d+ answered, judge .+, writer .+, [\d,]+ tokens, \$[\d.]+.*, [\d.]+ s"
)
PLANTED = ("json", "argparse", "ssl")
HEAVY = (
    "ssl",
    "urllib.request",
    "http.server",
    "http.client",
    "asyncio",
    "concurrent.futures",
    "subprocess",
)
ABOUT_STATE = re.compile(r"home|histor|state dir|xdg|nonexistent|/dev/null", re.IGNORECASE)
MAX_SECONDS = 2.0
TRIES = 3


def on_each(found):
    """A parameter for each interpreter, with ids like py3.9."""
    return [pytest.param(python, id="py%d.%d" % python[0][:2]) for python in found]


each_python = pytest.mark.parametrize("python", on_each(interpreters()))
each_old_python = pytest.mark.parametrize("python", on_each(old_interpreters()))


@pytest.fixture
def folder(tmp_path):
    """An otherwise empty folder with the file in it."""
    path = tmp_path / "drop"
    path.mkdir()
    shutil.copyfile(FUSION_PY, path / "fusion.py")
    return path


@pytest.fixture
def drop(folder, tmp_path):
    """Runs the dropped file from within its folder; its state goes to another one."""

    def run_dropped(*args, **options):
        options.setdefault("home", tmp_path / "home")
        options["home"].mkdir(exist_ok=True)
        return run(*args, path=folder / "fusion.py", cwd=folder, **options)

    return run_dropped


def lines_of(result):
    return (result.out + result.err).splitlines()


def assert_answered(result):
    assert result.code == 0, result.err
    assert "fake" in result.out
    assert "Traceback" not in result.out + result.err


# ---- it answers -----------------------------------------------------------------------------


@each_python
def test_answers_with_receipt(drop, folder, tmp_path, python):
    result = drop("ask", "--fake", "hello", python=python[1], flags=ALONE)
    assert_answered(result)
    assert RECEIPT.search(result.err), result.err
    assert not RECEIPT.search(result.out)
    shared = set(filter(str.strip, result.out.splitlines())) & set(result.err.splitlines())
    assert not shared, "on both streams"
    assert os.listdir(folder) == ["fusion.py"]
    assert set(os.listdir(tmp_path / "home")) <= {"state"}


@each_python
def test_answers_soon(drop, python):
    seconds = []
    while len(seconds) < TRIES and min(seconds, default=MAX_SECONDS) >= MAX_SECONDS:
        result = drop("ask", "--fake", "hello", python=python[1], flags=ALONE)
        assert_answered(result)
        seconds.append(result.seconds)
    assert min(seconds) < MAX_SECONDS, seconds


@each_python
def test_bare_command_introduces_itself(drop, folder, python):
    result = drop(python=python[1], flags=ALONE)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert 0 < len(lines_of(result)) < 15
    assert os.listdir(folder) == ["fusion.py"]


@each_python
def test_version(drop, python):
    result = drop("--version", python=python[1], flags=ALONE)
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(r"fusion\.py \d+\.\d+\.\d+\r?\n", result.out)


# ---- on a Python that is too old ------------------------------------------------------------


def assert_refuses(result, version):
    assert result.code == 2, (result.out, result.err)
    refusal = "needs Python 3.9 or newer; this is %d.%d.%d" % version
    assert len(lines_of(result)) == 1, lines_of(result)
    assert refusal in lines_of(result)[0]


@each_old_python
@pytest.mark.parametrize("args", [(), ("ask", "--fake", "hello"), ("--version",)], ids=repr)
def test_old_python_is_refused(drop, folder, python, args):
    assert_refuses(drop(*args, python=python[1]), python[0])
    assert os.listdir(folder) == ["fusion.py"]


# ---- imports --------------------------------------------------------------------------------


@pytest.fixture
def planted(folder):
    """Modules beside the file that bear names of the standard library."""
    for name in PLANTED:
        (folder / (name + ".py")).write_text("raise SystemExit('planted')\n")


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_module_would_be_seen(planted, folder, tmp_path, name):
    script = folder / "script.py"
    script.write_text("import %s\n" % name)
    result = run(path=script, home=tmp_path)
    assert (result.code, result.err.strip()) == (1, "planted")


@each_python
@pytest.mark.parametrize("args", [("ask", "--fake", "hi"), ("--help",), ()], ids=repr)
def test_planted_modules_are_not_imported(drop, folder, planted, python, args):
    before = sorted(os.listdir(folder))
    result = drop(*args, python=python[1])
    assert result.code == 0, result.err
    assert "planted" not in result.out + result.err
    assert sorted(os.listdir(folder)) == before


def imported(result):
    """The modules that `-X importtime` names."""
    rows = [line for line in result.err.splitlines() if line.startswith("import time:")]
    return {row.rpartition("|")[2].strip() for row in rows}


@each_python
@pytest.mark.parametrize("args", [("--help",), ("ask", "--help")], ids=" ".join)
def test_help_imports_nothing_heavy(drop, python, args):
    result = drop(*args, python=python[1], flags=ALONE + ("-X", "importtime"))
    assert result.code == 0, result.err
    assert result.out.strip()
    assert "argparse" in imported(result)
    assert not imported(result).intersection(HEAVY)


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_import_would_be_seen(tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text("import %s\n" % name)
    assert name in imported(run(path=script, flags=ALONE + ("-X", "importtime")))


# ---- without a HOME -------------------------------------------------------------------------


def assert_answers_without_state(drop, home):
    """Answers, and has at most one line to say about the folder that it cannot write."""
    result = drop("ask", "--fake", "hi", env={"HOME": home, "XDG_STATE_HOME": None})
    assert_answered(result)
    said = [line for line in result.err.splitlines() if ABOUT_STATE.search(line)]
    assert len(said) <= 1, said


def test_missing_home(drop):
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        pytest.skip("root could create the folder")
    assert_answers_without_state(drop, "/nonexistent")


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="no /dev/null here")
def test_home_that_nobody_can_create(drop):
    assert_answers_without_state(drop, "/dev/null/home")


def test_read_only_home(drop, tmp_path):
    home = tmp_path / "read-only"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert_answers_without_state(drop, home)
    finally:
        home.chmod(stat.S_IRWXU)
