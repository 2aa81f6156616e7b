"""The README is true: its tables are those of the code, its commands run, its codes exist."""
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from conftest import FUSION_PY, clean_environment, run_fusion

README = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")
REWRITE = os.environ.get("REWRITE_README") == "1"


def readme():
    with open(README, encoding="utf-8") as file:
        return file.read()


def shown(value):
    if isinstance(value, tuple):
        value = list(value)
    return "`%s`" % json.dumps(value) if value != [] else "-"


def settings_rows(fusion, kind):
    for name, field in fusion.settings_of(kind).items():
        default = field.default
        if not isinstance(default, (str, int, float, bool, tuple, type(None))):
            default = {}
        if name in ("panel", "model"):
            default = ()
        yield "| `%s` | %s | %s |" % (name, shown(default), field.metadata["doc"])


def preset_rows(fusion):
    for name, values in fusion.PRESETS.items():
        panel = values["panel"]
        members = panel if isinstance(panel, str) else ", ".join(
            member if isinstance(member, str) else member["model"] for member in panel)
        rest = {key: value for key, value in values.items()
                if key not in ("panel", "judge", "synthesizer")}
        yield "| `%s` | %s | %s | %s | %s |" % (
            name, members, values.get("judge", "the first"), values.get("synthesizer", "the first"),
            ", ".join("%s: %s" % (key, json.dumps(value)) for key, value in rest.items()) or "-")


def tables(fusion):
    return {"presets": preset_rows(fusion), "config": settings_rows(fusion, fusion.Config),
            "member": settings_rows(fusion, fusion.Member)}


@pytest.mark.parametrize("name", ["presets", "config", "member"])
def test_the_table_is_the_codes(fusion, name):
    rows = list(tables(fusion)[name])
    text = readme()
    match = re.search(r"<!-- %s -->\n(.*?\n\|[-|]+\|\n)(.*?)<!-- /%s -->" % (name, name), text,
                      re.DOTALL)
    if REWRITE:
        text = text[:match.start(2)] + "\n".join(rows) + "\n" + text[match.end(2):]
        with open(README, "w", encoding="utf-8") as file:
            file.write(text)
        return
    assert match.group(2).splitlines() == rows


def commands():
    for block in re.findall(r"```(?:sh|console)\n(.*?)```", readme(), re.DOTALL):
        for line in block.splitlines():
            line = re.sub(r"^\$ ", "", line).split("   #")[0].strip()
            if "fusion.py" in line:
                yield line


def serve_and_stop(args, home):
    """Runs a serve command on a free port of this machine until it says where it is."""
    env = dict(clean_environment(home), FUSION_SERVER_KEY="a-key", OPENROUTER_API_KEY="sk-none")
    args = [arg.replace("0.0.0.0", "127.0.0.1") for arg in args] + ["--port", "0", "--fake"]
    with subprocess.Popen([sys.executable, str(FUSION_PY)] + args, env=env, cwd=str(home),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline()
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1\n", url)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_the_command_runs_on_the_fake_backend(line, tmp_path):
    (tmp_path / "notes.txt").write_text("some notes")
    (tmp_path / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    words = shlex.split(line.split("|")[-1])
    args = words[words.index("fusion.py") + 1:]
    if args[0] in ("ask", "doctor") and "--fake" not in args:
        args.insert(1, "--fake")
    if args[0] == "serve":
        serve_and_stop(args, tmp_path)
        return
    if "--replay" in args:
        run_fusion("ask", "--fake", "--record", "calls.jsonl", "...", cwd=str(tmp_path))
    if args[0] == "show":
        run_fusion("ask", "--fake", "hello", home=tmp_path)
    result = run_fusion(*args, cwd=str(tmp_path), stdin=b"a diff" if "|" in line else None,
                        home=tmp_path)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err


def test_the_codes_of_the_receipt_are_those_of_the_program():
    text = readme()
    table = text[text.index("| code | what happened |"):text.index("Prices are in the file")]
    named = set(re.findall(r"`(\w+)`", table)) - {"null"}
    with open(FUSION_PY, encoding="utf-8") as file:
        source = file.read()
    used = set(re.findall(r'degrade\(\s*"(\w+)"', source))
    used |= set(re.search(r'code = "(\w+)" if .+? else "(\w+)" if late else "(\w+)"',
                          source).groups())
    assert named == used


def test_the_example_configuration_loads(fusion, tmp_path):
    block = re.search(r"```json\n(.*?)```", readme(), re.DOTALL).group(1)
    path = tmp_path / "my.json"
    path.write_text(block)
    env = fusion.Env({"OPENAI_API_KEY": "sk-openai", "OPENROUTER_API_KEY": "sk-router"})
    config = fusion.load_config(str(path), env)
    assert [member.backend.key for member in config.panel] == ["sk-router", "sk-openai", ""]
    assert config.max_cost_usd == 0.5


def test_the_example_environment_file_sets_only_what_it_may(fusion):
    path = os.path.join(os.path.dirname(README), ".env.example")
    with open(path, encoding="utf-8") as file:
        names = re.findall(r"^# ?([A-Z_]+)=", file.read(), re.MULTILINE)
    assert len(names) >= 5
    assert all(name in fusion.MAY_SET or name.startswith("FUSION_") for name in names)


def test_every_backend_of_the_readme_is_one_variable_away(fusion):
    table = readme().split("| backend | what to set |")[1].split("\n\n")[0]
    presets = {"OpenRouter": "budget", "OpenAI": "openai", "Ollama": "local",
               "llama.cpp": "local", "vLLM": "local"}
    for backend, preset in presets.items():
        row = [line for line in table.splitlines() if line.startswith("| %s |" % backend)][0]
        name, value = re.search(r"export (\w+)=([^`\s]+)", row).groups()
        env = fusion.Env({name: value})
        assert fusion.load_config(None, env).source == preset


def test_each_promise_names_a_test_that_exists():
    names = re.findall(r"`(test_\w+)`", readme())
    folder = os.path.dirname(os.path.abspath(__file__))
    source = ""
    for name in os.listdir(folder):
        if name.startswith("test_") and name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                source += file.read()
    assert len(names) > 20
    assert [name for name in names if "\ndef %s(" % name not in source] == []
