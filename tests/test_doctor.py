"""The doctor: what an installation can do, a line a check, and what is wrong with it."""
import hashlib
import json
import re
import socket
import sys

import pytest

from conftest import FUSION_PY
from test_talk import command
from upstream import Reply, Upstream, error_reply

KEY = "sk-or-v1-0123456789abcdefWXYZ"
LOCAL_PORTS = (11434, 8080, 1234, 8000)
SETUP = {"panel": ["m/a", "m/b"], "judge": "m/j", "synthesizer": "m/s"}
MODELS = ["m/a", "m/b", "m/j", "m/s"]
PRICE = {"input": 1.5, "output": 7.25}


class Seen:
    """What the doctor said, with its exit code."""

    def __init__(self, found):
        self.code, self.out, self.err = found.code, found.out, found.err

    def told(self, *words, state=None):
        """The lines that hold all of these words, in their state."""
        found = [line for line in self.out.splitlines() if all(word in line for word in words)]
        return [line for line in found if state is None or line.split()[0] == state]


@pytest.fixture
def doctor(command, tmp_path):
    """Runs the doctor on a configuration: doctor(values or None, "--json", NAME=value)."""
    def run(values, *argv, **env):
        flags = []
        if values is not None:
            path = tmp_path / "setup.json"
            path.write_text(json.dumps(values))
            flags = ["--config", str(path)]
        found = command("doctor", *flags, *argv, **env)
        assert "Traceback" not in found.err and "defect" not in found.err + found.out
        return Seen(found)
    return run


def check(seen, code):
    """Hold what was said to its shape: a state first, and the exit code that follows from it."""
    assert all(line.split()[0] in ("ok", "note", "fail") for line in seen.out.splitlines())
    assert ("fail" in {line.split()[0] for line in seen.out.splitlines()}) == (code == 1)
    assert seen.code == code, seen.out + seen.err


def llamacpp(*models):
    return Upstream({"*": "hello"}, models=models or ["qwen3-8b-q4.gguf"], owned_by="llamacpp")


def ollama(*models):
    return Upstream({}, models=models, owned_by="library")


# ---- an installation that works --------------------------------------------------------------

def test_all_is_well_with_a_backend_that_has_every_model(doctor):
    with Upstream(models=MODELS) as up:
        seen = doctor(SETUP, FUSION_BASE_URL=up.url, FUSION_API_KEY=KEY)
        assert up.posts() == [], "the doctor calls no model"
    check(seen, 0)
    assert seen.err == ""
    for model in MODELS:
        assert len(seen.told(model)) == 1
    assert seen.told("127.0.0.1:%d" % up.port, "4 models", state="ok")


def test_the_python_and_the_file_are_told_with_its_digest(doctor):
    seen = doctor(None, "--fake")
    digest = hashlib.sha256(FUSION_PY.read_bytes()).hexdigest()
    assert len(seen.told(digest, state="ok")) == 1
    version = "%d.%d.%d" % sys.version_info[:3]
    assert seen.told(version, sys.executable, state="ok")


def test_the_version_in_the_line_of_the_digest_is_that_of_the_program(doctor, fusion):
    assert doctor(None, "--fake").told("SHA-256", fusion.VERSION)


def test_with_the_fake_backend_all_is_well_and_nothing_is_asked_of_others(doctor):
    seen = doctor(None, "--fake", FUSION_BASE_URL="http://127.0.0.1:9/v1")
    check(seen, 0)
    assert seen.told("fake", "no key", state="ok") and not seen.told("127.0.0.1:9")


def test_the_terminal_and_the_place_of_runs_are_told(doctor, tmp_path):
    seen = doctor(None, "--fake")
    assert seen.told("terminal", "plain", state="ok")
    assert seen.told("state", str(tmp_path / "home" / "state" / "fusion"), state="ok")


# ---- keys -----------------------------------------------------------------------------------

def test_without_a_key_it_fails_with_the_variable_to_set(doctor):
    seen = doctor(None)
    check(seen, 1)
    assert len(seen.told("OPENROUTER_API_KEY", state="fail")) == 1


def test_a_key_is_told_by_its_name_and_last_four_characters_alone(doctor):
    with Upstream(models=MODELS) as up:
        seen = doctor(SETUP, FUSION_BASE_URL=up.url, FUSION_API_KEY=KEY)
        assert up.requests[0].headers["authorization"] == "Bearer " + KEY
    assert seen.told("FUSION_API_KEY", "WXYZ", "127.0.0.1:%d" % up.port, state="ok")
    assert KEY[:-4] not in seen.out and KEY[-5:] not in seen.out


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_fails_with_its_name_and_is_not_echoed(doctor, status):
    with Upstream(models=MODELS) as up:
        up.models_reply = error_reply(status, "Incorrect API key provided: %s" % KEY)
        seen = doctor(SETUP, FUSION_BASE_URL=up.url, FUSION_API_KEY=KEY)
    check(seen, 1)
    assert seen.told("backend", str(status), "FUSION_API_KEY", state="fail")
    assert KEY not in seen.out and KEY[:-4] not in seen.out


def test_a_short_key_is_not_told_whole(doctor):
    with Upstream(models=MODELS) as up:
        seen = doctor(SETUP, FUSION_BASE_URL=up.url, FUSION_API_KEY="q7Zx")
    assert "q7Zx" not in seen.out


def test_a_missing_key_of_one_member_fails_and_the_others_are_looked_at(doctor):
    with Upstream(models=MODELS) as up, Upstream(models=["m/far"]) as far:
        member = {"model": "m/far", "base_url": far.url, "api_key_env": "FUSION_FAR_KEY"}
        seen = doctor(dict(SETUP, panel=["m/a", member]), FUSION_BASE_URL=up.url)
        assert far.posts() == up.posts() == []
    check(seen, 1)
    assert len(seen.told("FUSION_FAR_KEY", state="fail")) == 1
    assert seen.told("127.0.0.1:%d" % up.port, "4 models"), "the others are looked at all the same"


def test_a_key_that_may_not_go_to_a_host_fails_in_words(doctor):
    member = {"model": "m/far", "base_url": "http://127.0.0.1:9/v1",
              "api_key_env": "OPENAI_API_KEY"}
    seen = doctor({"panel": [member]}, OPENAI_API_KEY=KEY)
    check(seen, 1)
    assert seen.told("OPENAI_API_KEY", "127.0.0.1:9", state="fail") and KEY not in seen.out


# ---- backends -------------------------------------------------------------------------------

def closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_dead_backend_fails_with_its_place(doctor):
    place = "127.0.0.1:%d" % closed_port()
    seen = doctor(SETUP, FUSION_BASE_URL="http://%s/v1" % place)
    check(seen, 1)
    assert len(seen.told("backend", place, state="fail")) == 1


ODD_LISTS = {
    "HTML": Reply(body=b"<!doctype html><title>Welcome to nginx</title>\n",
                  content_type="text/html"),
    "HTML and 404": Reply(status=404, body=b"<html>\n<h1>no</h1>\n</html>"),
    "HTML and 502": Reply(status=502, body=b"<html>\nbad gateway\n</html>"),
    "empty": Reply(body=b""), "a list of texts": Reply(body=b'["m/a"]'),
    "cut": Reply(body=b'{"data": [{"id": "m/a"}]}', cut_after=1),
    "without a word": Reply(raw=b""), "null": Reply(body=b"null"),
    "redirect": Reply(status=302, headers={"Location": "http://127.0.0.1:9/login"}),
    "escapes": error_reply(500, "\x1b[31mred\nFAIL  ok  line"),
}


@pytest.mark.parametrize("name", ODD_LISTS)
def test_a_backend_that_lists_no_models_fails_in_one_line(doctor, name):
    with Upstream(models=MODELS) as up:
        up.models_reply = ODD_LISTS[name]
        seen = doctor(SETUP, FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert "\x1b" not in seen.out
    assert seen.told("127.0.0.1:%d" % up.port, state="fail") or seen.told("m/a", state="fail")
    assert not re.search(r"hint:\s*$", seen.out, re.MULTILINE), "a hint without words"


def test_several_backends_have_a_line_each_with_their_own_key(doctor):
    with Upstream(models=MODELS) as up, Upstream(models=["m/far"]) as far:
        member = {"model": "m/far", "base_url": far.url, "api_key_env": "FUSION_FAR_KEY"}
        seen = doctor(dict(SETUP, panel=["m/a", member]), FUSION_BASE_URL=up.url,
                      FUSION_API_KEY=KEY, FUSION_FAR_KEY="another-key-000-QQQQ")
        assert {request.headers["authorization"] for request in far.requests} == {
            "Bearer another-key-000-QQQQ"}
    check(seen, 0)
    assert seen.told("127.0.0.1:%d" % up.port, "FUSION_API_KEY", "WXYZ", state="ok")
    assert seen.told("127.0.0.1:%d" % far.port, "FUSION_FAR_KEY", "QQQQ", state="ok")


def test_one_backend_that_is_dead_does_not_hide_the_others(doctor):
    place = "127.0.0.1:%d" % closed_port()
    with Upstream(models=MODELS) as up:
        member = {"model": "m/far", "base_url": "http://%s/v1" % place}
        seen = doctor(dict(SETUP, panel=["m/a", member]), FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert seen.told(place, state="fail") and seen.told("m/a") and not seen.told("m/a", "fail")


# ---- models ---------------------------------------------------------------------------------

@pytest.mark.parametrize("asked, meant", [("m/gpt-5.5-min", "m/gpt-5.5-mini"),
                                          ("m/gtp-5.5", "m/gpt-5.5")])
def test_a_model_that_the_backend_does_not_have_fails_with_what_was_meant(doctor, asked, meant):
    with Upstream(models=["m/gpt-5.5", "m/gpt-5.5-mini", "m/other"]) as up:
        seen = doctor({"panel": ["m/other", asked]}, FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert len(seen.told("member", asked, "did you mean", meant, state="fail")) == 1


@pytest.mark.parametrize("role, change", [
    ("member", {"panel": ["m/a", "m/zzz"]}), ("judge", {"judge": "m/zzz"}),
    ("writer", {"synthesizer": ["m/s", "m/zzz"]}), ("spare", {"spares": ["m/zzz"]})])
def test_a_retired_model_fails_in_whichever_role_it_stands(doctor, role, change):
    with Upstream(models=MODELS) as up:
        seen = doctor(dict(SETUP, **change), FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert len(seen.told(role, "m/zzz", state="fail")) == 1


def test_a_llamacpp_answers_to_any_name_and_that_is_a_note(doctor):
    with llamacpp() as up:
        seen = doctor({"panel": ["m/any-name"]}, FUSION_BASE_URL=up.url)
    check(seen, 0)
    assert seen.told("m/any-name", "qwen3-8b-q4.gguf", state="note")


def test_a_llamacpp_asked_by_its_own_name_is_well_and_costs_nothing(doctor):
    with llamacpp() as up:
        seen = doctor({"panel": ["qwen3-8b-q4.gguf"]}, FUSION_BASE_URL=up.url)
    check(seen, 0)
    assert seen.told("member", "qwen3-8b-q4.gguf", "nothing", state="ok")


def test_an_ollama_with_one_model_does_not_answer_to_other_names(doctor):
    with ollama("llama3.2:latest") as up:
        seen = doctor({"panel": ["mistral"]}, FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert seen.told("mistral", state="fail")


def test_an_ollama_model_may_be_named_without_its_latest(doctor):
    with ollama("llama3.2:latest", "qwen3:8b") as up:
        seen = doctor({"panel": ["llama3.2", "qwen3:8b"]}, FUSION_BASE_URL=up.url)
    check(seen, 0)


def test_an_automatic_panel_is_what_the_backend_has_without_embeddings(doctor):
    with ollama("llama3.2:latest", "nomic-embed-text:latest", "qwen3:8b", "bge-m3:latest") as up:
        seen = doctor(None, FUSION_BASE_URL=up.url)
    check(seen, 0)
    assert len(seen.told("member", state="ok")) == 2
    assert seen.told("member", "llama3.2:latest") and seen.told("member", "qwen3:8b")
    assert not seen.told("embed") and not seen.told("bge")
    assert seen.told("config", "preset local", state="ok")


def test_an_automatic_panel_of_a_backend_without_models_fails(doctor):
    with ollama("nomic-embed-text:latest") as up:
        seen = doctor(None, FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert seen.told("127.0.0.1:%d" % up.port, state="fail")


def test_another_fusion_server_is_no_backend_of_an_automatic_panel(doctor):
    with Upstream(models=["fusion", "fusion/budget"], owned_by="fusion") as up:
        seen = doctor(None, FUSION_BASE_URL=up.url)
    check(seen, 1)
    assert seen.told("fusion server", "127.0.0.1:%d" % up.port, state="fail")


# ---- prices ---------------------------------------------------------------------------------

def test_prices_are_told_or_said_to_be_unknown(doctor):
    known = "anthropic/claude-opus-4.8"
    with Upstream(models=["m/a", "m/b", known]) as up:
        seen = doctor({"panel": ["m/a", "m/b", known], "prices": {"m/a": PRICE}},
                      FUSION_BASE_URL=up.url)
    check(seen, 0)
    assert seen.told("member", "m/a", "$1.5", "$7.25", state="ok")
    assert seen.told("member", "m/b", "price", "not known", state="note")
    assert seen.told("member", known, "$", "million", state="ok")


def test_a_price_of_the_member_itself_is_told(doctor):
    with Upstream(models=["m/a"]) as up:
        seen = doctor({"panel": [{"model": "m/a", "price": PRICE}]}, FUSION_BASE_URL=up.url)
    assert seen.told("member", "m/a", "$1.5", "$7.25", state="ok")


# ---- where values come from -----------------------------------------------------------------

def test_the_origin_of_each_value_is_told(doctor, tmp_path):
    with Upstream(models=MODELS) as up:
        seen = doctor(dict(SETUP, layers=2), "--refine", "--max-cost", "3", FUSION_BASE_URL=up.url)
    from_file = seen.told("config", str(tmp_path / "setup.json"), state="ok")
    from_flags = seen.told("config", "flag", "refine", state="ok")
    assert any(all(key in line for key in ("panel", "judge", "layers")) for line in from_file)
    assert "max_cost_usd" in from_flags[0] and "layers" not in from_flags[0]
    assert not any("refine" in line for line in from_file)


def test_a_flag_over_a_value_of_the_file_is_its_origin(doctor, tmp_path):
    with Upstream(models=MODELS) as up:
        seen = doctor(dict(SETUP, layers=2), "--layers", "3", FUSION_BASE_URL=up.url)
    assert seen.told("config", "flag", "layers")
    assert not any("layers" in line for line in seen.told(str(tmp_path / "setup.json")))


def test_the_preset_is_named_as_the_origin(doctor):
    seen = doctor(None, "--fake", "--config", "frontier")
    assert seen.told("config", "preset frontier", "panel", "judge", state="ok")


@pytest.mark.parametrize("values, words", [
    ({"panel": ["m/a"], "jugde": "m/j"}, ("jugde", "judge")), ({"panel": []}, ("panel",)),
    ({"panel": ["m/a"], "layers": 9}, ("layers", "1 to 4"))])
def test_a_wrong_configuration_fails_in_one_line_that_names_the_key(doctor, values, words):
    seen = doctor(values, FUSION_BASE_URL="http://127.0.0.1:9/v1")
    check(seen, 1)
    assert len(seen.told("config", *words, state="fail")) == 1


@pytest.mark.parametrize("argv, env, words", [
    (("--config", "bugdet"), {}, ("bugdet", "budget")),
    (("--env-file", "/nowhere/x.env"), {}, ("x.env",)),
    ((), {"FUSION_BASE_URL": "ftp://x"}, ("FUSION_BASE_URL",)),
    ((), {"FUSION_API_KEY": "caf\u00e9-0123456789"}, ("FUSION_API_KEY",))])
def test_what_is_wrong_outside_the_file_fails_in_one_line(doctor, argv, env, words):
    seen = doctor(None, *argv, **env)
    check(seen, 1)
    assert len(seen.told(*words, state="fail")) == 1


# ---- as JSON --------------------------------------------------------------------------------

@pytest.mark.parametrize("models, code", [(MODELS, 0), (["m/zzz"], 1)])
def test_json_says_the_same_as_the_lines(doctor, models, code):
    with Upstream(models=models + ["m/other"]) as up:
        env = {"FUSION_BASE_URL": up.url, "FUSION_API_KEY": KEY}
        lines, data = doctor(SETUP, **env), doctor(SETUP, "--json", **env)
    found = json.loads(data.out)
    assert data.code == lines.code == code and found["ok"] == (code == 0) and data.err == ""
    said = [line.split()[0] for line in lines.out.splitlines()]
    assert [entry["state"] for entry in found["checks"]] == said
    assert KEY not in data.out and KEY[:-4] not in data.out
    for entry, line in zip(found["checks"], lines.out.splitlines()):
        assert set(entry) >= {"state", "what", "detail"} and entry["what"] in line


# ---- the local preset without an address ----------------------------------------------------

class AtPort(Upstream):
    """A scripted backend at a port that is known by name; skips where it is taken."""

    def __init__(self, at, *args, **options):
        super().__init__(*args, **options)
        self.at = at

    def __enter__(self):
        plain = socket.create_server

        def create(address, **options):
            return plain((address[0], self.at), **options)

        socket.create_server = create
        try:
            return super().__enter__()
        except OSError:
            pytest.skip("port %d is taken" % self.at)
        finally:
            socket.create_server = plain


def free(*ports):
    """Skip where something listens at one of these ports."""
    for port in ports:
        with socket.socket() as sock:
            sock.settimeout(1)
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                pytest.skip("something listens at port %d" % port)


@pytest.mark.parametrize("index", range(4))
def test_the_local_preset_takes_the_first_engine_that_answers(doctor, index):
    free(*LOCAL_PORTS[:index])
    with AtPort(LOCAL_PORTS[index], {}, models=["found-%d" % index], owned_by="vllm"):
        seen = doctor(None, "--config", "local")
    check(seen, 0)
    assert seen.told("127.0.0.1:%d" % LOCAL_PORTS[index], "1 model", state="ok")
    assert seen.told("member", "found-%d" % index, "nothing", state="ok")


def test_of_two_local_engines_the_first_of_the_list_is_taken(doctor):
    free(LOCAL_PORTS[0])
    with AtPort(LOCAL_PORTS[1], {}, models=["first"], owned_by="llamacpp"), \
            AtPort(LOCAL_PORTS[2], {}, models=["second"], owned_by="lmstudio"):
        seen = doctor(None, "--config", "local")
    assert seen.told("member", "first") and not seen.told("second")


def test_another_fusion_server_at_a_local_port_is_passed_over(doctor):
    free(LOCAL_PORTS[0], LOCAL_PORTS[2])
    with AtPort(LOCAL_PORTS[1], {}, models=["fusion"], owned_by="fusion"), \
            AtPort(LOCAL_PORTS[3], {}, models=["engine"], owned_by="vllm"):
        seen = doctor(None, "--config", "local")
    check(seen, 0)
    assert seen.told("member", "engine") and not seen.told("member", "fusion  ")


def test_without_any_local_engine_it_fails_with_the_ports_that_were_tried(doctor):
    free(*LOCAL_PORTS)
    seen = doctor(None, "--config", "local")
    check(seen, 1)
    assert seen.told(*("127.0.0.1:%d" % port for port in LOCAL_PORTS), state="fail")


def test_no_key_goes_to_an_engine_that_was_found_by_its_port(doctor):
    free(*LOCAL_PORTS[:3])
    with AtPort(LOCAL_PORTS[3], {}, models=["engine"], owned_by="vllm") as up:
        seen = doctor(None, "--config", "local", OPENROUTER_API_KEY=KEY)
        assert up.requests
        assert all("authorization" not in request.headers for request in up.requests)
    assert "WXYZ" not in seen.out
