"""Money: the price table, the cost of a usage, the ledger, estimates, the ceiling that holds."""

import collections
import itertools
import json
import random
import re
import threading
import time

import pytest

from upstream import Reply, Upstream, error_reply

OPUS = "anthropic/claude-opus-4.8"
BUDGET = ["google/gemini-3-flash-preview", "moonshotai/kimi-k2.6", "deepseek/deepseek-v4-pro"]
QUESTION = [{"role": "user", "content": "Which of the two bridges carries more, and why?"}]
TINY = 1e-9  # USD; what adding up floats may be off

# Input, output and cached input in USD per million tokens, copied from OpenRouter's list of
# 2026-11-10; None where cached input is no cheaper.
ROWS = {
    "google/gemini-3-flash-preview": (0.5, 3, 0.05),
    "moonshotai/kimi-k2.6": (0.65, 3.41, 0.15),
    "deepseek/deepseek-v4-pro": (0.95526, 1.91052, 0.079605),
    "anthropic/claude-opus-4.8": (5, 25, 0.5),
    "openai/gpt-5.5": (5, 30, 0.5),
    "google/gemini-3.1-pro-preview": (2, 12, 0.2),
    "openai/gpt-5.4": (2.5, 15, 0.25),
    "openai/gpt-5.4-mini": (0.75, 4.5, 0.075),
    "anthropic/claude-fable-5.2": (8, 40, 0.2),
    "anthropic/claude-haiku-4.5": (1, 5, 0.1),
    "anthropic/claude-opus-5.5": (4, 20, 0.2),
    "anthropic/claude-sonnet-5": (2, 10, 0.2),
    "deepseek/deepseek-v3.2": (0.26, 0.38, 0.13),
    "deepseek/deepseek-v4-flash": (0.091, 0.182, 0.0182),
    "google/gemini-2.5-flash": (0.3, 2.5, 0.03),
    "google/gemini-3.8-flash": (0.825, 4.125, 0.0825),
    "google/gemma-4-31b-it": (0.2, 0.4, None),
    "meta-llama/llama-3.3-70b-instruct": (0.71, 0.71, 0.71),
    "meta-llama/llama-4-maverick": (0.35, 1, 0.17),
    "mistralai/mistral-medium-3-5": (1.5, 7.5, None),
    "moonshotai/kimi-k3": (0.192, 16, 0.182),
    "openai/gpt-4o": (2.5, 10, 1.25),
    "openai/gpt-oss-120b": (0.15, 0.6, 0.075),
    "qwen/qwen3-coder": (0.3, 1, 0.1),
    "qwen/qwen3.8-max-0902": (2, 6, 0.25),
    "x-ai/grok-4.7": (2, 6, 0.5),
    "z-ai/glm-5.3": (0.0699, 1.4, 0.0689),
}
# Prompts above so many tokens: input, output, cached input of the whole request.
TIERS = {
    "anthropic/claude-haiku-5.5": (100000, 0.5, 2.5, 0.05),
    "anthropic/claude-sonnet-4.5": (200000, 6, 22.5, 0.6),
    "google/gemini-2.5-pro": (200000, 2.5, 15, 0.25),
    "google/gemini-3.1-pro-preview": (200000, 4, 18, 0.4),
    "openai/gpt-5.4": (272000, 5, 22.5, 0.5),
    "openai/gpt-5.5": (272000, 10, 45, 1),
    "openai/gpt-6-astra": (272000, 20, 75, 2),
    "openai/gpt-6-luna": (272000, 0.2, 0.75, 0.02),
    "openai/gpt-6.1-sol": (272000, 4, 15, 0.2),
    "x-ai/grok-4.3": (200000, 2.5, 5, 0.4),
    "x-ai/grok-4.7": (200000, 4, 12, 1),
}
BASES = dict(ROWS, **{
    "anthropic/claude-haiku-5.5": (0.1, 0.5, 0.01),
    "anthropic/claude-sonnet-4.5": (3, 15, 0.3),
    "google/gemini-2.5-pro": (1.25, 10, 0.125),
    "openai/gpt-6-astra": (10, 50, 1),
    "openai/gpt-6-luna": (0.1, 0.5, 0.01),
    "openai/gpt-6.1-sol": (2, 10, 0.1),
    "x-ai/grok-4.3": (1.25, 2.5, 0.2),
})


@pytest.fixture
def load(fusion, tmp_path):
    """Loads a configuration with these values over a backend (none: the default one)."""

    def load_values(values, url=None):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        real = {"FUSION_BASE_URL": url} if url else {}
        return fusion.load_config(str(path), fusion.Env(real))

    return load_values


@pytest.fixture
def network(fusion):
    made = fusion.Network()
    yield made
    made.close()


@pytest.fixture
def price(fusion, load):
    """The price of a model by the table alone."""
    config = load({"panel": ["m"]})
    return lambda model: fusion.price_of(fusion.Member(model=model), config)


@pytest.fixture
def ready(fusion, load, network):
    """Makes (config, run) of these values over an upstream, without a wait between retries."""

    def make(up, values):
        config = load(dict({"panel": ["m"], "max_retries": 0, "retry_backoff": 0}, **values),
                      up.url)
        return config, fusion.start_run(config, network)

    return make


@pytest.fixture
def fused(fusion, ready):
    """Runs the pipeline against an upstream and returns (result, run)."""

    def run_once(up, values, messages=QUESTION, params=None):
        config, run = ready(up, values)
        return fusion.fuse(config, messages, run, params), run

    return run_once


@pytest.fixture
def asked(fusion, ready):
    """Asks one model and returns (its line of the receipt, the run)."""

    def ask(up, values, **options):
        config, run = ready(up, values)
        fusion.complete(run, config.panel[0], QUESTION, **options)
        return run.ledger.records[0], run

    return ask


def named(table):
    return [pytest.param(*row, id=str(row[0])) for row in table]


# ---- the price table ------------------------------------------------------------------------


@pytest.mark.parametrize("slug, row", named(sorted(BASES.items())))
def test_the_table_has_the_published_price(price, slug, row):
    found = price(slug)
    assert (found.input, found.output, found.cached_input) == row


@pytest.mark.parametrize("slug, row", named(sorted(TIERS.items())))
def test_the_table_has_the_published_tier(price, slug, row):
    assert [tuple(tier) for tier in price(slug).tiers] == [row]


def test_no_other_model_has_a_tier(price):
    assert [slug for slug in ROWS if price(slug).tiers and slug not in TIERS] == []


def test_the_table_says_where_it_comes_from_and_of_which_day(fusion):
    assert fusion.PRICES_DATE == "2026-11-10"
    assert "OpenRouter" in fusion.PRICES_SOURCE


def test_the_table_has_the_models_of_the_presets_and_forty_others(fusion):
    config = [fusion.load_config(name, fusion.Env({}))
              for name in ("budget", "frontier", "research", "self", "openai")]
    used = {member.model for found in config
            for member in found.panel + (found.judge,) + found.synthesizer}
    prefixed = {slug if "/" in slug else "openai/" + slug for slug in used}
    assert prefixed <= set(fusion.PRICES)
    assert len(set(fusion.PRICES) - prefixed) >= 40


@pytest.mark.parametrize("model, slug", [
    ("gpt-5.5", "openai/gpt-5.5"), ("gpt-5.4-mini", "openai/gpt-5.4-mini"),
    ("claude-opus-4.8", "anthropic/claude-opus-4.8"),
    ("gemini-3.1-pro-preview", "google/gemini-3.1-pro-preview")])
def test_a_name_without_its_vendor_has_the_same_price(price, model, slug):
    assert price(model) == price(slug) is not None


@pytest.mark.parametrize("model", [
    "openai/gpt-5.5:nitro", "openai/gpt-5.5:free", "gpt-5.5:batch", "openai/gpt-5.5-pro",
    "openai/gpt-5", "OPENAI/GPT-5.5", "azure/gpt-5.5", "vendor/openai/gpt-5.5", "gpt", "", "5.5",
    "openai/", "unknown/model"])
def test_a_variant_or_another_name_has_no_guessed_price(price, model):
    known = {"openai/gpt-5": (1.25, 10)}
    found = price(model)
    assert (found and (found.input, found.output)) == known.get(model)


def test_the_models_command_shows_the_table_with_its_date(run_fusion):
    result = run_fusion("models", "--json")
    shown = json.loads(result.out)
    assert "2026-11-10" in shown["source"]
    rows = {row["id"]: (row["input"], row["output"], row["cached_input"])
            for row in shown["models"]}
    assert {slug: rows[slug] for slug in BASES} == BASES


# ---- the cost of a usage --------------------------------------------------------------------

# prompt, completion, cached, reasoning -> USD; gpt-5.5 is 5/30, cached 0.5, above 272,000 10/45/1.
COSTS = [
    ("openai/gpt-5.5", (1000, 100, 0, 0), (1000 * 5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (1000, 100, 400, 0), (600 * 5 + 400 * 0.5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (1000, 100, 1000, 0), (1000 * 0.5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (1000, 100, 0, 80), (1000 * 5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (1000, 100, 0, 100), (1000 * 5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (0, 0, 0, 0), 0),
    ("openai/gpt-5.5", (1000, 100, 5000, 0), (1000 * 0.5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (272000, 100, 0, 0), (272000 * 5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (272001, 100, 0, 0), (272001 * 10 + 100 * 45) / 1e6),
    ("openai/gpt-5.5", (272001, 100, 272000, 50), (1 * 10 + 272000 * 1 + 100 * 45) / 1e6),
    ("openai/gpt-5.5", (272000, 100, 272000, 0), (272000 * 0.5 + 100 * 30) / 1e6),
    ("openai/gpt-5.5", (900, 300000, 0, 0), (900 * 5 + 300000 * 30) / 1e6),
    ("google/gemma-4-31b-it", (1000, 10, 900, 0), (1000 * 0.2 + 10 * 0.4) / 1e6),
    ("deepseek/deepseek-v4-pro", (10, 10, 10, 0), (10 * 0.079605 + 10 * 1.91052) / 1e6),
]


@pytest.mark.parametrize("slug, usage, cost", [
    pytest.param(*row, id="%s-%s" % (row[0].partition("/")[2], "-".join(map(str, row[1]))))
    for row in COSTS])
def test_cost_of_a_usage(fusion, price, slug, usage, cost):
    assert fusion.cost_of(fusion.Usage(*usage), price(slug)) == pytest.approx(cost, abs=1e-12)


@pytest.mark.parametrize("slug", sorted(TIERS))
def test_each_tier_begins_just_above_its_boundary(fusion, price, slug):
    above, given, out, cached = TIERS[slug]
    base = BASES[slug]
    at = fusion.cost_of(fusion.Usage(above, 1000, 1000), price(slug))
    over = fusion.cost_of(fusion.Usage(above + 1, 1000, 1000), price(slug))
    assert at == pytest.approx(((above - 1000) * base[0] + 1000 * (base[2] + base[1])) / 1e6)
    assert over == pytest.approx(((above - 999) * given + 1000 * (cached + out)) / 1e6)


def test_a_configured_price_without_cached_input_takes_the_input_price(fusion, load):
    config = load({"panel": ["m"], "prices": {"m": {"input": 7, "output": 9}}})
    found = fusion.price_of(config.panel[0], config)
    assert fusion.cost_of(fusion.Usage(1000, 10, 999), found) == pytest.approx(7090e-6)


def test_a_configured_cached_price_of_zero_is_free_and_not_missing(fusion, load):
    values = {"input": 7, "output": 9, "cached_input": 0}
    config = load({"panel": ["m"], "prices": {"m": values}})
    found = fusion.price_of(config.panel[0], config)
    assert fusion.cost_of(fusion.Usage(1000, 0, 400), found) == pytest.approx(4200e-6)


# ---- where a price comes from ---------------------------------------------------------------

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100,
         "prompt_tokens_details": {"cached_tokens": 400},
         "completion_tokens_details": {"reasoning_tokens": 90}}
OF_MEMBER = {"input": 1, "output": 2, "cached_input": 0.5}
OF_CONFIG = {"input": 10, "output": 20, "cached_input": 5}
MEMBER_USD = (600 * 1 + 400 * 0.5 + 100 * 2) / 1e6
CONFIG_USD = (600 * 10 + 400 * 5 + 100 * 20) / 1e6
TABLE_USD = (600 * 5 + 400 * 0.5 + 100 * 30) / 1e6
KNOWN, UNKNOWN = "openai/gpt-5.5", "some/model"

# Reported cost, price of the member, price in `prices`, model, owner of the backend's models.
ORDER = [
    ("reported first", (0.125, True, True, KNOWN, "llamacpp"), 0.125, "reported"),
    ("reported zero", (0, True, True, KNOWN, "llamacpp"), 0, "reported"),
    ("reported for an unknown model", (0.125, False, False, UNKNOWN, "x"), 0.125, "reported"),
    ("then the member", (None, True, True, KNOWN, "llamacpp"), MEMBER_USD, "table"),
    ("then the configuration", (None, False, True, KNOWN, "llamacpp"), CONFIG_USD, "table"),
    ("configured unknown model", (None, False, True, UNKNOWN, "x"), CONFIG_USD, "table"),
    ("then the table", (None, False, False, KNOWN, "x"), TABLE_USD, "table"),
    ("then a local engine", (None, False, False, UNKNOWN, "llamacpp"), 0, "local"),
    ("else unknown", (None, False, False, UNKNOWN, "x"), None, "unknown"),
    ("a variant is unknown", (None, False, False, KNOWN + ":nitro", "x"), None, "unknown"),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("given, cost, source", [
    pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in ORDER])
def test_a_price_is_taken_in_the_documented_order(asked, given, cost, source, streamed):
    reported, of_member, of_config, model, owner = given
    member = dict({"model": model}, **({"price": OF_MEMBER} if of_member else {}))
    prices = {model: OF_CONFIG} if of_config else {}
    with Upstream({model: Reply("x", usage=USAGE, cost=reported)}, owned_by=owner) as up:
        line, run = asked(up, {"panel": [member], "prices": prices}, stream=streamed)
    assert line.cost_usd == (None if cost is None else pytest.approx(cost, abs=1e-12))
    assert line.source == source
    found = [entry["model"] for entry in run.degraded if entry["code"] == "price_unknown"]
    assert found == ([model] if cost is None else [])
    assert (line.usage.prompt, line.usage.completion) == (1000, 100)


@pytest.mark.parametrize("owner", ["llamacpp", "library", "vllm", "organization_owner"])
def test_ollama_llama_cpp_lm_studio_and_vllm_on_loopback_cost_nothing(asked, owner):
    with Upstream(lambda request: Reply("x", usage=USAGE), models=["m"], owned_by=owner) as up:
        line, _ = asked(up, {})
    assert (line.cost_usd, line.source) == (0, "local")


def test_a_backend_that_is_not_on_loopback_is_not_free_for_saying_so(fusion, load, network):
    with Upstream(models=["m"], owned_by="llamacpp") as up:
        url = up.url.replace("127.0.0.1", "0.0.0.0")  # reaches it, and is no loopback address
        config = load({"panel": ["m"], "mode": "solo"}, url)
        run = fusion.start_run(config, network)
        fusion.complete(run, config.panel[0], QUESTION)
        assert len(up.posts()) == 1
    assert run.ledger.records[0].cost_usd is None


@pytest.mark.parametrize("member, owner, cost_known, source", [
    (KNOWN, "x", True, "estimated"), (UNKNOWN, "llamacpp", True, "local"),
    (UNKNOWN, "x", False, "unknown")])
def test_a_usage_that_is_missing_is_estimated_and_said(asked, member, owner, cost_known, source):
    with Upstream({member: Reply("y" * 4000, usage=None)}, owned_by=owner) as up:
        line, run = asked(up, {"panel": [member]})
    assert "usage_estimated" in [entry["code"] for entry in run.degraded]
    assert line.source == source
    assert (line.cost_usd is not None) == cost_known
    assert 800 <= line.usage.completion <= 1400
    if source == "estimated":
        assert line.cost_usd > 800 * 30 / 1e6


@pytest.mark.parametrize("usage", [
    {}, [], "1", {"prompt_tokens": -1, "completion_tokens": 5}, {"prompt_tokens": 5},
    {"prompt_tokens": True, "completion_tokens": True},
    {"prompt_tokens": "7", "completion_tokens": "7"},
    {"prompt_tokens": 0, "completion_tokens": 0}])
def test_a_usage_that_is_nonsense_is_estimated(asked, usage):
    with Upstream({KNOWN: Reply("y" * 400, usage=usage)}) as up:
        line, _ = asked(up, {"panel": [KNOWN]}, stream=False)
    assert line.source == "estimated"
    assert line.cost_usd > 0


@pytest.mark.parametrize("cost", [-1, "0.5", True, None, float("nan"), [1]])
def test_a_reported_cost_that_is_no_price_is_passed_over(asked, cost):
    with Upstream({KNOWN: Reply("x", usage=dict(USAGE, cost=cost))}) as up:
        line, _ = asked(up, {"panel": [KNOWN]})
    assert (line.cost_usd, line.source) == (pytest.approx(TABLE_USD), "table")


ATTEMPTS = {
    "a cut stream": Reply("x" * 80, usage=USAGE, cut_after=2),
    "an error in the stream": Reply("x" * 80, usage=USAGE, error="overloaded", error_after=2),
    "an empty answer": Reply("", usage=USAGE),
    "reasoning alone": Reply("", reasoning="hm " * 40, usage=USAGE),
}


@pytest.mark.parametrize("name", sorted(ATTEMPTS))
def test_an_accepted_attempt_that_failed_counts_with_the_one_that_succeeded(asked, name):
    with Upstream({KNOWN: [ATTEMPTS[name], Reply("done", usage=USAGE)]}) as up:
        line, _ = asked(up, {"panel": [KNOWN], "max_retries": 1, "retry_backoff": 0})
        assert len(up.billed) == 2
    assert line.attempts == 2
    assert line.cost_usd > TABLE_USD + TINY
    assert line.usage.prompt > 1000


@pytest.mark.parametrize("cut", ["fin", "rst"])
def test_a_usage_that_came_before_the_cut_is_what_the_attempt_cost(asked, cut):
    broken = Reply(chunks=["half ", "of"], usage=USAGE, cut_after=2, cut=cut,
                   sse={"usage_on": "content"})
    with Upstream({KNOWN: [broken, Reply("done", usage=USAGE)]}) as up:
        line, run = asked(up, {"panel": [KNOWN], "max_retries": 1, "max_cost_usd": 5})
    assert line.attempts == 2
    assert (line.cost_usd, line.source) == (pytest.approx(2 * TABLE_USD), "table")
    assert run.ledger.held == 0


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_a_refused_attempt_costs_nothing(asked, status):
    fields = {"panel": [KNOWN], "max_retries": 1, "retry_backoff": 0}
    refusals = [error_reply(status, "temperature is not supported"), Reply("x", usage=USAGE)]
    with Upstream({KNOWN: refusals}) as up:
        line, run = asked(up, fields, temperature=0.5)
        assert len(up.posts()) == 2
    assert line.cost_usd == run.ledger.spent == pytest.approx(TABLE_USD)


# ---- sums -----------------------------------------------------------------------------------


JUDGEMENT = json.dumps({"consensus": ["Both carry."], "contradictions": [], "best_draft": "A"})


def reply_as(**options):
    """A script: members, judge and writer all answer in the role they were asked in."""

    def script(request):
        text = JUDGEMENT if is_judge(request) else "%s says %d." % (request.model, request.n)
        return Reply(text, **options)

    return script


def is_judge(request):
    return "You are the judge" in str(request.messages[-1]["content"])


def test_the_receipt_is_the_sum_of_what_the_backend_billed(fusion, fused, price):
    models = ["openai/gpt-5.5", "x-ai/grok-4.7", "openai/gpt-5.4-mini"]
    with Upstream(reply_as()) as up:
        result, _ = fused(up, {"panel": models, "samples": 2, "layers": 2, "refine": True})
        billed = [fusion.cost_of(fusion.Usage(row[1], row[2]), price(row[0])) for row in up.billed]
        tokens = sum(row[1] + row[2] for row in up.billed)
    receipt = result.receipt
    assert len(billed) == 3 * 2 * 2 + 3
    assert receipt["cost_usd"] == pytest.approx(sum(billed), abs=TINY)
    assert sum(row["cost_usd"] for row in receipt["cost_breakdown"]) == pytest.approx(sum(billed))
    assert receipt["cost_source"] == "table"
    assert result.usage.total == tokens


SOURCES = [
    ("reported", {"cost": 0.25}, "x", "openai/gpt-5.5"),
    ("table", {}, "x", "openai/gpt-5.5"),
    ("estimated", {"usage": None}, "x", "openai/gpt-5.5"),
    ("local", {}, "llamacpp", "some/model"),
    ("unknown", {}, "x", "some/model"),
]


@pytest.mark.parametrize("source, options, owner, model", named(SOURCES))
def test_the_receipt_names_the_source_of_its_cost(fused, source, options, owner, model):
    with Upstream(reply_as(**options), models=[model], owned_by=owner) as up:
        result, _ = fused(up, {"panel": [model, model]})
    assert result.receipt["cost_source"] == source
    cost = {"reported": pytest.approx(1.0), "local": 0, "unknown": None}
    if source in cost:
        assert result.receipt["cost_usd"] == cost[source]


def test_several_sources_are_mixed(fused):
    def script(request):
        reply = reply_as()(request)
        reply.cost = 0.5 if request.model == "some/model" else None
        return reply

    with Upstream(script) as up:
        result, _ = fused(up, {"panel": ["some/model", "openai/gpt-5.5"],
                               "judge": "openai/gpt-5.5", "synthesizer": "openai/gpt-5.5"})
    assert result.receipt["cost_source"] == "mixed"
    assert result.receipt["cost_usd"] > 0.5


def test_one_call_of_unknown_price_makes_the_total_unknown_and_never_zero(fused):
    with Upstream(reply_as()) as up:
        result, _ = fused(up, {"panel": ["some/model", "openai/gpt-5.5"],
                               "judge": "openai/gpt-5.5", "synthesizer": "openai/gpt-5.5"})
    costs = {row["model"]: row["cost_usd"] for row in result.receipt["cost_breakdown"]}
    assert costs["some/model"] is None
    assert costs["openai/gpt-5.5"] > 0
    assert result.receipt["cost_usd"] is None
    assert result.receipt["cost_source"] == "unknown"
    assert "price_unknown" in [entry["code"] for entry in result.receipt["degraded"]]


def test_under_a_ceiling_a_call_of_unknown_price_is_refused_and_said(fused):
    with Upstream(reply_as()) as up:
        result, run = fused(up, {"panel": ["some/model", "openai/gpt-5.5"], "max_cost_usd": 5,
                                 "judge": "openai/gpt-5.5", "synthesizer": "openai/gpt-5.5"})
        assert up.posts("some/model") == []
    assert result.receipt["panel_succeeded"] == ["openai/gpt-5.5"]
    unknown = [entry["model"] for entry in run.degraded if entry["code"] == "price_unknown"]
    assert unknown == ["some/model"]


# ---- the ledger -----------------------------------------------------------------------------


def test_the_ledger_reserves_settles_and_holds(fusion):
    ledger = fusion.Ledger(1.0)
    amount = ledger.reserve(0.5, "m")
    assert (amount, ledger.reserved, ledger.spent) == (0.5, 0.5, 0)
    ledger.settle(amount, 0.125)
    assert (ledger.reserved, ledger.spent, ledger.held) == (0, 0.125, 0)
    ledger.settle(ledger.reserve(0.5, "m"), 0.125, exact=False)
    assert (ledger.reserved, ledger.spent, ledger.held) == (0, 0.25, 0.375)
    ledger.settle(ledger.reserve(0.375, "m"), None)
    assert ledger.committed() == 0.625


@pytest.mark.parametrize("first", ["reserved", "spent", "held"])
def test_the_ceiling_is_exact_whatever_uses_it_up(fusion, first):
    ledger = fusion.Ledger(1.0)
    amount = ledger.reserve(0.75, "m")
    if first != "reserved":
        ledger.settle(amount, 0.75 if first == "spent" else 0, exact=first == "spent")
    with pytest.raises(fusion.LimitError) as caught:
        ledger.reserve(0.25 + 2**-30, "the writer")
    assert (caught.value.exit_code, caught.value.status) == (4, 402)
    assert caught.value.code == "budget_exceeded"
    assert "the writer" in caught.value.message
    assert "--max-cost" in caught.value.hint
    assert ledger.reserve(0.25, "m") == 0.25


def test_a_ledger_without_ceiling_never_refuses(fusion):
    ledger = fusion.Ledger()
    ledger.settle(ledger.reserve(1e9, "m"), 1e9)
    assert ledger.spent == 1e9


def test_a_ceiling_of_zero_is_a_ceiling(fusion):
    with pytest.raises(fusion.LimitError):
        fusion.Ledger(0.0).reserve(TINY, "m")


class Slow(float):
    """An amount that lets the other threads go first, whenever a sum is made with it."""

    def __radd__(self, other):
        time.sleep(0)
        return other + float(self)

    def __rsub__(self, other):
        time.sleep(0)
        return other - float(self)


def in_threads(count, work):
    """Runs work(number) on so many threads at once, and returns what each of them returned."""
    together, results = threading.Barrier(count), {}

    def start(number):
        together.wait(10)
        results[number] = work(number)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def test_sixteen_threads_get_exactly_the_ceiling_and_no_reservation_more(fusion):
    ledger = fusion.Ledger(1.0)

    def work(number):
        granted = 0
        for _ in range(20):
            try:
                granted += bool(ledger.reserve(Slow(2**-7), "m"))
            except fusion.LimitError:
                continue
        return granted

    assert sum(in_threads(16, work).values()) == 128
    assert ledger.committed() == 1.0


def test_sixteen_hammering_threads_never_pass_the_ceiling(fusion):
    ledger = fusion.Ledger(1.0)

    def work(number):
        rng, spent, worst = random.Random(number), 0.0, 0.0
        for _ in range(100):
            amount = Slow(rng.uniform(0.001, 0.2))
            try:
                ledger.reserve(amount, "m")
            except fusion.LimitError:
                continue
            worst = max(worst, ledger.committed())
            cost, exact = Slow(amount * rng.random() * 0.05), rng.random() < 0.95
            ledger.settle(amount, cost, exact)
            spent += float(cost if exact else amount)
        return spent, worst

    found = in_threads(16, work).values()
    total = sum(spent for spent, _ in found)
    assert max(worst for _, worst in found) <= 1.0 + TINY
    assert 0.5 < total <= 1.0 + TINY
    assert ledger.spent + ledger.held == pytest.approx(total, abs=TINY)
    assert abs(ledger.reserved) < TINY


# ---- what a call reserves -------------------------------------------------------------------


def size_of(value):
    return len(json.dumps(value, ensure_ascii=False).encode())


BIG_TOOLS = [{"type": "function", "function": {
    "name": "tool_%d" % number, "description": "Does something. " * 60,
    "parameters": {"type": "object", "properties": {}}}} for number in range(20)]
BIG_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
    "type": "object", "description": "What belongs here. " * 500}}}
SENT = [
    ("the messages and the cap", {"max_tokens": 700}, 700),
    ("max_completion_tokens", {"max_completion_tokens": 900}, 900),
    ("the larger of two caps", {"max_tokens": 10, "max_completion_tokens": 900}, 900),
    ("tools", {"max_tokens": 700, "tools": BIG_TOOLS}, 700),
    ("a response format", {"max_tokens": 700, "response_format": BIG_FORM}, 700),
    ("the configured cap", {}, 333),
]


@pytest.mark.parametrize("params, completion", [
    pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in SENT])
def test_a_call_reserves_all_that_it_may_be_billed_for(fusion, ready, params, completion):
    messages = [{"role": "user", "content": "a question of some length. " * 50}]
    values = {"panel": [KNOWN], "mode": "solo", "max_tokens": 333, "max_cost_usd": 50}
    with Upstream() as up:
        config, run = ready(up, values)
        reserved = []
        up.script = watching(run.ledger, reserved)
        fusion.fuse(config, messages, run, params)
        sent = up.posts()[0].body
    prompt = sum(size_of(sent[key]) for key in ("messages", "tools", "response_format")
                 if key in sent)
    worst = (prompt / 4 * 5 + completion * 30) / 1e6
    assert worst <= reserved[0] < 2 * worst
    assert abs(run.ledger.reserved) < TINY


def watching(ledger, reserved):
    """A script that notes what is reserved while its request is under way."""

    def script(request):
        reserved.append(ledger.reserved)
        return Reply("x")

    return script


def image(count, size=100):
    """A message with so many images of so many bytes, and a few words."""
    url = "data:image/png;base64," + "A" * size
    parts = [{"type": "image_url", "image_url": {"url": url}} for _ in range(count)]
    return [{"role": "user", "content": parts + [{"type": "text", "text": "What is it?"}]}]


def test_a_call_with_an_image_reserves_the_image_and_not_its_bytes(fusion, ready):
    reserved = []
    values = {"panel": [KNOWN], "mode": "solo", "max_tokens": 1, "max_cost_usd": 50}
    with Upstream() as up:
        for messages in (image(0), image(1), image(1, 1_000_000), image(3)):
            config, run = ready(up, values)
            up.script = watching(run.ledger, reserved)
            fusion.fuse(config, messages, run)
    none, one, large, three = reserved
    assert 700 * 5 / 1e6 < one - none < 4000 * 5 / 1e6
    assert large == pytest.approx(one, rel=0.01)
    assert three - none == pytest.approx(3 * (one - none), rel=0.1)


# ---- estimates ------------------------------------------------------------------------------

TRIO = ["openai/gpt-5.4-mini", "x-ai/grok-4.7", "anthropic/claude-haiku-4.5"]
SHAPES = [dict(zip(("layers", "samples", "refine", "mode", "vote"), row))
          for row in itertools.product((1, 2, 4), (1, 3, 8), (False, True), ("fuse", "solo"),
                                       (False, True))]


def calls_of(shape, members):
    """How many calls a request of this shape makes, by the words of the contract."""
    drafts = 0 if shape["mode"] == "solo" else members * shape["samples"] * shape["layers"]
    return drafts + (shape["mode"] != "solo") + 1 + shape["refine"]


@pytest.mark.parametrize("members", [1, 3, 16])
def test_an_estimate_plans_the_calls_of_every_shape_and_low_is_at_most_high(
    fusion, load, members
):
    panel = [TRIO[index % 3] for index in range(members)]
    for shape in SHAPES:
        plan = fusion.estimate(load(dict({"panel": panel}, **shape)), QUESTION)
        low, high = fusion.total_of(plan)
        assert sum(item.calls for item in plan) == calls_of(shape, members), shape
        assert 0 < low <= high, shape
        assert all(item.low <= item.high for item in plan)
        assert (low, high) == pytest.approx((sum(item.low for item in plan),
                                             sum(item.high for item in plan)))


@pytest.mark.parametrize("more", [{"layers": 2}, {"samples": 2}, {"refine": True},
                                  {"max_tokens": 5000}, {"panel": TRIO + [OPUS]},
                                  {"judge": OPUS}, {"synthesizer": OPUS}],
                         ids=lambda more: next(iter(more)))
def test_an_estimate_rises_with_each_thing_that_costs(fusion, load, more):
    base = fusion.total_of(fusion.estimate(load({"panel": TRIO}), QUESTION))
    found = fusion.total_of(fusion.estimate(load(dict({"panel": TRIO}, **more)), QUESTION))
    assert found[0] > base[0]
    assert found[1] > base[1]


def test_an_estimate_rises_with_the_prompt(fusion, load):
    config = load({"panel": TRIO})
    short = fusion.total_of(fusion.estimate(config, QUESTION))
    long = fusion.total_of(fusion.estimate(config, [{"role": "user", "content": "why " * 9000}]))
    assert long[0] > short[0] + 5 * 5000 * 1 / 1e6
    assert long[1] > short[1] + 5 * 9000 * 1 / 1e6


def test_the_cap_of_the_client_changes_the_estimate_of_the_writer_alone(fusion, load):
    config = load({"panel": TRIO, "synthesizer": OPUS, "max_tokens": 1000})
    own = {item.role: item for item in fusion.estimate(config, QUESTION)}
    capped = {item.role: item for item in fusion.estimate(config, QUESTION, 3000)}
    assert capped["synth"].high - own["synth"].high == pytest.approx(2000 * 25 / 1e6)
    assert capped["synth"].low > own["synth"].low
    assert (capped["member"], capped["judge"]) == (own["member"], own["judge"])
    below = {item.role: item for item in fusion.estimate(config, QUESTION, 100)}
    assert own["synth"].high - below["synth"].high == pytest.approx(900 * 25 / 1e6)


def test_the_cap_of_a_judge_of_its_own_changes_its_estimate(fusion, load):
    def judged(cap):
        config = load({"panel": TRIO, "judge": {"model": OPUS, "max_tokens": cap}})
        return {item.role: item for item in fusion.estimate(config, QUESTION)}["judge"].high

    assert judged(20000) - judged(10000) == pytest.approx(10000 * 25 / 1e6)


def test_an_unknown_price_makes_the_total_of_an_estimate_unknown(fusion, load):
    plan = fusion.estimate(load({"panel": [KNOWN, "some/model"]}), QUESTION)
    assert fusion.total_of(plan) == (None, None)
    known = [item for item in plan if item.model == KNOWN]
    assert known
    assert all(item.high > 0 for item in known)


def test_an_estimate_counts_images_and_not_their_bytes(fusion, load):
    config = load({"panel": [KNOWN], "mode": "solo"})

    def high(messages):
        return fusion.total_of(fusion.estimate(config, messages))[1]

    assert 700 * 5 / 1e6 < high(image(1)) - high(image(0)) < 4000 * 5 / 1e6
    assert high(image(1, 1_000_000)) == pytest.approx(high(image(1)), rel=0.01)
    assert high(image(3)) - high(image(0)) > 2.5 * (high(image(1)) - high(image(0)))


# ---- the high end against runs whose replies hit every cap ----------------------------------

CAP = 200
CAPPED = [{"model": model, "max_tokens": CAP} for model in TRIO]
ROLES = {"panel": CAPPED, "max_tokens": CAP, "judge": KNOWN, "synthesizer": OPUS}
WORST = [
    ("three members", {}, None),
    ("one model in all roles", {"panel": CAPPED[:1], "judge": TRIO[0], "synthesizer": TRIO[0]},
     None),
    ("samples", {"samples": 3}, None),
    ("layers", {"layers": 3}, None),
    ("layers and samples", {"layers": 2, "samples": 2}, None),
    ("refine", {"refine": True}, None),
    ("vote without majority", {"vote": True}, None),
    ("solo", {"mode": "solo"}, None),
    ("solo and refine", {"mode": "solo", "refine": True}, None),
    ("lens", {"panel": [dict(member, lens="Mind the cost. " * 33) for member in CAPPED]}, None),
    ("caps of the members differ", {"panel": [
        dict(member, max_tokens=50 * 4**index) for index, member in enumerate(CAPPED)]}, None),
    ("a judge with a larger cap", {"judge": {"model": KNOWN, "max_tokens": 9000}}, None),
    ("a writer with a larger cap", {"synthesizer": {"model": OPUS, "max_tokens": 9000}}, None),
    ("a larger cap of the client", {"refine": True}, {"max_tokens": 9000}),
    ("the other cap of the client", {"refine": True}, {"max_completion_tokens": 9000}),
    ("128 drafts", {"panel": [{"model": TRIO[index % 3], "max_tokens": 20}
                              for index in range(16)], "samples": 8}, None),
]


def at_caps(request):
    """A reply that takes all of its cap, at four bytes a token, in one piece of prose or JSON."""
    body = request.body
    cap = body.get("max_completion_tokens") or body["max_tokens"]
    mark = "%s %d %s " % (request.model, request.n, request.connection)
    text = (mark + "and so on " * (cap // 2 + 1))[:4 * cap]
    if is_judge(request):
        shell = json.dumps({"consensus": [""], "best_draft": "A"})
        text = shell.replace('""', '"%s"' % text[:4 * cap - len(shell)], 1)
    usage = {"prompt_tokens": size_of(body["messages"]) // 3, "completion_tokens": cap}
    return Reply(text, usage=usage)


def worst_of(request):
    """The tokens that a request reserves, by the contract: prompt bytes / 3, and the cap."""
    cap = request.body.get("max_completion_tokens") or request.body["max_tokens"]
    return request.model, size_of(request.messages) // 3, cap


def by_model(fusion, price, rows):
    """What rows of (model, prompt tokens, completion tokens) cost, for each model."""
    found = collections.Counter()
    for model, prompt, completion in rows:
        found[model] += fusion.cost_of(fusion.Usage(prompt, completion), price(model))
    return found


@pytest.mark.parametrize("values, params", [
    pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in WORST])
def test_the_high_estimate_covers_a_run_whose_replies_hit_every_cap(
    fusion, ready, price, values, params
):
    with Upstream(at_caps) as up:
        config, run = ready(up, dict(ROLES, **values))
        plan = fusion.estimate(config, QUESTION, *(params or {}).values())
        result = fusion.fuse(config, QUESTION, run, params)
        assert len(up.posts()) == sum(item.calls for item in plan)
        billed = by_model(fusion, price, [row[:3] for row in up.billed])
        worst = by_model(fusion, price, map(worst_of, up.posts()))
    high = collections.Counter()
    for item in plan:
        high[item.model] += item.high
    assert result.receipt["cost_usd"] == pytest.approx(sum(billed.values()))
    assert fusion.total_of(plan)[0] < sum(billed.values())
    assert {model: usd for model, usd in billed.items() if usd > high[model] + TINY} == {}
    assert {model: usd for model, usd in worst.items() if usd > high[model] + TINY} == {}


def test_the_high_estimate_is_a_ceiling_under_which_the_whole_run_fits(fusion, ready):
    values = {"panel": CAPPED, "max_tokens": CAP, "layers": 2, "samples": 2, "refine": True}
    with Upstream(at_caps) as up:
        high = fusion.total_of(fusion.estimate(ready(up, values)[0], QUESTION))[1]
        config, run = ready(up, dict(values, max_cost_usd=high))
        fusion.fuse(config, QUESTION, run)
        assert len(up.posts()) == 15
    codes = {entry["code"] for entry in run.degraded}
    assert not codes & {"budget_cut", "judge_failed", "synthesizer_failed", "member_failed"}


# ---- the ladder -----------------------------------------------------------------------------

FOUR = [{"model": model, "max_tokens": 500} for model in TRIO + ["openai/gpt-5.4"]]
FULL = {"panel": FOUR, "refine": True, "samples": 3, "layers": 2}
LADDER = [
    ("refine", {"refine": False}),
    ("samples", {"samples": 1}),
    ("layers", {"layers": 1}),
    ("openai/gpt-5.4", {"panel": FOUR[:3]}),
    (TRIO[2], {"panel": FOUR[:2]}),
    ("solo", {"mode": "solo"}),
]


def rungs(fusion, load):
    """The configurations from the full one down to solo, each with its high estimate."""
    values, found = dict(FULL), []
    for changes in [{}] + [changes for _, changes in LADDER]:
        values.update(changes)
        config = load(values)
        found.append((config, fusion.total_of(fusion.estimate(config, QUESTION))[1]))
    return found


def shape(config):
    return (config.mode, config.refine, config.samples, config.layers,
            [member.model for member in config.panel] if config.mode != "solo" else None)


@pytest.mark.parametrize("steps", range(len(LADDER) + 1))
def test_the_ladder_goes_down_in_order_and_only_as_far_as_it_must(fusion, load, steps):
    configs = rungs(fusion, load)
    wanted, high = configs[steps]
    found, cuts = fusion.within_budget(configs[0][0], QUESTION, None, high)
    assert shape(found) == shape(wanted)
    assert len(cuts) == steps
    for cut, (words, _) in zip(cuts, LADDER):
        assert words in cut
    if steps:
        above = configs[steps - 1][1]
        found, _ = fusion.within_budget(configs[0][0], QUESTION, None, (high + above) / 2)
        assert shape(found) == shape(wanted)


def test_without_a_ceiling_nothing_is_cut(fusion, load):
    config = load(FULL)
    assert fusion.within_budget(config, QUESTION, None, None) == (config, [])


def test_below_one_call_the_ladder_ends_in_a_limit_error(fusion, load):
    configs = rungs(fusion, load)
    with pytest.raises(fusion.LimitError) as caught:
        fusion.within_budget(configs[0][0], QUESTION, None, configs[-1][1] * 0.999)
    error = caught.value
    assert (error.exit_code, error.status, error.code) == (4, 402, "budget_exceeded")
    allowed = float(re.search(r"--max-cost ([\d.]+)", error.hint).group(1))
    found, _ = fusion.within_budget(configs[0][0], QUESTION, None, allowed)
    assert found.mode == "solo"


def test_refine_is_also_cut_first_when_the_mode_is_solo_from_the_start(fusion, load):
    config = load({"panel": CAPPED, "mode": "solo", "refine": True, "max_tokens": CAP})
    high = fusion.total_of(fusion.estimate(config, QUESTION))[1]
    found, cuts = fusion.within_budget(config, QUESTION, None, high * 0.7)
    assert (found.mode, found.refine, len(cuts)) == ("solo", False, 1)
    assert "refine" in cuts[0]


def test_the_cap_of_the_client_counts_on_the_ladder(fusion, load):
    config = load({"panel": CAPPED, "max_tokens": CAP})
    high = fusion.total_of(fusion.estimate(config, QUESTION))[1]
    assert fusion.within_budget(config, QUESTION, CAP, high) == (config, [])
    assert fusion.within_budget(config, QUESTION, 10 * CAP, high)[1] != []


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_cap_of_the_client_counts_on_the_ladder_of_a_run(fusion, ready, name):
    with Upstream(reply_as()) as up:
        values = {"panel": CAPPED, "max_tokens": CAP, "refine": True}
        high = fusion.total_of(fusion.estimate(ready(up, values)[0], QUESTION))[1]
        cuts = {}
        for cap in (CAP, 10 * CAP):
            config, run = ready(up, dict(values, max_cost_usd=high))
            fusion.fuse(config, QUESTION, run, {name: cap})
            cuts[cap] = [entry["code"] for entry in run.degraded]
    assert cuts[CAP] == []
    assert "budget_cut" in cuts[10 * CAP]


@pytest.mark.parametrize("steps", range(1, len(LADDER) + 1))
def test_a_run_under_a_ceiling_does_less_and_says_so(fusion, load, fused, steps):
    config, high = rungs(fusion, load)[steps]
    with Upstream(reply_as()) as up:
        _, run = fused(up, dict(FULL, max_cost_usd=high))
        expected = calls_of({"mode": config.mode, "refine": config.refine, "layers": config.layers,
                             "samples": config.samples}, len(config.panel))
        assert len(up.posts()) == expected
    cuts = [entry["detail"] for entry in run.degraded if entry["code"] == "budget_cut"]
    assert len(cuts) == steps
    assert all(words in cut for cut, (words, _) in zip(cuts, LADDER))


# ---- the ceiling that holds -----------------------------------------------------------------


def limit_of(fusion, ready, up, values):
    """Runs the pipeline, which must end at the ceiling, and returns (error, run)."""
    config, run = ready(up, values)
    with pytest.raises(fusion.LimitError) as caught:
        fusion.fuse(config, QUESTION, run)
    error = caught.value
    assert (error.exit_code, error.status, error.code) == (4, 402, "budget_exceeded")
    assert "--max-cost" in error.hint
    return error, run


@pytest.mark.parametrize("ceiling", [0, TINY, 1e-5])
@pytest.mark.parametrize("mode", ["fuse", "solo", "auto"])
def test_a_ceiling_below_one_call_sends_nothing_and_is_a_limit_error(fusion, ready, ceiling, mode):
    with Upstream() as up:
        limit_of(fusion, ready, up, {"panel": TRIO, "max_cost_usd": ceiling, "mode": mode})
        assert up.posts() == []


@pytest.mark.parametrize("params", [
    {"max_tokens": 0}, {"max_tokens": -1}, {"max_completion_tokens": -1}, {"max_tokens": "100"},
    {"n": -3}, {"n": "2"}], ids=lambda params: "%s=%r" % next(iter(params.items())))
def test_under_a_ceiling_a_cap_that_bounds_nothing_is_refused_before_anything_is_sent(
    fusion, ready, params
):
    values = {"panel": [KNOWN, OPUS], "max_tokens": 100, "max_cost_usd": 5}
    with Upstream(reply_as()) as up:
        config, run = ready(up, values)
        with pytest.raises(fusion.UsageError) as caught:
            fusion.fuse(config, QUESTION, run, params)
        assert up.posts() == []
    assert caught.value.status == 400
    assert next(iter(params)) in caught.value.message


def test_what_was_never_reported_is_held_so_that_a_retry_cannot_pass_the_ceiling(fusion, ready):
    values = {"panel": [{"model": KNOWN, "max_tokens": 1000}], "mode": "solo", "max_retries": 5}
    with Upstream(lambda request: Reply("x" * 400, usage=None, cut_after=3)) as up:
        config, _ = ready(up, values)
        one = fusion.total_of(fusion.estimate(config, QUESTION))[1]
        config, run = ready(up, dict(values, max_cost_usd=2.5 * one))
        with pytest.raises(fusion.LimitError):
            fusion.fuse(config, QUESTION, run)
        assert len(up.posts()) == 2
    assert run.ledger.committed() == pytest.approx(2 * one, rel=0.1)


def test_a_call_that_was_cancelled_before_it_was_sent_costs_nothing(fusion, ready):
    values = {"panel": [KNOWN], "max_concurrency": 1, "max_cost_usd": 5, "max_tokens": 1000}
    with Upstream(lambda request: Reply("x" * 80, delay=threading.Event())) as up:
        config, run = ready(up, values)
        calls = [fusion.spawn(fusion.complete, run, config.panel[0], QUESTION) for _ in range(2)]
        assert up.wait_for(lambda: len(up.posts()) == 1 and run.ledger.reserved > 1.5 * 0.03)
        run.cancel.set("the client left")
        for call in calls:
            with pytest.raises(fusion.Cancelled):
                call.result(5)
        assert len(up.posts()) == 1
    assert len(run.ledger.records) == 1
    assert 0.03 < run.ledger.committed() < 1.1 * 0.03
    assert abs(run.ledger.reserved) < TINY


def test_a_reported_usage_frees_the_rest_of_the_reservation(fusion, ready):
    values = {"panel": [{"model": KNOWN, "max_tokens": 1000}], "mode": "solo", "max_retries": 5}
    usage = {"prompt_tokens": 10, "completion_tokens": 10}
    replies = [Reply("", usage=usage)] * 4 + [Reply("done", usage=usage)]
    with Upstream({KNOWN: replies}) as up:
        config, _ = ready(up, values)
        one = fusion.total_of(fusion.estimate(config, QUESTION))[1]
        config, run = ready(up, dict(values, max_cost_usd=1.2 * one))
        assert fusion.fuse(config, QUESTION, run).reply.text == "done"
    assert run.ledger.spent == pytest.approx(5 * (10 * 5 + 10 * 30) / 1e6)
    assert run.ledger.held == 0


def test_calls_at_the_same_time_share_one_ceiling(fusion, ready):
    """Eight members wait for each other, so that all their worst cases are reserved at once."""
    gate, peaks = threading.Event(), []
    panel = [{"model": TRIO[index % 3], "max_tokens": 400} for index in range(8)]

    with Upstream() as up:
        config, _ = ready(up, {"panel": panel, "max_tokens": 400})
        high = fusion.total_of(fusion.estimate(config, QUESTION))[1]
        config, run = ready(up, {"panel": panel, "max_tokens": 400, "max_cost_usd": high})

        def script(request):
            if not is_judge(request) and len(up.posts()) >= 8:
                peaks.append(run.ledger.reserved)
                gate.set()
            return Reply(JUDGEMENT if is_judge(request) else "draft %d" % request.connection,
                         delay=0 if is_judge(request) else gate)

        up.script = script
        fusion.fuse(config, QUESTION, run)
        assert up.peak_in_flight == 8
    members = [item for item in fusion.estimate(config, QUESTION) if item.role == "member"]
    assert peaks[0] == pytest.approx(sum(item.high for item in members), rel=0.05)
    assert run.ledger.committed() <= high
    assert abs(run.ledger.reserved) < TINY


# What an upstream may do with a call, and how often; each of them is billed if it was accepted.
DEEDS = (["answers"] * 4 + ["at its cap"] * 8 + ["empty"] * 3
         + ["reports its cost", "no usage", "error event"] * 2
         + ["cut", "cut with usage", "reset", "refuses", "busy", "cut by length", "no headers",
            "too slow"])


def billing_script(seed, slow):
    """A script that does a deed by lot with each call, within the worst case of that call."""
    lock, rng = threading.Lock(), random.Random(seed)

    def script(request):
        with lock:
            deed, share = rng.choice(DEEDS), rng.random()
        body = request.body
        cap = body.get("max_completion_tokens") or body["max_tokens"]
        words = JUDGEMENT if is_judge(request) else "%s says %s. " % (request.model, share)
        completion = int(cap * share) if deed in ("answers", "reports its cost") else cap
        prompt = size_of(body["messages"]) // 4
        row = ROWS[request.model]
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        cost = share * (prompt * row[0] + completion * row[1]) / 1e6
        options = {
            "reports its cost": {"cost": cost},
            "no usage": {"usage": None},
            "cut": {"cut_after": 2},
            "cut with usage": {"cut_after": 3, "chunks": ["a", "b"],
                               "sse": {"usage_on": "content"}},
            "reset": {"cut_after": 1, "cut": "rst"},
            "error event": {"error": "overloaded", "error_after": 2},
            "cut by length": {"finish": "length"},
            "no headers": {"raw": b""},
            "too slow": {"hang_after": 1} if slow else {},
        }.get(deed, {})
        if deed in ("refuses", "busy"):
            return error_reply(400 if deed == "refuses" else 429, "no")
        return Reply("" if deed == "empty" else words, **dict({"usage": usage}, **options))

    return script


def random_values(rng, slow):
    """A configuration by lot."""
    models = [rng.choice(sorted(ROWS)) for _ in range(rng.randint(1, 5))]
    return {
        "panel": [{"model": model, "max_tokens": rng.randint(60, 900)} for model in models],
        "judge": rng.choice(models),
        "synthesizer": rng.sample(models, min(2, len(models))),
        "spares": [rng.choice(sorted(ROWS))], "max_tokens": rng.randint(60, 900),
        "samples": rng.choice([1, 1, 2, 3]), "layers": rng.choice([1, 1, 2]),
        "refine": rng.random() < 0.3, "vote": rng.random() < 0.2,
        "mode": rng.choice(["fuse"] * 5 + ["solo"]), "max_retries": rng.randint(0, 5),
        "quorum": rng.choice([0, 0, 1, 2]), "grace_s": 0.01, "stream_members": rng.random() < 0.8,
        "member_timeout_s": 0.25 if slow else 20, "timeout_s": 20,
    }


def cost_of_bill(fusion, price, billed):
    """What the upstream billed, at the list price where it named none."""
    return sum(fusion.cost_of(fusion.Usage(prompt, completion), price(model))
               if cost is None else cost for model, prompt, completion, cost in billed)


def seeded_run(fusion, ready, price, seed):
    """One run by lot; returns (what came of it, its ceiling, what was billed, its ledger)."""
    rng = random.Random(seed)
    slow = seed % 6 == 0
    values = random_values(rng, slow)
    with Upstream(billing_script(seed, slow)) as up:
        config, _ = ready(up, values)
        whole = fusion.total_of(fusion.estimate(config, QUESTION))[1]
        alone = fusion.total_of(fusion.estimate(
            fusion.with_flags(config, {"mode": "solo", "refine": False}), QUESTION))[1]
        ceiling = rng.choice([0.9, 1, 1.3, 2, 3]) * alone if seed % 2 else \
            rng.choice([0.3, 0.5, 0.8, 1]) * whole
        config, run = ready(up, dict(values, max_cost_usd=ceiling))
        try:
            fusion.fuse(config, QUESTION, run)
            outcome = "answered"
        except fusion.LimitError as error:
            outcome = "limit"
            assert (error.exit_code, error.status) == (4, 402)
        except fusion.BackendError:
            outcome = "failed"
        assert up.wait_for(lambda: up.in_flight == 0)
        return outcome, ceiling, cost_of_bill(fusion, price, up.billed), run.ledger


def test_sixty_runs_by_lot_never_cost_more_than_their_ceiling(fusion, ready, price):
    outcomes, used = collections.Counter(), 0
    for seed in range(60):
        outcome, ceiling, billed, ledger = seeded_run(fusion, ready, price, seed)
        outcomes[outcome] += 1
        used += billed > 0.7 * ceiling
        where = "seed %d, %s" % (seed, outcome)
        assert billed <= ceiling + TINY, where
        assert billed <= ledger.committed() + TINY, where
        assert ledger.committed() <= ceiling + TINY, where
        assert abs(ledger.reserved) < TINY, where
    assert outcomes["answered"] >= 15, outcomes
    assert outcomes["limit"] >= 3, outcomes
    assert used >= 8, "the ceilings were hardly ever near"


# ---- the program ----------------------------------------------------------------------------


def test_ask_estimate_needs_no_network_and_no_key(run_fusion):
    with Upstream() as up:
        result = run_fusion("ask", "--estimate", "--json", "--config", "budget", "--refine",
                            "Why?", env={"FUSION_BASE_URL": up.url})
        assert (up.connections, up.requests) == (0, [])
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert {call["model"] for call in found["calls"]} == set(BUDGET) | {OPUS}
    assert sum(call["calls"] for call in found["calls"]) == 6
    assert 0 < found["low_usd"] < found["high_usd"] < 1


def test_ask_estimate_works_for_the_default_backend_without_any_key(run_fusion):
    result = run_fusion("ask", "--estimate", "Why?")
    assert result.code == 0, result.err
    assert all(model in result.out for model in BUDGET)
    assert "$" in result.out


def test_a_ceiling_that_is_too_low_ends_the_program_with_4_and_a_hint(run_fusion):
    result = run_fusion("ask", "--max-cost", "0.000001", "--fake", "hello")
    assert (result.code, result.out) == (4, "")
    assert re.search(r"(?m)^error: ", result.err)
    assert re.search(r"(?m)^hint: .*--max-cost \d", result.err)


def test_a_ceiling_that_is_high_enough_lets_the_program_answer(run_fusion):
    result = run_fusion("ask", "--max-cost", "2", "--fake", "hello")
    assert result.code == 0, result.err
    assert "fake" in result.out
