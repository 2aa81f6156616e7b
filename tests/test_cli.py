"""The command line: bad input gets one error and one hint; the small commands tell the truth."""
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Optional

import pytest

from conftest import FUSION_PY, run_fusion, run_in
from test_talk import Program, command, lines_with, unharmed, write_setup
from upstream import Reply, Upstream, error_reply

MB = 1000 * 1000
QUICK = '{"panel": ["m/a", "m/b"], "max_retries": 0}'
FILES = {
    "good.json": QUICK,
    "list.json": "[]",
    "empty.json": "",
    "wrong.json": '{"panel": ["m/a"],\n  "judge": }',
    "comma.json": '{"panel": ["m/a",]}',
    "typo.json": '{"panel": ["m/a"], "jugde": "m/j"}',
    "nested.json": '{"panel": ["m/a", {"model": "m/b", "temprature": 1}]}',
    "type.json": '{"panel": ["m/a"], "layers": "two"}',
    "range.json": '{"panel": ["m/a"], "samples": 9}',
    "panel.json": '{"panel": "m/a"}',
    "nobody.json": '{"judge": "m/j"}',
    "twice.json": '{"panel": ["m/a"], "panel": ["m/b"]}',
    "latin1.json": '{"panel": ["caf\u00e9"]}'.encode("latin-1"),
    "nested-key.json": '{"panel": [{"model": "m/a", "api_key": "sk-1"}]}',
    "binary.dat": b"words\0more words",
    "latin1.txt": "caf\u00e9".encode("latin-1"),
    "large.txt": b"x" * 5 * MB,
    "late.env": b"\xff\xfe",
}


class Bad(NamedTuple):
    """Input that is refused: the arguments, and words that the complaint has to hold."""

    argv: tuple
    words: tuple
    stdin: Optional[bytes] = None


def bad(line, *words, stdin=None):
    """A name and a Bad from a command line of plain words, of which ? stands for a prompt."""
    argv = tuple("why?" if word == "?" else word for word in line.split())
    return line, Bad(argv, words, stdin)


def config(name, *words):
    return bad("ask --config ./%s ?" % name, name, *words)


def odd(name, argv, words, stdin=None):
    return name, Bad(argv, words, stdin)


# Each of these by the program itself; it takes a tenth of a second to start.
BAD = dict([
    config("missing.json", "No such file"), config("folder", "directory"),
    config("wrong.json", "line 2", "column 12"), config("list.json", "a list", "object"),
    config("typo.json", "jugde", "did you mean judge?"),
    bad("ask --config bugdet ?", "did you mean budget?"),
    odd("0 bytes", ("ask", ""), ("empty",)),
    odd("blanks by pipe", ("ask",), ("empty",), b" \n"),
    odd("5 MB by pipe", ("ask", "-"), ("5.0 MB",), b"x" * 5 * MB),
    odd("lone surrogate", ("ask", b"caf\xff"), ("Unicode",)),
    odd("lone surrogate in --system", ("ask", "--system", b"\xff", "why?"), ("Unicode",)),
    odd("pipe not UTF-8", ("ask", "why?"), ("UTF-8",), b"caf\xe9"),
    bad("ask --file missing.txt ?", "missing.txt", "No such file"),
    bad("ask --file folder ?", "folder", "directory"),
    bad("ask --file binary.dat ?", "binary.dat", "binary"),
    bad("ask -o missing/answer.md ?", "missing/answer.md", "No such file"),
    bad("aks ?", "aks", "did you mean ask?"),
    bad("ask --modle m/a ?", "--modle", "did you mean --mode?"),
    bad("--fake", "--fake"),
    bad("ask --layers 9 ?", "--layers", "1 to 4"),
    bad("ask --max-cost -1 ?", "--max-cost", "-1"),
    bad("ask --samples x ?", "--samples", "'x'"),
    bad("presets show bugdet", "did you mean budget?"),
    bad("show", "last run"), bad("fake --port 99999", "99999"),
])
# And these in one process.
ALSO_BAD = dict([
    config("comma.json", "line 1"), config("empty.json", "line 1, column 1"),
    config("nested.json", "panel[1].temprature", "did you mean temperature?"),
    config("type.json", "layers", "whole number"), config("range.json", "samples", "1 to 8", "9"),
    config("panel.json", "panel", "list"), config("nobody.json", "panel", "missing"),
    config("twice.json", "panel", "twice"), config("latin1.json", "UTF-8"),
    config("nested-key.json", "api_key"),
    bad("ask --config nosuch ?", "nosuch", "budget"), bad("ask --config good ?", "good"),
    bad("ask --env-file missing.env ?", "missing.env", "No such file"),
    bad("ask --env-file late.env ?", "late.env", "UTF-8"),
    odd("no prompt", ("ask",), ("prompt", "empty")),
    odd("blanks", ("ask", " \n\t"), ("empty",)),
    odd("0 bytes by pipe", ("ask", "-"), ("empty",), b""),
    odd("21 MB by pipe", ("ask", "-"), ("MB",), b"x" * 21 * MB),
    odd("binary pipe", ("ask", "why?"), ("binary",), b"\0\1\2"),
    bad("ask --file latin1.txt ?", "latin1.txt", "UTF-8"),
    bad("ask --file large.txt ?", "5.0 MB"), bad("ask -o folder ?", "folder", "directory"),
    bad("preset", "did you mean presets?"), bad("frobnicate", "frobnicate", "ask"),
    bad("ask --panle m/a,m/b ?", "did you mean --panel?"), bad("ask --fil x ?", "--fil"),
    bad("ask why not", "not"), bad("ask ? --file", "--file"), bad("--nosuch ask ?", "--nosuch"),
    bad("show --draft", "did you mean --drafts?"), bad("models nosuch", "nosuch"),
    bad("presets lst", "lst"), bad("presets show", "budget"),
    bad("presets --export good.json", "good.json"), bad("ask --layers two ?", "--layers", "two"),
    bad("ask --max-cost nan ?", "--max-cost"), bad("ask --samples 0 ?", "--samples", "1 to 8"),
    bad("ask --timeout 0 ?", "--timeout"), bad("ask --timeout inf ?", "--timeout"),
    bad("ask --mode fuze ?", "--mode", "fuse"), bad("ask --panel , ?", "--panel"),
    bad("ask --panel %s ?" % ",".join(["m/a"] * 17), "--panel", "16"),
    bad("fake --port -1", "-1"), bad("fake --port x", "--port"),
])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with FILES, in which the program is started."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "folder").mkdir()
    for name, content in FILES.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


def at_once(run, cases):
    """run(case) for each of {name: case}, a few at a time; a start of the program takes a while."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(run, cases.values())))


@pytest.fixture(scope="module")
def refused(place):
    """What the program says to each bad input, before a backend that would take everything."""
    before = set(place.rglob("*"))
    with Upstream({"*": "an answer"}) as up:
        def run(case):
            argv = [os.fsdecode(arg) for arg in case.argv]
            return run_fusion(*argv, stdin=case.stdin, cwd=place, env={"FUSION_BASE_URL": up.url})

        found = at_once(run, BAD)
    return found, up.requests, set(place.rglob("*")) - before


def check_complaint(found, code, *words):
    """Hold an error to its form: one error line, one hint line, nothing on stdout."""
    assert (found.code, found.out) == (code, ""), found
    assert unharmed(found), found.err
    lines = [line for line in found.err.splitlines() if not line.startswith("member ")]
    assert [line.split(" ")[0] for line in lines] == ["error:", "hint:"], found.err
    assert all(len(line.split()) > 1 for line in lines)
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    return lines[1]


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_gets_one_error_and_one_hint(refused, name):
    check_complaint(refused[0][name], 2, *BAD[name].words)


@pytest.mark.parametrize("name", list(ALSO_BAD))
def test_this_too_is_bad_input(command, monkeypatch, place, name):
    monkeypatch.chdir(place)
    case = ALSO_BAD[name]
    with Upstream({"*": "an answer"}) as up:
        found = command(*case.argv, stdin=case.stdin, FUSION_BASE_URL=up.url)
    check_complaint(found, 2, *case.words)
    assert up.requests == []


def test_a_flag_before_its_command_is_not_suggested_for_itself(command):
    found = command("--fake", "ask", "why?")
    check_complaint(found, 2, "--fake")
    assert "did you mean --fake" not in found.err


def test_bad_input_is_refused_before_anything_is_done(refused):
    _, requests, new_files = refused
    assert (requests, new_files) == ([], set())


@pytest.mark.parametrize("env, argv, word", [
    ({}, (), "OPENROUTER_API_KEY"), ({}, ("--config", "openai"), "OPENROUTER_API_KEY"),
    ({"FUSION_BASE_URL": "https://api.openai.com/v1"}, (), "OPENAI_API_KEY"),
    ({"FUSION_BASE_URL": "ftp://host"}, (), "FUSION_BASE_URL"),
    ({"FUSION_BASE_URL": "http://u:p@host"}, (), "FUSION_BASE_URL"),
    ({"FUSION_CONFIG": "./gone.json"}, (), "presets")],
    ids=["nothing-set", "preset", "openai", "no-http", "password", "variable"])
def test_a_missing_key_or_a_bad_variable_is_named(place, env, argv, word):
    found = run_fusion("ask", *argv, "why?", cwd=place, env=env)
    assert word in check_complaint(found, 2)


# ---- a backend that is no use -----------------------------------------------------------------

HTML = Reply(body=b"<!doctype html><title>Hi</title>", content_type="text/html")
USELESS = {
    "key": (error_reply(401, "Incorrect API key provided"), "401", "FUSION_API_KEY"),
    "forbidden": (error_reply(403, "not for you"), "403", "FUSION_API_KEY"),
    "credit": (error_reply(402, "no more credit"), "402", "credit"),
    "model": (error_reply(404, "No such model", "model_not_found"), "404", "models --refresh"),
    "html": (HTML, "HTML", "FUSION_BASE_URL"),
    "nothing": (Reply(""), "nothing", ""),
    "reasoning": (Reply("", reasoning="hm"), "reasoning", ""),
    "broken": (Reply(status=500), "500", ""),
    "prose": (Reply(body=b"Welcome to this web server."), "", ""),
    "redirect": (Reply(status=302, headers={"Location": "http://127.0.0.1:9/"}), "302", ""),
    "cut": (Reply("some words", cut_after=2), "cut", ""),
}
ASK = ("ask", "--config", "./good.json", "why?")
SOLO = ASK + ("--mode", "solo")
REFRESH = ("models", "--refresh")
WAYS = [(name, ASK) for name in USELESS]
WAYS += [(name, SOLO) for name in ("key", "model", "html", "nothing", "broken")]
WAYS += [(name, argv) for name in ("key", "html", "broken") for argv in (REFRESH, ("ask", "why?"))]


def known_as(way):
    return "%s: %s" % (way[0], " ".join(way[1]))


@pytest.fixture(scope="module")
def disappointed(place):
    """What the program says about each backend that is no use."""
    def run(way):
        reply = USELESS[way[0]][0]
        with Upstream({"*": reply}) as up:
            if way[1] not in (ASK, SOLO):
                up.models_reply = reply
            env = {"FUSION_BASE_URL": up.url, "FUSION_API_KEY": "sk-12345678"}
            return run_fusion(*way[1], cwd=place, env=env)
    return at_once(run, {known_as(way): way for way in WAYS})


@pytest.mark.parametrize("way", WAYS, ids=known_as)
def test_a_backend_without_an_answer_is_exit_3_with_its_reason(disappointed, way):
    (name, argv), found = way, disappointed[known_as(way)]
    _, reason, hint = USELESS[name]
    said = check_complaint(found, 3, reason if argv in (ASK, SOLO) else "")
    assert hint in said and " ".join(argv) not in said, "a hint is something else to try"
    assert "sk-12345678" not in found.err
    if argv == ASK:
        assert found.err.count("m/a") >= 2 and found.err.count("m/b") >= 2, "each has its reason"


def closed_url():
    """A loopback URL at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return "http://127.0.0.1:%d/v1" % server.getsockname()[1]


@pytest.mark.parametrize("argv", [ASK, SOLO, ("ask", "why?"), REFRESH], ids=" ".join)
def test_a_dead_backend_is_exit_3(place, argv):
    found = run_fusion(*argv, cwd=place, env={"FUSION_BASE_URL": closed_url()})
    check_complaint(found, 3, "127.0.0.1")


def test_a_traceback_is_shown_to_those_who_ask_for_it(place):
    found = run_fusion("ask", "--debug", "--config", "nosuch", "why?", cwd=place)
    assert found.code == 2 and "Traceback" in found.err
    assert len(lines_with("error: ", found.err)) == len(lines_with("hint: ", found.err)) == 1


# ---- streams that cannot be written -----------------------------------------------------------

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@FULL
@pytest.mark.parametrize("argv", [
    ("ask", "why is it?"), ("ask", "why is it?", "--stream"),
    ("ask", "why is it?", "-o", "/dev/full"), ("presets",), ("--help",), ()],
    ids=lambda argv: " ".join(argv) or "bare")
def test_a_full_disk_is_named_and_is_no_defect(tmp_path, argv):
    with Upstream({"m/a": "an answer"}) as up, open("/dev/full", "w") as full:
        env = {"FUSION_BASE_URL": up.url}
        with Program(tmp_path, *argv, env=env, stdout=full) as running:
            found = running.end()
    assert found.code not in (0, 120) and unharmed(found), found.err
    assert "No space left" in "".join(lines_with("error: ", found.err))
    assert len(lines_with("hint: ", found.err)) == 1


def run_on_a_small_disk(folder, words):
    """What the program says that is started by these words of a shell, with room for 2 or 4 kB."""
    limited = 'ulimit -f 4; exec "$0" "$1" ask "why is it?" ' + words
    with Upstream({"m/a": "word " * 3000}) as up:
        found = run_in(folder, ["sh", "-c", limited, sys.executable, FUSION_PY], cwd=folder,
                       env={"FUSION_BASE_URL": up.url, "FUSION_HISTORY": "0"})
    assert found.code not in (0, 120) and unharmed(found), found.err
    assert len(lines_with("error: ", found.err)) == len(lines_with("hint: ", found.err)) == 1


@pytest.mark.parametrize("flags", ["", "--stream "])
def test_a_disk_that_fills_up_in_mid_answer_is_named_too(tmp_path, flags):
    run_on_a_small_disk(tmp_path, flags + "> answer.md")


def test_a_disk_that_fills_up_spares_the_old_answer(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "answer.md").write_text("an old answer")
    run_on_a_small_disk(tmp_path, "-o out/answer.md")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "answer.md": "an old answer"}


@pytest.mark.parametrize("descriptor", [0, 1, 2])
def test_a_stream_that_is_closed_does_no_harm(tmp_path, descriptor):
    shell = 'exec "$0" "$1" ask "why is it?" %d>&-' % descriptor
    with Upstream({"m/a": "an answer"}) as up:
        found = run_in(tmp_path, ["sh", "-c", shell, sys.executable, FUSION_PY],
                       env={"FUSION_BASE_URL": up.url})
    assert unharmed(found), found.err
    if descriptor == 1:
        assert found.code == 0 or lines_with("error: ", found.err)
    else:
        assert (found.code, found.out) == (0, "an answer\n")


@pytest.mark.parametrize("argv", [("--help",), ("presets",), ("models", "--json"), ()],
                         ids=lambda argv: " ".join(argv) or "bare")
def test_a_reader_that_has_left_ends_the_small_commands_without_a_word(tmp_path, argv):
    reading, writing = os.pipe()
    os.close(reading)
    with Program(tmp_path, *argv, stdout=writing) as running:
        os.close(writing)
        found = running.end()
    assert found.code in (141, -signal.SIGPIPE) and found.err == ""


@pytest.mark.parametrize("flags", [[], ["--json"], ["--json", "--stream"]], ids=" ".join)
def test_a_reader_that_has_left_does_not_turn_an_error_into_a_traceback(tmp_path, flags):
    reading, writing = os.pipe()
    os.close(reading)
    with Upstream({"m/a": Reply(status=400)}) as up:
        env = {"FUSION_BASE_URL": up.url}
        with Program(tmp_path, "ask", "why is it?", *flags, env=env, stdout=writing) as running:
            os.close(writing)
            found = running.end()
    assert found.code in (3, 141, -signal.SIGPIPE) and unharmed(found), found.err


# ---- help -------------------------------------------------------------------------------------

COMMANDS = ["ask", "fake", "presets", "models", "show"]
FLAGS = ["--json", "--quiet", "--debug", "--no-color"]
ASKING = FLAGS + [
    "--config", "--fake", "--max-cost", "--timeout", "--env-file", "--panel", "--judge",
    "--synthesizer", "--refine", "--no-refine", "--layers", "--samples", "--mode", "--vote",
    "--tools", "--estimate", "--file", "--system", "-o", "--stream", "--no-history"]


@functools.lru_cache(maxsize=None)
def help_of(command):
    return run_fusion(*[command] * bool(command), "--help")


def test_the_bare_program_says_what_it_is_in_a_few_lines():
    found = run_fusion()
    lines = found.out.splitlines()
    assert found.code == 0 and found.err == "" and 0 < len(lines) < 15
    assert lines[0].startswith("fusion.py ") and lines[0].count(".") >= 2
    assert len(lines_with("  python3 fusion.py ", found.out)) == 3
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", [None] + COMMANDS, ids=str)
def test_help_starts_with_examples(command):
    found = help_of(command)
    lines = found.out.splitlines()
    assert found.code == 0 and found.err == "" and lines[0] == "Examples:"
    examples = lines[1:lines.index("")]
    assert examples and all("python3 fusion.py %s" % (command or "") in line for line in examples)
    assert found.out.index("usage:") > found.out.index(examples[-1])


def test_the_help_names_every_command():
    text = help_of(None).out
    assert [name for name in COMMANDS if not re.search(r"^\s+%s\s" % name, text, re.M)] == []


@pytest.mark.parametrize("command, flags", [("ask", ASKING)] + [
    (command, FLAGS) for command in COMMANDS[1:]])
def test_the_help_of_a_command_names_its_flags(command, flags):
    text = help_of(command).out
    assert [flag for flag in flags if not re.search(r"(?<!\S)%s\b" % flag, text)] == []


def test_the_version_is_that_of_the_file(fusion):
    found = run_fusion("--version")
    assert (found.code, found.out, found.err) == (0, "fusion.py %s\n" % fusion.VERSION, "")


# ---- presets ----------------------------------------------------------------------------------

def test_presets_lists_panel_judge_and_writer_of_each(fusion, command):
    text = command("presets").out
    for name, values in fusion.PRESETS.items():
        block = re.search(r"^%s .*(\n .*)*" % name, text, re.M).group(0)
        named = [values.get("judge", ""), values.get("synthesizer", "")]
        named += [member if isinstance(member, str) else member["model"]
                  for member in values["panel"] if values["panel"] != "auto"]
        assert [model for model in named if model not in block] == []
        assert "judge" in block and "writer" in block
    assert command("presets", "list").out == text


def test_presets_in_json_are_the_presets(fusion, command):
    assert json.loads(command("presets", "--json").out) == fusion.PRESETS
    for name in ("budget", "local"):
        assert json.loads(command("presets", "show", name).out) == fusion.PRESETS[name]


def test_exported_presets_can_be_used_and_are_not_overwritten(fusion, command, tmp_path):
    folder = tmp_path / "new" / "presets"
    found = command("presets", "--export", str(folder))
    assert found.code == 0 and found.out == ""
    written = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert written == fusion.PRESETS
    used = command("ask", "--estimate", "--config", str(folder / "frontier.json"), "hello")
    assert used.code == 0 and "openai/gpt-5.5" in used.out
    (folder / "self.json").write_text("my own")
    assert command("presets", "--export", str(folder)).code == 2
    assert (folder / "self.json").read_text() == "my own"


def test_an_export_that_would_overwrite_one_writes_none(command, tmp_path):
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "local.json").write_text("my own")
    check_complaint(command("presets", "--export", str(folder)), 2)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"local.json": "my own"}


# ---- models -----------------------------------------------------------------------------------

def rows_of(text):
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_models_shows_the_price_table_with_its_date(fusion, command):
    found = command("models")
    rows = rows_of(found.out)
    assert rows[0][0] == "model" and len(rows) == len(fusion.PRICES) + 1
    assert ["openai/gpt-5.5", "5", "30", "0.5", "1,050,000"] in rows
    assert fusion.PRICES_DATE in found.err


def test_models_in_json_has_the_same_numbers(fusion, command):
    found = json.loads(command("models", "--json").out)
    row = {row["id"]: row for row in found["models"]}["openai/gpt-5.5"]
    assert (row["input"], row["output"], row["cached_input"]) == (5, 30, 0.5)
    assert fusion.PRICES_DATE in found["source"]


def test_models_refresh_asks_the_backend_for_what_it_has(command):
    listed = [{"id": "m/new", "context_length": 8192, "pricing": {
        "prompt": "0.000001", "completion": "0.0000025", "input_cache_read": "0.0000001"}},
        {"id": "m/bare"}, {"id": "openai/gpt-5.5"}, {"id": "m/odd", "pricing": "free"}]
    with Upstream(models=listed) as up:
        env = {"FUSION_BASE_URL": up.url}
        found = command("models", "--refresh", **env)
        data = json.loads(command("models", "--refresh", "--json", **env).out)
    assert found.code == 0
    assert rows_of(found.out)[1:] == [
        ["m/new", "1", "2.5", "0.1", "8,192"], ["m/bare", "-", "-", "-", "-"],
        ["openai/gpt-5.5", "5", "30", "0.5", "1,050,000"], ["m/odd", "-", "-", "-", "-"]]
    assert data["models"][0]["output"] == 2.5 and data["models"][1]["input"] is None
    assert [request.path for request in up.requests] == ["/v1/models"] * 2


def test_models_refresh_of_the_fake_lists_the_fakes(command):
    found = command("models", "--refresh", "--fake")
    assert found.code == 0 and len(lines_with("fake/", found.out)) == 3
    assert len(found.out.splitlines()) == 4 and "fake" in found.err


# ---- where settings come from -------------------------------------------------------------------

def test_nothing_is_discovered_in_the_current_folder(tmp_path):
    """Neither a .env, nor a configuration, nor a preset, nor a module that lies there is used."""
    with Upstream({"*": "an answer"}) as up:
        planted = {
            ".env": "FUSION_BASE_URL=%s\nFUSION_API_KEY=sk-1\n" % up.url,
            "config.json": QUICK, "fusion.json": QUICK, "budget.json": QUICK,
            "json.py": "raise SystemExit('planted')"}
        for name, words in planted.items():
            (tmp_path / name).write_text(words)
        check_complaint(run_fusion("ask", "why?", cwd=tmp_path), 2)
        found = run_fusion("ask", "--estimate", "--config", "budget", "why?", cwd=tmp_path)
        assert "google/gemini" in found.out and up.requests == []


def test_a_module_that_lies_beside_the_file_is_not_imported(tmp_path):
    copy = shutil.copy(str(FUSION_PY), str(tmp_path / "fusion.py"))
    for name in ("json", "difflib", "http", "random"):
        (tmp_path / (name + ".py")).write_text("raise SystemExit('planted')")
    found = run_fusion("ask", "--fake", "why?", path=copy)
    assert found.code == 0 and "[fake]" in found.out, found.err


def test_settings_come_from_flag_then_variable_then_home(tmp_path):
    names = {}
    for name in ("flag", "variable", "home"):
        names[name] = tmp_path / (name + ".json")
        names[name].write_text('{"panel": ["m/%s"], "max_retries": 0}' % name)
    folder = tmp_path / ".config" / "fusion"
    folder.mkdir(parents=True)
    names["home"].rename(folder / "config.json")

    def panel(*argv, **env):
        found = run_fusion("ask", "--estimate", "--json", *argv, "why?", env=env, home=tmp_path)
        return json.loads(found.out)["calls"][0]["model"]

    variable = {"FUSION_CONFIG": names["variable"]}
    assert panel() == "m/home"
    assert panel(**variable) == "m/variable"
    assert panel("--config", names["flag"], **variable) == "m/flag"


def test_an_env_file_sets_the_backend_and_its_key(tmp_path):
    with Upstream({"*": "an answer"}, models=["m/a"]) as up:
        (tmp_path / "my.env").write_text(
            "# mine\nexport FUSION_BASE_URL=%s\nFUSION_API_KEY='sk-mine'\n" % up.url)
        found = run_fusion("ask", "--env-file", tmp_path / "my.env", "why is it?")
    assert (found.code, found.out) == (0, "an answer\n")
    assert {request.headers.get("authorization") for request in up.posts()} == {"Bearer sk-mine"}


# ---- without a home -----------------------------------------------------------------------------

@pytest.mark.parametrize("env", [
    {"HOME": None, "XDG_STATE_HOME": None}, {"HOME": "/nonexistent", "XDG_STATE_HOME": None},
    {"HOME": "", "XDG_STATE_HOME": ""}, {"XDG_STATE_HOME": "/proc/nothing"}],
    ids=["none", "missing", "empty", "not-writable"])
def test_a_home_that_is_no_home_costs_no_answer(tmp_path, env):
    with Upstream({"*": "an answer"}) as up:
        path = write_setup(tmp_path)
        env = dict(env, FUSION_BASE_URL=up.url, FUSION_HISTORY="0" if "HOME" in env else None)
        found = run_fusion("ask", "--config", path, "why is it?", cwd=tmp_path, env=env)
    assert (found.code, found.out) == (0, "an answer\n") and unharmed(found)


def test_the_program_runs_from_any_folder_and_through_a_link(tmp_path):
    link = tmp_path / "linked.py"
    link.symlink_to(FUSION_PY)
    found = run_fusion("presets", "show", "budget", path=link, cwd=tmp_path)
    assert found.code == 0 and json.loads(found.out)["judge"]
