"""The server as its clients meet it: what it takes, what it refuses, and in which words.

Everything goes over HTTP on loopback, to a server in this process that stands before a scripted
backend; `serve` and `smoke` run as programs.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from conftest import FUSION_PY, run_in
from serving import CHAT, MEMBERS, PRICED, Client, Serving, until
from test_talk import Program
from upstream import Reply, Upstream, error_reply

ANALYSIS = json.dumps(dict(
    dict.fromkeys(("consensus", "contradictions", "partial_coverage", "unique_insights",
                   "errors", "blind_spots", "must_include"), []), best_draft="A"))
TEXT = "Because of Rayleigh scattering."
SHAPE = {"message", "type", "param", "code"}
PANEL_CALLS = {"m1": 1, "m2": 1, "m3": 1, "judge": 1}


# ---- a server, and what is asked of it ---------------------------------------------------------


def cast(**changes):
    """A script in which all goes well, but for the models that are given."""
    found = {model: "draft of " + model for model in PRICED + ("m4", "w2")}
    found.update(judge=ANALYSIS, writer=TEXT)
    found.update(changes)
    return found


def user(text):
    return {"role": "user", "content": text}


ASKED = [{"role": "system", "content": "Be exact."}, user("Why is the sky blue?")]


class House(Serving):
    """A Serving with presets, environment variables of the configuration, and short questions."""

    def __init__(self, fusion, folder, script=None, presets=None, env=None, served=None,
                 network=None, **settings):
        super().__init__(fusion, folder, script or cast(), served, network, **settings)
        self.presets, self.env = presets or {}, env or {}

    def configuration(self, **settings):
        self.served["presets"] = {file: self.one(file, **changes)
                                  for file, changes in self.presets.items()}
        return self.one("config", **settings)

    def one(self, file, **settings):
        """The Config of a file with these settings."""
        values = {"panel": list(MEMBERS), "judge": "judge", "synthesizer": "writer",
                  "retry_backoff": 0, "max_retries": 0,
                  "prices": {model: {"input": 1, "output": 10} for model in PRICED + ("m4",)}}
        values.update(settings)
        path = self.folder / (file + ".json")
        path.write_text(json.dumps({key: value for key, value in values.items()
                                    if value is not None}))
        env = self.fusion.Env(dict({"FUSION_BASE_URL": self.up.url}, **self.env))
        return self.fusion.load_config(str(path), env)

    def chat(self, messages=ASKED, headers=(), **fields):
        """The Answer to a chat of these messages."""
        return self.post(dict({"messages": messages}, **fields), headers=headers)

    def calls(self):
        """{model: how often it was asked}."""
        models = [post.model for post in self.up.posts()]
        return {model: models.count(model) for model in sorted(set(models))}


@pytest.fixture
def house(fusion, tmp_path):
    """Makes Houses, and ends them after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda script=None, **options: stack.enter_context(
            House(fusion, tmp_path, script, **options))


@pytest.fixture(scope="module")
def calm(fusion, tmp_path_factory):
    """One server for all questions that need nothing special."""
    with House(fusion, tmp_path_factory.mktemp("calm"),
               presets={"small": {"panel": ["m4"], "judge": "m4", "synthesizer": "m4"}},
               served={"origins": ("http://page.test",)}) as made:
        yield made


def message(answer):
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["message"]


def receipt(answer):
    assert answer.status == 200, answer.body
    return answer.json["fusion"]


def codes(answer):
    return [entry["code"] for entry in receipt(answer)["degraded"]]


def chunks_of(answer):
    """The JSON of all events of a stream that has to end as streams do."""
    assert answer.status == 200, answer.body
    lines = [line[6:] for line in answer.body.decode().split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def streamed(chunks):
    """{"content", "tool_calls", "finish_reason"} of the first choice of a stream."""
    calls, found = [], {"content": "", "finish_reason": None}
    for chunk in chunks:
        for choice in chunk["choices"]:
            found["content"] += choice["delta"].get("content") or ""
            found["finish_reason"] = choice["finish_reason"] or found["finish_reason"]
            for piece in choice["delta"].get("tool_calls", ()):
                if piece["index"] == len(calls):
                    assert piece["id"] and piece["type"] == "function"
                    assert piece["function"]["name"]
                    calls.append(json.loads(json.dumps(piece)))
                else:
                    assert "id" not in piece
                    calls[piece["index"]]["function"]["arguments"] += \
                        piece["function"]["arguments"]
    return dict(found, tool_calls=calls)


def refusal(answer, status, param=None, code=None):
    """The error of an answer, which must have OpenAI's shape and nothing that leaks."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-should-retry"] == ("true" if status in (429, 503) else "false")
    assert re.fullmatch(r"(req|run)-\w+", answer.headers["x-request-id"])
    error = answer.json["error"]
    assert set(error) == SHAPE and set(answer.json) <= {"error", "fusion"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str) and error["type"]
    assert error["code"] is None or isinstance(error["code"], str)
    if param is not None:
        assert error["param"] == param, error
    if code is not None:
        assert error["code"] == code, error
    head = answer.raw_head.decode("latin-1")
    assert "Traceback" not in str(answer.body) and "python" not in head.lower()
    return error


# ---- tools of the client -----------------------------------------------------------------------


def tool(name, **properties):
    return {"type": "function", "function": {
        "name": name, "description": "it does " + name,
        "parameters": {"type": "object", "properties": properties}}}


TOOLS = [tool("add", a={"type": "integer"}), tool("look")]
GOOD = '{"a": 1}'


def call(name="add", arguments=GOOD, id="call_1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls, **options):
    return Reply("", tool_calls=list(calls), **options)


def names_and_arguments(calls):
    return [(each["function"]["name"], json.loads(each["function"]["arguments"]))
            for each in calls]


def tool_turn(messages=ASKED, said="two", id="call_1"):
    """The conversation in which a call was made and its result came in."""
    return list(messages) + [
        {"role": "assistant", "content": None, "tool_calls": [call(id=id)]},
        {"role": "tool", "tool_call_id": id, "content": said}]


def test_members_get_tools_as_text_and_the_writer_the_real_ones(house):
    made = house(cast(writer=calling(call())))
    answer = made.chat(tools=TOOLS, tool_choice="auto", parallel_tool_calls=True)
    assert names_and_arguments(message(answer)["tool_calls"]) == [("add", {"a": 1})]
    for model in MEMBERS + ("judge",):
        post, = made.up.posts(model)
        assert not post.body.keys() & {"tools", "tool_choice", "parallel_tool_calls"}
        assert post.messages[:len(ASKED)] == ASKED and len(post.messages) == len(ASKED) + 1
    for model in MEMBERS:
        text = made.up.posts(model)[0].messages[-1]["content"]
        assert all(json.dumps(each["function"]) in text for each in TOOLS)
    post, = made.up.posts("writer")
    assert post.body["tools"] == TOOLS and post.body["tool_choice"] == "auto"
    assert post.body["parallel_tool_calls"] is True


@pytest.mark.parametrize("stream", [False, True])
def test_a_native_call_comes_back_as_it_was_made(house, stream):
    calls = [call(), call("look", "{}", "call_2")]
    made = house(cast(writer=calling(*calls)))
    answer = made.chat(tools=TOOLS, stream=stream)
    if stream:
        found = streamed(chunks_of(answer))
        for each in found["tool_calls"]:
            assert each.pop("index") in (0, 1)
        assert (found["content"], found["finish_reason"]) == ("", "tool_calls")
        assert found["tool_calls"] == calls
    else:
        assert message(answer)["content"] is None and message(answer)["tool_calls"] == calls
        assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
        assert codes(answer) == []
    assert made.calls() == dict(PANEL_CALLS, writer=1)


WRITTEN = {
    "bare": '{"name": "add", "arguments": {"a": 1}}',
    "fenced": '```json\n{"name": "add", "arguments": {"a": 1}}\n```',
    "parameters": '{"name": "add", "parameters": {"a": 1}}',
    "function": '{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1}"}}',
    "tag": '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
    "two tags": '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
                '<tool_call>{"name": "look", "arguments": {}}</tool_call>',
    "list": '[{"name": "add", "arguments": {"a": 1}}, {"name": "look", "arguments": {}}]',
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_a_call_written_as_text_becomes_a_native_call(house, text, stream):
    made = house(cast(writer=text))
    answer = made.chat(tools=TOOLS, stream=stream)
    found = streamed(chunks_of(answer)) if stream else message(answer)
    wanted = [("add", {"a": 1}), ("look", {})][:1 + ("look" in text)]
    assert names_and_arguments(found["tool_calls"]) == wanted
    assert not found["content"] and len({each["id"] for each in found["tool_calls"]}) == len(wanted)
    assert all(each["id"] for each in found["tool_calls"])
    finish = found["finish_reason"] if stream else answer.json["choices"][0]["finish_reason"]
    assert finish == "tool_calls" and made.calls()["writer"] == 1


@pytest.mark.parametrize("text, fields", [
    ('Call it so: {"name": "add", "arguments": {"a": 1}}', {}),
    ('```json\n{"name": "add", "arguments": {"a": 1}}\n```\nand then look.', {}),
    ('{"name": "nobody", "arguments": {}}', {}),
    ('{"name": "add"}', {}),
    ('[1, 2]', {}),
    ('{"name": "add", "arguments": {"a": 1}}', {"tool_choice": "none"}),
    ("<b>bold</b>", {}),
    ('I do <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', {}),
    ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\nand more', {}),
    ('<tool_call>{"name": "add", "arg</tool_call>', {}),
], ids=["in prose", "prose after", "unknown", "no arguments", "numbers", "none wanted", "bold",
        "prose before a tag", "prose after a tag", "half a call in a tag"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_text_that_is_no_call_stays_text(house, text, fields, stream):
    made = house(cast(writer=text))
    answer = made.chat(tools=TOOLS, stream=stream, **fields)
    if stream:
        found = streamed(chunks_of(answer))
        assert (found["content"], found["tool_calls"]) == (text, [])
    else:
        assert message(answer)["content"] == text and "tool_calls" not in message(answer)


FAULTS = {
    "unknown name": (calling(call("adds")), {}),
    "no JSON": (calling(call(arguments='{"a": 1')), {}),
    "a list": (calling(call(arguments="[1]")), {}),
    "required": ("I would rather talk.", {"tool_choice": "required"}),
    "named": (calling(call("look", "{}")), {"tool_choice": {
        "type": "function", "function": {"name": "add"}}}),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("bad, fields", FAULTS.values(), ids=FAULTS)
def test_a_bad_call_is_repaired_by_one_more_call_of_the_writer(house, bad, fields, stream):
    made = house(cast(writer=[bad, calling(call(id="call_9"))]))
    answer = made.chat(tools=TOOLS, stream=stream, **fields)
    found = streamed(chunks_of(answer)) if stream else message(answer)
    assert names_and_arguments(found["tool_calls"]) == [("add", {"a": 1})]
    assert made.calls() == dict(PANEL_CALLS, writer=2)
    assert [post.body["tools"] for post in made.up.posts("writer")] == [TOOLS, TOOLS]
    again = made.up.posts("writer")[1].messages
    assert again[:len(ASKED)] == ASKED and len(again) == len(ASKED) + 1
    said = bad if isinstance(bad, str) else json.dumps(bad.tool_calls)
    assert said in again[-1]["content"]
    told = chunks_of(answer)[-1]["fusion"] if stream else receipt(answer)
    entry, = told["degraded"]
    assert (entry["code"], entry["model"]) == ("reply_repaired", "writer") and entry["detail"]


@pytest.mark.parametrize("bad, fields", FAULTS.values(), ids=FAULTS)
def test_a_call_that_is_bad_twice_is_never_returned(house, bad, fields):
    made = house(cast(writer=bad))
    answer = made.chat(tools=TOOLS, **fields)
    assert made.calls()["writer"] == 2 and "reply_invalid" in codes(answer)
    returned = message(answer).get("tool_calls", [])
    assert all(each["function"]["name"] in ("add", "look") for each in returned)
    assert all(isinstance(each[1], dict) for each in names_and_arguments(returned))
    assert message(answer)["content"] or returned


def test_the_good_one_of_two_calls_is_kept(house):
    made = house(cast(writer=calling(call(), call("nobody", "{}", "call_2"))))
    answer = made.chat(tools=TOOLS)
    assert message(answer)["tool_calls"] == [call()] and "reply_invalid" in codes(answer)
    assert made.calls()["writer"] == 2


@pytest.mark.parametrize("calls, kept", [
    ([call(arguments='{"a": ')], []),
    ([call(), call("look", '{"b', "call_2")], [call()]),
    ([call(arguments="")], []),
    ([call(), call("look", "", "call_2")], [call()]),
], ids=["in its arguments", "in the second", "before its arguments", "before the second's"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_call_that_was_cut_off_is_not_returned(house, calls, kept, stream):
    made = house(cast(writer=calling(*calls, finish="length")))
    answer = made.chat(tools=TOOLS, stream=stream)
    found = streamed(chunks_of(answer)) if stream else message(answer)
    returned = [{key: value for key, value in each.items() if key != "index"}
                for each in found.get("tool_calls", [])]
    assert returned == kept and made.calls()["writer"] == 1
    assert bool(found["content"]) == (not kept)
    if kept:
        told = chunks_of(answer)[-1]["fusion"] if stream else receipt(answer)
        choice = found if stream else answer.json["choices"][0]
        assert (choice["finish_reason"], told["degraded"]) == ("length", [])


def test_only_one_call_when_parallel_calls_are_not_wanted(house):
    made = house(cast(writer=calling(call(), call("look", "{}", "call_2"))))
    answer = made.chat(tools=TOOLS, parallel_tool_calls=False)
    assert message(answer)["tool_calls"] == [call()] and codes(answer) == []
    assert made.up.posts("writer")[0].body["parallel_tool_calls"] is False


def test_a_call_without_arguments_has_an_empty_object(house):
    made = house(cast(writer=calling(call("look", ""), call("look", " ", ""))))
    calls = message(made.chat(tools=TOOLS))["tool_calls"]
    assert [each["function"]["arguments"] for each in calls] == ["{}", "{}"]
    assert calls[0]["id"] == "call_1" and calls[1]["id"] not in ("", "call_1")


@pytest.mark.parametrize("arguments", ['{"a": NaN}', '{"a": -Infinity}'])
def test_arguments_that_only_python_takes_for_json_are_repaired(house, arguments):
    made = house(cast(writer=[calling(call(arguments=arguments)), calling(call())]))
    answer = made.chat(tools=TOOLS)
    assert message(answer)["tool_calls"] == [call()] and codes(answer) == ["reply_repaired"]


def test_a_tool_choice_that_names_no_tool_is_refused(house):
    made = house()
    choice = {"type": "function", "function": {"name": "nobody"}}
    refusal(made.chat(tools=TOOLS, tool_choice=choice), 400)
    assert made.calls() == {}


def test_tools_of_unknown_kinds_are_left_out(house):
    made = house()
    answer = made.chat(tools=[{"type": "web_search"}, TOOLS[0], {"type": "custom", "x": [1]}, {}])
    assert message(answer)["content"] == TEXT
    assert made.up.posts("writer")[0].body["tools"] == TOOLS[:1]
    answer = made.chat(tools=[{"type": "web_search"}], tool_choice="required",
                       parallel_tool_calls=True)
    assert message(answer)["content"] == TEXT
    assert not made.up.posts("writer")[1].body.keys() & {"tools", "tool_choice",
                                                         "parallel_tool_calls"}


def test_the_panel_runs_once_in_a_turn_of_the_user(house):
    made = house(cast(writer=[calling(call()), calling(call(id="call_2")), "It is two.", TEXT]))
    first = made.chat(tools=TOOLS)
    assert receipt(first)["mode"] == "fuse" and made.calls() == dict(PANEL_CALLS, writer=1)
    turn = tool_turn()
    second = made.chat(turn, tools=TOOLS)
    third = made.chat(tool_turn(turn, "three", "call_2"), tools=TOOLS)
    assert message(third)["content"] == "It is two."
    assert made.calls() == dict(PANEL_CALLS, writer=3)
    for answer in (second, third):
        found = receipt(answer)
        assert (found["mode"], found["degraded"]) == ("tool_loop", [])
        assert found["mode_reason"] and found["panel_models"] == []
        assert [row["role"] for row in found["cost_breakdown"]] == ["synth"]
    sent = made.up.posts("writer")[1].messages
    assert sent[:-1] == turn and all("draft of " + model in sent[-1]["content"]
                                     for model in MEMBERS)
    followed = tool_turn(turn, "three", "call_2") + [
        {"role": "assistant", "content": "It is two."}, user("And four?")]
    assert receipt(made.chat(followed, tools=TOOLS))["mode"] == "fuse"
    assert made.calls() == {"m1": 2, "m2": 2, "m3": 2, "judge": 2, "writer": 4}


def test_a_streamed_turn_leaves_its_advice_too(house):
    made = house(cast(writer=[calling(call()), "It is two."]))
    made.chat(tools=TOOLS, stream=True)
    answer = made.chat(tool_turn(), tools=TOOLS, stream=True)
    chunks = chunks_of(answer)
    assert streamed(chunks)["content"] == "It is two."
    assert (chunks[-1]["fusion"]["mode"], chunks[-1]["fusion"]["degraded"]) == ("tool_loop", [])


def test_advice_of_a_panel_that_was_cut_down_to_the_budget_is_found(house):
    made = house(cast(writer=[calling(call()), "It is two."]), samples=2, max_cost_usd=0.35)
    assert codes(made.chat(tools=TOOLS)) == ["budget_cut"]
    answer = made.chat(tool_turn(), tools=TOOLS)
    assert (receipt(answer)["mode"], codes(answer)) == ("tool_loop", [])


@pytest.mark.parametrize("after", [
    {"role": "system", "content": "The budget is low."},
    {"role": "developer", "content": "Be quick."}])
def test_a_note_after_the_result_of_a_tool_is_the_same_turn(house, after):
    made = house(cast(writer=[calling(call()), "It is two."]))
    made.chat(tools=TOOLS)
    assert receipt(made.chat(tool_turn() + [after], tools=TOOLS))["mode"] == "tool_loop"
    assert made.calls() == dict(PANEL_CALLS, writer=2)


@pytest.mark.parametrize("messages, fields, token", [
    (tool_turn(ASKED[:1] + [user("Another one?")]), {}, "one"),
    (tool_turn([{"role": "system", "content": "Be brief."}] + ASKED[1:]), {}, "one"),
    (tool_turn(), {"fusion": {"panel": ["m1", "m2"]}}, "one"),
    (tool_turn(), {}, "two"),
], ids=["another question", "another system prompt", "another panel", "another token"])
def test_advice_is_for_nobody_and_nothing_else(house, messages, fields, token):
    made = house(cast(writer=[calling(call()), "It is two."]),
                 served={"tokens": ("one", "two")})
    made.chat(tools=TOOLS, headers={"Authorization": "Bearer one"})
    answer = made.chat(messages, tools=TOOLS, headers={"Authorization": "Bearer " + token},
                       **fields)
    assert receipt(answer)["mode"] == "tool_loop" and codes(answer) == ["advice_missing"]
    assert made.calls() == dict(PANEL_CALLS, writer=2)
    sent = made.up.posts("writer")[1].messages
    assert sent == messages and "draft of" not in str(sent)


def test_a_fresh_server_has_no_advice_and_says_so(house):
    made = house()
    answer = made.chat(tool_turn(), tools=TOOLS)
    assert message(answer)["content"] == TEXT and made.calls() == {"writer": 1}
    assert codes(answer) == ["advice_missing"]


@pytest.mark.parametrize("fields, settings, scope", [
    ({"tools": TOOLS}, {}, "answer"),
    ({}, {}, "total"),
    ({"tools": TOOLS}, {"usage_scope": "total"}, "total"),
    ({}, {"usage_scope": "answer"}, "answer"),
    ({"tools": []}, {}, "total"),
], ids=["tools", "no tools", "tools, total", "no tools, answer", "an empty list"])
def test_usage_is_that_of_the_writer_for_agents_and_of_all_otherwise(
        house, fields, settings, scope):
    made = house(**settings)
    answer = made.chat(**fields)
    rows = receipt(answer)["cost_breakdown"]
    counted = rows if scope == "total" else [row for row in rows if row["role"] == "synth"]
    assert len(rows) == 5 and answer.json["usage"]["prompt_tokens"] == sum(
        row["prompt_tokens"] for row in counted)
    assert answer.json["usage"]["completion_tokens"] == sum(
        row["completion_tokens"] for row in counted)
    assert answer.headers["x-litellm-total-tokens"] == str(sum(
        row["prompt_tokens"] + row["completion_tokens"] for row in rows))


# ---- the form of the answer --------------------------------------------------------------------


def form(schema=None):
    """A response_format: of this schema, or any object."""
    if schema is None:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}
BERLIN = '{"city": "Berlin"}'


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("schema", [None, CITY], ids=["object", "schema"])
@pytest.mark.parametrize("said, final, code", [
    ([BERLIN], BERLIN, None),
    (["```json\n%s\n```" % BERLIN], BERLIN, None),
    (["It is Berlin.", BERLIN], BERLIN, "reply_repaired"),
    (["[%s]" % BERLIN, BERLIN], BERLIN, "reply_repaired"),
    (["It is Berlin.", "```\n%s\n```" % BERLIN], BERLIN, "reply_repaired"),
    (["It is Berlin.", "So it is."], "It is Berlin.", "reply_invalid"),
], ids=["valid", "fenced", "repaired", "a list", "repaired in a fence", "never valid"])
def test_a_json_answer_is_held_to_its_form(house, schema, said, final, code, stream):
    made = house(cast(writer=said))
    answer = made.chat(response_format=form(schema), stream=stream)
    if stream:
        chunks = chunks_of(answer)
        found, told = streamed(chunks)["content"], chunks[-1]["fusion"]
    else:
        found, told = message(answer)["content"], receipt(answer)
    assert found == final
    assert [entry["code"] for entry in told["degraded"]] == [code] * bool(code)
    assert made.calls() == dict(PANEL_CALLS, writer=len(said))
    assert made.up.posts("writer")[0].body["response_format"] == form(schema)
    assert all("response_format" not in post.body for model in MEMBERS
               for post in made.up.posts(model))
    for post in made.up.posts("writer")[1:]:
        words = post.messages[-1]["content"]
        assert said[0] in words and (schema is None or json.dumps(schema) in words)


def nested(items):
    return {"type": "object", "properties": {"rows": {"type": "array", "items": {
        "type": "array", "items": items}}}, "required": ["rows"]}


# A schema, a value that keeps to it, and values that do not.
SCHEMAS = {
    "required": (CITY, {"city": "x"}, [{}, {"city": 1}, {"city": "x", "more": 1}, [], "x", None]),
    "reference": ({"$defs": {"n": {"type": "integer"}}, "type": "object",
                   "properties": {"n": {"$ref": "#/$defs/n"}}}, {"n": 1}, [{"n": "1"}]),
    "itself": ({"type": "object", "properties": {"next": {"anyOf": [
        {"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
        {"next": {"next": None}}, [{"next": {}}, {"next": {"next": 1}}]),
    "any of": ({"type": "object", "properties": {"a": {"anyOf": [
        {"type": "string"}, {"type": "null"}]}}}, {"a": None}, [{"a": 1}]),
    "types": ({"type": ["object", "null"]}, None, [[], 1]),
    "enum": ({"type": "object", "properties": {"a": {"enum": ["x", 2, None]}}},
             {"a": 2}, [{"a": "y"}, {"a": 3}]),
    "const": ({"type": "object", "properties": {"a": {"const": "x"}}}, {"a": "x"}, [{"a": "y"}]),
    "nested": (nested({"type": "number"}), {"rows": [[1, 2.5], []]},
               [{"rows": [[1], ["x"]]}, {"rows": [1]}, {"rows": {}}]),
    "bounds": ({"type": "object", "properties": {
        "n": {"type": "integer", "minimum": 1, "maximum": 3},
        "l": {"type": "array", "minItems": 1, "maxItems": 2}}}, {"n": 1, "l": [1]},
        [{"n": 0}, {"n": 4}, {"n": 1.5}, {"l": []}, {"l": [1, 2, 3]}, {"n": True}]),
    "rest": ({"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}},
             {"x": 1}, [{"x": "y"}]),
    "all of": ({"allOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1, "b": 2},
               [{"a": 1}, {"b": 1}]),
    "boolean": ({"type": "object", "properties": {"a": {"type": "boolean"}}}, {"a": True},
                [{"a": 1}, {"a": "true"}]),
}


@pytest.mark.parametrize("schema, good, bad", SCHEMAS.values(), ids=SCHEMAS)
def test_schemas_are_kept_to(house, schema, good, bad):
    """The bad values in one request each; a writer of its own keeps the panel out of it."""
    said = []
    made = house(lambda request: said.pop(0))
    for value in bad:
        said[:] = [json.dumps(value), json.dumps(good)]
        answer = made.chat(model="writer", response_format=form(schema))
        assert codes(answer) == ["reply_repaired"], (value, answer.body)
        assert json.loads(message(answer)["content"]) == good and said == []
    said[:] = [json.dumps(good)]
    assert codes(made.chat(model="writer", response_format=form(schema))) == []


def chain(length):
    """A schema in which each link asks for the next one twice."""
    links = {"d%d" % index: {"allOf": [{"$ref": "#/$defs/d%d" % (index + 1)}] * 2}
             for index in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": dict(links, **{"d%d" % length: {}})}


@pytest.mark.parametrize("schema", [
    {"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}, {"$ref": "#/nowhere"}, {"$ref": 5},
    {"$ref": "https://example.com/x"}, {"type": 5}, {"type": "nothing"}, {"type": [[]]},
    {"enum": 5}, {"required": 5}, {"required": [{}]}, {"anyOf": 5}, {"anyOf": {"a": 1}},
    {"items": "x"}, {"additionalProperties": 5}, {"properties": {"a": None}}, {},
    {"properties": {"a": {"minimum": "x"}}}, {"properties": {"a": {"maximum": None}}},
    {"properties": {"x%d" % index: {"type": "string"} for index in range(20_000)}},
    {"properties": []}, {"properties": "abc"}, {"properties": 5}, {"properties": None},
    chain(5)], ids=lambda schema: json.dumps(schema)[:40])
def test_a_hostile_schema_is_no_error_of_the_server(house, schema):
    made = house(cast(writer='{"a": 1}'))
    answer = made.chat(model="writer", response_format=form(schema))
    assert answer.status in (200, 400) and b"an error of this server" not in answer.body


def seconds_of(work):
    """The processor time of this process, in which the server runs, for some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def test_a_small_schema_cannot_keep_the_server_busy(house):
    made = house(cast(writer="{}"))
    made.chat(model="writer")
    short, long = (seconds_of(lambda: made.chat(model="writer", response_format=form(
        chain(length)))) for length in (10, 16))
    assert long < 4 * short + 0.05


def test_a_large_request_takes_time_in_proportion_to_its_size(house):
    made = house()

    def estimate(count):
        parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%d" % index}}
                 for index in range(count)]
        body = {"messages": [{"role": "user", "content": parts}]}
        return seconds_of(lambda: made.post(body, path="/v1/estimate"))

    few, many = (min(estimate(count) for _ in "abc") for count in (500, 4000))
    assert many < 25 * few


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_several_choices_are_of_one_panel(house, count, stream):
    made = house(cast(writer=["one", "two", "three", "four"]))
    answer = made.chat(n=count, seed=7, stream=stream)
    if stream:
        texts = {}
        for chunk in chunks_of(answer):
            for choice in chunk["choices"]:
                texts.setdefault(choice["index"], []).append(choice["delta"].get("content") or "")
        found = ["".join(texts[index]) for index in sorted(texts)]
        assert sorted(texts) == list(range(count))
    else:
        choices = answer.json["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        found = [choice["message"]["content"] for choice in choices]
    assert sorted(found) == sorted(["one", "two", "three", "four"][:count])
    assert made.calls() == dict(PANEL_CALLS, writer=count)
    assert sorted(post.body["seed"] for post in made.up.posts("writer")) == list(
        range(7, 7 + count))


def test_parameters_of_the_answer_go_to_the_writer_alone(house):
    fields = {"stop": ["END"], "max_completion_tokens": 77, "seed": 5, "temperature": 0.11,
              "top_p": 0.5, "presence_penalty": 0.1, "frequency_penalty": -0.1,
              "logit_bias": {"5": -100}, "logprobs": True, "top_logprobs": 2,
              "reasoning_effort": "low", "verbosity": "low", "response_format": form()}
    made = house(cast(writer="{}"))
    message(made.chat(n=1, **fields))
    sent = made.up.posts("writer")[0].body
    assert {key: sent.get(key) for key in fields} == fields and "max_tokens" not in sent
    for model in MEMBERS + ("judge",):
        body = made.up.posts(model)[0].body
        left = set(fields) - {"temperature"} - ({"response_format"} if model == "judge" else set())
        assert not body.keys() & left and body["temperature"] != 0.11
        assert body["max_tokens"] > 77


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def test_images_go_to_the_models_that_take_them(house):
    made = house(panel=["m1", {"model": "m2", "vision": False}, "m3"])
    asked = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, IMAGE]}]
    answer = made.chat(asked)
    for model in ("m1", "m3", "writer"):
        assert made.up.posts(model)[0].messages[0] == asked[0]
    blind, = made.up.posts("m2")
    assert "base64" not in str(blind.messages)
    assert blind.messages[0]["content"][0] == asked[0]["content"][0]
    entry, = receipt(answer)["degraded"]
    assert (entry["code"], entry["model"]) == ("rewritten", "m2")


# ---- which models answer -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m1", "judge", "writer", "third", "m4"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_name_of_a_member_asks_that_model_alone(house, name, stream):
    settings = {"panel": ["m1", "m2", {"model": "m3", "label": "third"}], "refine": True,
                "vote": True, "spares": ["w2"]}
    made = house(presets={"small": {"panel": ["m4"]}}, **settings)
    asked = ASKED + [{"role": "assistant", "content": [{"type": "text", "text": "hm"}]},
                     {"role": "user", "content": [IMAGE], "name": "someone"}]
    answer = made.chat(asked, model=name, stream=stream, tools=TOOLS, stop="END")
    model = {"third": "m3"}.get(name, name)
    post, = made.up.posts()
    assert post.model == model and post.messages == asked
    assert (post.body["tools"], post.body["stop"]) == (TOOLS, "END")
    chunks = chunks_of(answer) if stream else [answer.json]
    said = {"writer": TEXT, "judge": ANALYSIS}.get(model, "draft of " + model)
    found = streamed(chunks)["content"] if stream else message(answer)["content"]
    told = chunks[-1]["fusion"]
    assert (found, {chunk["model"] for chunk in chunks}) == (said, {name})
    assert (told["mode"], told["panel_models"], told["judge"]) == ("solo", [], None)
    assert (told["synthesizer"], told["degraded"]) == (name, [])


def test_a_member_that_fails_is_an_error_and_not_another_model(house):
    made = house(cast(m1=error_reply(500, "boom")), spares=["s1"], synthesizer=["writer", "w2"])
    error = refusal(made.chat(model="m1"), 502)
    assert "boom" in error["message"] and made.calls() == {"m1": 1}


OVERRIDES = {
    "panel": (["m4", "m1"], lambda post, told: told["panel_models"] == ["m4", "m1"]),
    "judge": ("m4", lambda post, told: told["judge"] == "m4"),
    "synthesizer": ("w2", lambda post, told: told["synthesizer"] == "w2"),
    "refine": (True, lambda post, told: told["cost_breakdown"][-1]["role"] == "refine"),
    "layers": (2, lambda post, told: roles(told).count("member") == 6),
    "samples": (2, lambda post, told: roles(told).count("member") == 6),
    "mode": ("solo", lambda post, told: roles(told) == ["synth"]),
    "quorum": (2, lambda post, told: roles(told).count("member") == 3),
    "vote": (True, lambda post, told: "Answer: X" in post.messages[-1]["content"]),
    "preset": ("small", lambda post, told: told["panel_models"] == ["m4"]),
    "max_cost_usd": (1, lambda post, told: told["cost_usd"] > 0),
    "include": (["drafts", "analysis", "trace"],
                lambda post, told: len(told["drafts"]) == 3 and told["trace"]),
    "events": (True, lambda post, told: told["mode"] == "fuse"),
    "progress": ("reasoning", lambda post, told: told["mode"] == "fuse"),
}


def roles(told):
    return [row["role"] for row in told["cost_breakdown"]]


@pytest.mark.parametrize("key", OVERRIDES)
def test_each_key_that_requests_may_set_works(house, key):
    value, holds = OVERRIDES[key]
    made = house(cast(m4="draft of m4" if key != "judge" else ANALYSIS), presets={
        "small": {"panel": ["m4"], "judge": "judge", "synthesizer": "writer"}})
    answer = made.chat(fusion={key: value})
    assert holds(made.up.posts()[0], receipt(answer)), receipt(answer)


def test_every_key_of_the_block_is_tried(fusion):
    assert set(OVERRIDES) == set(fusion.REQUEST_BOUNDS)


def test_drafts_and_trace_come_only_when_they_are_asked_for(house):
    made = house()
    told = receipt(made.chat())
    assert not told.keys() & {"drafts", "trace"}
    told = receipt(made.chat(fusion={"include": ["drafts", "trace"]}))
    assert sorted(draft["text"] for draft in told["drafts"]) == [
        "draft of " + model for model in MEMBERS]
    assert {"start", "slot", "stage"} <= {step["event"] for step in told["trace"]}


FORBIDDEN = {
    "api_key": ({"api_key": "sk-1"}, "fusion.api_key"),
    "base_url": ({"base_url": "http://127.0.0.1:1/v1"}, "fusion.base_url"),
    "timeout_s": ({"timeout_s": 1}, "fusion.timeout_s"),
    "tools_enabled": ({"tools_enabled": True}, "fusion.tools_enabled"),
    "allow_models": ({"allow_models": ["*"]}, "fusion.allow_models"),
    "prices": ({"prices": {}}, "fusion.prices"),
    "name": ({"name": "x"}, "fusion.name"),
    "spares": ({"spares": ["m4"]}, "fusion.spares"),
    "unknown": ({"sample": 2}, "fusion.sample"),
    "a member with a key": ({"panel": [{"model": "m1", "api_key_env": "HOME"}]},
                            "fusion.panel[0]"),
    "a member with a URL": ({"panel": ["m1", {"model": "m1", "base_url": "http://x"}]},
                            "fusion.panel[1]"),
    "a judge with a URL": ({"judge": {"model": "m1", "base_url": "http://x"}}, "fusion.judge"),
    "a list of writers": ({"synthesizer": ["m1"]}, "fusion.synthesizer"),
    "17 members": ({"panel": ["m1"] * 17}, "fusion.panel"),
    "no member": ({"panel": []}, "fusion.panel"),
    "auto": ({"panel": "auto"}, "fusion.panel"),
    "9 samples": ({"samples": 9}, "fusion.samples"),
    "a million samples": ({"samples": 1e6}, "fusion.samples"),
    "5 layers": ({"layers": 5}, "fusion.layers"),
    "true layers": ({"layers": True}, "fusion.layers"),
    "49 calls": ({"panel": ["m1"] * 16, "samples": 3}, "fusion"),
    "layers of samples": ({"samples": 8, "layers": 3}, "fusion"),
    "a preset that is not served": ({"preset": "budget"}, "fusion.preset"),
    "a path": ({"preset": "../../etc/passwd"}, "fusion.preset"),
    "a negative ceiling": ({"max_cost_usd": -1}, "fusion.max_cost_usd"),
    "a ceiling in words": ({"max_cost_usd": "1"}, "fusion.max_cost_usd"),
    "a mode": ({"mode": "turbo"}, "fusion.mode"),
    "tool_loop": ({"mode": "tool_loop"}, "fusion.mode"),
    "include": ({"include": ["keys"]}, "fusion.include[0]"),
    "no object": ([], "fusion"),
    "a word": ("high", "fusion"),
}


@pytest.mark.parametrize("block, param", FORBIDDEN.values(), ids=FORBIDDEN)
@pytest.mark.parametrize("model", ["fusion", "m1"])
def test_what_a_request_may_not_set_is_refused_by_name(calm, block, param, model):
    before = len(calm.up.posts())
    error = refusal(calm.chat(fusion=block, model=model), 400, param)
    assert param in error["message"] and "sk-1" not in error["message"]
    assert len(calm.up.posts()) == before


@pytest.mark.parametrize("fields, fine", [
    ({"fusion": {"panel": ["m1"] * 15, "samples": 3, "refine": True}}, True),
    ({"fusion": {"panel": ["m1"] * 15, "samples": 3, "refine": True}, "n": 1}, True),
    ({"fusion": {"panel": ["m1"] * 15, "samples": 3}, "n": 4}, False),
])
def test_a_request_plans_at_most_48_calls(house, fields, fine):
    made = house()
    answer = made.chat(**fields)
    assert answer.status == (200 if fine else 400)
    assert sum(made.calls().values()) == (48 if fine else 0)


@pytest.mark.parametrize("own, asked, fits", [
    (None, 0, False), (None, 0.000001, False), (0.000001, 100, False), (100, 0.000001, False),
    (None, 100, True), (100, 1, True), (100, 1000, True)])
def test_a_request_can_only_lower_the_ceiling(house, own, asked, fits):
    made = house(max_cost_usd=own)
    answer = made.chat(fusion={"max_cost_usd": asked})
    if fits:
        assert message(answer)["content"] == TEXT
        return
    error = refusal(answer, 402, code="budget_exceeded")
    assert "$" in error["message"] and made.calls() == {}


def test_a_preset_cannot_raise_the_ceiling(house):
    made = house(max_cost_usd=0.000001, presets={"rich": {"max_cost_usd": 100}})
    refusal(made.chat(model="fusion/rich"), 402, code="budget_exceeded")
    made = house(max_cost_usd=100, presets={"poor": {"max_cost_usd": 0.000001}})
    refusal(made.chat(fusion={"preset": "poor"}), 402, code="budget_exceeded")
    assert made.calls() == {}


def test_a_preset_cannot_widen_what_members_may_do(house):
    panel = [{"model": "m1", "tools": True}]
    made = house(panel=panel, presets={"armed": {"panel": panel, "tools_enabled": True}})
    assert codes(made.chat(model="fusion/armed")) == []
    made.server.config = made.one("own", panel=panel, tools_enabled=True)
    assert codes(made.chat(model="fusion/armed")) == ["tools_missing"]


@pytest.mark.parametrize("block, fine", [
    ({"panel": ["m1", "m4"]}, False), ({"judge": "w2"}, False), ({"synthesizer": "m4"}, False),
    ({"panel": ["s1"]}, True), ({"panel": ["m1"], "judge": "judge"}, True),
    ({"panel": ["third"]}, True), ({"panel": ["s1"], "judge": "w2"}, False)])
def test_requests_name_models_only_within_allow_models(house, block, fine):
    made = house(dict(cast(), s1="draft of s1"), allow_models=["s*"],
                 panel=["m1", "m2", {"model": "m3", "label": "third"}])
    answer = made.chat(fusion=block)
    if fine:
        assert answer.status == 200, answer.body
        return
    error = refusal(answer, 400)
    assert error["param"].startswith("fusion.") and "allow_models" in error["message"]
    assert made.calls() == {}


def test_a_preset_is_chosen_by_block_or_by_model(calm):
    for fields in ({"fusion": {"preset": "small"}}, {"model": "fusion/small"},
                   {"model": "openrouter/fusion", "fusion": {"preset": "small"}},
                   {"model": "fusion/small", "fusion": {"synthesizer": "m4"}},
                   {"plugins": [{"id": "fusion", "preset": "small"}]}):
        answer = calm.chat(**fields)
        told = receipt(answer)
        assert (told["config"], told["panel_models"]) == ("small.json", ["m4"])
        assert answer.json["model"] == fields.get("model", "fusion")


@pytest.mark.parametrize("name", ["fusion", "openrouter/fusion", "", None])
def test_the_panel_has_several_names(calm, name):
    assert receipt(calm.chat(model=name))["panel_models"] == list(MEMBERS)


def test_a_model_that_is_not_there_is_404_and_lists_those_that_are(calm):
    before = len(calm.up.posts())
    for name in ("gpt-9", "fusion/nope", "M1", "m1 "):
        error = refusal(calm.chat(model=name), 404, "model", "model_not_found")
        assert name in error["message"]
        assert all(known in error["message"] for known in ("fusion", "fusion/small", "m1"))
    assert len(calm.up.posts()) == before
    error = refusal(calm.get("/v1/models/gpt-9"), 404, "model", "model_not_found")
    assert "fusion/small" in error["message"]


def test_any_model_is_the_panel_if_the_server_is_told_so(house):
    made = house(served={"any_model": True})
    answer = made.chat(model="gpt-9")
    assert receipt(answer)["panel_models"] == list(MEMBERS) and answer.json["model"] == "gpt-9"
    assert receipt(made.chat(model="m2"))["mode"] == "solo"


def test_a_configuration_may_be_named_like_a_preset(house):
    made = house(name="fusion/mine")
    assert message(made.chat(model="fusion/mine"))["content"] == TEXT


# ---- the forms of OpenRouter -------------------------------------------------------------------


def plugin(**fields):
    return {"plugins": [{"id": "web"}, dict({"id": "fusion"}, **fields)]}


def fusion_tool(**parameters):
    return {"tools": [{"type": "openrouter:fusion", "parameters": parameters}]}


@pytest.mark.parametrize("fields, panel, judge, writer, ignored", [
    (plugin(), list(MEMBERS), "judge", "writer", []),
    (plugin(analysis_models=["m4", "m1"], model="w2"), ["m4", "m1"], "w2", "w2", []),
    (plugin(enabled=True), list(MEMBERS), "judge", "writer", []),
    (fusion_tool(analysis_models=["m4"], model="w2"), ["m4"], "w2", "writer", []),
    (fusion_tool(), list(MEMBERS), "judge", "writer", []),
    ({"tools": [{"type": "openrouter:fusion"}]}, list(MEMBERS), "judge", "writer", []),
    (plugin(max_tool_calls=3, max_completion_tokens=9, temperature=1, reasoning={}, tools=[]),
     list(MEMBERS), "judge", "writer",
     ["max_tool_calls", "max_completion_tokens", "temperature", "reasoning", "tools"]),
    (fusion_tool(max_tool_calls=3), list(MEMBERS), "judge", "writer", ["max_tool_calls"]),
    (dict(plugin(analysis_models=["m4"]), fusion={"panel": ["m2"]}), ["m2"], "judge", "writer",
     []),
    (plugin(preset="general-high", max_tool_calls=1), list(MEMBERS), "judge", "writer",
     ["preset", "max_tool_calls"]),
    (plugin(preset="general-high"), list(MEMBERS), "judge", "writer", ["preset"]),
], ids=["plugin", "panel and model", "enabled", "tool", "bare tool", "no parameters", "ignored",
        "ignored of the tool", "the block counts more", "preset and more", "preset alone"])
def test_forms_of_openrouter_are_understood(house, fields, panel, judge, writer, ignored):
    made = house(cast(w2=lambda request: ANALYSIS if "judge of a panel" in str(
        request.messages[-1]) else "w2 wrote this"))
    answer = made.chat(**fields)
    told = receipt(answer)
    assert (told["panel_models"], told["judge"], told["synthesizer"]) == (panel, judge, writer)
    assert "tools" not in made.up.posts(writer)[-1].body
    entries = told["degraded"]
    assert [entry["code"] for entry in entries] == ["ignored"] * bool(ignored)
    assert all(key in entries[0]["detail"] for key in ignored)


def test_a_plugin_that_is_switched_off_leaves_the_writer_alone(house):
    made = house()
    assert receipt(made.chat(**plugin(enabled=False)))["mode"] == "solo"
    assert made.calls() == {"writer": 1}


@pytest.mark.parametrize("fields", [
    plugin(analysis_models=["m1"] * 17), plugin(analysis_models="m1"), plugin(model=5),
    fusion_tool(model=["m1"])])
def test_bad_values_in_these_forms_are_refused(calm, fields):
    before = len(calm.up.posts())
    assert refusal(calm.chat(**fields), 400)["param"]
    assert len(calm.up.posts()) == before


@pytest.mark.parametrize("parameters", ["x", [1], 5, True])
def test_a_fusion_tool_without_an_object_is_no_error_of_the_server(house, parameters):
    made = house()
    answer = made.chat(tools=[{"type": "openrouter:fusion", "parameters": parameters}])
    assert answer.status in (200, 400)


def test_the_block_is_strict_beside_a_plugin(house):
    made = house()
    answer = made.chat(fusion={"preset": "nope"}, **plugin(max_tool_calls=3))
    refusal(answer, 400, "fusion.preset")
    assert made.calls() == {}


@pytest.mark.parametrize("name", ["x-fusion-depth", "x-openrouter-fusion-depth"])
@pytest.mark.parametrize("path", [CHAT, "/v1/estimate"])
def test_a_request_of_another_fusion_server_is_refused(calm, name, path):
    before = len(calm.up.posts())
    for depth in ("1", "2", "x"):
        answer = calm.post({"messages": ASKED}, path=path, headers={name: depth})
        refusal(answer, 400, code="fusion_recursion")
    assert len(calm.up.posts()) == before
    assert calm.chat(headers={name: "0"}).status == 200


def test_our_own_requests_carry_the_depth(calm):
    calm.chat()
    assert {post.headers["x-fusion-depth"] for post in calm.up.posts()} == {"1"}


# ---- what clients send -------------------------------------------------------------------------

PART = {"type": "text", "text": "hello"}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
@pytest.mark.parametrize("content", ["hello", "", None, [], [PART], [PART, PART], [
    {"type": "input_audio", "input_audio": {}}], [{"type": "text", "text": ""}],
    [{"type": "refusal", "refusal": "no"}], [{"type": "unheard_of", "x": [1]}]],
    ids=lambda content: json.dumps(content)[:20])
def test_content_is_accepted_in_every_form_and_role(calm, role, content):
    before = len(calm.up.posts())
    said = {"role": role, "content": content, "tool_call_id": "c", "name": "x", "unheard": 1}
    asked = [user("first"), said, user("last")]
    assert calm.chat(asked, model="m1").status == 200
    assert calm.up.posts()[before:][0].messages == asked


@pytest.mark.parametrize("asked", [
    [{"role": "assistant"}], [{"role": "user"}], [{"role": "system", "content": "x"}],
    [{"role": "assistant", "content": "begun"}],
    [user("x"), {"role": "developer", "content": "y"}],
    [{"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None,
      "function_call": None}, user("x")],
    [user("x"), {"role": "assistant", "tool_calls": []}, user("y")],
    [user("x"), {"role": "assistant", "tool_calls": [{"id": "c", "type": "custom", "custom": {
        "name": "f", "input": "x"}}]}, {"role": "tool", "tool_call_id": "c", "content": None}],
], ids=lambda asked: json.dumps(asked)[:40])
def test_conversations_of_any_shape_are_accepted(calm, asked):
    assert calm.chat(asked).status == 200


@pytest.mark.parametrize("fields", [
    {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto",
     "prediction": None, "modalities": ["text"], "unheard_of": {"deep": [1]}, "functions": []},
    {"provider": {"order": []}, "transforms": [], "route": "fallback", "models": ["x"],
     "reasoning": {"effort": "high"}, "usage": {"include": True}},
    {"max_tokens": None, "max_completion_tokens": None, "temperature": None, "n": None,
     "stop": None, "seed": None, "tools": None, "tool_choice": None, "response_format": None,
     "stream": None, "stream_options": None, "fusion": None, "model": None, "plugins": None,
     "logit_bias": None, "logprobs": None, "top_p": None, "parallel_tool_calls": None},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tool_choice": "none"}, {"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS},
    {"response_format": {"type": "text"}}, {"stop": []}, {"stop": "x"},
    {"stop": ["a", "b", "c", "d"]}, {"logit_bias": {}}, {"temperature": 0}, {"temperature": 2},
    {"stream_options": {}, "stream": False}, {"max_tokens": 1}, {"plugins": []},
    {"plugins": [{"id": "web"}]}, {"plugins": "x"}, {"seed": -1}, {"fusion": {}},
], ids=lambda fields: " ".join(fields)[:30])
def test_what_clients_send_is_accepted(calm, fields):
    answer = calm.chat(**fields)
    assert message(answer)["content"] == TEXT and codes(answer) == []


@pytest.mark.parametrize("path", [CHAT + "/", CHAT + "?api-version=1", CHAT + "/?x", CHAT + "//"])
def test_query_strings_and_slashes_change_nothing(calm, path):
    assert message(calm.post({"messages": ASKED}, path=path))["content"] == TEXT


REFUSED = {
    "no messages": ({"messages": None}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages as text": ({"messages": "hello"}, "messages"),
    "messages as object": ({"messages": {"role": "user"}}, "messages"),
    "a message as text": ({"messages": ["hello"]}, "messages[0]"),
    "a message as null": ({"messages": [user("x"), None]}, "messages[1]"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "a bad role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    "a list as role": ({"messages": [{"role": ["user"]}]}, "messages[0].role"),
    "content as number": ({"messages": [user(5)]}, "messages[0].content"),
    "content as object": ({"messages": [user({"type": "text"})]}, "messages[0].content"),
    "a part as text": ({"messages": [user(["x"])]}, "messages[0].content[0]"),
    "a part without type": ({"messages": [user([PART, {}])]}, "messages[0].content[1]"),
    "tool_calls as text": ({"messages": [{"role": "assistant", "tool_calls": "x"}]},
                           "messages[0].tool_calls"),
    "arguments as object": ({"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": {}}}]}]},
        "messages[0].tool_calls[0].function"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens -1": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens 1.5": ({"max_tokens": 1.5}, "max_tokens"),
    "max_tokens in words": ({"max_tokens": "10"}, "max_tokens"),
    "max_completion_tokens 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "temperature in words": ({"temperature": "hot"}, "temperature"),
    "temperature 3": ({"temperature": 3}, "temperature"),
    "temperature true": ({"temperature": True}, "temperature"),
    "top_p 2": ({"top_p": 2}, "top_p"),
    "n 0": ({"n": 0}, "n"), "n 5": ({"n": 5}, "n"), "n true": ({"n": True}, "n"),
    "stop as number": ({"stop": 5}, "stop"), "17 stops": ({"stop": ["x"] * 17}, "stop"),
    "a null stop": ({"stop": [None]}, "stop[0]"),
    "stream in words": ({"stream": "yes"}, "stream"),
    "stream_options": ({"stream_options": "x"}, "stream_options"),
    "seed": ({"seed": "x"}, "seed"),
    "logit_bias": ({"logit_bias": {"5": 101}}, "logit_bias"),
    "a model as number": ({"model": 5}, "model"),
    "tools as object": ({"tools": {}}, "tools"),
    "a tool as text": ({"tools": ["x"]}, "tools[0]"),
    "a tool without function": ({"tools": [TOOLS[0], {"type": "function"}]}, "tools[1]"),
    "a tool without name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0]"),
    "tool_choice": ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
    "tool_choice without name": ({"tools": TOOLS, "tool_choice": {"type": "function"}},
                                 "tool_choice"),
    "parallel_tool_calls": ({"tools": TOOLS, "parallel_tool_calls": "no"},
                            "parallel_tool_calls"),
    "response_format as text": ({"response_format": "json"}, "response_format"),
    "response_format of no type": ({"response_format": {}}, "response_format"),
    "a schema that is none": ({"response_format": form(5)}, "response_format"),
    "reasoning_effort": ({"reasoning_effort": 5}, "reasoning_effort"),
}


@pytest.mark.parametrize("fields, param", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_can_never_work_is_refused_by_name(calm, fields, param, stream):
    before = len(calm.up.posts())
    body = dict({"messages": ASKED, "stream": stream}, **fields)
    error = refusal(calm.post({key: value for key, value in body.items() if value is not None}),
                    400)
    assert error["param"].startswith(param) and error["param"] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(calm.up.posts()) == before


@pytest.mark.parametrize("body", [
    b"", b"{", b"null", b"[]", b'"x"', b"5", b'{"messages": [}', b"\xff\xfe{}", b"NaN",
    b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', b"[" * 100_000,
    b'{"messages": NaN}', b'{"max_tokens": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:20]))
@pytest.mark.parametrize("path", [CHAT, "/v1/estimate"])
def test_a_body_that_is_no_request_is_refused(calm, body, path):
    refusal(calm.post(body, path=path), 400)


@pytest.mark.parametrize("fields, words", [
    ({"messages": [{"role": "x" * 5000, "content": "x"}]}, "x" * 1000),
    ({"messages": [{"role": {"content": "a secret prompt"}}]}, "a secret prompt"),
    ({"response_format": {"type": "x" * 5000}}, "x" * 1000)],
    ids=["long", "prompt", "format"])
def test_a_refused_value_is_not_repeated_at_length(house, fields, words):
    made = house()
    answer = made.chat(**fields) if "messages" not in fields else made.post(fields)
    assert words not in refusal(answer, 400)["message"]
    assert words not in str(made.logged())


# ---- lists, prices, health ---------------------------------------------------------------------


def test_models_lists_the_panel_the_presets_and_the_members(calm):
    found = calm.get("/v1/models").json
    assert found["object"] == "list"
    rows = {row["id"]: row for row in found["data"]}
    assert set(rows) == {"fusion", "fusion/small", "m1", "m2", "m3", "judge", "writer", "m4"}
    assert len(rows) == len(found["data"])
    for row in rows.values():
        assert (row["object"], row["owned_by"]) == ("model", "fusion")
        assert isinstance(row["created"], int)
        assert {"tools", "response_format", "max_tokens"} <= set(row["supported_parameters"])
        assert row["architecture"]["output_modalities"] == ["text"]
        assert {float(row["pricing"][key]) for key in ("prompt", "completion")} == {1e-6, 1e-5}


@pytest.mark.parametrize("name", ["fusion", "fusion/small", "fusion%2Fsmall", "m1", "m1/",
                                  "m1?x=1", "openrouter/fusion"])
def test_models_describes_one(calm, name):
    answer = calm.get("/v1/models/" + name)
    assert answer.status == 200
    assert answer.json["id"] == name.replace("%2F", "/").split("?")[0].rstrip("/")


def test_models_says_what_is_known_of_context_prices_and_images(house):
    made = house(panel=[{"model": "m1", "context": 9000, "vision": False},
                        {"model": "unknown/one"}], judge=None, synthesizer=None, prices=None)
    rows = {row["id"]: row for row in made.get("/v1/models").json["data"]}
    assert (rows["m1"]["context_length"], rows["fusion"]["context_length"]) == (9000, None)
    assert rows["m1"]["architecture"]["input_modalities"] == ["text"]
    assert rows["unknown/one"]["architecture"]["input_modalities"] == ["text", "image"]
    assert rows["unknown/one"]["pricing"] is None


def test_models_says_the_prices_of_a_preset(house):
    made = house(presets={"dear": {"prices": {
        model: {"input": 50, "output": 60} for model in PRICED}}})
    row = made.get("/v1/models/fusion/dear").json
    assert float(row["pricing"]["prompt"]) == 50e-6


@pytest.mark.parametrize("fields, roles_and_calls, mode", [
    ({}, [("member", 1)] * 3 + [("judge", 1), ("synth", 1)], "fuse"),
    ({"n": 2, "fusion": {"refine": True, "samples": 2}},
     [("member", 2)] * 3 + [("judge", 1), ("synth", 2), ("refine", 2)], "fuse"),
    ({"model": "m1"}, [("synth", 1)], "solo"),
    ({"model": "fusion/small"}, [("member", 1), ("judge", 1), ("synth", 1)], "fuse"),
    ({"fusion": {"mode": "solo"}}, [("synth", 1)], "solo"),
    ({"fusion": {"mode": "auto"}, "max_tokens": 5}, [("synth", 1)], "solo"),
])
def test_estimate_names_the_planned_calls_and_makes_none(calm, fields, roles_and_calls, mode):
    before = len(calm.up.posts())
    answer = calm.post(dict({"messages": ASKED}, **fields), path="/v1/estimate")
    found = answer.json
    assert (answer.status, found["object"], found["mode"]) == (200, "estimate", mode)
    assert [(row["role"], row["calls"]) for row in found["calls"]] == roles_and_calls
    assert 0 < found["low_usd"] < found["high_usd"]
    assert found["high_usd"] == pytest.approx(sum(row["high"] for row in found["calls"]))
    assert len(calm.up.posts()) == before


def test_the_estimate_holds(calm):
    found = calm.post({"messages": ASKED}, path="/v1/estimate").json
    answer = calm.chat()
    assert 0 < receipt(answer)["cost_usd"] <= found["high_usd"]
    assert float(answer.headers["x-fusion-cost-usd"]) == pytest.approx(
        receipt(answer)["cost_usd"])
    assert answer.headers["x-litellm-response-cost"] == answer.headers["x-fusion-cost-usd"]
    assert float(answer.headers["x-fusion-latency-s"]) >= 0
    assert answer.headers["x-request-id"] == receipt(answer)["request_id"]


def test_estimate_refuses_what_the_chat_refuses(calm):
    for fields, param in (({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"),
                          ({"fusion": {"api_key": "x"}}, "fusion.api_key"),
                          ({"model": "nope"}, "model")):
        answer = calm.post(dict({"messages": ASKED}, **fields), path="/v1/estimate")
        refusal(answer, 404 if param == "model" else 400, param)


def test_a_price_that_is_unknown_is_null_and_not_nothing(house):
    made = house(dict(cast(), **{"m/x": "a draft"}), panel=["m/x"], judge="m/x",
                 synthesizer="m/x", prices=None)
    found = made.post({"messages": ASKED}, path="/v1/estimate").json
    assert (found["low_usd"], found["high_usd"]) == (None, None)
    answer = made.chat(model="m/x")
    assert receipt(answer)["cost_usd"] is None and "price_unknown" in codes(answer)
    assert "x-fusion-cost-usd" not in answer.headers


def test_health_with_a_token_says_what_is_served(house):
    made = house(cast(m1=error_reply(500, "boom")), served={"tokens": ("one",)},
                 presets={"small": {"panel": ["m4"]}})
    answer = made.get("/health")
    assert (answer.status, answer.body) == (200, b"ok\n")
    assert made.get("/health", headers={"Authorization": "Bearer two"}).body == b"ok\n"
    for _ in range(5):
        made.chat(model="m1", headers={"x-api-key": "one"})
    found = made.get("/health", headers={"x-api-key": "one"}).json
    assert (found["status"], found["config"]) == ("ok", "config.json")
    assert (found["panel"], found["judge"]) == (list(MEMBERS), "judge")
    assert (found["synthesizer"], found["presets"]) == (["writer"], ["small"])
    assert found["version"] == made.fusion.VERSION and list(found["breakers"]) == ["m1"]


def test_metrics_count_requests_calls_tokens_and_dollars(house):
    made = house(cast(m2=error_reply(500, "boom")))
    told = receipt(made.chat())
    made.get("/nothing")
    made.get("/nothing/else")
    made.post(b"{")
    assert made.logged(4)
    text = made.get("/metrics").body.decode()
    rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert rows['fusion_requests_total{path="%s",status="200"}' % CHAT] == "1"
    assert rows['fusion_requests_total{path="%s",status="400"}' % CHAT] == "1"
    assert rows['fusion_requests_total{path="other",status="404"}'] == "2"
    assert rows['fusion_upstream_calls_total{model="m1",role="member",status="stop"}'] == "1"
    assert rows['fusion_upstream_calls_total{model="m2",role="member",status="failed"}'] == "1"
    assert rows['fusion_degraded_total{code="member_failed"}'] == "1"
    paid = {row["model"]: row for row in told["cost_breakdown"]}
    for kind in ("prompt", "completion"):
        name = 'fusion_tokens_total{model="writer",kind="%s"}' % kind
        assert int(rows[name]) == paid["writer"][kind + "_tokens"]
    assert float(rows['fusion_cost_usd_total{model="writer"}']) == paid["writer"]["cost_usd"]
    assert "fusion_requests_running" in rows
    for line in text.splitlines():
        assert re.fullmatch(r'# TYPE \w+ (counter|gauge)|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? '
                            r'[-+.e\d]+', line), line


def test_strangers_cannot_add_metrics(house):
    made = house(served={"tokens": ("one",)})
    for index in range(3):
        refusal(made.get("/v1/models/x%d" % index), 401)
    text = made.get("/metrics", headers={"x-api-key": "one"}).body.decode()
    assert "x1" not in text


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, path, allow", [
    ("GET", CHAT, {"POST"}), ("PUT", CHAT, {"POST"}), ("DELETE", "/v1/models", {"GET", "HEAD"}),
    ("POST", "/v1/models", {"GET", "HEAD"}), ("POST", "/v1/models/m1", {"GET", "HEAD"}),
    ("POST", "/health", {"GET", "HEAD"}), ("GET", "/v1/estimate", {"POST"}),
    ("PATCH", "/metrics", {"GET", "HEAD"})])
def test_another_method_is_405_and_says_which(calm, method, path, allow):
    answer = calm.post(None if method == "GET" else {}, method=method, path=path)
    refusal(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == allow


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/chat/completions", "/favicon.ico",
                                  "/v1/completions", "/" + "x" * 5000])
def test_another_path_is_404(calm, path):
    if path == "/" and calm.get(path).headers["content-type"].startswith("text/html"):
        return  # the web page
    error = refusal(calm.get(path), 404)
    assert len(error["message"]) < 1000


@pytest.mark.parametrize("headers, status", [
    ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "multipart/form-data"}, 415),
    ({"Content-Encoding": "gzip"}, 415), ({"Expect": "magic"}, 417)])
def test_a_body_of_another_kind_is_refused(calm, headers, status):
    before = len(calm.up.posts())
    lines = dict({"Content-Type": "application/json"}, **headers)
    data = json.dumps({"messages": ASKED}).encode()
    head = "".join("%s: %s\r\n" % pair for pair in lines.items())
    client = calm.client()
    client.send(("POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n"
                 % (CHAT, len(data), head)).encode() + data)
    refusal(client.answer(), status)
    assert len(calm.up.posts()) == before


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", None])
def test_json_is_taken_under_each_of_its_names(calm, kind):
    data = json.dumps({"messages": ASKED}).encode()
    line = "Content-Type: %s\r\n" % kind if kind else ""
    client = calm.client()
    client.send(("POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n"
                 % (CHAT, line, len(data))).encode() + data)
    assert client.answer().status == 200


def test_a_large_body_is_413(house):
    made = house(served={"max_body": 1000})
    assert made.chat().status == 200
    refusal(made.chat([user("x" * 1000)]), 413)
    assert made.calls()["writer"] == 1


class Broken:
    """A Network with a defect in it."""

    def close(self):
        pass


@pytest.mark.parametrize("method, path, body", [
    ("GET", "/health", None), ("POST", CHAT, {"messages": ASKED})])
def test_a_defect_is_500_without_a_word_about_it_and_the_server_goes_on(
        house, method, path, body):
    made = house(network=Broken())
    for _ in range(2):
        error = refusal(made.post(body, method=method, path=path), 500, code="internal_error")
        assert error["type"] == "api_error"
        assert "Broken" not in str(error) and "attribute" not in str(error)
    assert [type(defect) for defect in made.defects] == [AttributeError] * 2
    made.defects.clear()
    assert made.get("/v1/models").status == 200
    assert sorted(line["status"] for line in made.logged(3)) == [200, 500, 500]


def test_all_members_failing_is_502_that_names_each_reason(house):
    made = house(cast(m1=error_reply(500, "boom"), m2=Reply(raw=b""), m3=error_reply(401, "no")))
    answer = made.chat()
    error = refusal(answer, 502, code="panel_failed")
    assert all(word in error["message"] for word in ("m1", "boom", "m2", "m3", "401"))
    entries = answer.json["fusion"]["degraded"]
    assert {entry["model"] for entry in entries if entry["code"] == "member_failed"} == set(
        MEMBERS)
    assert "writer" not in made.calls()


@pytest.mark.parametrize("said, waits", [(None, range(2, 61)), ("7", [7]), ("0", [2]),
                                         ("1", [2]), ("2.5", [3]), ("soon", range(2, 61))])
def test_a_rate_limit_of_a_member_is_a_429_with_an_honest_wait(house, said, waits):
    made = house(cast(m1=error_reply(429, "slow down", headers={"Retry-After": said})))
    answer = made.chat(model="m1")
    error = refusal(answer, 429, code="rate_limit_exceeded")
    assert error["type"] == "rate_limit_error" and "slow down" in error["message"]
    assert int(answer.headers["retry-after"]) in waits


@pytest.mark.parametrize("reply, status, code", [
    (error_reply(400, "n_ctx is too small: maximum context length is 5 tokens"), 400,
     "context_length_exceeded"),
    (error_reply(401, "bad key"), 502, None), (error_reply(404, "no such model"), 502, None),
    (error_reply(503, "loading"), 502, None), (Reply(""), 502, None),
    (error_reply(422, "not so"), 400, None)])
def test_errors_of_a_member_say_whether_it_is_the_client_s(house, reply, status, code):
    made = house(cast(m1=reply))
    for stream in (False, True):
        answer = made.chat(model="m1", stream=stream)
        if not stream:
            refusal(answer, status, code=code)
        else:
            assert "finish_reason\": \"stop" not in answer.body.decode()
            assert answer.status != 200 or chunks_of(answer)[-1]["error"].keys() == SHAPE


def test_a_model_that_is_left_alone_is_503_with_the_time_of_its_rest(house):
    made = house(cast(m1=error_reply(500, "boom")))
    for _ in range(5):
        made.chat(model="m1")
    answer = made.chat(model="m1")
    refusal(answer, 503, code="overloaded")
    assert 20 <= int(answer.headers["retry-after"]) <= 30 and made.calls() == {"m1": 5}


def test_too_many_requests_are_503_and_those_that_wait_are_answered(house):
    gate = threading.Event()
    made = house(cast(m1=Reply("at last", delay=gate)), served={"max_requests": 1})
    first, second = (made.client().request({"model": "m1", "messages": ASKED}) for _ in "ab")
    assert until(lambda: made.front.running == 1 and len(made.front.waiting) == 1)
    answer = made.chat(model="m1")
    refusal(answer, 503, code="overloaded")
    assert int(answer.headers["retry-after"]) >= 2
    assert made.get("/health").status == 200
    gate.set()
    for client in (first, second):
        assert message(client.answer())["content"] == "at last"


def test_who_waits_too_long_is_told_so(house, fusion, monkeypatch):
    monkeypatch.setattr(fusion, "QUEUE_S", 0.05)
    gate = threading.Event()
    made = house(cast(m1=Reply("at last", delay=gate)), served={"max_requests": 1})
    first = made.client().request({"model": "m1", "messages": ASKED})
    assert until(lambda: made.front.running == 1)
    refusal(made.chat(model="m1"), 503, code="overloaded")
    gate.set()
    assert first.answer().status == 200 and made.calls() == {"m1": 1}


# ---- keys --------------------------------------------------------------------------------------

KEY, OTHER, TOKEN = "sk-key-0123456789abcdef-KEY", "sk-other-fedcba9876543210-KEY", "tok-SERVER-1"


def echoes(kind):
    """A backend that repeats the key that it was sent."""
    def reply(request):
        key = request.headers.get("authorization", "")
        return {
            "message": lambda: error_reply(401, "Incorrect API key provided: %s." % key),
            "fields": lambda: error_reply(400, "no", code=key, type=key, param=key),
            "text": lambda: Reply(status=500, body=key.encode()),
            "list": lambda: Reply(status=400, body=json.dumps({"detail": [key]}).encode()),
            "mid-stream": lambda: Reply("half", error="broke with " + key, error_after=1),
            "html": lambda: Reply(body=b"<p>%s</p>" % key.encode()),
            "no JSON": lambda: Reply(body=b"data: %s\n\n" % key.encode(),
                                     content_type="text/event-stream"),
            "redirect": lambda: Reply(status=302, body=b"", headers={
                "Location": "http://127.0.0.1:9/" + key.replace(" ", "")}),
            "model": lambda: Reply("fine", model=key, finish=key),
        }[kind]()
    return reply


ECHOES = ("message", "fields", "text", "list", "mid-stream", "html", "no JSON", "redirect", "model")


@pytest.mark.parametrize("kind", ECHOES)
def test_no_key_is_ever_shown(house, kind):
    made = house(echoes(kind), env={"FUSION_API_KEY": KEY, "FUSION_OTHER": OTHER},
                 served={"tokens": (TOKEN,)})
    other = dict(model="m2", base_url=made.up.url, api_key_env="FUSION_OTHER")
    made.server.config = made.one("other", panel=["m1", other])
    headers = {"Authorization": "Bearer " + TOKEN}
    shown = []
    for model in ("fusion", "m1", "m2"):
        for stream in (False, True):
            answer = made.chat(model=model, stream=stream, headers=headers,
                               fusion={"include": ["drafts", "trace"]})
            shown.append(answer.raw_head + answer.body)
    for path in ("/metrics", "/health", "/v1/models"):
        shown.append(made.get(path, headers=headers).body)
    sent = {post.headers.get("authorization") for post in made.up.posts()}
    assert {"Bearer " + KEY, "Bearer " + OTHER} == sent
    assert TOKEN not in str([post.raw_head for post in made.up.posts()])
    text = str(shown) + str(made.logged(9))
    assert not [key for key in (KEY, OTHER, TOKEN) if key in text or key[3:20] in text]


def test_the_log_has_no_prompt_and_no_answer(house):
    made = house()
    made.chat([user("the prompt that is private")])
    assert made.logged()
    refusal(made.chat([user("the prompt that is private")], max_tokens=0), 400)
    first, second = made.logged(2)
    assert "private" not in str(made.lines) and "Rayleigh" not in str(made.lines)
    assert (first["method"], first["path"], first["status"]) == ("POST", CHAT, 200)
    assert first["client"] == "127.0.0.1" and first["cost_usd"] > 0 and first["id"]
    assert second["status"] == 400 and "max_tokens" in second["error"]


# ---- who may ask -------------------------------------------------------------------------------


@pytest.mark.parametrize("headers, fine", [
    ({"Authorization": "Bearer one"}, True), ({"Authorization": "bearer two"}, True),
    ({"x-api-key": "two"}, True), ({"Authorization": "Basic eDp5", "x-api-key": "one"}, True),
    ({"Authorization": "Bearer  one "}, True),
    ({}, False), ({"Authorization": "Bearer three"}, False), ({"Authorization": "one"}, False),
    ({"Authorization": "Bearer"}, False), ({"Authorization": "Bearer one,two"}, False),
    ({"x-api-key": ""}, False), ({"x-api-key": "on"}, False), ({"x-api-key": "ones"}, False),
    ({"Authorization": "Bearer \xe4\xf6"}, False),
    ({"Authorization": "Bearer three", "x-api-key": "one"}, False)],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None)
def test_only_who_has_a_key_is_answered(fusion, house, headers, fine):
    made = house(served={"tokens": ("one", "two")})
    lines = "".join("%s: %s\r\n" % pair for pair in headers.items()).encode("latin-1")
    data = json.dumps({"messages": ASKED, "model": "m1"}).encode()
    for start, body in ((b"POST /v1/chat/completions", data), (b"POST /v1/estimate", data),
                        (b"GET /v1/models", b""), (b"GET /v1/models/m1", b""),
                        (b"GET /metrics", b""), (b"GET /nothing", b"")):
        client = made.client()
        client.send(b"%s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n%s" % (
            start, lines, len(body), body))
        answer = client.answer()
        client.close()
        if not fine:
            error = refusal(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert error["type"] == "authentication_error" and "three" not in error["message"]
        else:
            assert answer.status == (404 if b"nothing" in start else 200)
    assert made.get("/health", headers={}).status == 200
    assert made.calls() == ({"m1": 1} if fine else {})


@pytest.mark.parametrize("host, fine", [
    ("127.0.0.1", True), ("127.0.0.1:8000", True), ("localhost", True), ("LocalHost:1", True),
    ("[::1]:8000", True), ("127.9.9.9", True), ("proxy.test", True), ("PROXY.test:443", True),
    ("evil.test", False), ("127.0.0.1.evil.test", False), ("localhost.evil.test", False),
    ("192.168.0.1", False), ("", False), ("evil.test:8000", False), ("proxy.test.evil", False)])
def test_the_host_has_to_be_one_of_ours(house, host, fine):
    made = house(served={"hosts": ("proxy.test",)})
    answer = made.post({"messages": ASKED, "model": "m1"}, host=host)
    if fine:
        assert answer.status == 200
    else:
        refusal(answer, 421)
        refusal(made.post(None, method="GET", path="/health", host=host), 421)
        assert made.calls() == {}


@pytest.mark.parametrize("headers, fine", [
    ({"Origin": "http://127.0.0.1"}, True), ({"Origin": "http://page.test"}, True),
    ({"Origin": "http://page.test", "Sec-Fetch-Site": "cross-site"}, True),
    ({"Sec-Fetch-Site": "same-origin"}, True), ({}, True),
    ({"Origin": "http://evil.test"}, False), ({"Origin": "null"}, False),
    ({"Origin": "https://page.test"}, False), ({"Origin": "http://page.test.evil"}, False),
    ({"Sec-Fetch-Site": "cross-site"}, False), ({"Origin": "http://127.0.0.1:9"}, False)],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None)
def test_pages_of_other_sites_are_refused(calm, headers, fine):
    before = len(calm.up.posts())
    answer = calm.chat(model="m1", headers=headers)
    if fine:
        assert answer.status == 200
        if "Origin" in headers and "page" in headers["Origin"]:
            assert answer.headers["access-control-allow-origin"] == headers["Origin"]
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        else:
            assert "access-control-allow-origin" not in answer.headers
    else:
        refusal(answer, 403)
        assert "access-control-allow-origin" not in answer.headers
        assert len(calm.up.posts()) == before


SDK = ("authorization, content-type, x-stainless-lang, x-stainless-arch, x-stainless-os, "
       "x-stainless-package-version, x-stainless-retry-count, x-stainless-runtime, "
       "x-stainless-runtime-version, x-stainless-timeout, http-referer, x-title, "
       "anthropic-version, anthropic-dangerous-direct-browser-access, x-api-key")


def test_a_browser_may_ask_from_an_allowed_origin(house):
    made = house(served={"origins": ("http://page.test",), "tokens": ("one",)})
    asked = {"Origin": "http://page.test", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": SDK,
             "Access-Control-Request-Private-Network": "true"}
    answer = made.post(None, method="OPTIONS", headers=asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == "http://page.test"
    assert {"POST", "GET"} <= set(answer.headers["access-control-allow-methods"].split(", "))
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert set(SDK.split(", ")) <= set(allowed.split(", "))
    assert answer.headers["vary"] == "Origin"
    assert answer.headers["access-control-allow-private-network"] == "true"
    wrong = made.chat(headers={"Origin": "http://page.test"})
    refusal(wrong, 401)
    assert wrong.headers["access-control-allow-origin"] == "http://page.test"
    foreign = made.post(None, method="OPTIONS", headers=dict(asked, Origin="http://evil.test"))
    refusal(foreign, 403)
    right = made.chat(headers={"Origin": "http://page.test", "Authorization": "Bearer one"})
    assert right.headers["access-control-allow-origin"] == "http://page.test"
    injected = dict(asked, **{"Access-Control-Request-Headers": "x<script>"})
    answer = made.post(None, method="OPTIONS", headers=injected)
    assert "<" not in answer.headers["access-control-allow-headers"]


def test_without_cors_there_is_no_preflight(house):
    made = house()
    answer = made.post(None, method="OPTIONS", headers={"Origin": "http://page.test"})
    refusal(answer, 403)
    answer = made.post(None, method="OPTIONS")
    refusal(answer, 405)
    assert answer.headers["allow"] == "POST"


def test_head_is_get_without_its_body(calm):
    client = calm.client()
    client.send(b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    head = client.head()
    assert client.status == 200 and int(client.headers["content-length"]) > 100
    assert head and client.is_closed()


# ---- serve as a program ------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path):
    """Starts `serve` before a scripted backend: served(up, "--json") is a running Program."""
    path = tmp_path / "setup.json"
    path.write_text(json.dumps({
        "panel": list(MEMBERS), "judge": "judge", "synthesizer": "writer", "max_retries": 0,
        "prices": {model: {"input": 1, "output": 10} for model in PRICED}}))
    with contextlib.ExitStack() as stack:
        def start(up, *args, **env):
            env.setdefault("FUSION_BASE_URL", getattr(up, "url", up))
            argv = ["serve", "--config", str(path)] + list(args)
            if "--port" not in args:
                argv += ["--port", "0"]
            return stack.enter_context(Program(tmp_path / "home", *argv, env=env))
        yield start


def port_of(program):
    """The port of a program that has said where it listens."""
    program.wait_for("/v1", "out")
    return int(re.search(r":(\d+)/v1", program.text("out")).group(1))


def asked(port, body=None, path=CHAT, **headers):
    """The answer of a server at a port."""
    client = Client(port)
    client.request(body, method="GET" if body is None else "POST", path=path, headers=headers)
    answer = client.answer()
    client.close()
    return answer


PASS_THROUGH = {"model": "m1", "messages": ASKED}


def test_serve_says_where_it_is_and_ends_at_sigterm_when_all_is_done(served):
    gate = threading.Event()
    with Upstream(cast(m1=Reply("at last", delay=gate))) as up:
        program = served(up)
        port = port_of(program)
        assert program.text("out") == "http://127.0.0.1:%d/v1\n" % port
        flying = Client(port).request(dict(PASS_THROUGH, stream=True))
        assert up.wait_for(lambda: up.in_flight == 1)
        program.signal(signal.SIGTERM)
        program.wait_for("1 request")
        with pytest.raises(OSError):
            Client(port)
        gate.set()
        frames = [frame[6:] for frame in flying.frames() if frame.startswith(b"data: ")]
        assert frames.pop() == b"[DONE]"
        assert streamed(map(json.loads, frames))["content"] == "at last"
        assert program.end().code == 0


def test_sigterm_delivers_all_that_is_in_flight(served):
    gate = threading.Event()
    with Upstream(cast(m1=Reply("at last", delay=gate))) as up:
        program = served(up)
        clients = [Client(port_of(program)).request(dict(PASS_THROUGH, stream=bool(number % 2)))
                   for number in range(20)]
        assert up.wait_for(lambda: up.in_flight == 20)
        program.signal(signal.SIGTERM)
        program.wait_for("20 requests")
        gate.set()
        answers = [client.answer() for client in clients]
        whole, streams = answers[::2], answers[1::2]
        assert {message(answer)["content"] for answer in whole} == {"at last"}
        assert {streamed(chunks_of(answer))["content"] for answer in streams} == {"at last"}
        assert program.end().code == 0


@pytest.mark.parametrize("most, refused", [(1000, 0), (30, 40)])
def test_a_hundred_chats_at_once_are_each_answered_or_told_to_come_back(house, most, refused):
    """30 run, 30 wait, 40 are told so."""
    gate = threading.Event()
    made = house(cast(m1=Reply("a draft", delay=gate)), served={"max_requests": most})
    clients = [Client(made.port).request({"messages": ASKED}) for _ in range(100)]
    assert until(lambda: made.front.running + len(made.front.waiting) == 100 - refused)
    gate.set()
    answers = [client.answer() for client in clients]
    told = [answer for answer in answers if answer.status == 503]
    assert len(told) == refused
    assert all(int(answer.headers["retry-after"]) >= 2 for answer in told)
    assert all(message(answer)["content"] == TEXT for answer in answers if answer not in told)


def children_of(program):
    """The process ids of a program's children."""
    with open("/proc/%d/task/%d/children" % (program.process.pid, program.process.pid)) as file:
        return list(map(int, file.read().split()))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_workers_share_the_port_and_one_that_dies_is_replaced(served):
    with Upstream(cast()) as up:
        program = served(up, "--workers", "2")
        port = port_of(program)
        assert until(lambda: len(children_of(program)) == 2)
        assert {asked(port, {"messages": ASKED}).status for _ in range(6)} == {200}
        time.sleep(2.1)  # who dies earlier than that has a fault of its own, and ends them all
        first = children_of(program)[0]
        os.kill(first, signal.SIGKILL)
        program.wait_for("another one starts")
        assert until(lambda: len(children_of(program)) == 2 and first not in children_of(program))
        assert {asked(port, {"messages": ASKED}).status for _ in range(6)} == {200}
        program.signal(signal.SIGTERM)
        assert program.end().code == 0
        assert program.text("out").count("http") == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_workers_end_with_their_parent(served):
    with Upstream(cast()) as up:
        program = served(up, "--workers", "2")
        assert asked(port_of(program), path="/health").status == 200
        workers = children_of(program)
        program.signal(signal.SIGKILL)
        assert until(lambda: not any(os.path.exists("/proc/%d/fd" % worker) and
                                     os.listdir("/proc/%d/fd" % worker) for worker in workers))


def test_ctrl_c_ends_serve_with_130(served):
    with Upstream(cast()) as up:
        program = served(up)
        assert asked(port_of(program), path="/health").status == 200
        program.signal(signal.SIGINT)
        assert program.end().code == 130


def test_serve_writes_one_line_of_log_for_each_request(served):
    with Upstream(cast()) as up:
        plain, lines = served(up), served(up, "--log", "json", "--json")
        port_of(plain)
        where = json.loads(lines.text("out")) if port_of(lines) else {}
        assert set(where) == {"url"} and where["url"].endswith("/v1")
        for program in (plain, lines):
            asked(port_of(program), PASS_THROUGH)
            asked(port_of(program), path="/nothing")
            program.wait_for("/nothing")
            program.signal(signal.SIGTERM)
        assert (plain.end().code, lines.end().code) == (0, 0)
    line, = (line for line in plain.text("err").splitlines() if " POST " in line)
    assert re.match(r"\S+ 127\.0\.0\.1 POST %s 200 " % CHAT, line) and "model=m1" in line
    found = sorted((json.loads(line) for line in lines.text("err").splitlines()
                    if line.startswith("{")), key=lambda row: row["status"])
    assert [(row["method"], row["path"], row["status"]) for row in found] == [
        ("POST", CHAT, 200), ("GET", "/nothing", 404)]
    assert found[0]["model"] == "m1" and found[0]["seconds"] >= 0 and found[0]["id"]


def test_serve_takes_its_keys_from_the_environment_and_shows_none(served):
    with Upstream(echoes("message")) as up:
        program = served(up, "--presets", "self", "--debug", FUSION_API_KEY=KEY,
                         FUSION_SERVER_KEY="%s, second" % TOKEN)
        port = port_of(program)
        refusal(asked(port, PASS_THROUGH), 401)
        answers = [asked(port, body, Authorization="Bearer " + token)
                   for token in (TOKEN, "second")
                   for body in (PASS_THROUGH, {"messages": ASKED})]
        assert {answer.status for answer in answers} <= {502}
        assert up.posts()[0].headers["authorization"] == "Bearer " + KEY
        names = [row["id"] for row in asked(port, path="/v1/models", **{
            "x-api-key": TOKEN}).json["data"]]
        assert {"fusion", "fusion/self", "fusion/setup"} <= set(names)
        program.wait_for("/v1/models")
        program.signal(signal.SIGTERM)
        text = str(program.end()) + str(answers)
    assert not [key for key in (KEY, TOKEN) if key in text or key[3:20] in text]


def test_serve_records_and_replays(served, tmp_path):
    tape = tmp_path / "tape.jsonl"
    with Upstream(cast()) as up:
        program = served(up, "--record", str(tape), FUSION_API_KEY=KEY)
        first = message(asked(port_of(program), {"messages": ASKED}))
        program.signal(signal.SIGTERM)
        assert program.end().code == 0, program.ending()
    assert tape.stat().st_size and KEY not in tape.read_text()
    program = served("http://127.0.0.1:9/v1", "--replay", str(tape))
    answer = asked(port_of(program), {"messages": ASKED})
    assert message(answer) == first and receipt(answer)["panel_succeeded"] == list(MEMBERS)
    program.signal(signal.SIGTERM)
    assert program.end().code == 0


def test_serve_can_be_opened_to_others(served):
    with Upstream(cast()) as up:
        for args, env in ((("--insecure-no-auth",), {}), ((), {"FUSION_SERVER_KEY": TOKEN})):
            program = served(up, "--host", "0.0.0.0", "--allow-host", "proxy.test", "--any-model",
                             "--cors", "http://page.test", *args, **env)
            port = port_of(program)
            assert program.text("out") == "http://127.0.0.1:%d/v1\n" % port
            for host, status in (("127.0.0.1", 200), ("10.1.2.3", 200), ("proxy.test", 200),
                                 ("evil.test", 421)):
                client = Client(port)
                client.request(None, method="GET", path="/v1/models", host=host, headers={
                    "x-api-key": TOKEN})
                assert client.answer().status == status
                client.close()
            answer = asked(port, {"model": "any", "messages": ASKED}, Origin="http://page.test",
                           Authorization="Bearer " + TOKEN)
            assert receipt(answer)["panel_models"] == list(MEMBERS)
            assert answer.headers["access-control-allow-origin"] == "http://page.test"
            program.signal(signal.SIGTERM)
            assert program.end().code == 0


@pytest.fixture(scope="module")
def busy_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield str(taken.getsockname()[1])


LOCAL = {"FUSION_BASE_URL": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize("args, env, words", [
    (["--port", "BUSY"], LOCAL, ("BUSY", "--port 0")),
    (["--port", "70000"], LOCAL, ("70000",)),
    (["--port", "http"], LOCAL, ("--port",)),
    (["--host", "0.0.0.0"], LOCAL, ("0.0.0.0", "FUSION_SERVER_KEY", "--insecure-no-auth")),
    (["--host", "::"], LOCAL, ("FUSION_SERVER_KEY",)),
    (["--host", "127.0.0.1.evil.test"], LOCAL, ("FUSION_SERVER_KEY",)),
    (["--config", "budget"], {}, ("OPENROUTER_API_KEY",)),
    (["--presets", "nope"], LOCAL, ("nope",)),
    ([], dict(LOCAL, FUSION_SERVER_KEY=" , "), ("FUSION_SERVER_KEY",)),
    (["--max-body", "0"], LOCAL, ("--max-body",)),
    (["--max-requests", "0"], LOCAL, ("--max-requests",)),
    (["--panle", "x"], LOCAL, ("--panle", "--panel")),
    (["--log", "xml"], LOCAL, ("--log",)),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_serve_does_not_start_with_what_cannot_work(run_fusion, busy_port, args, env, words):
    args = [busy_port if arg == "BUSY" else arg for arg in args]
    more = [] if "--port" in args else ["--port", "0"]
    more += [] if "--config" in args else ["--panel", "m1"]
    found = run_fusion("serve", *args, *more, env=env, timeout=10)
    assert (found.code, found.out) == (2, ""), found.err
    assert re.fullmatch(r"error: .+\nhint: .+\n", found.err), found.err
    assert all(word.replace("BUSY", busy_port) in found.err for word in words), found.err


def test_a_request_that_hangs_is_ended_by_a_second_sigterm(served):
    with Upstream(cast(m1=Reply("never", hang_after=-1))) as up:
        program = served(up)
        client = Client(port_of(program)).request(PASS_THROUGH)
        assert up.wait_for(lambda: up.in_flight == 1)
        program.signal(signal.SIGTERM)
        program.wait_for("stopping")
        started = time.monotonic()

        def again():  # what a supervisor sends twice at once may count once
            if program.process.poll() is None:
                program.signal(signal.SIGTERM)
            return program.process.poll() is not None

        assert until(again) and time.monotonic() - started < 3
        assert program.end().code == 143
        client.close()


# ---- smoke -------------------------------------------------------------------------------------

# Defects that somebody might make: code that replaces a part of the server.
BREAKAGES = {
    "health": "Server.health = lambda self, answer: answer.send(200, {'status': 'fine'})",
    "models": "Server.models = lambda self, answer: answer.send(200, {'data': []})",
    "estimate": "Server.estimate = lambda self, answer: answer.send(200, {'calls': []})",
    "chat": "chat_completion_ = chat_completion\n"
            "def whole(result, *more):\n"
            "    found = chat_completion_(result, *more)\n"
            "    return dict(found, fusion=dict(found['fusion'], request_id='another'))\n"
            "DIALECTS[CHAT] = DIALECTS[CHAT]._replace(whole=whole)",
    "stream": "ChatStream.end = lambda self, result, end=ChatStream.end: "
              "end(self, result).replace(b'[DONE]', b'[OVER]')",
    "tools": "Advice.find = lambda self, key: None",
    "form": "Smoke.ask = lambda self, question, ask=Smoke.ask, **fields: "
            "ask(self, question, **{key: value for key, value in fields.items() "
            "if key != 'response_format'})",
    "refusals": "error_object_ = error_object\n"
                "def without_param(error, degraded=()):\n"
                "    found = error_object_(error, degraded)\n"
                "    del found['error']['param']\n"
                "    return found\n"
                "error_object = without_param\n"
                "DIALECTS[CHAT] = DIALECTS[CHAT]._replace(error=without_param)",
    "metrics": "Counters.add = lambda self, name, amount=1, **labels: None",
    "member": "Server.chosen = lambda self, request, chosen=Server.chosen: chosen(self, "
              "request._replace(model=self.config.name) if request.model in self.names() "
              "else request)",
}


def broken_copy(folder, *names):
    """A copy of the file in which these parts are broken."""
    main = 'if __name__ == "__main__":'
    before, found, after = FUSION_PY.read_text().rpartition(main)
    code = ["CHAT = %r" % CHAT] + [BREAKAGES[name] for name in names]
    path = folder / "fusion.py"
    path.write_text("%s%s\n\n\n%s%s" % (before, "\n".join(code), found, after))
    return path


SMOKES = {
    "well": ((), (), {}),
    "well, with a key": ((), ("--json",), {"FUSION_SERVER_KEY": TOKEN}),
    "health models estimate chat refusals": (
        ("health", "models", "estimate", "chat", "refusals"), ("--json",), {}),
    "stream form metrics": (("stream", "form", "metrics"), (), {}),
    "tools member": (("tools", "member"), (), {}),
}


@pytest.fixture(scope="module")
def smokes(tmp_path_factory):
    """{name: Finished} of SMOKES. They mostly wait, so they run side by side."""
    def smoke(job):
        broken, args, env = job
        home = tmp_path_factory.mktemp("smoke")
        path = broken_copy(home, *broken) if broken else FUSION_PY
        return run_in(home, [sys.executable, path, "smoke", *args], env=env)

    with ThreadPoolExecutor(len(SMOKES)) as pool:
        return dict(zip(SMOKES, pool.map(smoke, SMOKES.values())))


def states_of(found, as_json):
    """{check: state} of what smoke wrote."""
    rows = json.loads(found.out)["checks"] if as_json else [
        dict(zip(("state", "what"), line.split()[:2])) for line in found.out.splitlines()]
    return {row["what"]: row["state"] for row in rows}


@pytest.mark.parametrize("name", [name for name in SMOKES if name.startswith("well")])
def test_smoke_passes_with_the_fake(smokes, name):
    found, as_json = smokes[name], bool(SMOKES[name][1])
    assert found.code == 0 and found.seconds < 20, found.out + found.err
    states = states_of(found, as_json)
    assert set(BREAKAGES) <= set(states) and set(states.values()) == {"ok"}
    if as_json:
        assert json.loads(found.out)["ok"] is True and TOKEN not in found.out + found.err
    else:
        assert all(path in found.out for path in ("/health", "/v1/models", CHAT, "/metrics"))


@pytest.mark.parametrize("name", [name for name in SMOKES if SMOKES[name][0]])
def test_smoke_names_what_is_broken(smokes, name):
    found, (broken, args, _) = smokes[name], SMOKES[name]
    assert found.code == 1, found.out + found.err
    failed = {check for check, state in states_of(found, bool(args)).items() if state == "fail"}
    shared = {"tools"} if "stream" in broken else set()  # that check reads a stream too
    assert set(broken) <= failed <= set(broken) | shared, found.out
    assert "Traceback" not in found.out + found.err
    if args:
        assert json.loads(found.out)["ok"] is False
