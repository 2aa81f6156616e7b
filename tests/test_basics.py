"""Section 01: tolerant JSON, reasoning in text, threads, errors and the small helpers."""

import json
import random
import sys
import threading
import time

import pytest

from conftest import FUSION_PY, run_in

KEYS = {
    "consensus",
    "contradictions",
    "partial_coverage",
    "unique_insights",
    "errors",
    "blind_spots",
    "must_include",
    "best_draft",
}
HOSTILE_BYTES = 200_000
HOSTILE_SECONDS = 3.0

ANALYSIS = {
    "consensus": ["Water boils at 100 \u00b0C at sea level.",
                  'It is "lower" on a mountain; {why}?'],
    "contradictions": [
        {
            "topic": "at what height",
            "positions": [
                {"letters": ["A", "C"], "stance": "3,000 m", "quote": "at 3,000 m: 90 \u00b0C"},
                {"letters": ["B"], "stance": "5,000 m", "quote": "it's [about] 83 \u00b0C"},
            ],
            "verdict": "both hold // they name different heights",
        }
    ],
    "partial_coverage": [{"letters": ["A"], "point": "pressure # not temperature"}],
    "unique_insights": [
        {"letter": "B", "point": "salt, raises it", "quote": "58 g: 0.5 K", "keep": True},
        {"letter": "C", "point": "a \\ backslash\nand a line", "quote": "", "keep": False},
    ],
    "errors": [],
    "blind_spots": ["superheating \U0001f525", "/* altitude of the reader */"],
    "must_include": ["the pressure", "a table, [with] units"],
    "best_draft": "C",
}
REALISTIC = json.dumps(ANALYSIS, indent=1)


# ---- tolerant JSON: the table ---------------------------------------------------------------

ONE = {"best_draft": "A"}
TWO = {"consensus": ["x"], "best_draft": "A"}
AGREED = [
    # (name, what a model wrote, the object that is in it)
    ("plain", '{"best_draft": "A"}', ONE),
    ("byte order mark", '\ufeff{"best_draft": "A"}', ONE),
    ("blank space around", ' \n\t{"best_draft": "A"}\r\n ', ONE),
    ("think block before", '<think>{"best_draft": "B"}?</think>\n{"best_draft": "A"}', ONE),
    ("think block unopened", 'so A wins\n</think>{"best_draft": "A"}', ONE),
    ("think block of the long name", '<thinking>B?</thinking>{"best_draft": "A"}', ONE),
    ("fence with a language", '```json\n{"best_draft": "A"}\n```', ONE),
    ("fence without one", '```\n{"best_draft": "A"}\n```', ONE),
    ("fence that never closes", '```json\n{"best_draft": "A"}', ONE),
    ("fence inside a string", '```\n{"best_draft": "```"}\n```', {"best_draft": "```"}),
    ("prose before", 'Here is the map:\n\n{"best_draft": "A"}', ONE),
    ("prose after", '{"best_draft": "A"}\n\nI hope that {this} helps!', ONE),
    ("prose with braces before", 'I use {} and {x} here: {"best_draft": "A"}', ONE),
    ("trailing comma in an object", '{"best_draft": "A",}', ONE),
    ("trailing comma in a list", '{"consensus": ["x",], "best_draft": "A"}', TWO),
    ("doubled comma", '{"consensus": ["x",,], "best_draft": "A"}', TWO),
    ("comma first", '{, "best_draft": "A"}', ONE),
    ("single quotes", "{'consensus': ['x'], 'best_draft': 'A'}", TWO),
    ("apostrophes in single quotes", "{'consensus': ['it's a dog's life', 'don't']}",
     {"consensus": ["it's a dog's life", "don't"]}),
    ("escaped apostrophe", r"{'consensus': ['it\'s']}", {"consensus": ["it's"]}),
    ("mixed quotes", """{'consensus': ["it's"], "errors": ['say "no" now']}""",
     {"consensus": ["it's"], "errors": ['say "no" now']}),
    ("line comments", '{ // a map\n "best_draft": "A" // the best\n}', ONE),
    ("hash comments", '# map\n{ # a map\n "best_draft": "A", # the best\n}', ONE),
    ("block comments", '{/* a\nmap */ "best_draft": /* the best */ "A"}', ONE),
    ("comment right after a string", '{"consensus": ["x"// yes\n], "best_draft": "A"/* ! */}', TWO),
    ("comment right after a word", '{"errors": [1/* one */, true// yes\n, null# no\n], }',
     {"errors": [1, True, None]}),
    ("comment signs in strings", '{"consensus": ["a // b # c /* d */"],}',
     {"consensus": ["a // b # c /* d */"]}),
    ("a URL in a string", '{"consensus": ["see https://example.org/x"],}',
     {"consensus": ["see https://example.org/x"]}),
    ("NaN", '{"errors": NaN, "best_draft": "A"}', {"errors": None, "best_draft": "A"}),
    ("Infinity", '{"errors": [Infinity, -Infinity], "best_draft": "A"}',
     {"errors": [None, None], "best_draft": "A"}),
    ("NaN in loose JSON", "{'errors': [NaN, Infinity, -Infinity], 'best_draft': 'A'}",
     {"errors": [None] * 3, "best_draft": "A"}),
    ("Python's words", "{'errors': [True, False, None]}", {"errors": [True, False, None]}),
    ("JSON's words, loosely", "{errors: [true, false, null]}", {"errors": [True, False, None]}),
    ("numbers", "{errors: [0, -12, 2.5, 1e3, -4E-2]}", {"errors": [0, -12, 2.5, 1000.0, -0.04]}),
    ("unquoted keys", '{consensus: ["x"], best_draft: "A"}', TWO),
    ("unquoted values", "{best_draft: A}", ONE),
    ("doubly encoded", json.dumps('{"best_draft": "A"}'), ONE),
    ("doubly encoded, quotes lost", r'{\"consensus\": [\"x\"], \"best_draft\": \"A\"}', TWO),
    ("encoded within an object", json.dumps({"text": '{"best_draft": "A"}'}), ONE),
    ("encoded within a list of parts", json.dumps([{"text": json.dumps(TWO)}]), TWO),
    ("wrapped", '{"analysis": {"best_draft": "A"}}', ONE),
    ("wrapped twice, loosely", "{'result': {'analysis': {'best_draft': 'A',}}}", ONE),
    ("in a list", '[{"best_draft": "A"}]', ONE),
    ("the fuller one in a list", '[{"errors": []}, {"consensus": ["x"], "best_draft": "A"}]', TWO),
    ("repeated: the last of equals", '{"best_draft": "B"}\nNo, wait:\n{"best_draft": "A"}', ONE),
    ("repeated: the fuller one", 'So: {"consensus": ["x"], "best_draft": "A"} {"errors": []}', TWO),
    ("an example, then the answer", '{"letter": "..."} {"best_draft": "A"}', ONE),
    ("unescaped quotes", '{"consensus": ["they say "no way" to it"], "best_draft": "A"}',
     {"consensus": ['they say "no way" to it'], "best_draft": "A"}),
    ("raw newlines and tabs", '{"consensus": ["one\ntwo\tthree\r\nfour"], }',
     {"consensus": ["one\ntwo\tthree\r\nfour"]}),
    ("escapes", r'{"consensus": ["a\nb\t\"c\" \\ \/ \u00e9"], }',
     {"consensus": ['a\nb\t"c" \\ / \u00e9']}),
    ("surrogate pair", r'{"consensus": ["\ud83d\ude00"], }', {"consensus": ["\U0001f600"]}),
    ("emoji as it is", '{"consensus": ["\U0001f600"], }', {"consensus": ["\U0001f600"]}),
    ("braces in strings", '{"consensus": ["} ] { ["], "best_draft": "A",}',
     {"consensus": ["} ] { ["], "best_draft": "A"}),
    ("thinking tags in strings", '{"consensus": ["<think> opens it", "</think> ends it"]}',
     {"consensus": ["<think> opens it", "</think> ends it"]}),
    ("an end of thinking in a string", '{"consensus": ["x ends with </think>"], "errors": []}',
     {"consensus": ["x ends with </think>"], "errors": []}),
    ("cut after a key", '{"best_draft": "A", "consensus"', ONE),
    ("cut after a colon", '{"best_draft": "A", "consensus":', ONE),
    ("brackets of the wrong kind", '{"best_draft": "A"]}', ONE),
]


@pytest.mark.parametrize("text, expected", [
    pytest.param(text, expected, id=name.replace(" ", "-").replace(":", "").replace("'", ""))
    for name, text, expected in AGREED])
def test_an_object_is_found_however_a_model_writes_it(fusion, text, expected):
    assert fusion.loose_object(text, KEYS) == expected


@pytest.mark.parametrize("text", [
    "", " ", "null", "[]", "{}", "no object here", "42", '"best_draft"', "best_draft: A", "{",
    '{"other": 1}', '[{"other": {"best": 2}}]', '{"best_draft"}',
    "<think>" + REALISTIC + "</think>"])
def test_what_holds_no_wanted_key_is_none(fusion, text):
    assert fusion.loose_object(text, KEYS) is None


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "-NaN", "+Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("form", ['{"best_draft": "A", "errors": [%s]}', "{'errors': [%s,]}"])
def test_no_number_comes_out_that_is_no_json(fusion, form, word):
    found = fusion.loose_object(form % word, KEYS)
    json.dumps(found, allow_nan=False)


def test_half_of_a_surrogate_pair_can_be_encoded(fusion):
    found = fusion.loose_object(r"""{'consensus': ['a\ud83d', 'b']}""", KEYS)
    assert found["consensus"][1] == "b" and found["consensus"][0].startswith("a")
    json.dumps(found, ensure_ascii=False).encode("utf-8")


# ---- tolerant JSON: texts that end anywhere -------------------------------------------------


def ends_of_values(answer):
    """Where each value of the indented JSON of an object is complete: [(offset, key)]."""
    items = list(answer.items())
    return [(len(json.dumps(dict(items[:count]), indent=1)) - 2, items[count - 1][0])
            for count in range(1, len(items) + 1)]


def is_beginning(part, whole):
    """Whether a value that was cut off holds nothing but what the whole one holds first."""
    if isinstance(whole, list) and isinstance(part, list):
        return part[:-1] == whole[:max(0, len(part) - 1)] and len(part) <= len(whole) and (
            not part or is_beginning(part[-1], whole[len(part) - 1]))
    if isinstance(whole, dict) and isinstance(part, dict):
        return set(part) <= set(whole) and all(
            is_beginning(value, whole[key]) for key, value in part.items())
    return isinstance(part, str) or part == whole


@pytest.mark.parametrize("before", ["", "Here is the analysis:\n```json\n", "<think>hm</think>"],
                         ids=["bare", "fenced", "thought"])
def test_at_every_length_what_was_complete_is_kept(fusion, before):
    ends = ends_of_values(ANALYSIS)
    assert ends[-1][0] == len(REALISTIC) - 2
    for length in range(len(REALISTIC) + 1):
        found = fusion.loose_object(before + REALISTIC[:length], KEYS) or {}
        complete = {key: ANALYSIS[key] for end, key in ends if end <= length}
        assert {key: found.get(key) for key in complete} == complete, length
        assert len(found) <= len(complete) + 1
        assert is_beginning(found, ANALYSIS), (length, found)


@pytest.mark.parametrize("text", [repr(ANALYSIS), json.dumps(json.dumps(ANALYSIS)),
                                  json.dumps({"analysis": ANALYSIS}), REALISTIC.replace('"', "'")],
                         ids=["Python", "encoded-twice", "wrapped", "single-quoted"])
def test_sloppy_forms_can_be_cut_anywhere(fusion, text):
    for length in range(len(text) + 1):
        found = fusion.loose_object(text[:length], KEYS)
        assert found is None or KEYS & set(found)
    assert "consensus" in fusion.loose_object(text, KEYS)


@pytest.mark.parametrize("text", [repr(ANALYSIS), json.dumps(json.dumps(ANALYSIS)),
                                  json.dumps({"analysis": ANALYSIS})],
                         ids=["Python", "encoded-twice", "wrapped"])
def test_sloppy_forms_lose_nothing_when_they_are_whole(fusion, text):
    assert fusion.loose_object(text, KEYS) == ANALYSIS


def nested(depth, opening, closing, inner):
    return opening * depth + inner + closing * depth


@pytest.mark.parametrize("depth", [20, 99, 1000, 50_000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}"), ("[{'a': ", "}]")])
def test_deep_nesting_costs_no_earlier_key(fusion, depth, opening, closing):
    text = '{"best_draft": "A", "errors": %s}' % nested(depth, opening, closing, "1")
    found = fusion.loose_object(text[:HOSTILE_BYTES], KEYS)
    assert found["best_draft"] == "A"
    json.dumps(found)


def staircase(steps):
    """Objects whose quotes are escaped once, twice, three times and so on."""
    return "".join("{" + "\\" * step + '"' for step in range(1, steps))


HOSTILE = {
    "braces": "{",
    "pairs": "{}",
    "closing": "}",
    "brackets": "[{",
    "keys": '{"best_draft":',
    "lists": '{"errors":[',
    "quotes": '{"',
    "apostrophes": "{'",
    "escaped quotes": '\\"{',
    "objects": '{"best_draft":"A"}',
    "other objects": '{"x":1}',
    "strings of objects": '{"best_draft":"{',
    "comments": "{/*",
    "hashes": "{#",
    "words": "{a ",
    "thinking": "<think>",
    "ends of thinking": "</think>",
    "thinking that ends otherwise": "<thinking></think>",
    "quotes alone": '"',
    "backslashes": "{\\",
}


def assert_quick(fusion, text):
    started = time.thread_time()
    found = fusion.loose_object(text, KEYS)
    assert time.thread_time() - started < HOSTILE_SECONDS
    assert found is None or isinstance(found, dict)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_in_time(fusion, name):
    unit = HOSTILE[name]
    assert_quick(fusion, unit * (HOSTILE_BYTES // len(unit)))


def test_many_values_behind_many_braces_are_read_in_time(fusion):
    assert_quick(fusion, ("{" * 39 + "[" + "0," * HOSTILE_BYTES)[:HOSTILE_BYTES])


def test_quotes_that_are_escaped_ever_deeper_are_read_in_time(fusion):
    assert_quick(fusion, staircase(150))


def test_an_open_quote_before_much_blank_space_is_read_in_time(fusion):
    assert_quick(fusion, '{"best_draft": "' + ('"' + " " * 450) * 440)


# ---- tolerant JSON: properties --------------------------------------------------------------

SEED = 20_240_117
LETTERS = "abcxyz \"'\\/{}[]:,#\n\t\u00e9\u2028\U0001f600`-."


def random_text(rng):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))


def random_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind < 3:
        return random_text(rng)
    if kind == 3:
        return rng.randrange(-10**12, 10**12)
    if kind == 4:
        return rng.choice([True, False, None, 0.5, -2.75, 1e-07, 3e+22])
    if kind == 5:
        return ""
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(5))}


def random_object(rng):
    found = {random_text(rng): random_value(rng) for _ in range(rng.randrange(4))}
    return dict(found, best_draft=random_value(rng))


WRITERS = {
    "JSON": json.dumps,
    "indented": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    "in prose": lambda value: "The map: %s, I think." % json.dumps(value),
    "trailing comma": lambda value: json.dumps(value)[:-1] + ",}",
    "commented": lambda value: "/* map */ {// one\n" + json.dumps(value)[1:],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_random_objects_come_back_equal(fusion, writer):
    rng = random.Random(SEED)
    for _ in range(300):
        value = random_object(rng)
        assert fusion.loose_object(WRITERS[writer](value), KEYS) == value


NOISE = ["{", "}", "[", "]", '"', "'", "\\", ",", ":", "//", "/*", "*/", "#", "\n", "\\u12",
         "\ud83d", "\x00", "<think>", "</think>", "```", "NaN", "'s", '\\"', "{{", "\\ud83d"]


def spoilt(rng, text):
    """The text with a few pieces cut out, repeated or put in."""
    for _ in range(rng.randrange(1, 6)):
        at, size = rng.randrange(len(text) + 1), rng.randrange(8)
        text = text[:at] + rng.choice([rng.choice(NOISE), text[at:at + size], ""]) + \
            text[at + rng.choice([0, size]):]
    return text[:rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text


@pytest.mark.parametrize("source", [REALISTIC, repr(ANALYSIS), json.dumps(json.dumps(ANALYSIS))],
                         ids=["JSON", "Python", "encoded-twice"])
def test_spoilt_text_never_raises_and_gives_an_object_or_none(fusion, source):
    rng = random.Random(SEED)
    for _ in range(500):
        text = spoilt(rng, source)
        found = fusion.loose_object(text, KEYS)
        assert found is None or KEYS & set(found), text
        json.dumps(found, ensure_ascii=False).encode("utf-8", "replace")


def test_one_spoilt_value_leaves_most_of_the_others(fusion):
    rng = random.Random(SEED)
    kept = []
    for _ in range(300):
        at = rng.randrange(len(REALISTIC))
        text = REALISTIC[:at] + rng.choice(",\\ \nx9") + REALISTIC[at:]
        found = fusion.loose_object(text, KEYS) or {}
        kept.append(sum(found.get(key) == value for key, value in ANALYSIS.items()))
    assert sum(kept) / len(kept) > 6.5


# ---- reasoning in text ----------------------------------------------------------------------

THOUGHTS = [
    # (name, text, answer, reasoning)
    ("none", "an answer", "an answer", ""),
    ("empty", "", "", ""),
    ("spaces kept", " an answer\n", " an answer\n", ""),
    ("block", "<think>hm</think>answer", "answer", "hm"),
    ("block with lines", "<think>\nhm\n\nso\n</think>\n\nanswer\n", "answer\n", "hm\n\nso"),
    ("long name", "<thinking>hm</thinking>answer", "answer", "hm"),
    ("unopened", "hm, so\n</think>\nanswer", "answer", "hm, so"),
    ("unclosed", "<think>hm, so", "", "hm, so"),
    ("empty block", "<think></think>answer", "answer", ""),
    ("two blocks", "<think>one</think><think>two</think>answer", "answer", "one\ntwo"),
    ("names do not close each other", "<think>a</thinking>b</think>answer", "answer",
     "a</thinking>b"),
    ("other tags stay", "<b>an</b> <thinker>answer</thinker>",
     "<b>an</b> <thinker>answer</thinker>", ""),
]


@pytest.mark.parametrize("text, answer, reasoning", [
    pytest.param(*row[1:], id=row[0].replace(" ", "-")) for row in THOUGHTS])
def test_reasoning_is_parted_from_the_answer(fusion, text, answer, reasoning):
    assert fusion.split_thinking(text) == (answer, reasoning)


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<think></think>", "<thinking></think>",
                                  "<think", "<think> </thinking"])
def test_hostile_tags_are_parted_in_time(fusion, unit):
    started = time.thread_time()
    fusion.split_thinking(unit * (HOSTILE_BYTES // len(unit)))
    assert time.thread_time() - started < 1


# ---- threads --------------------------------------------------------------------------------


def test_spawn_gives_the_result_of_the_call(fusion):
    assert fusion.spawn(divmod, 17, 5).result(5) == (3, 2)


@pytest.mark.parametrize("error", [ValueError("v"), KeyboardInterrupt("k"), SystemExit(3)],
                         ids=["Exception", "KeyboardInterrupt", "SystemExit"])
def test_spawn_hands_on_what_was_raised(fusion, error):
    def fail():
        raise error

    assert fusion.spawn(fail).exception(5) is error


def test_spawn_runs_on_a_daemon_thread_of_its_own(fusion):
    thread = fusion.spawn(threading.current_thread).result(5)
    assert thread.daemon and thread is not threading.current_thread()


def test_spawn_returns_while_the_work_still_runs(fusion):
    gate = threading.Event()
    future = fusion.spawn(gate.wait, 5)
    assert not future.done()
    gate.set()
    assert future.result(5) is True


def test_an_interpreter_ends_though_a_spawned_call_hangs(tmp_path):
    code = ("import runpy, threading; spawn = runpy.run_path(%r)['spawn'];"
            "spawn(threading.Event().wait); print('over')" % str(FUSION_PY))
    finished = run_in(tmp_path, [sys.executable, "-B", "-c", code], timeout=10)
    assert (finished.code, finished.out.split()) == (0, ["over"])


def test_wait_for_returns_with_the_first_that_is_done(fusion):
    gate = threading.Event()
    slow, quick = fusion.spawn(gate.wait, 5), fusion.spawn(int)
    assert fusion.wait_for([slow, quick], 5) == {quick}
    assert fusion.wait_for([slow], 0.01) == set()
    gate.set()
    assert fusion.wait_for([slow], 5) == {slow}


# ---- errors ---------------------------------------------------------------------------------

ENDINGS = [
    # (class, exit code, HTTP status, code); exit codes as the README's table
    ("FusionError", 1, 500, "internal_error"),
    ("UsageError", 2, 400, "invalid_request_error"),
    ("BackendError", 3, 502, "panel_failed"),
    ("CallError", 3, 502, "panel_failed"),
    ("LimitError", 4, 402, "budget_exceeded"),
    ("Cancelled", 130, 499, "cancelled"),
]


@pytest.mark.parametrize("name, exit_code, status, code", ENDINGS)
def test_each_kind_of_error_ends_the_program_with_its_own_code(fusion, name, exit_code, status,
                                                               code):
    error = getattr(fusion, name)("what happened", "a command")
    assert isinstance(error, fusion.FusionError)
    assert (error.exit_code, error.status, error.code) == (exit_code, status, code)
    assert str(error) == error.message == "what happened" and error.hint == "a command"


def test_details_belong_to_one_error_and_not_to_its_kind(fusion):
    error = fusion.LimitError("late", "wait", status=504, code="timeout", param="fusion.x")
    assert (error.status, error.code, error.param) == (504, "timeout", "fusion.x")
    plain = fusion.LimitError("dear")
    assert (plain.status, plain.code, plain.param, plain.hint) == (402, "budget_exceeded", None, "")


def test_a_call_error_says_nothing_that_it_was_not_told(fusion):
    error = fusion.CallError("failed")
    assert not error.retryable and not error.accepted
    assert error.usage is None and error.retry_after is None


# ---- small helpers --------------------------------------------------------------------------


def test_ids_have_their_prefix_and_never_repeat(fusion):
    found = {fusion.new_id("run-") for _ in range(1000)}
    assert len(found) == 1000 and all(name.startswith("run-") for name in found)
    assert len({len(name) for name in found}) == 1


@pytest.mark.parametrize("text, limit, expected", [
    ("short", 5, "short"), ("longer", 5, "lo..."), ("", 0, ""), ("abc", 3, "abc"),
    ("abcd", 3, "..."), (12345678, 6, "123...")])
def test_clipped_text_fits_with_its_mark(fusion, text, limit, expected):
    assert fusion.clip(text, limit) == expected


def test_folded_text_has_single_blanks(fusion):
    assert fusion.fold(" a\n\tb \r\n c\u00a0") == "a b c"


@pytest.mark.parametrize("count, expected", [
    (0, "0 drafts"), (1, "1 draft"), (2, "2 drafts"), (1801, "1,801 drafts")])
def test_counted_nouns_read_well(fusion, count, expected):
    assert fusion.plural(count, "draft") == expected


@pytest.mark.parametrize("word, expected", [
    ("panle", "panel"), ("PANEL", "panel"), ("temperatur", "temperature")])
def test_a_near_word_is_suggested(fusion, word, expected):
    assert fusion.did_you_mean(word, ["temperature", "panel"]) == "did you mean %s?" % expected


def test_without_a_near_word_all_are_listed(fusion):
    found = fusion.did_you_mean("zzz", ["panel", "judge"])
    assert "judge" in found and "panel" in found and "did you mean" not in found
