"""The fake backend: a real HTTP server that reacts to what reaches it, and says that it is fake."""
import functools
import http.client
import json
import os
import re
import signal
import socket
from urllib.parse import urlsplit

import pytest

from conftest import run_fusion
from test_talk import Program, check_completion, check_shape, check_stopped, unharmed

QUESTION = {"role": "user", "content": "Why is the sky blue?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The program `fake --port 0` at work."""
    with Program(tmp_path_factory.mktemp("home"), "fake", "--port", "0") as running:
        running.wait_for("\n", "out")
        yield running


@pytest.fixture(scope="module")
def url(server):
    return server.text("out").strip()


@pytest.fixture
def call(url):
    """Sends one HTTP request as any client would; returns (status, content type, body)."""
    def send(method, path, body=None, headers=None):
        client = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        try:
            if isinstance(body, dict):
                body = json.dumps(body)
            client.request(method, path, body, headers or {"Content-Type": "application/json"})
            response = client.getresponse()
            return response.status, response.headers["Content-Type"], response.read().decode()
        finally:
            client.close()
    return send


@pytest.fixture
def complete(call):
    """Asks the fake for a completion: complete(messages, temperature=1) -> the whole object."""
    def ask(messages=(QUESTION,), **fields):
        body = dict({"model": "fake/owl", "messages": list(messages)}, **fields)
        status, kind, found = call("POST", "/v1/chat/completions", body)
        assert (status, kind) == (200, "application/json"), found
        return json.loads(found)
    return ask


@pytest.fixture
def say(complete):
    """The text of a completion."""
    return lambda *args, **fields: complete(*args, **fields)["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def ask(fusion, url, tmp_path_factory):
    """Asks a panel of the fake, the same thing once: ask(layers=2) -> Result."""
    path = tmp_path_factory.mktemp("setup") / "setup.json"
    path.write_text(json.dumps({"panel": ["fake/owl", "fake/fox"], "judge": "fake/j",
                                "synthesizer": "fake/s", "diversity_jitter": 0.7}))
    config = fusion.load_config(str(path), fusion.Env({"FUSION_BASE_URL": url}))

    @functools.lru_cache(maxsize=None)
    def run(question="Why is the sky blue?", **flags):
        network = fusion.Network()
        try:
            given = fusion.with_flags(config, flags)
            messages = [{"role": "user", "content": question}]
            return fusion.fuse(given, messages, fusion.start_run(given, network))
        finally:
            network.close()
    return run


# ---- the server -----------------------------------------------------------------------------

def test_its_address_is_all_that_is_on_stdout(server, url):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)
    assert server.text("out") == url + "\n"
    server.wait_for("FUSION_BASE_URL=" + url)
    assert "fake" in server.text("err")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models?limit=9"])
def test_it_lists_its_models(call, path):
    status, kind, body = call("GET", path)
    assert (status, kind) == (200, "application/json")
    found = json.loads(body)
    assert found["object"] == "list" and len(found["data"]) >= 3
    check_shape(found, {"data": [{"id": str, "object": str, "created": int, "owned_by": str}]})
    assert all("fake" in model["id"] for model in found["data"])


def test_an_answer_is_openais_object_and_says_that_it_is_fake(complete):
    found = complete()
    check_shape(found, {"id": str, "object": str, "created": int, "model": str, "usage": {
        "prompt_tokens": int, "completion_tokens": int, "total_tokens": int}})
    assert (found["object"], found["model"]) == ("chat.completion", "fake/owl")
    assert found["usage"]["total_tokens"] == (found["usage"]["prompt_tokens"] +
                                              found["usage"]["completion_tokens"])
    (choice,) = found["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert choice["message"]["role"] == "assistant"
    assert "[fake]" in choice["message"]["content"]
    assert QUESTION["content"] in choice["message"]["content"]


def events_of(body):
    """The JSON values of an event stream that ends with [DONE]."""
    blocks = body.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block[len("data: "):]) for block in blocks[:-2]]


def test_a_stream_says_the_same_in_chunks_and_then_its_usage(call, complete):
    whole = complete()
    status, kind, body = call("POST", "/v1/chat/completions?x=1", {
        "model": "fake/owl", "messages": [QUESTION], "stream": True,
        "stream_options": {"include_usage": True}})
    assert (status, kind) == (200, "text/event-stream")
    events = events_of(body)
    check_shape({"events": events}, {"events": [{"id": str, "object": str, "created": int}]})
    assert len({(event["id"], event["created"]) for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    choices = [event["choices"][0] for event in events if event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == whole["choices"][0]["message"]["content"] and len(choices) > 5
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_token_cap_cuts_and_says_length(complete, field):
    found = complete(**{field: 5})
    choice = found["choices"][0]
    assert choice["finish_reason"] == "length" and found["usage"]["completion_tokens"] == 5
    whole = complete(**{field: 5000})["choices"][0]
    assert whole["message"]["content"].startswith(choice["message"]["content"])
    assert whole["finish_reason"] == "stop"


@pytest.mark.parametrize("method, path", [
    ("GET", "/v1/nothing"), ("GET", "/"), ("POST", "/v1/embeddings")])
def test_what_is_not_there_is_a_404_in_json(call, method, path):
    status, kind, body = call(method, path, "{}" if method == "POST" else None)
    assert (status, kind) == (404, "application/json")
    check_shape(json.loads(body), {"error": {"message": str, "type": str}})


@pytest.mark.parametrize("body", [
    "", "{", "[]", "null", "7", '"words"', "{}", '{"messages": []}', '{"messages": "words"}',
    '{"messages": [7]}', '{"messages": null}', "\xff"])
def test_a_bad_request_is_a_400_in_json_and_the_server_lives(call, body):
    status, kind, found = call("POST", "/v1/chat/completions", body.encode("latin-1"))
    assert (status, kind) == (400, "application/json")
    check_shape(json.loads(found), {"error": {"message": str, "type": str}})
    assert call("GET", "/v1/models")[0] == 200


@pytest.mark.parametrize("content", [
    "words", "", None, [{"type": "text", "text": "words"}], [{"type": "image_url", "image_url": {
        "url": "data:image/png;base64,AA=="}}], []])
def test_any_content_of_a_message_is_taken(say, content):
    assert "[fake]" in say([{"role": "user", "content": content}])


# ---- it reacts to what reaches it -------------------------------------------------------------

def test_a_draft_changes_with_model_question_and_temperature(say):
    variants = [{}, {"model": "fake/fox"}, {"temperature": 1.5}, {"temperature": 0.1},
                {"messages": [dict(QUESTION, content="Why is grass green?")]}]
    said = [say(**fields) for fields in variants]
    assert len({re.sub("fake/\\w+", "", text) for text in said}) == len(said)
    assert said[0] == say(), "and with nothing else"


def drafts_of(result):
    return {draft.letter: draft.text for draft in result.drafts}


def test_the_judge_quotes_the_drafts_that_reached_it(ask):
    result = ask(samples=4)
    analysis, texts = result.receipt["analysis"], " ".join(
        " ".join(text.split()) for text in drafts_of(result).values())
    quotes = [stance["quote"] for entry in analysis["contradictions"]
              for stance in entry["stances"]]
    quotes += [entry["quote"] for entry in analysis["unique_insights"]]
    assert len(quotes) > 2 and all(quote in texts for quote in quotes)
    assert result.receipt["judge_unsupported"] == 0 and result.receipt["degraded"] == []


@pytest.mark.parametrize("question", [
    "caf\u00e9 \U0001f600 & <b>\nlines\n\n\tand ```code``` </draft> <draft-x>", "x" * 5000],
    ids=["odd", "long"])
def test_any_question_goes_through_the_whole_pipeline(ask, question):
    result = ask(question=question)
    assert result.receipt["degraded"] == [] and result.receipt["judge"] == "fake/j"
    start = " ".join(question.split())[:150]
    assert start in result.reply.text and "2 drafts reached the writer (A, B)" in result.reply.text


def last_message(drafts, analysis=None):
    """The message that a writer gets, as a wire that changes what it carries would send it."""
    fenced = "\n".join('<draft-t letter="%s">\n%s\n</draft-t>' % pair for pair in drafts.items())
    found = "" if analysis is None else "<analysis-t>\n%s\n</analysis-t>\n" % json.dumps(analysis)
    return {"role": "user", "content": "%s\n%sNow write the answer" % (fenced, found)}


def test_the_writer_uses_the_analysis_that_reached_it(say):
    drafts = {"A": "one", "B": "two"}
    without = say([QUESTION, last_message(drafts)])
    said = [say([QUESTION, last_message(drafts, {"consensus": [point]})])
            for point in ("POINT ONE", "POINT TWO")]
    assert "POINT ONE" in said[0] and "POINT TWO" in said[1]
    assert "No analysis" in without and "No analysis" not in said[0]
    assert all("[fake]" in text for text in said + [without])


def test_the_answer_holds_what_the_judge_found(ask):
    result = ask(samples=4)
    analysis = result.receipt["analysis"]
    points = analysis["consensus"] + analysis["blind_spots"]
    points += [entry["insight"] for entry in analysis["unique_insights"]]
    assert len(points) > 2 and all(point in result.reply.text for point in points)


def test_layers_show_in_the_drafts_and_refining_in_the_answer(ask):
    plain, deep = ask(), ask(layers=2, refine=True)
    seen = "I have seen drafts A, B"
    assert all(seen in text for text in drafts_of(deep).values())
    assert not any(seen in text for text in drafts_of(plain).values())
    assert "refined" in deep.reply.text and "refined" not in plain.reply.text
    assert deep.receipt["degraded"] == []


def test_samples_differ_and_are_each_heard(ask):
    result = ask(samples=4)
    assert len(drafts_of(result)) == len(result.receipt["panel_succeeded"]) == 8
    assert "8 drafts reached the writer" in result.reply.text


def test_a_fake_answer_costs_nothing_on_an_unlisted_model(ask):
    receipt = ask().receipt
    assert (receipt["cost_usd"], receipt["cost_source"]) == (0, "local")


# ---- as a program ---------------------------------------------------------------------------

def test_the_program_answers_through_the_fake_that_it_starts(tmp_path):
    found = run_fusion("ask", "--fake", "hello", "--json", env={"OPENROUTER_API_KEY": "sk-real"})
    assert found.code == 0 and "fake: nothing is billed" in found.err
    answer = json.loads(found.out)
    check_completion(answer)
    assert "[fake]" in answer["choices"][0]["message"]["content"]
    assert answer["fusion"]["degraded"] == [] and len(answer["fusion"]["panel_succeeded"]) == 3


def test_it_is_a_backend_like_any_other(url):
    found = run_fusion("ask", "Why is it so?", "--json", env={"FUSION_BASE_URL": url})
    assert found.code == 0, found.err
    receipt = json.loads(found.out)["fusion"]
    assert receipt["panel_models"] == ["fake/owl", "fake/fox", "fake/heron"]
    assert receipt["panel_succeeded"] == receipt["panel_models"] and receipt["degraded"] == []


def test_it_is_never_on_unless_it_is_asked_for():
    found = run_fusion("ask", "hello")
    assert (found.code, found.out) == (2, "") and "[fake]" not in found.err
    dead = run_fusion("ask", "hello", env={"FUSION_BASE_URL": "http://127.0.0.1:9/v1"})
    assert (dead.code, dead.out) == (3, "")


def test_a_port_that_is_busy_is_refused_and_a_free_one_is_used(tmp_path, url):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with Program(tmp_path, "fake", "--port", port) as running:
        running.wait_for("http://127.0.0.1:%s/v1\n" % port, "out")
        busy = run_fusion("fake", "--port", port)
    assert (busy.code, busy.out) == (2, "") and port in busy.err and unharmed(busy)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_ends_at_once(tmp_path, number, code):
    with Program(tmp_path, "fake") as running:
        running.wait_for("/v1\n", "out")
        running.signal(number)
        check_stopped(running.end(), code)
    assert os.listdir(tmp_path) == [], "it keeps nothing"
