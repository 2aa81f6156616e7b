"""Presets, configuration files, the keys and the hosts they may go to, request overrides."""

import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from conftest import FUSION_PY, ROOT
from upstream import Reply, Upstream, error_reply

BUDGET = ["google/gemini-3-flash-preview", "moonshotai/kimi-k2.6", "deepseek/deepseek-v4-pro"]
FRONTIER = ["anthropic/claude-opus-4.8", "openai/gpt-5.5", "google/gemini-3.1-pro-preview"]
OPUS = "anthropic/claude-opus-4.8"
KEYS = ("FUSION_API_KEY", "OPENROUTER_API_KEY", "OPENAI_API_KEY")
SECRET = "sk-very-secret-0123456789"
QUESTION = [{"role": "user", "content": "Why is the sky blue, in a few words?"}]

DEFAULTS = {
    "name": "fusion", "temperature": 0.7, "max_tokens": 4096, "tools_enabled": False,
    "refine": False, "layers": 1, "samples": 1, "diversity": True, "diversity_jitter": 0.3,
    "max_retries": 2, "retry_backoff": 0.5, "max_concurrency": 0, "backend_concurrency": 0,
    "quorum": 0, "grace_s": 8, "member_timeout_s": 180, "timeout_s": 600, "max_cost_usd": None,
    "vote": False, "mode": "fuse", "spares": [], "stream_members": True, "prices": {},
    "usage_scope": "total", "allow_models": ["*"],
}
MEMBER_KEYS = {
    "model": "vendor/model", "temperature": 1.25, "max_tokens": 321, "tools": True,
    "base_url": "http://127.0.0.1:8080/v1", "api_key_env": "FUSION_LOCAL_KEY",
    "reasoning_effort": "low", "lens": "Look for what can break.", "label": "breaker",
    "vision": False, "context": 8192,
    "price": {"input": 1, "output": 2.5, "cached_input": 0.1},
}


@pytest.fixture
def env_of(fusion):
    """Makes an environment: real variables, and those of a .env file."""

    def make(real=None, file=None):
        return fusion.Env(dict(real or {}), dict(file or {}), "/somewhere/.env")

    return make


@pytest.fixture
def load(fusion, tmp_path, env_of):
    """Loads a configuration file with these values (or this text, or these bytes)."""

    def load_values(values, env=None):
        path = tmp_path / "config.json"
        if isinstance(values, dict):
            values = json.dumps(values)
        path.write_bytes(values if isinstance(values, bytes) else values.encode())
        return fusion.load_config(str(path), env or env_of())

    return load_values


@pytest.fixture
def refused(fusion, load):
    """Loads what must be refused, and returns the message, which names the file."""

    def load_wrong(values, env=None):
        with pytest.raises(fusion.UsageError) as caught:
            load(values, env)
        error = caught.value
        assert (error.exit_code, error.status) == (2, 400)
        assert error.hint
        assert "Traceback" not in error.message
        return error.message

    return load_wrong


@pytest.fixture
def network(fusion):
    made = fusion.Network()
    yield made
    made.close()


@pytest.fixture
def answer(fusion, network):
    """Runs the pipeline on a question and returns (result, run)."""

    def run_once(config, params=None):
        run = fusion.start_run(config, network)
        return fusion.fuse(config, QUESTION, run, params), run

    return run_once


@pytest.fixture
def failure(fusion, network):
    """Runs the pipeline on a question, which must fail, and returns (error, run)."""

    def run_once(config):
        run = fusion.start_run(config, network)
        with pytest.raises(fusion.FusionError) as caught:
            fusion.fuse(config, QUESTION, run)
        return caught.value, run

    return run_once


@pytest.fixture
def program(tmp_path):
    """A copy of the program in a folder of its own, away from the repository."""
    folder = tmp_path / "app"
    folder.mkdir()
    shutil.copyfile(FUSION_PY, folder / "fusion.py")
    return folder / "fusion.py"


def slugs(members):
    return [member.model for member in members]


def plain(value):
    """A value of a configuration as JSON has it."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def authorizations(up):
    """The Authorization header of each request that came, chat or not."""
    return [request.headers.get("authorization") for request in up.requests]


def labelled(table):
    """Parameters for pytest with readable ids, one per row."""
    return [pytest.param(*row, id=" ".join(fitted(part) for part in row)) for row in table]


def fitted(value):
    words = re.sub(r"[^\w./:*-]+", "_", str(value))
    return words if len(words) < 40 else words[:37] + "..."


# ---- presets --------------------------------------------------------------------------------

PRESETS = {
    "budget": (BUDGET, BUDGET[0], OPUS),
    "frontier": (FRONTIER, "openai/gpt-5.5", OPUS),
    "research": (FRONTIER, "openai/gpt-5.5", OPUS),
}
SIX = ("budget", "frontier", "local", "openai", "research", "self")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_has_the_published_panel_judge_and_writer(fusion, env_of, name):
    config = fusion.load_config(name, env_of())
    found = slugs(config.panel), config.judge.model, slugs(config.synthesizer)
    assert found == (PRESETS[name][0], PRESETS[name][1], [PRESETS[name][2]])


def test_research_is_frontier_with_tools(fusion, env_of):
    config = fusion.load_config("research", env_of())
    assert config.tools_enabled
    assert [member.tools for member in config.panel] == [True, True, True]
    assert not fusion.load_config("frontier", env_of()).tools_enabled


def test_self_is_one_strong_model_with_three_samples(fusion, env_of):
    config = fusion.load_config("self", env_of())
    assert (len(config.panel), config.samples) == (1, 3)
    assert {config.panel[0].model, config.judge.model} == {config.synthesizer[0].model}


def test_openai_preset_names_models_without_vendor(fusion, env_of):
    config = fusion.load_config("openai", env_of())
    named = slugs(config.panel + (config.judge,) + config.synthesizer)
    assert len(config.panel) > 1
    assert all(re.fullmatch(r"gpt-[\w.-]+", slug) for slug in named), named


def test_local_preset_is_an_automatic_panel_one_call_at_a_time(fusion, env_of):
    config = fusion.load_config("local", env_of({"FUSION_BASE_URL": "http://127.0.0.1:1/v1"}))
    assert (config.panel, config.backend_concurrency) == ((), 1)


def test_local_preset_never_points_at_a_paid_backend(fusion, env_of):
    config = fusion.load_config("local", env_of({"OPENROUTER_API_KEY": SECRET}))
    assert config.backend is None or config.backend.loopback, config.backend


@pytest.mark.parametrize("name", sorted(set(SIX) - {"local"}))
def test_each_model_of_a_preset_has_a_price(fusion, env_of, name):
    config = fusion.load_config(name, env_of())
    members = config.panel + (config.judge,) + config.synthesizer + config.spares
    prices = {member.model: fusion.price_of(member, config) for member in members}
    assert all(price and price.input > 0 and price.output > 0 for price in prices.values()), prices


def test_presets_beside_the_script_and_exported_ones_are_the_built_in_ones(
    run_fusion, program, tmp_path
):
    shown = run_fusion("presets", "--json", path=program)
    exported = run_fusion("presets", "--export", tmp_path / "out", path=program)
    assert (shown.code, exported.code) == (0, 0), exported.err
    built_in = json.loads(shown.out)
    assert sorted(built_in) == sorted(SIX)
    assert read_all(ROOT / "presets") == built_in
    assert read_all(tmp_path / "out") == built_in


def read_all(folder):
    return {path.stem: json.loads(path.read_text()) for path in Path(folder).iterdir()}


def test_export_never_overwrites_an_edited_preset(run_fusion, program, tmp_path):
    (tmp_path / "budget.json").write_text("mine")
    result = run_fusion("presets", "--export", tmp_path, path=program)
    assert result.code == 2
    assert (tmp_path / "budget.json").read_text() == "mine"


def test_a_preset_file_beside_the_script_wins(run_fusion, program):
    edited = {"panel": ["vendor/edited"], "judge": "openai/gpt-5.5"}
    (program.parent / "presets").mkdir()
    (program.parent / "presets" / "budget.json").write_text(json.dumps(edited))
    result = run_fusion("presets", "show", "budget", path=program)
    assert json.loads(result.out) == edited


def test_an_unknown_preset_is_refused_with_the_nearest_name(fusion, env_of):
    with pytest.raises(fusion.UsageError) as caught:
        fusion.load_config("frontir", env_of())
    assert caught.value.exit_code == 2
    assert re.search(r"\bfrontir\b.*\bfrontier\b", caught.value.message)


def test_an_automatic_panel_is_never_another_fusion_server(fusion, load, env_of, failure):
    with Upstream(models=["fusion", "fusion/budget"], owned_by="fusion") as up:
        error, _ = failure(load({"panel": "auto"}, env_of({"FUSION_BASE_URL": up.url})))
        assert up.posts() == []
    assert isinstance(error, fusion.BackendError)
    assert "fusion server" in error.message


# ---- defaults and what each key takes -------------------------------------------------------


@pytest.mark.parametrize("key", sorted(DEFAULTS))
def test_a_key_that_is_left_out_has_its_default(load, key):
    assert plain(getattr(load({"panel": ["m"]}), key)) == DEFAULTS[key]


def test_a_file_stands_for_itself_and_takes_nothing_from_a_preset(load):
    config = load({"panel": ["m"]})
    assert (slugs(config.panel), config.judge.model, slugs(config.synthesizer)) == (
        ["m"], "m", ["m"])


def test_there_is_no_configuration_key_beyond_the_documented_ones(fusion, refused):
    known = set(DEFAULTS) | {"panel", "judge", "synthesizer"}
    for key in {item.name for item in dataclasses.fields(fusion.Config)} - known:
        assert key in refused({"panel": ["m"], key: "x"})


ACCEPTED = [
    ("name", "x", "n" * 100),
    ("temperature", 0, 2, 0.1),
    ("max_tokens", 1, 100000),
    ("tools_enabled", True, False),
    ("refine", True, False),
    ("layers", 1, 4),
    ("samples", 1, 8),
    ("diversity", True, False),
    ("diversity_jitter", 0, 1, 0.25),
    ("max_retries", 0, 5),
    ("retry_backoff", 0, 0.25, 30),
    ("max_concurrency", 0, 1, 64),
    ("backend_concurrency", 0, 1, 64),
    ("quorum", 0, 1, 16),
    ("grace_s", 0, 0.5, 60),
    ("member_timeout_s", 1, 0.5, 900),
    ("timeout_s", 1, 0.5, 3600),
    ("max_cost_usd", None, 0.01, 5, 100),
    ("vote", True, False),
    ("mode", "fuse", "solo", "auto"),
    ("stream_members", True, False),
    ("usage_scope", "total", "answer"),
    ("allow_models", [], ["*"], ["openai/*", "x-ai/grok-4.7"]),
]
REFUSED = [
    ("name", "", "n" * 101, 5, None, True, ["x"], {}, "two\nlines", "esc\x1b[0m"),
    ("panel", [], ["m"] * 17, "m", "Auto", None, 3, {}, {"model": "m"}),
    ("judge", 5, True, ["m"], "", "m" * 201, "a\nb", "a\ud800b"),
    ("synthesizer", None, [], {}, 5, True, ["m"] * 100),
    ("temperature", -0.01, 2.01, "0.7", True, None, [0.7], 1e300),
    ("max_tokens", 0, -1, 10**9, 4096.5, "4096", True, None),
    ("tools_enabled", 0, 1, "true", None, []),
    ("refine", 0, 1, "false", None, {}),
    ("layers", 0, 5, 1.5, "2", True, None),
    ("samples", 0, 9, 1.5, "2", True, None),
    ("diversity", 0, "yes", None),
    ("diversity_jitter", -0.01, 1.01, "0.3", True, None),
    ("max_retries", -1, 10**9, 1.5, "2", True, None),
    ("retry_backoff", -0.1, 1e9, "1", True, None),
    ("max_concurrency", -1, 10**9, 0.5, "4", True, None),
    ("backend_concurrency", -1, 10**9, 0.5, "4", True, None),
    ("quorum", -1, 10**9, 0.5, "2", True, None),
    ("grace_s", -1, 1e12, "8", True, None),
    ("member_timeout_s", 0, -5, 1e12, "180", True, None),
    ("timeout_s", 0, -5, 1e12, "600", True, None),
    ("max_cost_usd", -0.01, 1e12, "5", True, [5]),
    ("vote", 0, 1, "true", None),
    ("mode", "", "Fuse", "deep", 1, None, True, ["fuse"], {}),
    ("spares", "m", None, {}, ["m"] * 100, [5]),
    ("stream_members", 0, 1, "true", None),
    ("prices", [], None, "x", 5, {"m": 5}, {"m": {}}, {"m": {"input": 1}}, {"m": None}),
    ("usage_scope", "", "all", "Total", 1, None, True),
    ("allow_models", "*", None, [""], [5], {}, True),
]


def each_value(table):
    return [pytest.param(row[0], value, id="%s=%s" % (row[0], fitted(json.dumps(value))))
            for row in table for value in row[1:]]


@pytest.mark.parametrize("key, value", each_value(ACCEPTED))
def test_a_key_takes_each_value_within_its_bounds(load, key, value):
    config = load({"panel": ["m"], key: value})
    assert plain(getattr(config, key)) == value


@pytest.mark.parametrize("key, value", each_value(REFUSED))
def test_a_wrong_type_or_a_value_out_of_range_names_file_and_key(refused, key, value):
    message = refused({"panel": ["m"], **{key: value}})
    assert "config.json" in message
    assert re.search(r"\b%s\b" % key, message.partition("config.json")[2]), message


def test_the_tables_above_cover_every_key():
    every = set(DEFAULTS) | {"panel", "judge", "synthesizer"}
    assert {row[0] for row in REFUSED} == every
    assert {row[0] for row in ACCEPTED} | {"spares", "prices"} == set(DEFAULTS)


def test_a_panel_is_required(refused):
    assert re.search(r"\bpanel\b", refused({"judge": "m"}))


@pytest.mark.parametrize("count", [1, 16])
def test_a_panel_has_one_to_sixteen_members(load, count):
    assert len(load({"panel": ["m%d" % index for index in range(count)]}).panel) == count


@pytest.mark.parametrize("key", sorted(set(DEFAULTS) | {"judge", "synthesizer"}))
def test_a_misspelt_key_is_refused_with_the_nearest_one(refused, key):
    message = refused({"panel": ["m"], key[:-1]: DEFAULTS.get(key, "m")})
    assert "config.json" in message
    assert re.search(r"did you mean %s\b" % key, message), message


@pytest.mark.parametrize("key", sorted(set(MEMBER_KEYS) - {"model"}))
def test_a_misspelt_key_of_a_member_is_refused_with_path_and_nearest_one(refused, key):
    message = refused({"panel": ["m", {"model": "m", key[:-1]: MEMBER_KEYS[key]}]})
    assert "panel[1].%s " % key[:-1] in message
    assert re.search(r"did you mean %s\b" % key, message), message


# ---- member objects -------------------------------------------------------------------------


def assert_is_the_member(member):
    price = MEMBER_KEYS["price"]
    simple = {key: value for key, value in MEMBER_KEYS.items() if key != "price"}
    assert {key: getattr(member, key) for key in simple} == simple
    assert {key: getattr(member.price, key) for key in price} == price


@pytest.mark.parametrize("place", ["panel", "judge", "synthesizer", "spares"])
def test_a_member_object_keeps_each_of_its_keys(load, env_of, place):
    value = MEMBER_KEYS if place in ("judge", "synthesizer") else [MEMBER_KEYS]
    config = load({"panel": ["m"], place: value}, env_of({"FUSION_LOCAL_KEY": SECRET}))
    found = getattr(config, place)
    assert_is_the_member(found[0] if isinstance(found, tuple) else found)


def test_slug_and_object_may_stand_side_by_side(load):
    config = load({"panel": ["a", {"model": "b", "temperature": 0}, "c"]})
    assert slugs(config.panel) == ["a", "b", "c"]
    assert [member.temperature for member in config.panel] == [None, 0, None]


WRONG_MEMBERS = [
    ("temperature", 2.5), ("temperature", "hot"), ("max_tokens", 0), ("max_tokens", 1.5),
    ("tools", "yes"), ("tools", None), ("reasoning_effort", "lots"), ("reasoning_effort", 3),
    ("lens", ""), ("lens", "two\nlines"), ("lens", "x" * 10000), ("label", ""), ("label", 5),
    ("vision", 1), ("context", 0), ("context", "8k"), ("price", 1), ("price", {"input": 1}),
    ("api_key_env", ""), ("api_key_env", 5), ("model", ""), ("model", 5), ("model", None),
    ("base_url", ""), ("base_url", 5), ("base_url", "api.example.com"),
    ("base_url", "ftp://h.example/v1"), ("base_url", "http://"), ("base_url", "file:///etc/passwd"),
    ("base_url", "https://user:word@h.example/v1"), ("base_url", "http://h.example/v1?key=x"),
    ("base_url", "http://h.example/v1#x"), ("base_url", "http://h.example:99999/v1"),
]


@pytest.mark.parametrize("key, value", labelled(WRONG_MEMBERS))
def test_a_wrong_value_in_a_member_is_named_by_its_path(refused, key, value):
    member = dict({"model": "m", "base_url": "http://127.0.0.1:1/v1"}, **{key: value})
    message = refused({"panel": ["m", member]})
    assert "config.json" in message
    assert "panel[1].%s" % key in message


PATHS = [
    ("panel[0]", {"panel": [5]}),
    ("panel[1].model", {"panel": ["m", {"temperature": 1}]}),
    ("panel[1].temperature", {"panel": ["m", {"model": "m", "temperature": 9}]}),
    ("panel[0].price.output", {"panel": [{"model": "m", "price": {"input": 1, "output": -1}}]}),
    ("judge.max_tokens", {"panel": ["m"], "judge": {"model": "m", "max_tokens": -1}}),
    ("synthesizer[1].lens", {"panel": ["m"], "synthesizer": ["m", {"model": "m", "lens": 1}]}),
    ("spares[2]", {"panel": ["m"], "spares": ["a", "b", None]}),
    ("prices.a/b-1.5.input", {"panel": ["m"], "prices": {"a/b-1.5": {"input": "1", "output": 1}}}),
    ("prices.m.inptu", {"panel": ["m"], "prices": {"m": {"inptu": 1, "output": 1}}}),
    ("allow_models[1]", {"panel": ["m"], "allow_models": ["*", 5]}),
]


@pytest.mark.parametrize("path, values", labelled(PATHS))
def test_an_error_deep_inside_carries_the_whole_path(refused, path, values):
    assert re.search(r"config\.json\W+%s\s" % re.escape(path), refused(values))


def test_a_base_url_without_path_gets_the_usual_one(load):
    urls = ["http://127.0.0.1:8080", "http://127.0.0.1:8080/", "http://127.0.0.1:8080/v1/",
            "http://127.0.0.1:8080/v1/chat/completions"]
    members = [{"model": "m", "base_url": url} for url in urls]
    found = {member.base_url for member in load({"panel": members}).panel}
    assert found == {"http://127.0.0.1:8080/v1"}


def test_a_base_url_with_a_path_of_its_own_keeps_it(load):
    url = "https://generativelanguage.googleapis.com/v1beta/openai"
    assert load({"panel": [{"model": "m", "base_url": url}]}).panel[0].base_url == url


# ---- files that are no configuration --------------------------------------------------------

NO_JSON = [
    (b'{\n  "panel": ["m"],\n  "samples": oops\n}', r"line 3\D+column 14\b"),
    (b'{"panel": ["m"]', r"line 1\D+column 1\d\b"),
    (b"", r"line 1\D+column 1\b"),
    (b'{"panel": ["m"]}\n{"panel": ["m"]}', r"line 2\D+column 1\b"),
    (b'{"panel": ["a"], "panel": ["b"]}', r"\bpanel\b.*\btwice\b"),
    (b'{"panel": [{"model": "a", "model": "b"}]}', r"\bmodel\b.*\btwice\b"),
    (b'{"panel": ["m"], "temperature": NaN}', r"\bNaN\b"),
    (b'{"panel": ["m"], "timeout_s": Infinity}', r"\bInfinity\b"),
    (b'{"panel": ["m"], "timeout_s": 1e999}', r"\btimeout_s\b"),
    (b'{"panel": ["m"], "max_tokens": 1' + b"0" * 5000 + b"}", r"config\.json"),
    (b'["m"]', r"\blist\b.*\bobject\b"),
    (b'"budget"', r"\bobject\b"),
    (b"null", r"\bobject\b"),
    (b"[" * 100000, r"config\.json"),
    (b"\x89PNG\r\n\x1a\n\x00\xff", r"UTF-8"),
    (b'{"panel": ["\xff"]}', r"UTF-8"),
    (b" " * 2_000_000 + b'{"panel": ["m"]}', r"\blarge"),
]


@pytest.mark.parametrize("content, words", [
    pytest.param(*row, id="%d-%s" % (number, fitted(row[0][:25])))
    for number, row in enumerate(NO_JSON)])
def test_a_file_that_is_no_configuration_is_refused_in_words(refused, content, words):
    message = refused(content)
    assert "config.json" in message
    assert re.search(words, message), message


def test_a_file_may_begin_with_a_byte_order_mark(load):
    assert slugs(load(b'\xef\xbb\xbf{"panel": ["m"]}').panel) == ["m"]


def make_missing(folder):
    return folder / "missing.json"


def make_directory(folder):
    return folder


def make_path_through_a_file(folder):
    (folder / "file").write_text("x")
    return folder / "file" / "config.json"


def make_endless_link(folder):
    (folder / "loop.json").symlink_to(folder / "loop.json")
    return folder / "loop.json"


@pytest.mark.parametrize("make", [
    make_missing, make_directory, make_path_through_a_file, make_endless_link])
def test_a_file_that_cannot_be_read_is_named(fusion, env_of, tmp_path, make):
    path = str(make(tmp_path))
    with pytest.raises(fusion.UsageError) as caught:
        fusion.load_config(path, env_of())
    assert path in caught.value.message
    assert caught.value.exit_code == 2


def test_the_program_ends_with_2_and_a_hint_for_a_wrong_file(run_fusion, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"panel": ["m"], "temprature": 1}')
    result = run_fusion("ask", "--fake", "--config", path, "hello")
    assert (result.code, result.out) == (2, "")
    assert re.search(r"(?m)^error: .*mine\.json.*temprature.*temperature", result.err)
    assert re.search(r"(?m)^hint: \S", result.err)


# ---- who judges and writes ------------------------------------------------------------------

ROLES = [
    ({}, None, ("a", ["a"])),
    ({"judge": "j"}, None, ("j", ["a"])),
    ({"synthesizer": "s"}, None, ("a", ["s"])),
    ({"synthesizer": ["s", "t", "u"]}, None, ("a", ["s", "t", "u"])),
    ({}, ["x", "y"], ("x", ["x"])),
    ({"judge": "j"}, ["x", "y"], ("j", ["x"])),
    ({"synthesizer": ["s", "t"]}, ["x"], ("x", ["s", "t"])),
    ({"judge": "j", "synthesizer": "s"}, ["x"], ("j", ["s"])),
]


@pytest.mark.parametrize("values, panel, expected", labelled(ROLES))
def test_judge_and_writer_are_the_first_member_unless_named(
    fusion, load, values, panel, expected
):
    config = load(dict({"panel": ["a", "b"]}, **values))
    if panel:
        config = fusion.with_flags(config, {"panel": panel})
    assert (config.judge.model, slugs(config.synthesizer)) == expected


@pytest.mark.parametrize("values, panel, expected", labelled(ROLES))
def test_a_request_with_another_panel_follows_the_same_rule(
    fusion, load, values, panel, expected
):
    config = load(dict({"panel": ["a", "b"]}, **values))
    config, _ = fusion.with_overrides(config, {"panel": panel} if panel else {})
    assert (config.judge.model, slugs(config.synthesizer)) == expected


def test_flags_name_members_by_slug_or_label(fusion, load):
    config = load({"panel": [{"model": "m1", "label": "one", "temperature": 0.1}, "m2"]})
    config = fusion.with_flags(config, {"panel": ["m2", "one", "new"], "judge": "m2"})
    assert slugs(config.panel) == ["m2", "m1", "new"]
    assert config.panel[1].temperature == 0.1


def test_a_label_still_names_its_member_when_the_panel_is_replaced_by_a_flag(fusion, load):
    config = load({"panel": [{"model": "m1", "label": "one", "temperature": 0.1}, "m2"]})
    config = fusion.with_flags(config, {"panel": ["m2"], "judge": "one", "synthesizer": ["one"]})
    assert (config.judge.model, slugs(config.synthesizer)) == ("m1", ["m1"])


WRONG_FLAGS = [
    ("samples", 9), ("samples", 0), ("layers", 5), ("mode", "deep"), ("max_cost_usd", -1),
    ("max_cost_usd", float("nan")), ("timeout_s", 0), ("timeout_s", float("inf")),
    ("panel", []), ("panel", ["m"] * 17), ("panel", ["a\nb"]), ("judge", "m" * 300),
    ("synthesizer", []),
]


@pytest.mark.parametrize("key, value", labelled(WRONG_FLAGS))
def test_a_flag_is_bounded_like_its_key(fusion, load, key, value):
    with pytest.raises(fusion.UsageError) as caught:
        fusion.with_flags(load({"panel": ["m"]}), {key: value})
    option = {"max_cost_usd": "max-cost", "timeout_s": "timeout"}.get(key, key)
    assert caught.value.exit_code == 2
    assert "--" + option in caught.value.message


# ---- where each value came from -------------------------------------------------------------


def test_origins_name_the_file_and_are_silent_about_defaults(load, tmp_path):
    origins = load({"panel": ["m"], "samples": 2}).origins
    assert set(origins) == {"panel", "samples"}
    assert all(str(tmp_path / "config.json") in origin for origin in origins.values())


def test_origins_name_the_preset(fusion, env_of):
    origins = fusion.load_config("self", env_of()).origins
    assert set(origins) == {"panel", "judge", "synthesizer", "samples"}
    assert all("preset self" in origin for origin in origins.values())


def test_origins_tell_flags_and_requests_from_the_file(fusion, load):
    config = fusion.with_flags(load({"panel": ["m"], "samples": 2, "layers": 2}),
                               {"refine": True, "layers": 3})
    config, _ = fusion.with_overrides(config, {"vote": True, "samples": 4})
    origins = dict(config.origins, panel="file")
    assert origins == {"panel": "file", "samples": "request", "vote": "request",
                       "refine": "flag", "layers": "flag"}
    assert (config.samples, config.layers, config.refine, config.vote) == (4, 3, True, True)


# ---- which configuration is taken -----------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A HOME of its own, with a configuration in it on demand."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("USERPROFILE", str(path))
    return path


def put_config(path, model):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"panel": [model]}))
    return str(path)


def test_the_configuration_is_taken_in_the_documented_order(fusion, env_of, home, tmp_path):
    def taken(choice, named):
        env = env_of({"FUSION_CONFIG": named} if named else {})
        return slugs(fusion.load_config(choice, env).panel)

    option = put_config(tmp_path / "option.json", "by/option")
    variable = put_config(tmp_path / "variable.json", "by/variable")
    assert taken(None, None) == BUDGET
    put_config(home / ".config" / "fusion" / "config.json", "by/home")
    assert taken(None, None) == ["by/home"]
    assert taken(None, variable) == ["by/variable"]
    assert taken(option, variable) == ["by/option"]
    assert taken("frontier", variable) == FRONTIER
    assert taken(None, "frontier") == FRONTIER


FITTING = [
    ("budget", {}),
    ("budget", {"OPENROUTER_API_KEY": "k"}),
    ("budget", {"OPENROUTER_API_KEY": "k", "OPENAI_API_KEY": "k"}),
    ("budget", {"FUSION_API_KEY": "k"}),
    ("budget", {"FUSION_BASE_URL": "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY": "k"}),
    ("openai", {"OPENAI_API_KEY": "k"}),
    ("local", {"FUSION_BASE_URL": "http://127.0.0.1:11434/v1"}),
    ("local", {"FUSION_BASE_URL": "http://localhost:8080"}),
    ("local", {"FUSION_BASE_URL": "http://[::1]:1234/v1"}),
    ("local", {"FUSION_BASE_URL": "http://127.0.0.1:8000/v1", "OPENAI_API_KEY": "k"}),
]


@pytest.mark.parametrize("name, variables", labelled(FITTING))
def test_without_a_choice_the_preset_fits_the_backend(fusion, env_of, home, name, variables):
    found = fusion.load_config(None, env_of(variables))
    assert found.panel == fusion.load_config(name, env_of(variables)).panel
    assert re.search(r"\b%s\b" % name, found.source)


def test_nothing_is_discovered_in_the_current_directory(run_fusion, program, tmp_path):
    here = tmp_path / "work"
    for name in ("budget", "budget.json", "config.json", "fusion.json", "presets/budget.json",
                 ".config/fusion/config.json"):
        put_config(here / name, "planted/model")
    (here / ".env").write_text("FUSION_CONFIG=%s\n" % (here / "config.json"))
    for choice in ((), ("--config", "budget")):
        result = run_fusion("ask", "--estimate", "--json", *choice, "hi", path=program, cwd=here)
        assert result.code == 0, result.err
        asked = {call["model"] for call in json.loads(result.out)["calls"]}
        assert asked == set(BUDGET) | {OPUS}


def test_the_home_configuration_and_the_env_file_beside_the_script_do_count(
    run_fusion, program, tmp_path
):
    put_config(tmp_path / "home/.config/fusion/config.json", "by/home")
    options = {"path": program, "home": tmp_path / "home", "cwd": tmp_path}
    found = run_fusion("ask", "--estimate", "--json", "hi", **options)
    assert json.loads(found.out)["calls"][0]["model"] == "by/home"
    (program.parent / ".env").write_text("FUSION_CONFIG=frontier\n")
    found = run_fusion("ask", "--estimate", "--json", "hi", **options)
    assert json.loads(found.out)["calls"][0]["model"] == FRONTIER[0]


# ---- keys and hosts: the default backend ----------------------------------------------------

OPENROUTER, OPENAI = "openrouter.ai", "api.openai.com"
BUILT_IN_HOSTS = [
    (["FUSION_API_KEY"], OPENROUTER, "FUSION_API_KEY"),
    (["OPENROUTER_API_KEY"], OPENROUTER, "OPENROUTER_API_KEY"),
    (["OPENAI_API_KEY"], OPENAI, "OPENAI_API_KEY"),
    (["FUSION_API_KEY", "OPENROUTER_API_KEY"], OPENROUTER, "FUSION_API_KEY"),
    (["FUSION_API_KEY", "OPENAI_API_KEY"], OPENROUTER, "FUSION_API_KEY"),
    (["OPENROUTER_API_KEY", "OPENAI_API_KEY"], OPENROUTER, "OPENROUTER_API_KEY"),
    (list(KEYS), OPENROUTER, "FUSION_API_KEY"),
    ([], OPENROUTER, ""),
]


def values_of(names, prefix):
    """A value of its own for each variable: {"FUSION_API_KEY": "real-FUSION_API_KEY"}."""
    return {name: "%s-%s" % (prefix, name) for name in names}


@pytest.mark.parametrize("source", ["real", "file"])
@pytest.mark.parametrize("names, host, name", labelled(BUILT_IN_HOSTS))
def test_without_a_url_the_first_key_decides_between_openrouter_and_openai(
    load, env_of, source, names, host, name
):
    backend = load({"panel": ["m"]}, env_of(**{source: values_of(names, source)})).panel[0].backend
    assert backend.url.startswith("https://%s/" % host)
    assert backend.key == ("%s-%s" % (source, name) if name else "")


def key_subsets():
    return [names for count in range(4) for names in itertools.combinations(KEYS, count)]


def first_of(names, prefix):
    return "Bearer %s-%s" % (prefix, [name for name in KEYS if name in names][0]) if names else None


@pytest.mark.parametrize("url_in", ["real", "file", "both"])
def test_a_backend_gets_only_keys_of_the_place_that_names_its_url(
    load, env_of, answer, url_in
):
    with Upstream() as up:
        for real, file in itertools.product(key_subsets(), key_subsets()):
            sources = {"real": values_of(real, "real"), "file": values_of(file, "file")}
            named = ("real", "file") if url_in == "both" else (url_in,)
            for source in named:
                url = up.url if source == named[0] else "http://127.0.0.1:1/v1"
                sources[source]["FUSION_BASE_URL"] = url
            up.requests.clear()
            answer(load({"panel": ["m"], "mode": "solo"}, env_of(**sources)))
            expected = first_of(file, "file") if url_in == "file" else first_of(real, "real")
            assert len(up.posts()) == 1
            assert set(authorizations(up)) == {expected}, (real, file)


def test_a_real_key_goes_to_any_real_url_over_every_stage(load, env_of, answer):
    with Upstream() as up:
        env = env_of({"FUSION_BASE_URL": up.url, "FUSION_API_KEY": SECRET})
        answer(load({"panel": ["a", "b"], "refine": True}, env))
        assert len(up.posts()) >= 5
        assert set(authorizations(up)) == {"Bearer " + SECRET}


def test_white_space_around_a_key_is_not_sent(load, env_of, answer):
    with Upstream() as up:
        env = env_of({"FUSION_BASE_URL": " %s " % up.url, "FUSION_API_KEY": " %s\r\n" % SECRET})
        answer(load({"panel": ["a"], "mode": "solo"}, env))
        assert set(authorizations(up)) == {"Bearer " + SECRET}


ENV_FILE_KEYS = [
    ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", True),
    ("https://api.openai.com/v1", "OPENAI_API_KEY", True),
    ("https://api.openai.com/v1", "OPENROUTER_API_KEY", False),
    ("https://openrouter.ai/api/v1", "OPENAI_API_KEY", False),
    ("https://evil.example/v1", "OPENROUTER_API_KEY", False),
    ("https://openrouter.ai.evil.example/v1", "OPENROUTER_API_KEY", False),
    ("https://notopenrouter.ai/v1", "OPENROUTER_API_KEY", False),
    ("http://127.0.0.1:8000/v1", "FUSION_API_KEY", False),
    ("http://api.openai.com/v1", "OPENAI_API_KEY", False),
]


@pytest.mark.parametrize("url, name, goes", labelled(ENV_FILE_KEYS))
def test_an_env_file_key_reaches_a_real_url_only_at_its_own_well_known_host(
    load, env_of, url, name, goes
):
    backend = load({"panel": ["m"]}, env_of({"FUSION_BASE_URL": url}, {name: SECRET})).backend
    assert backend.key == (SECRET if goes else "")


def test_a_redirect_never_carries_the_key_to_another_host(load, env_of, failure):
    with Upstream() as other:
        target = other.url + "/chat/completions"
        for status in (301, 302, 307, 308):
            moved = Reply(status=status, headers={"Location": target})
            with Upstream(lambda request, moved=moved: moved) as up:
                env = env_of({"FUSION_BASE_URL": up.url, "FUSION_API_KEY": SECRET})
                failure(load({"panel": ["a"], "mode": "solo", "max_retries": 0}, env))
                assert up.posts()
        assert other.requests == []


@pytest.mark.parametrize("url", ["nonsense", "ftp://h/v1", "http://user:word@h/v1", "http://"])
def test_a_wrong_fusion_base_url_is_a_usage_error(fusion, env_of, url):
    with pytest.raises(fusion.UsageError) as caught:
        fusion.load_config("budget", env_of({"FUSION_BASE_URL": url}))
    assert caught.value.exit_code == 2
    assert "FUSION_BASE_URL" in caught.value.message


# ---- keys and hosts: members with a base_url ------------------------------------------------


@pytest.fixture
def two_backends():
    """The default backend and another one."""
    with Upstream() as default, Upstream() as other:
        yield default, other


@pytest.mark.parametrize("place", ["panel", "judge", "synthesizer", "spares"])
@pytest.mark.parametrize("variable", [None, "FUSION_OTHER_KEY"])
def test_a_member_with_a_base_url_gets_the_key_of_its_api_key_env_or_none(
    load, env_of, answer, two_backends, place, variable
):
    default, other = two_backends
    if place == "spares":
        default.script = {"ok": "a whole draft of the other one"}
    member = {"model": "elsewhere", "base_url": other.url}
    if variable:
        member["api_key_env"] = variable
    values = {"panel": ["broken", "ok"], "judge": "ok", "synthesizer": "ok", "max_retries": 0}
    values[place] = [values["panel"][0], member] if place == "panel" else [member]
    values["judge"] = member if place == "judge" else "ok"
    env = env_of(dict(values_of(KEYS, "real"), FUSION_BASE_URL=default.url,
                      FUSION_OTHER_KEY=SECRET))
    answer(load(values, env))
    assert other.posts("elsewhere")
    assert set(authorizations(other)) == {"Bearer " + SECRET if variable else None}
    assert set(authorizations(default)) == {"Bearer real-FUSION_API_KEY"}


def test_an_automatic_panel_leaves_judge_writer_and_spares_at_their_own_backend(
    load, env_of, answer, two_backends
):
    default, other = two_backends
    default.models = ["a", "b"]
    own = {"model": "elsewhere", "base_url": other.url, "api_key_env": "FUSION_OTHER_KEY"}
    env = env_of({"FUSION_BASE_URL": default.url, "FUSION_API_KEY": "default",
                  "FUSION_OTHER_KEY": SECRET})
    answer(load({"panel": "auto", "judge": own, "synthesizer": own, "spares": [own]}, env))
    assert {request.model for request in default.posts()} == {"a", "b"}
    assert len(other.posts("elsewhere")) >= 2
    assert set(authorizations(default)) == {"Bearer default"}
    assert set(authorizations(other)) == {"Bearer " + SECRET}


@pytest.mark.parametrize("url", [
    "https://openrouter.ai/api/v1", "https://api.openai.com/v1", "https://api.groq.com/openai/v1"])
def test_a_member_with_a_base_url_never_gets_a_key_by_itself(fusion, load, env_of, failure, url):
    real = dict(values_of(KEYS, "real"), GROQ_API_KEY=SECRET)
    config = load({"panel": [{"model": "m", "base_url": url}]}, env_of(real))
    assert config.panel[0].backend.key == ""
    error, _ = failure(config)
    assert isinstance(error, fusion.UsageError)
    assert "api_key_env" in error.hint


@pytest.mark.parametrize("same_url", [True, False])
def test_an_env_file_key_of_a_member_goes_only_to_the_url_of_that_file(
    fusion, load, env_of, network, two_backends, same_url
):
    file_backend, other = two_backends
    target = file_backend if same_url else other
    member = {"model": "m", "base_url": target.url, "api_key_env": "FUSION_X"}
    env = env_of({}, {"FUSION_BASE_URL": file_backend.url, "FUSION_X": SECRET})
    config = load({"panel": [member], "mode": "solo"}, env)
    run = fusion.start_run(config, network)
    try:
        fusion.fuse(config, QUESTION, run)
    except fusion.UsageError:
        assert not same_url
    assert ("Bearer " + SECRET in authorizations(target)) == same_url
    assert "Bearer " + SECRET not in authorizations(other)


def test_the_real_environment_wins_over_an_env_file_for_api_key_env(load, env_of, answer):
    with Upstream() as up:
        member = {"model": "m", "base_url": up.url, "api_key_env": "FUSION_X"}
        env = env_of({"FUSION_X": "real"}, {"FUSION_BASE_URL": up.url, "FUSION_X": "file"})
        answer(load({"panel": [member], "mode": "solo"}, env))
        assert set(authorizations(up)) == {"Bearer real"}


MAY_GO = [
    ("OPENAI_API_KEY", "https://api.openai.com/v1"),
    ("GROQ_API_KEY", "https://api.groq.com/openai/v1"),
    ("OPENROUTER_API_KEY", "https://openrouter.ai/api/v1"),
    ("FUSION_ANYTHING", "https://example.com/v1"),
    ("FUSION_ANYTHING", "http://127.0.0.1:8080/v1"),
]
MAY_NOT_GO = [
    ("GROQ_API_KEY", "https://evil.example/v1"),
    ("GROQ_API_KEY", "http://127.0.0.1:8080/v1"),
    ("OPENAI_API_KEY", "https://api.groq.com/openai/v1"),
    ("OPENAI_API_KEY", "http://api.openai.com/v1"),
    ("OPENAI_API_KEY", "https://api.openai.com.evil.example/v1"),
    ("OPENAI_API_KEY", "https://evil.example/api.openai.com/v1"),
    ("OPENROUTER_API_KEY", "https://api.openai.com/v1"),
    ("AWS_SECRET_ACCESS_KEY", "https://api.openai.com/v1"),
    ("HOME", "http://127.0.0.1:8080/v1"),
    ("FUSION_SERVER_KEY", "https://api.openai.com/v1"),
    ("FUSION_SERVER_KEY", "http://127.0.0.1:8080/v1"),
]


@pytest.mark.parametrize("name, url", labelled(MAY_GO))
def test_api_key_env_takes_fusion_names_and_the_well_known_one_of_the_host(
    load, env_of, name, url
):
    member = {"model": "m", "base_url": url, "api_key_env": name}
    backend = load({"panel": [member]}, env_of({name: SECRET})).panel[0].backend
    assert (backend.url, backend.key) == (url, SECRET)


@pytest.mark.parametrize("name, url", labelled(MAY_NOT_GO))
@pytest.mark.parametrize("place", ["panel", "judge", "synthesizer", "spares"])
def test_api_key_env_is_refused_where_that_key_does_not_belong(
    fusion, load, env_of, name, url, place
):
    member = {"model": "m", "base_url": url, "api_key_env": name}
    values = {"panel": ["m"], place: member if place == "judge" else [member]}
    with pytest.raises(fusion.UsageError) as caught:
        load(values, env_of({name: SECRET}))
    assert caught.value.exit_code == 2
    assert name in caught.value.message
    assert SECRET not in caught.value.message + caught.value.hint


def test_api_key_env_without_a_base_url_is_refused(refused):
    member = {"model": "m", "api_key_env": "FUSION_X"}
    assert "panel[1].api_key_env" in refused({"panel": ["m", member]})
    assert "judge.api_key_env" in refused({"panel": ["m"], "judge": member})


# ---- keys that are missing ------------------------------------------------------------------


def test_without_any_key_openrouter_is_refused_with_a_way_out(fusion, load, failure):
    error, run = failure(load({"panel": ["m"]}))
    assert isinstance(error, fusion.UsageError)
    assert error.exit_code == 2
    assert "OPENROUTER_API_KEY" in error.hint
    assert "--fake" in error.hint
    assert run.ledger.records == []


def test_the_program_says_how_to_go_on_without_a_key(run_fusion):
    result = run_fusion("ask", "hello")
    assert (result.code, result.out) == (2, "")
    assert re.search(r"(?m)^hint: .*OPENROUTER_API_KEY.*--fake", result.err)


def test_an_api_key_env_that_is_not_set_is_named(fusion, load, failure):
    member = {"model": "m", "base_url": "https://api.groq.com/openai/v1",
              "api_key_env": "GROQ_API_KEY"}
    error, _ = failure(load({"panel": [member]}))
    assert isinstance(error, fusion.UsageError)
    assert "GROQ_API_KEY" in error.message + error.hint


def test_loopback_works_without_a_key(load, env_of, answer):
    with Upstream() as up:
        result, _ = answer(load({"panel": ["m"]}, env_of({"FUSION_BASE_URL": up.url})))
        assert result.reply.text == "draft of m"
        assert set(authorizations(up)) == {None}


# ---- .env files -----------------------------------------------------------------------------

ENV_LINES = [
    ("FUSION_X=plain", "plain"),
    ("FUSION_X = spaced  ", "spaced"),
    ("  export FUSION_X=exported", "exported"),
    ('FUSION_X="double quoted"', "double quoted"),
    ("FUSION_X='single # quoted'", "single # quoted"),
    ("export FUSION_X='quoted' # comment", "quoted"),
    ("FUSION_X=value # comment", "value"),
    ("FUSION_X=val#ue", "val#ue"),
    ("FUSION_X=a=b==", "a=b=="),
    ("FUSION_X=first\nFUSION_X=second", "second"),
    ("\ufeffFUSION_X=after a mark", "after a mark"),
    ("FUSION_X=windows\r\nFUSION_Y=1\r\n", "windows"),
    ("# FUSION_X=commented", ""),
    ("FUSION_X=", ""),
    ('FUSION_X=""', ""),
    ("FUSION_X= # only a comment", ""),
    ("nonsense\n\n===\nFUSION_X=found", "found"),
]


@pytest.fixture
def env_file(tmp_path):
    def write(text):
        path = tmp_path / "settings.env"
        path.write_bytes(text.encode())
        return str(path)

    return write


@pytest.mark.parametrize("text, value", labelled(ENV_LINES))
def test_an_env_file_takes_quotes_export_and_comments(fusion, env_file, text, value):
    assert fusion.read_env(env_file(text), {}).get("FUSION_X") == value


def test_an_env_file_sets_only_our_own_keys_and_search_keys(fusion, env_file):
    allowed = KEYS + ("FUSION_BASE_URL", "FUSION_CONFIG", "FUSION_ANY", "TAVILY_API_KEY",
                      "BRAVE_API_KEY", "SERPAPI_API_KEY")
    refused = ("PATH", "HOME", "LD_PRELOAD", "PYTHONPATH", "GROQ_API_KEY", "ANTHROPIC_API_KEY",
               "HTTPS_PROXY", "SSL_CERT_FILE", "XDG_STATE_HOME", "NO_COLOR", "NOT_FUSION_X")
    text = "\n".join("%s=x" % name for name in allowed + refused)
    before = dict(os.environ)
    env = fusion.read_env(env_file(text), {})
    assert [name for name in allowed if env.get(name) != "x"] == []
    assert [name for name in refused if env.get(name)] == []
    assert dict(os.environ) == before


def test_the_real_environment_wins_over_the_env_file(fusion, env_file):
    env = fusion.read_env(env_file("FUSION_X=file\nFUSION_Y=file"), {"FUSION_X": "real"})
    assert (env.get("FUSION_X"), env.get("FUSION_Y")) == ("real", "file")


def make_binary(folder):
    (folder / "binary.env").write_bytes(b"FUSION_X=\xff\xfe")
    return folder / "binary.env"


@pytest.mark.parametrize("make", [make_missing, make_directory, make_endless_link, make_binary])
def test_an_env_file_that_cannot_be_read_is_an_error(fusion, tmp_path, make):
    path = str(make(tmp_path))
    with pytest.raises(fusion.UsageError) as caught:
        fusion.read_env(path, {})
    assert caught.value.exit_code == 2
    assert path in caught.value.message


def test_a_missing_env_file_ends_the_program_with_2(run_fusion, tmp_path):
    result = run_fusion("ask", "--fake", "--env-file", tmp_path / "none.env", "hi")
    assert (result.code, result.out) == (2, "")
    assert "none.env" in result.err


# ---- keys are never shown -------------------------------------------------------------------


def everything_of(error, run):
    """All words of a failure that reach a person, a client or a log."""
    return json.dumps([str(error), repr(error), error.message, error.hint, str(error.param),
                       run.degraded, [list(record[:2]) for record in run.ledger.records]])


ECHOES = {
    "a 401 that quotes the key": error_reply(401, "Incorrect API key provided: %s" % SECRET),
    "a 400 that quotes the header": error_reply(400, "bad header Bearer %s here" % SECRET),
    "a 500 of plain text": Reply(status=500, body=("key %s is broken" % SECRET).encode()),
    "a redirect to the key": Reply(status=302, headers={"Location": "/login?key=" + SECRET}),
    "an error in the stream": Reply(error="the key %s has no credit" % SECRET),
    "a stream that is not JSON": Reply(body=("data: no key %s\n\n" % SECRET).encode()),
}


@pytest.mark.parametrize("name", sorted(ECHOES))
def test_a_key_that_the_backend_echoes_is_not_repeated(load, env_of, failure, name):
    with Upstream(lambda request: ECHOES[name]) as up:
        env = env_of({"FUSION_BASE_URL": up.url, "FUSION_API_KEY": SECRET})
        found = everything_of(*failure(load({"panel": ["m"], "max_retries": 0}, env)))
        assert up.posts()
    assert SECRET not in found
    assert SECRET[:-4] not in found


@pytest.mark.parametrize("odd", ["\n", "\r\nX-Other: 1", "\x00", "\u20ac"])
@pytest.mark.parametrize("of_member", [True, False])
def test_a_key_that_is_no_header_value_is_refused_without_being_shown(
    fusion, load, env_of, failure, odd, of_member
):
    with Upstream() as up:
        env = env_of({"FUSION_BASE_URL": up.url, "FUSION_API_KEY": SECRET + odd + "rest"})
        member = {"model": "m", "base_url": up.url, "api_key_env": "FUSION_API_KEY"}
        try:
            config = load({"panel": [member if of_member else "m"], "max_retries": 0}, env)
            found = everything_of(*failure(config))
        except fusion.UsageError as error:
            found = repr(error) + error.message + error.hint
        assert up.requests == []
    assert "FUSION_API_KEY" in found
    assert SECRET not in found


def test_no_repr_shows_a_key(load, env_of):
    env = env_of({"FUSION_API_KEY": SECRET, "FUSION_X": SECRET})
    member = {"model": "m", "base_url": "http://127.0.0.1:1/v1", "api_key_env": "FUSION_X"}
    config = load({"panel": ["m", member]}, env)
    assert [member.backend.key for member in config.panel] == [SECRET, SECRET]
    assert SECRET not in repr(config)
    assert SECRET not in str(config.panel) + repr(config.backend)


def test_the_repr_of_the_environment_shows_no_key(env_of):
    env = env_of({"FUSION_API_KEY": SECRET}, {"OPENAI_API_KEY": SECRET})
    assert SECRET not in "%r %s" % (env, env)


def test_a_run_of_the_program_keeps_and_prints_no_key(run_fusion, program, tmp_path):
    with Upstream() as up:
        (program.parent / ".env").write_text(
            'FUSION_BASE_URL="%s"\nexport FUSION_API_KEY=\'%s\'\n' % (up.url, SECRET))
        result = run_fusion("ask", "--json", "--panel", "a,b", "hello", path=program,
                                 home=tmp_path, env={"OPENROUTER_API_KEY": "real-" + SECRET})
        assert result.code == 0, result.err
        assert set(authorizations(up)) == {"Bearer " + SECRET}
    kept = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert kept, "the run is kept for show"
    assert all(SECRET not in path.read_text() for path in kept)
    assert SECRET not in result.out + result.err


# ---- overrides of a request: what is allowed ------------------------------------------------

ALLOWED = [
    ("refine", True), ("layers", 3), ("samples", 4), ("mode", "solo"), ("quorum", 2),
    ("vote", True), ("max_cost_usd", 0.25),
]


@pytest.mark.parametrize("key, value", labelled(ALLOWED))
def test_a_request_may_set_each_allowed_key(fusion, load, key, value):
    config, options = fusion.with_overrides(load({"panel": ["a", "b"]}), {key: value})
    assert getattr(config, key) == value
    assert options == {}


def test_a_request_may_name_panel_judge_and_synthesizer(load, env_of, fusion, answer):
    with Upstream() as up:
        config = load({"panel": ["a", "b"]}, env_of({"FUSION_BASE_URL": up.url}))
        config, _ = fusion.with_overrides(
            config, {"panel": ["x", "y"], "judge": "j", "synthesizer": "s", "mode": "fuse"})
        result, _ = answer(config)
        assert {request.model for request in up.posts()} == {"x", "y", "j", "s"}
        assert result.receipt["synthesizer"] == "s"


def test_include_events_and_progress_are_options_and_no_configuration(fusion, load):
    config = load({"panel": ["a"]})
    wanted = {"include": ["drafts", "analysis", "trace"], "events": True, "progress": "reasoning"}
    found, options = fusion.with_overrides(config, wanted)
    assert found == config
    assert dict(options, include=list(options["include"])) == wanted


def test_an_empty_block_changes_nothing(fusion, load):
    config = load({"panel": ["a", "b"], "samples": 2})
    assert fusion.with_overrides(config, {}) == (config, {})


OUT_OF_BOUNDS = [
    ("refine", 1), ("refine", "yes"), ("vote", None), ("layers", 0), ("layers", 5),
    ("layers", 1.5), ("samples", 0), ("samples", 9), ("samples", "2"), ("mode", "deep"),
    ("quorum", -1), ("quorum", True), ("max_cost_usd", -1), ("max_cost_usd", "1"),
    ("max_cost_usd", None), ("max_cost_usd", float("nan")), ("max_cost_usd", float("inf")),
    ("panel", []), ("panel", "a"), ("panel", "auto"), ("panel", ["a"] * 17), ("panel", [""]),
    ("panel", [5]), ("panel", {}), ("judge", 5), ("judge", ""), ("judge", ["a"]),
    ("judge", "a\r\nb"), ("synthesizer", {}), ("synthesizer", "x" * 300), ("synthesizer", None),
    ("include", ["secrets"]), ("include", "drafts"), ("events", 1), ("progress", "all"),
    ("preset", ["budget"]), ("preset", ""), ("preset", 5),
]


@pytest.fixture
def overridden(fusion):
    """Applies overrides that must be refused, and returns the error."""

    def refuse(config, wanted, served=None):
        with pytest.raises(fusion.UsageError) as caught:
            fusion.with_overrides(config, wanted, served or {})
        assert (caught.value.status, caught.value.exit_code) == (400, 2)
        return caught.value

    return refuse


@pytest.mark.parametrize("key, value", labelled(OUT_OF_BOUNDS))
def test_a_value_out_of_bounds_is_a_400_that_names_the_key(load, overridden, key, value):
    error = overridden(load({"panel": ["a"]}), {key: value})
    assert re.search(r"\b%s\b" % key, error.param)
    assert re.search(r"\b%s\b" % key, error.message)


@pytest.mark.parametrize("block", [[], "panel", 5, None, True, ["panel"]])
def test_a_block_that_is_no_object_is_a_400(load, overridden, block):
    assert overridden(load({"panel": ["a"]}), block).param == "fusion"


# ---- overrides of a request: what is not ----------------------------------------------------

REQUEST_KEYS = {"panel", "judge", "synthesizer", "refine", "layers", "samples", "mode", "quorum",
                "vote", "preset", "max_cost_usd", "include", "events", "progress"}
FOREIGN = ["base_url", "api_key_env", "api_key", "key", "url", "headers", "header", "tools",
           "tool", "path", "root", "timeout", "registry", "source", "origins", "backend", "served",
           "config", "presets", "sandbox", "model", "", "Panel", "refine ", "__class__"]


@pytest.mark.parametrize("key", sorted(set(DEFAULTS) - REQUEST_KEYS) + FOREIGN)
def test_any_other_key_is_a_400_that_names_it(load, overridden, key):
    error = overridden(load({"panel": ["a"]}), {"refine": True, key: DEFAULTS.get(key, "x")})
    assert error.param == ("fusion." + key).rstrip(".")
    assert key in error.message


def test_a_misspelt_override_is_refused_with_the_nearest_one(load, overridden):
    assert "samples" in overridden(load({"panel": ["a"]}), {"sampels": 2}).message


SMUGGLED = [
    ("panel", [{"model": "a"}]),
    ("panel", ["a", {"model": "a", "base_url": "http://evil.example/v1"}]),
    ("judge", {"model": "a", "api_key_env": "FUSION_API_KEY"}),
    ("synthesizer", {"model": "a", "headers": {"X": "y"}}),
    ("synthesizer", [{"model": "a", "tools": True}]),
    ("max_cost_usd", {"value": 1}),
    ("include", [{"drafts": True}]),
    ("preset", {"panel": ["a"]}),
]


@pytest.mark.parametrize("key, value", labelled(SMUGGLED))
def test_an_object_in_place_of_a_name_is_a_400(load, overridden, key, value):
    error = overridden(load({"panel": ["a"]}), {key: value})
    assert re.match(r"fusion\.%s\b" % key, error.param)


@pytest.mark.parametrize("own, wanted, found", [
    (1, 5, 1), (1, 0.5, 0.5), (1, 1, 1), (None, 2, 2), (1, None, 1), (None, None, None)])
def test_a_request_moves_the_ceiling_only_downward(fusion, load, own, wanted, found):
    config = load({"panel": ["a"], "max_cost_usd": own})
    block = {} if wanted is None else {"max_cost_usd": wanted}
    assert fusion.with_overrides(config, block)[0].max_cost_usd == found


PLANS = [
    (15, {"layers": 3, "refine": True}, True),  # 45 drafts, judge, synthesizer, refine: 48
    (15, {"layers": 3}, True),
    (16, {"layers": 3}, False),
    (6, {"samples": 8}, False),
    (5, {"samples": 8, "refine": True}, True),
    (3, {"samples": 4, "layers": 4}, False),
    (16, {"layers": 4, "samples": 8}, False),
    (16, {"layers": 4, "samples": 8, "mode": "solo"}, True),
]


@pytest.mark.parametrize("members, wanted, fits", labelled(PLANS))
def test_a_request_plans_at_most_48_calls(fusion, load, members, wanted, fits):
    config = load({"panel": ["m%d" % index for index in range(members)]})
    if fits:
        assert fusion.with_overrides(config, wanted)[0].layers == wanted.get("layers", 1)
        return
    with pytest.raises(fusion.UsageError) as caught:
        fusion.with_overrides(config, wanted)
    assert caught.value.status == 400
    assert "48" in caught.value.message


def test_an_automatic_panel_keeps_to_48_calls_too(fusion, load, env_of, network):
    with Upstream(models=["m%d" % index for index in range(16)]) as up:
        config = load({"panel": "auto"}, env_of({"FUSION_BASE_URL": up.url}))
        try:
            config, _ = fusion.with_overrides(config, {"samples": 8})
            fusion.fuse(config, QUESTION, fusion.start_run(config, network))
        except fusion.UsageError as error:
            assert error.status == 400
        assert len(up.posts()) <= 48


def test_an_automatic_panel_is_counted_as_it_is_found(fusion, load, env_of, answer):
    with Upstream(models=["a", "b"]) as up:
        config = load({"panel": "auto"}, env_of({"FUSION_BASE_URL": up.url}))
        config, _ = fusion.with_overrides(config, {"samples": 4})
        result, _ = answer(config)
        assert len(result.receipt["panel_succeeded"]) == 2 * 4


# ---- overrides of a request: presets and models ---------------------------------------------


def test_a_request_may_choose_a_served_preset_and_change_it(fusion, load):
    config = load({"panel": ["a"]})
    served = {"big": load({"panel": ["x", "y"], "samples": 2})}
    found, _ = fusion.with_overrides(config, {"preset": "big", "samples": 3}, served)
    assert (slugs(found.panel), found.samples) == (["x", "y"], 3)


@pytest.mark.parametrize("name", ["budget", "frontir", "../x", "/etc/passwd", "config.json"])
def test_a_preset_that_is_not_served_is_a_400(fusion, load, env_of, overridden, name):
    config = load({"panel": ["a"]})
    served = {"frontier": fusion.load_config("frontier", env_of())}
    assert "preset" in overridden(config, {"preset": name}, served).param
    assert "preset" in overridden(config, {"preset": name}).param


@pytest.mark.parametrize("own, of_preset, found", [
    (False, True, False), (True, True, True), (True, False, False), (False, False, False)])
def test_a_preset_cannot_widen_tools(fusion, load, own, of_preset, found):
    served = {"p": load({"panel": ["x"], "tools_enabled": of_preset})}
    config = load({"panel": ["a"], "tools_enabled": own})
    assert fusion.with_overrides(config, {"preset": "p"}, served)[0].tools_enabled is found


@pytest.mark.parametrize("own, of_preset, wanted, found", [
    (1, 5, None, 1), (1, 0.5, None, 0.5), (1, None, None, 1), (None, 2, None, 2),
    (1, 5, 3, 1), (1, 0.5, 0.7, 0.5), (None, None, None, None), (1, None, 0.2, 0.2)])
def test_a_preset_cannot_raise_the_ceiling(fusion, load, own, of_preset, wanted, found):
    served = {"p": load({"panel": ["x"], "max_cost_usd": of_preset})}
    config = load({"panel": ["a"], "max_cost_usd": own})
    block = {"preset": "p"} if wanted is None else {"preset": "p", "max_cost_usd": wanted}
    assert fusion.with_overrides(config, block, served)[0].max_cost_usd == found


def test_a_preset_cannot_widen_the_models_that_requests_may_name(load, overridden):
    served = {"p": load({"panel": ["x"]})}
    config = load({"panel": ["a"], "allow_models": ["openai/*"]})
    error = overridden(config, {"preset": "p", "panel": ["expensive/model"]}, served)
    assert "panel" in error.param


MODELS = [
    (["*"], "any/model", True),
    (["openai/*"], "openai/gpt-5.5", True),
    (["openai/*"], "anthropic/claude-opus-4.8", False),
    (["openai/*"], "evil/openai/gpt", False),
    (["openai/gpt-5.5"], "openai/gpt-5.5", True),
    (["openai/gpt-5.5"], "openai/gpt-5.5-pro", False),
    (["openai/*", "x-ai/*"], "x-ai/grok-4.7", True),
    ([], "openai/gpt-5.5", False),
    ([], "configured/model", True),
    (["openai/*"], "configured/model", True),
]


@pytest.mark.parametrize("key", ["panel", "judge", "synthesizer"])
@pytest.mark.parametrize("patterns, slug, allowed", labelled(MODELS))
def test_requests_name_only_allowed_or_configured_models(
    fusion, load, overridden, key, patterns, slug, allowed
):
    config = load({"panel": ["configured/model"], "allow_models": patterns})
    wanted = {key: [slug] if key == "panel" else slug}
    if allowed:
        found = getattr(fusion.with_overrides(config, wanted)[0], key)
        assert slugs(found if isinstance(found, tuple) else [found]) == [slug]
    else:
        error = overridden(config, wanted)
        assert (slug in error.message, key in error.param) == (True, True)


def test_a_request_names_a_configured_member_by_its_label(
    fusion, load, env_of, answer, two_backends
):
    default, other = two_backends
    own = {"model": "m", "label": "mine", "base_url": other.url, "api_key_env": "FUSION_X",
           "temperature": 0.123}
    env = env_of({"FUSION_BASE_URL": default.url, "FUSION_API_KEY": "default", "FUSION_X": "own"})
    config = load({"panel": ["a", own], "allow_models": ["new/*"]}, env)
    config, _ = fusion.with_overrides(
        config, {"panel": ["mine", "new/model"], "judge": "new/model", "synthesizer": "mine"})
    answer(config)
    assert [request.model for request in other.posts()] == ["m", "m"]
    assert other.posts()[0].body["temperature"] == 0.123
    assert set(authorizations(other)) == {"Bearer own"}
    assert {request.model for request in default.posts()} == {"new/model"}
    assert set(authorizations(default)) == {"Bearer default"}
