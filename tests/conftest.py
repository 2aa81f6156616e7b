"""What the tests share: the file under test, ways to run it, and clean surroundings.

The environment variable FUSION_PY names another file to test (a mutated copy, say).
"""

import contextlib
import functools
import glob
import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FUSION_PY = Path(os.environ.get("FUSION_PY") or ROOT / "fusion.py").resolve()

OURS = re.compile(r"FUSION_.*|OPENROUTER_API_KEY|OPENAI_API_KEY|.*_PROXY", re.IGNORECASE)
PASSED_ON = ("PATH", "TMPDIR", "SYSTEMROOT", "TEMP", "TMP")
GRACE_S = 1.0


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds or minutes; `sh tests/run --slow`")


# ---- the file as a module -------------------------------------------------------------------


def load(path=FUSION_PY, name="fusion"):
    """Imports a file as a module, afresh at each call, and leaves no bytecode behind."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, str(path), loader=loader)
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name), sys.dont_write_bytecode
    sys.modules[name], sys.dont_write_bytecode = module, True
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before[0] is not None:
            sys.modules[name] = before[0]
        raise
    finally:
        sys.dont_write_bytecode = before[1]
    return module


@pytest.fixture(scope="session")
def fusion():
    return load()


# ---- the file as a program ------------------------------------------------------------------


class Finished(NamedTuple):
    code: int
    raw_out: bytes
    raw_err: bytes
    seconds: float

    @property
    def out(self):
        return self.raw_out.decode("utf-8", "replace")

    @property
    def err(self):
        return self.raw_err.decode("utf-8", "replace")


def clean_environment(home, extra=None):
    """The environment of a user who has set nothing; a value None in `extra` removes a name."""
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env.update(HOME=str(home), XDG_STATE_HOME=str(Path(home) / "state"), LANG="C.UTF-8")
    env.update(extra or {})
    return {name: str(value) for name, value in env.items() if value is not None}


def group_lives(pid):
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return sys.platform != "darwin"
    return True


def end_group(pid):
    """Ends what a program left in its process group; True if there was something."""
    if not hasattr(os, "killpg"):
        return False
    deadline = time.monotonic() + GRACE_S
    while group_lives(pid):
        if time.monotonic() > deadline:
            kill_group(pid)
            return True
        time.sleep(0.01)
    return False


def kill_group(pid):
    kill = getattr(os, "killpg", os.kill)
    with contextlib.suppress(ProcessLookupError):
        kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def communicate(process, stdin, timeout):
    """Stdout and stderr of a program; whoever is late is killed with all that it started."""
    try:
        return process.communicate(stdin, timeout)
    except subprocess.TimeoutExpired as late:
        kill_group(process.pid)
        process.wait()
        said = "stdout %r, stderr %r" % (late.stdout, late.stderr)
    except BaseException:
        kill_group(process.pid)
        process.wait()
        raise
    pytest.fail("not done after %s s; %s" % (timeout, said))


def run_in(home, command, stdin=None, env=None, cwd=None, timeout=60):
    """Runs a command in a clean environment with that HOME."""
    if isinstance(stdin, str):
        stdin = stdin.encode()
    started = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(home, env),
        cwd=cwd,
        start_new_session=True,
    )
    out, err = communicate(process, stdin, timeout)
    seconds = time.monotonic() - started
    if end_group(process.pid):
        pytest.fail("left processes behind: %s" % (command,))
    return Finished(process.returncode, out, err, seconds)


def run_fusion(
    *args,
    stdin=None,
    env=None,
    cwd=None,
    timeout=60,
    python=sys.executable,
    flags=(),
    path=FUSION_PY,
    home=None,
):
    """Runs fusion.py with these arguments; without `home`, in a new one that is then removed."""
    command = [python, *flags, path, *args]
    if home is not None:
        return run_in(home, command, stdin, env, cwd, timeout)
    with tempfile.TemporaryDirectory() as new_home:
        return run_in(new_home, command, stdin, env, cwd, timeout)


@pytest.fixture(name="run_fusion")
def run_fusion_fixture(tmp_path_factory):
    """The function `run_fusion` with one HOME for the whole test, so that its state lasts."""
    return functools.partial(run_fusion, home=tmp_path_factory.mktemp("home"))


# ---- the Pythons of this machine ------------------------------------------------------------


def candidates(minors):
    """Paths that may be a Python 3 of one of these minor versions, the best first."""
    yield sys.executable
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    for minor in minors:
        for folder in folders:
            found = shutil.which("python3.%d" % minor, path=folder)
            if found:
                yield found
    yield from sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python")))


@functools.lru_cache(maxsize=None)
def identify(path):
    """((3, 11, 7), "/its/real/path") of a Python that runs, else None."""
    code = "import sys; print('%d %d %d' % sys.version_info[:3]); print(sys.executable)"
    try:
        result = subprocess.run(
            [path, "-E", "-S", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.decode("utf-8", "replace").splitlines()
    if result.returncode != 0 or len(lines) != 2:
        return None
    return tuple(int(part) for part in lines[0].split()), lines[1]


def one_per_minor(minors):
    found = {}
    for path in candidates(minors):
        version, executable = identify(path) or ((0, 0, 0), None)
        if version[0] == 3 and version[1] in minors:
            found.setdefault(version[:2], (version, executable))
    return [found[minor] for minor in sorted(found)]


def interpreters():
    """Each Python from 3.9 on: [((3, 9, 18), path), ...], one per minor version."""
    return one_per_minor(range(9, 21))


def old_interpreters():
    """Each Python from 3.0 to 3.8, in the same form."""
    return one_per_minor(range(9))


# ---- clean surroundings ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_surroundings(monkeypatch):
    """No key, setting or proxy of the person who runs the tests reaches a test."""
    for name in list(os.environ):
        if OURS.fullmatch(name):
            monkeypatch.delenv(name)


def is_running(pid):
    """False for a process that has ended and was not waited for."""
    try:
        stat = Path("/proc/%s/stat" % pid).read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def child_processes():
    """Process ids of our running children (Linux; elsewhere none are seen)."""
    pids = set()
    for path in glob.glob("/proc/self/task/*/children"):
        try:
            pids.update(int(pid) for pid in Path(path).read_text().split())
        except OSError:
            continue
    return {pid for pid in pids if is_running(pid)}


def lasting_threads():
    return {thread for thread in threading.enumerate() if not thread.daemon}


def leftovers(threads, children):
    """Threads and children that were not there before, once they had a moment to end."""
    deadline = time.monotonic() + GRACE_S
    while True:
        new = lasting_threads() - threads, child_processes() - children
        if not any(new) or time.monotonic() > deadline:
            return new
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Fails a test that leaves a child process or a non-daemon thread."""
    before = lasting_threads(), child_processes()
    yield
    threads, children = leftovers(*before)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    left = [thread.name for thread in threads] + ["process %d" % pid for pid in children]
    if left:
        pytest.fail("left behind: " + ", ".join(sorted(left)), pytrace=False)
