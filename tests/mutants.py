"""Breaks fusion.py in one place at a time and holds that the tests notice each time.

    python3 tests/mutants.py                 all of them, two at a time
    python3 tests/mutants.py -k judge        those with the word in their name or tests
    python3 tests/mutants.py --jobs 1        one at a time

First the unmutated file has to pass the same tests, since a red baseline proves nothing. Then
there is a line for each mutant: which test killed it, or that it survived. Exit code: 0 if all
were killed; 1 if one survived, a snippet is missing or stands there twice, or the baseline is
red; 130 at Ctrl-C, which leaves no process behind.

A snippet (`old`) is short, so that it lives through a reformatting. When one is lost because
the code has changed, move the breakage to where the code now does the same thing; remove it
only if nothing does that any more. `tests/test_mutants.py` finds lost snippets in a second.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 120  # for the tests of one mutant; whatever hangs longer is killed
END_S = 5  # for pytest to end the programs of its tests after an interrupt
PYTEST = ("-m", "pytest", "-c", os.devnull, "-x", "-q", "--color=no", "-p", "no:cacheprovider",
          "-m", "not slow")


class Mutant(NamedTuple):
    """A breakage: `old` occurs exactly once in the file; the tests kill what has `new` there."""

    name: str
    old: str
    new: str
    tests: str


BASICS = "tests/test_basics.py"
CHAOS = "tests/test_chaos.py"
CLI = "tests/test_cli.py"
CONFIG = "tests/test_config.py"
DOCTOR = "tests/test_doctor.py"
ENGINE = "tests/test_engine.py"
FAKE = "tests/test_fake.py"
HTTP = "tests/test_http.py"
MONEY = "tests/test_money.py"
MORE = "tests/test_more.py"
PROXY = "tests/test_proxy.py"
SERVER = "tests/test_server.py"
STREAMS = "tests/test_streams.py"
TALK = "tests/test_talk.py"
TAPE = "tests/test_tape.py"
TERMINAL = "tests/test_terminal.py"
TRANSPORT = "tests/test_transport.py"
WIRING = "tests/test_wiring.py"


def leak(parameter, role):
    """A mutant in which a parameter of the client reaches the calls of another role as well."""
    return Mutant(
        "the client's %s reaches every %s" % (parameter, role),
        "    params = dict(params or {})\n",
        "    params = dict(params or {})\n"
        "    own = Call.body\n"
        "    Call.body = lambda call, lessons: dict(own(call, lessons), **{\n"
        "        key: params[key] for key in ('%s',) if key in params and call.role == '%s'})\n"
        % (parameter, role), WIRING)


# ---- engine: what each stage is sent ----------------------------------------------------------

WIRES = [
    Mutant("the judge is not asked",
           "analysis = judge(config, messages, drafts, run)", "analysis = None", WIRING),
    Mutant("the judge's analysis does not reach the writer",
           "form.format(findings=findings(analysis, run.tag)",
           "form.format(findings=findings(None, run.tag)", WIRING),
    Mutant("the judge's analysis does not reach the refiner",
           "{findings}Go through this checklist", "Go through this checklist", WIRING),
    Mutant("the last of the drafts is dropped",
           "return tuple(found.values())", "return tuple(found.values())[:-1] or tuple(found)",
           WIRING),
    Mutant("a layer does not see the drafts of the one before",
           "Panel(config, messages, run, drafts, layer)", "Panel(config, messages, run, (), layer)",
           WIRING),
    Mutant("layers beyond the first are not run",
           "for layer in range(1, config.layers + 1):", "for layer in range(1, 2):", WIRING),
    Mutant("members are not sent the question",
           'return seen_by(member, messages, run, "member") + \\',
           'return seen_by(member, messages[:-1], run, "member") + \\', WIRING),
    Mutant("members are not sent the system prompt",
           'return seen_by(member, messages, run, "member") + \\',
           'return seen_by(member, [message for message in messages\n'
           '                            if message["role"] != "system"], run, "member") + \\',
           WIRING),
    Mutant("members are sent the last message without the ones before",
           'return seen_by(member, messages, run, "member") + \\',
           'return seen_by(member, messages[-1:], run, "member") + \\', WIRING),
    Mutant("the conversation is flattened into one message for the judge",
           'prefix = seen_by(config.judge, messages, run, "judge")',
           "prefix = [user(json.dumps(messages))]", WIRING),
    Mutant("the judge is sent the last message without the ones before",
           'prefix = seen_by(config.judge, messages, run, "judge")',
           'prefix = seen_by(config.judge, messages[-1:], run, "judge")', WIRING),
    Mutant("the writer is sent the last message without the ones before",
           "list(messages) + prompt(shown)", "list(messages)[-1:] + prompt(shown)", WIRING),
    Mutant("the writer gets its orders before the conversation",
           "list(messages) + prompt(shown)", "prompt(shown) + list(messages)", WIRING),
    Mutant("the refiner is not sent the conversation",
           "list(messages) + [user(prompt)], run, \"refine\"", "[user(prompt)], run, \"refine\"",
           WIRING),
    Mutant("the middle of a draft is cut",
           "untagged(draft.text, tag), tag)",
           "untagged(draft.text[:40] + draft.text[-40:], tag), tag)", WIRING),
    Mutant("the middle of a very long draft is cut",
           "untagged(draft.text, tag), tag)",
           "untagged(draft.text if len(draft.text) < 8000\n"
           "                                         else draft.text[:4000] + draft.text[-4000:],"
           " tag), tag)", MORE),
    Mutant("blanks around a draft are cut off",
           "untagged(draft.text, tag), tag)", "untagged(draft.text.strip(), tag), tag)", WIRING),
    Mutant("judge and writer see the drafts under different letters",
           "    if not replies:\n        with run.timed(\"synth\"):",
           "    if not replies:\n        drafts = tuple(draft._replace(letter=letter_of("
           "len(drafts) - 1 - index))\n                       for index, draft in "
           "enumerate(drafts))\n        with run.timed(\"synth\"):", WIRING),
    Mutant("the writer judges",
           "complete(run, config.judge, prefix + [user(prompt)]",
           "complete(run, config.writer, prefix + [user(prompt)]", WIRING),
    Mutant("the judge writes",
           "reply = complete(run, writer,", "reply = complete(run, config.judge,", WIRING),
    Mutant("the first member answers for all",
           "view, member, member_messages(",
           "view, self.config.panel[0], member_messages(", WIRING),
    leak("max_tokens", "member"),
    leak("max_tokens", "judge"),
    leak("temperature", "member"),
    leak("stop", "member"),
    leak("seed", "judge"),
    leak("response_format", "judge"),
    Mutant("the client's parameters do not reach the writer",
           "sent.update(params)", "sent.update({})", WIRING),
    Mutant("the judge has no cap of its own",
           'temperature=config.judge.temperature or 0, max_tokens=cap,',
           'temperature=config.judge.temperature or 0,', WIRING),
    Mutant("the judge is not asked for JSON",
           "response_format=ANALYSIS_FORMAT)", "response_format=None)", WIRING),
    Mutant("all members get the same temperature",
           "spread = config.diversity_jitter * place if config.diversity else 0",
           "spread = 0", WIRING),
    Mutant("all samples of a member get the same temperature",
           "place = 2 * index /", "place = 2 * (index % len(config.panel)) /", WIRING),
    Mutant("temperatures are spread though diversity is off",
           "spread = config.diversity_jitter * place if config.diversity else 0",
           "spread = config.diversity_jitter * place", ENGINE),
    Mutant("a member's own temperature is overwritten",
           "            temperature = member.temperature\n", "            pass\n", ENGINE),
    Mutant("a member is asked once however many samples are wanted",
           "for sample in range(config.samples) for", "for sample in range(1) for", WIRING),
    Mutant("a lens is not told to its member",
           "parts.append(LENS_PROMPT.format(lens=member.lens))", "pass", WIRING),
    Mutant("members are not asked for a short answer to vote on",
           "parts.append(VOTE_PROMPT)", "pass", WIRING),
    Mutant("members get tools though tools are off",
           "tools = view.registry if config.tools_enabled and member.tools else None",
           "tools = view.registry if member.tools else None", ENGINE),
    Mutant("images go to models that take none",
           "if takes_images(member) or not text_bytes(messages)[1]:", "if True:", ENGINE),
    Mutant("the tag of the fences is not taken out of drafts",
           "untagged(draft.text, tag), tag)", "draft.text, tag)", WIRING),
    Mutant("the tag of the fences is taken out once only",
           "    while tag in text:\n", "    if tag in text:\n", WIRING),
    Mutant("the tag of the fences is not taken out of the judge's words",
           "reply=untagged(clip(reply.text, 20_000), run.tag)",
           "reply=clip(reply.text, 20_000)", WIRING),
    Mutant("the tag of the fences is not taken out of the answer that is refined",
           "answer=untagged(reply.text, run.tag)", "answer=reply.text", WIRING),
    Mutant("the drafts are not shuffled",
           "random.Random(seed).shuffle(order)", "pass", WIRING),
    Mutant("the drafts are shuffled without the seed",
           "random.Random(seed).shuffle(order)", "random.shuffle(order)", WIRING),
    Mutant("the seed is the same for all requests",
           "return zlib.crc32(content.encode())", "return 7", WIRING),
    Mutant("the client's seed does not count",
           '[messages, params.get("seed")]', "[messages]", WIRING),
]

# ---- engine: drafts, spares, lateness ---------------------------------------------------------

DRAFTS = [
    Mutant("a refusal is a draft",
           "if reply.refusal or (len(reply.text) < 300 and REFUSAL.match(reply.text)):",
           "if False:", ENGINE),
    Mutant("a refusal in prose is a draft",
           "if reply.refusal or (len(reply.text) < 300 and REFUSAL.match(reply.text)):",
           "if reply.refusal:", ENGINE),
    Mutant("a long draft that opens with a doubt is a refusal",
           "len(reply.text) < 300 and REFUSAL", "REFUSAL", ENGINE),
    Mutant("when all refuse it is an error",
           "if panel.refusals:", "if False:", ENGINE),
    Mutant("an empty answer is a draft",
           "if not reply.text.strip() and not reply.refusal:", "if False:", ENGINE),
    Mutant("the error of a member is its draft",
           "            self.failed(slot, error)\n            return\n        except Exception",
           "            reply = Reply(error.message)\n        except Exception", ENGINE),
    Mutant("the error of a panel is its answer",
           "raise panel_failed(panel.failures, run.clock() >= panel.deadline)",
           "return (Draft(panel.failures[0][1].message, ()),)", ENGINE),
    Mutant("equal drafts are not merged",
           "key = \"\\n\".join(line.rstrip() for line in draft.text.strip().splitlines())",
           "key = draft", ENGINE),
    Mutant("drafts that differ in indentation are merged",
           "key = \"\\n\".join(line.rstrip() for", "key = \"\\n\".join(line.strip() for", ENGINE),
    Mutant("the count of equal drafts is lost",
           "_replace(slots=found[key].slots + draft.slots)", "_replace(slots=found[key].slots)",
           ENGINE),
    Mutant("how many gave a draft is not said",
           'notes.append("given by %d members" % len(draft.slots))', "pass", ENGINE),
    Mutant("a draft that was cut is not marked",
           'notes.append("cut off by a token limit")', "pass", ENGINE),
    Mutant("a spare is never asked",
           "if spare and self.spares and not over_budget and not late:", "if False:", ENGINE),
    Mutant("a spare is asked twice",
           "member = self.spares.pop(0)",
           "member = self.spares[0]; self.spares = self.spares[:len(self.failures) < 2]", ENGINE),
    Mutant("a spare is asked when the time is over",
           "and not over_budget and not late:", "and not over_budget:", ENGINE),
    Mutant("a spare gets the temperature that was its member's own",
           "warmth = slot.temperature if slot.member.temperature is None else \\",
           "warmth = slot.temperature if True else \\", ENGINE),
    Mutant("a quorum wants one draft more",
           "len(self.drafts) >= self.config.quorum:", "len(self.drafts) > self.config.quorum:",
           MORE),
    Mutant("there is no grace",
           "if now >= self.grace_ends:", "if True:", ENGINE),
    Mutant("grace never ends",
           "if now >= self.grace_ends:", "if False:", MORE),
    Mutant("a late member goes on",
           "            cancel.set(why)\n", "", ENGINE),
    Mutant("a late member is not told of",
           'self.run.degrade("member_late", "panel", slot.name, why)', "pass", ENGINE),
    Mutant("a failed member is not told of",
           'self.run.degrade(code, "panel", slot.name, error.message)', "pass", ENGINE),
    Mutant("a lone draft is not told of",
           "if voices == 1 and len(config.panel) * config.samples > 1:", "if False:", ENGINE),
    Mutant("a draft that several gave is told of as a lone one",
           "voices = sum(len(draft.slots) for draft in drafts)", "voices = len(drafts)", ENGINE),
    Mutant("the panel takes the time of judge and writer as well",
           "self.deadline = run.deadline - kept", "self.deadline = run.deadline", ENGINE),
    Mutant("an interrupt of the panel waits for all members",
           "if self.run.hurry.is_set():", "if False:", MORE),
    Mutant("an interrupt starts the layers that are left",
           "        if run.hurry.is_set():\n            break\n", "", ENGINE),
    Mutant("drafts are not cut to the window of a model",
           "shown = drafts if room is None else shortened(drafts, room)", "shown = drafts", CHAOS),
    Mutant("that drafts were cut to a window is not told",
           'if room is not None:\n            run.degrade("context_trimmed", stage',
           'if False:\n            run.degrade("context_trimmed", stage', CHAOS),
    Mutant("a judge with a small window reads all drafts at once",
           "size = 3  # so little", "size = len(drafts)  # so little", ENGINE),
]

# ---- engine: judge, votes, writer, refine -----------------------------------------------------

ANSWERS = [
    Mutant("quotes are not checked",
           "if quote and quote in self.texts[letter]]", "if quote]", ENGINE),
    Mutant("quotes may stand in another draft",
           "if quote and quote in self.texts[letter]]",
           "if quote and any(quote in text for text in self.texts.values())]", ENGINE),
    Mutant("an empty quote holds",
           "if quote and quote in self.texts[letter]]", "if quote in self.texts[letter]]", ENGINE),
    Mutant("white space in drafts counts for quotes",
           "self.texts = {draft.letter: fold(draft.text) for",
           "self.texts = {draft.letter: draft.text for", ENGINE),
    Mutant("white space in quotes counts",
           'quote = fold(str(entry.get("quote") or ""))', 'quote = str(entry.get("quote") or "")',
           ENGINE),
    Mutant("what no draft supports is not counted",
           "                self.unsupported += 1\n", "                pass\n", ENGINE),
    Mutant("the count of what no draft supports is not in the receipt",
           '"judge_unsupported": analysis.unsupported if analysis else 0',
           '"judge_unsupported": 0', ENGINE),
    Mutant("a contradiction needs one position only",
           "if len(positions) > 1:", "if positions:", MORE),
    Mutant("the analysis that leaves has letters for models",
           "return [name for letter in letters for name in names[letter]]", "return list(letters)",
           ENGINE),
    Mutant("a failed judge is not told of",
           'run.degrade("judge_failed", "judge", config.judge.name, why)', "pass", ENGINE),
    Mutant("JSON of the judge that is partly bad is not told of",
           "    if invalid:\n", "    if False:\n", ENGINE),
    Mutant("a judge that answers in prose is not asked again",
           "    if found is None:\n        repair =", "    if False:\n        repair =", ENGINE),
    Mutant("a judge that was cut gets no more room",
           "ask_judge(config, messages, prompt, run, 2 * cap)",
           "ask_judge(config, messages, prompt, run, cap)", ENGINE),
    Mutant("the minority wins a vote",
           "counts.most_common(1)[0]", "counts.most_common()[-1]", ENGINE),
    Mutant("a vote is won without a majority",
           "2 * most <= sum(counts.values())", "False", ENGINE),
    Mutant("a tie wins a vote",
           "2 * most <= sum(counts.values())", "2 * most < sum(counts.values())", ENGINE),
    Mutant("a lone voice wins a vote",
           "if most < 2 or", "if", ENGINE),
    Mutant("members with the same draft have one voice",
           "counts[final_answer(draft.text)] += len(draft.slots)",
           "counts[final_answer(draft.text)] += 1", ENGINE),
    Mutant("the first writer of a failover is asked last",
           "for writer in config.synthesizer:", "for writer in config.synthesizer[::-1]:", ENGINE),
    Mutant("the second writer of a failover is not asked",
           "for writer in config.synthesizer:", "for writer in config.synthesizer[:1]:", ENGINE),
    Mutant("a failed writer is not told of",
           'run.degrade("synthesizer_failed", "synth", writer.name, failure.message)', "pass",
           ENGINE),
    Mutant("the best draft does not stand in for the writer",
           "if analysis is not None and draft.letter == analysis.best_draft:", "if False:", ENGINE),
    Mutant("the shortest draft stands in for the writer",
           "return max(whole or drafts, key=", "return min(whole or drafts, key=", ENGINE),
    Mutant("a cut draft stands in though a whole one is there",
           "return max(whole or drafts, key=", "return max(drafts, key=", ENGINE),
    Mutant("the error of the writer is the answer",
           "    best = stand_in(drafts, analysis)\n",
           "    best = drafts[0]._replace(text=failure.message)\n", ENGINE),
    Mutant("an answer that was cut off in the middle ends as if it were whole",
           'run.degrade("stream_cut", role, writer.name, error.message)',
           'return Reply("")', ENGINE),
    Mutant("that an answer was cut off is not in the receipt",
           'run.degrade("stream_cut", role, writer.name, error.message)', "pass", ENGINE),
    Mutant("a live answer is shown before it is refined",
           "live = run.live and not config.refine", "live = run.live", ENGINE),
    Mutant("the refined answer is thrown away",
           "    return better\n", "    return reply\n", WIRING),
    Mutant("a refined answer is always taken",
           "worse = worse_than(reply, better)", "worse = None", ENGINE),
    Mutant("a refined answer may be cut off",
           "if after.cut or after.refusal:", "if after.refusal:", ENGINE),
    Mutant("a refined answer may lose its JSON",
           "if json_type_of(before.text) != json_type_of(after.text):", "if False:", ENGINE),
    Mutant("a refined answer may lose code fences",
           'if after.text.count("```") < before.text.count("```"):', "if False:", ENGINE),
    Mutant("a refined answer may lose half of its length",
           "REFINE_KEEPS = 0.6 ", "REFINE_KEEPS = 0.5 ", ENGINE),
    Mutant("that a refined answer was rejected is not told",
           'run.degrade("refine_rejected", "refine", writer.name, worse)', "pass", ENGINE),
    Mutant("a token cap of zero is sent",
           "or_null(integer(1, high))", "or_null(integer(0, high))", MORE),
    Mutant("solo asks the panel all the same",
           '    if config.mode == "fuse":\n', "    if True:\n", ENGINE),
    Mutant("auto sends everything to the panel",
           '    if config.mode != "auto":\n', "    if True:\n", ENGINE),
    Mutant("usage counts all calls though the answer's was asked for",
           'if scope == "answer":', "if False:", ENGINE),
    Mutant("the budget is not met by doing less",
           "config, cuts = within_budget(", "cuts = []\n    within_budget(", ENGINE),
    Mutant("what the budget cut is not told",
           'run.degrade("budget_cut", "plan", "", cut)', "pass", ENGINE),
]

# ---- money ------------------------------------------------------------------------------------

DOLLARS = [
    Mutant("only the last attempt of a call costs something",
           "self.cost = None if cost is None or self.cost is None else self.cost + cost",
           "self.cost = cost", TRANSPORT),
    Mutant("an attempt that failed after it was accepted costs nothing",
           "            if error.accepted:\n", "            if False:\n", MONEY),
    Mutant("a call that was cut off costs nothing",
           "            if cancelled.accepted:\n", "            if False:\n", TRANSPORT),
    Mutant("a reservation is never released",
           "            self.reserved -= amount\n", "", MONEY),
    Mutant("the ceiling is compared with what is spent, not with what is reserved",
           "self.committed() + amount > self.ceiling", "self.spent + amount > self.ceiling", MONEY),
    Mutant("a ceiling of zero is none",
           "if self.ceiling is not None and self.committed()",
           "if self.ceiling and self.committed()", MONEY),
    Mutant("what may still be billed is not held",
           "self.held += max(0.0, amount - (cost or 0.0))", "pass", MONEY),
    Mutant("a call reserves its prompt alone",
           "max(caps, default=self.run.config.max_tokens))", "0)", MONEY),
    Mutant("a price tier begins at its boundary",
           "if usage.prompt > above:", "if usage.prompt >= above:", MONEY),
    Mutant("cached tokens are billed at the full price",
           "+ hit * cached +", "+ hit * given +", MONEY),
    Mutant("cached tokens are billed twice",
           "((usage.prompt - hit) * given", "(usage.prompt * given", MONEY),
    Mutant("cached tokens are not read from the usage",
           'cached = count(value.get("prompt_tokens_details"), "cached_tokens")',
           "cached = 0", MONEY),
    Mutant("a usage that was estimated is not told of",
           "        if self.usage.estimated:\n", "        if False:\n", MONEY),
    Mutant("a price that is unknown costs nothing",
           'cost, source = None, "unknown"', 'cost, source = 0.0, "unknown"', MONEY),
    Mutant("a sum with an unknown cost is zero",
           'return usage, None, "unknown"', 'return usage, 0.0, "unknown"', MONEY),
    Mutant("a model without a price runs under a ceiling",
           "        price = self.price\n", "        price = self.price or LOCAL_PRICE\n", MONEY),
    Mutant("the cost that a backend reports is passed over",
           "known = isinstance(cost, (int, float)) and", "known = False and", MONEY),
    Mutant("configured prices are passed over",
           "if member.model in config.prices:", "if False:", MONEY),
    Mutant("a remote backend is free for calling itself local",
           "if known is not None or not backend.loopback:", "if known is not None:", MONEY),
    Mutant("layers are cut before samples",
           'for key in ("samples", "layers"):', 'for key in ("layers", "samples"):', MONEY),
    Mutant("the estimate leaves the judge out",
           'plan.append(planned("judge", config.judge, 1, read, judge_cap))', "pass", MONEY),
    Mutant("the estimate takes the client's cap for the configured one",
           "cap = writer_cap or config.writer.max_tokens", "cap = config.writer.max_tokens", MONEY),
    Mutant("a prompt is reserved at half of its bytes",
           "return size // bytes_per_token", "return size // 2 // bytes_per_token", MONEY),
]

# ---- keys, configuration and overrides --------------------------------------------------------

SETTINGS = [
    Mutant("a key of the real environment goes to a URL of a .env file",
           "sources = [env.file]", "sources = [env.real, env.file]", CONFIG),
    Mutant("the default key goes to a member's own URL",
           "        return Backend(url)\n",
           "        return Backend(url, default_backend(env).key)\n", CONFIG),
    Mutant("any variable may be the key of a member",
           'if name == "FUSION_SERVER_KEY" or not (name.startswith("FUSION_") or name == own):',
           "if False:", CONFIG),
    Mutant("the key of the server may be the key of a member",
           'if name == "FUSION_SERVER_KEY" or not (name', "if not (name", CONFIG),
    Mutant("a well-known key goes over http as well",
           ' if parts.scheme == "https" else None', "", CONFIG),
    Mutant("a key of a .env file goes to any URL of a member",
           "if not key and (own or", "if not key and (True or", CONFIG),
    Mutant("a well-known host gets the key of another one",
           "foreign = own and", "foreign = False and", CONFIG),
    Mutant("a key that a backend echoes is shown",
           "if len(self.key) > 7 else text", "if False else text", TRANSPORT),
    Mutant("the repr of a backend shows its key",
           'return "Backend(%r, key_name=%r)" % (self.url, self.key_name)',
           'return "Backend(%r, key_name=%r)" % (self.url, self.key)', CONFIG),
    Mutant("a .env file may set anything",
           'if match and (match.group(1) in MAY_SET or match.group(1).startswith("FUSION_")):',
           "if match:", CONFIG),
    Mutant("a .env file wins over the real environment",
           'return self.real.get(name) or self.file.get(name) or ""',
           'return self.file.get(name) or self.real.get(name) or ""', CONFIG),
    Mutant("a missing key is noticed by the backend only",
           "        if backend.key or backend.fake or not (own or backend.key_name):\n",
           "        if True:\n", CONFIG),
    Mutant("a misspelt key is refused without the nearest one",
           'raise Wrong("is no key here; %s" % did_you_mean(key, known))',
           'raise Wrong("is no key here")', CONFIG),
    Mutant("unknown keys are passed over",
           'raise Wrong("is no key here; %s" % did_you_mean(key, known))', "continue", CONFIG),
    Mutant("true is a number",
           "(isinstance(value, bool) and kinds is not bool)", "False", CONFIG),
    Mutant("a key may stand in a file twice",
           "if len(found) < len(pairs):", "if False:", CONFIG),
    Mutant("FUSION_CONFIG does not count",
           'choice = choice or env.get("FUSION_CONFIG")', 'choice = choice or ""', CONFIG),
    Mutant("a judge that nobody named stays with the old panel",
           'judge=found.judge if "judge" in origins else None', "judge=found.judge", CONFIG),
    Mutant("a request may turn tools on",
           '"samples", "quorum", "mode"))', '"samples", "quorum", "mode", "tools_enabled"))',
           CONFIG),
    Mutant("a request may set a time",
           '"samples", "quorum", "mode"))', '"samples", "quorum", "mode", "timeout_s"))', CONFIG),
    Mutant("a request may raise the ceiling",
           "ceiling = min((limit", "ceiling = max((limit", CONFIG),
    Mutant("a request may plan any number of calls",
           "planned > MAX_CALLS", "planned > 99 * MAX_CALLS", CONFIG),
    Mutant("a request may plan fewer than 48 calls only",
           "planned > MAX_CALLS", "planned >= MAX_CALLS", CONFIG),
    Mutant("a request may name any model",
           "if member not in all_members(config) and not any(", "if False and not any(", CONFIG),
    Mutant("a preset of a request widens the tools",
           "tools = config.tools_enabled and served[name].tools_enabled",
           "tools = served[name].tools_enabled", CONFIG),
    Mutant("a preset of a request widens the models that it may name",
           "allow_models=config.allow_models)", ")", CONFIG),
    Mutant("a preset of a request raises the ceiling",
           "        ceilings.append(served[name].max_cost_usd)\n",
           "        ceilings = [served[name].max_cost_usd]\n", CONFIG),
]

# ---- transport --------------------------------------------------------------------------------

WIRE = [
    Mutant("a deadline counts for each read and not for the whole call",
           "left = min(self.idle, self.until - time.monotonic())",
           "self.total = getattr(self, 'total', self.until - time.monotonic())\n"
           "        left = min(self.idle, self.total)", TRANSPORT),
    Mutant("a silent stream is waited for until the deadline",
           "            self.wire.idle = idle\n", "", TRANSPORT),
    Mutant("Retry-After is passed over",
           "wait = max(wait, error.retry_after)", "pass", TRANSPORT),
    Mutant("a pause is begun though it ends beyond the deadline",
           "if self.run.clock() + wait >= self.deadline:", "if False:", TRANSPORT),
    Mutant("pauses between attempts do not double",
           " * 2 ** (self.failures - 1)", "", TRANSPORT),
    Mutant("the last retry is left out",
           "self.failures > self.run.config.max_retries", "self.failures >= self.run.config"
           ".max_retries", TRANSPORT),
    Mutant("a connection that went stale is a failure",
           "if not reused or self.ended:", "if True:", TRANSPORT),
    Mutant("connections are not reused",
           "kept.append((connection, now))", "connection.sock.plain.close()", TRANSPORT),
    Mutant("what stands on an idle connection is taken for an answer",
           " and not ready(connection.plain)", "", TRANSPORT),
    Mutant("a 400 is tried again",
           'else ("request", "", False)', 'else ("request", "", True)', TRANSPORT),
    Mutant("a 503 is not tried again",
           "if status >= 500 else", "if status > 599 else", TRANSPORT),
    Mutant("what a backend refused is not remembered",
           "self.lessons = run.network.learnt(member)", "self.lessons = {}", TRANSPORT),
    Mutant("what a backend refused is remembered for all",
           "self.lessons.setdefault((member.backend.url, member.model), {})",
           'self.lessons.setdefault("", {})', TRANSPORT),
    Mutant("what was rewritten is not told",
           "if self.body(set(lessons) - {lesson}) != body:", "if False:", TRANSPORT),
    Mutant("a renamed cap loses its value",
           'body["max_completion_tokens"] = body.pop("max_tokens")',
           'body["max_completion_tokens"] = body.pop("max_tokens") // 2', TRANSPORT),
    Mutant("a cancel closes the socket under the reader",
           "socket.socket.shutdown(plain, socket.SHUT_RDWR)", "plain.close()", TRANSPORT),
    Mutant("a cancel in mid-answer looks like the end of the answer",
           "piece = self.wire.read()\n            self.stop_if_ended()",
           "piece = self.wire.read()", MORE),
    Mutant("a cancel of the run does not reach its calls",
           "        cancel.attach(self)\n", "", TRANSPORT),
    Mutant("gzip is not unpacked",
           'in ("gzip", "deflate")', "in ()", TRANSPORT),
    Mutant("an answer may have any size",
           "if size > MAX_REPLY:", "if False:", TRANSPORT),
    Mutant("CRLF does not end a line",
           r'line.rstrip(b"\r\n") for line in lines', r'line.rstrip(b"\n") for line in lines',
           TRANSPORT),
    Mutant("a byte order mark before a stream is not passed over",
           r'.lstrip(b"\xef\xbb\xbf \t\r\n")', r'.lstrip(b" \t\r\n")', TRANSPORT),
    Mutant("of several data lines of an event the last one counts",
           r'found.append(b"\n".join(self.data))', "found.append(self.data[-1])", TRANSPORT),
    Mutant("[DONE] is taken for JSON",
           'if payload.strip() == b"[DONE]":', "if False:", TRANSPORT),
    Mutant("a last event without a blank line is lost",
           '([b""] if last else [])', "[]", TRANSPORT),
    Mutant("a stream that was cut is a whole answer",
           "if not (assembler.done or assembler.finish):", "if False:", TRANSPORT),
    Mutant("a blank answer is an answer",
           "if not answer.strip() and not calls and not refusal:",
           "if not answer and not calls and not refusal:", TRANSPORT),
    Mutant("reasoning is part of the answer",
           'self.add("", thought)', 'self.add(thought, "")', ENGINE),
    Mutant("a think block is part of the answer",
           'self.add(*self.filter.feed(content))', 'self.add(content, "")', ENGINE),
    Mutant("an answer cut by length is taken for whole",
           'FINISHES = {"length": "length",', 'FINISHES = {"length": "stop",', TRANSPORT),
    Mutant("an answer that was shown is begun anew",
           "if self.relayed and any(self.shown):", "if False:", TRANSPORT),
    Mutant("one call more than allowed runs at once",
           "self.busy[place] >= limit for", "self.busy[place] > limit for", TRANSPORT),
    Mutant("the depth of a request stays the same",
           '"x-fusion-depth": str(depth + 1)', '"x-fusion-depth": str(depth)', TRANSPORT),
    Mutant("an embedding model is on an automatic panel",
           'NO_CHAT = re.compile(r"embed|', 'NO_CHAT = re.compile(r"', TRANSPORT),
    Mutant("what refuses a request counts as a backend that is down",
           'elif error.kind in ("connection", "timeout", "server"):', "else:", CHAOS),
    Mutant("a replay asks the backend all the same",
           "entry = run.tape.find(key)", "entry = None", TAPE),
    Mutant("a recording overwrites what is there",
           "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600",
           "os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600", TAPE),
    Mutant("this machine is asked through a proxy",
           "near = host in ", "near = False and host in ", PROXY),
    Mutant("NO_PROXY is passed over",
           "import getproxies, proxy_bypass",
           "import getproxies; proxy_bypass = lambda host: False", PROXY),
    Mutant("the result of a tool is lost",
           '"tool_call_id": call["id"], "content": result', '"tool_call_id": call["id"], '
           '"content": ""', ENGINE),
    Mutant("tools are offered after the last turn too",
           '"auto" if turn < turns else "none"', '"auto"', ENGINE),
    Mutant("a model that keeps failing is asked all the same",
           "if count >= BREAKER_CALLS else 0.0", "if False else 0.0", CHAOS),
]

# ---- basics, terminal, talk, fake, the command line -------------------------------------------

FACES = [
    Mutant("of several JSON objects in prose the first one counts",
           "if score and score >= best_score:", "if score and score > best_score:", BASICS),
    Mutant("control characters reach the terminal",
           "return str(text).translate(UNSAFE)", "return str(text)", TERMINAL),
    Mutant("control characters of the answer reach the terminal",
           "self.out.write(clean(text) if self.safe else text)", "self.out.write(text)", TERMINAL),
    Mutant("a pipe gets a changed answer",
           "self.out.write(clean(text) if self.safe else text)", "self.out.write(clean(text))",
           TALK),
    Mutant("receipt and warnings go to stdout",
           "self.err = sys.stderr", "self.err = sys.stdout", TALK),
    Mutant("NO_COLOR is passed over",
           ' and not os.environ.get("NO_COLOR")', "", TERMINAL),
    Mutant("a dumb terminal gets escape sequences",
           'dumb = os.environ.get("TERM", "") in ("dumb", "")', "dumb = False", TERMINAL),
    Mutant("wide letters count as one column",
           'unicodedata.east_asian_width(letter) in "WF"', "False", TERMINAL),
    Mutant("what degraded has no line",
           'for entry in receipt["degraded"]:', "for entry in ():", TALK),
    Mutant("stdin comes after the argument",
           'texts += [piped_input(prompt in (None, "-")), "" if prompt in (None, "-") else prompt]',
           'texts += ["" if prompt in (None, "-") else prompt, piped_input(prompt in (None, "-"))]',
           TALK),
    Mutant("the system prompt is not sent",
           'messages.insert(0, {"role": "system", "content": args.system})', "pass", TALK),
    Mutant("an output file is seen before it is whole",
           'part = "%s.%d.part" % (path, os.getpid()) if', "part = path if", CLI),
    Mutant("an output file that cannot be written is noticed after it was paid for",
           "        check_output(args.output)\n", "        pass\n", CLI),
    Mutant("a limit ends the program with 1",
           'exit_code, status, code = 4, 402, "budget_exceeded"',
           'exit_code, status, code = 1, 402, "budget_exceeded"', BASICS),
    Mutant("a backend that fails ends the program with 1",
           'exit_code, status, code = 3, 502, "panel_failed"',
           'exit_code, status, code = 1, 502, "panel_failed"', CLI),
    Mutant("a failure ends the program with 0",
           "    return error.exit_code\n", "    return 0\n", CLI),
    Mutant("a terminated program ends with 0",
           "lambda number, frame: os._exit(143)", "lambda number, frame: os._exit(0)", TALK),
    Mutant("the second Ctrl-C is not heard",
           "if self.count > 1:", "if self.count > 2:", TALK),
    Mutant("the first Ctrl-C throws the drafts away",
           "run.hurry.set()", 'run.cancel.set("interrupted")', TALK),
    Mutant("--no-history keeps the run",
           'if args.no_history or os.environ.get("FUSION_HISTORY") == "0":', "if False:", TALK),
    Mutant("anyone may read the last run",
           'os.O_TRUNC, 0o600), "w") as file', 'os.O_TRUNC, 0o644), "w") as file', TALK),
    Mutant("the estimate asks the panel",
           "    if args.estimate:\n        return say_estimate", "    if False:\n        return "
           "say_estimate", TALK),
    Mutant("--vote does nothing",
           '"samples", "mode", "vote",', '"samples", "mode",', TALK),
    Mutant("a doctor that found something broken ends with 0",
           "    return int(failed)\n", "    return 0\n", DOCTOR),
    Mutant("the fake judge quotes nothing",
           '{"letters": [letter], "stance": part, "quote": part}',
           '{"letters": [letter], "stance": part, "quote": ""}', FAKE),
    Mutant("the fake writer does not use the analysis",
           "json.loads(found.group(2)) if found else None)", "None)", FAKE),
    Mutant("the temperature does not show in a fake draft",
           'question, body.get("temperature")]', "question]", FAKE),
    Mutant("a fake draft does not say that it is fake",
           "[fake] No model was asked: this draft", "This draft", FAKE),
]

SERVED = [
    Mutant('a stop list may be of any length',
           'list_of(lambda item: typed(item, str, "a text"), 0, 16)(value))',
           'list_of(lambda item: typed(item, str, "a text"), 0, 99)(value))', SERVER),
    Mutant('null content is refused',
           'if content is not None and not isinstance(content, str):',
           'if not isinstance(content, str):', SERVER),
    Mutant("a plugin's panel counts more than the block's",
           '                overrides.setdefault(key, value)',
           '                overrides[key] = value', SERVER),
    Mutant('the fusion tool names the writer too',
           'found, roles = item.get("parameters"), ("judge",)',
           'found, roles = item.get("parameters"), ("judge", "synthesizer")', SERVER),
    Mutant('an error has no param',
           '"type": kind, "param": error.param,',
           '"type": kind, "param": None,', SERVER),
    Mutant('a tool call in a stream has no index',
           'rest = {"index": number, "function"',
           'rest = {"index": 0, "function"', SERVER),
    Mutant('finish_reason of calls is stop',
           'finish = "length" if reply.cut else "tool_calls" if calls else',
           'finish = "length" if reply.cut else "stop" if calls else', SERVER),
    Mutant('content beside a call is an empty text',
           'message = {"role": "assistant", "content": reply.text or None,',
           'message = {"role": "assistant", "content": reply.text,', SERVER),
    Mutant('404 before the key is looked at',
           '        if head.path != "/health":\n            self.owner(head)\n     '
           '   if methods is None',
           '        if head.path != "/health" and methods:\n            self.owner('
           'head)\n        if methods is None', SERVER),
    Mutant('405 without Allow',
           'headers=[("allow", ", ".join(allow))])',
           'headers=[])', SERVER),
    Mutant("a token's beginning is enough",
           'good = [hmac.compare_digest(token.encode(), given) for token in self.se'
           'rved.tokens]',
           'good = [token.encode().startswith(given) and given for token in self.se'
           'rved.tokens]', SERVER),
    Mutant('all keys share one advice',
           '        return hashlib.sha256(given).hexdigest()',
           '        return "someone"', SERVER),
    Mutant('any address is ours on loopback',
           '            own = own or plain or name == socket.gethostname().lower()',
           '            pass\n        own = own or plain', SERVER),
    Mutant('any origin is taken',
           '        if (foreign or cross) and origin not in self.served.origins:',
           '        if cross and origin not in self.served.origins:', SERVER),
    Mutant('preflight allows two headers',
           '("access-control-allow-headers", asked if re.fullmatch(',
           '("access-control-allow-headers", "authorization, content-type" if re.fu'
           'llmatch(', SERVER),
    Mutant('a defect is told',
           'self.fail(answer, FusionError("an error of this server; it is logged"))',
           'self.fail(answer, FusionError("an error of this server: %s" % error))', SERVER),
    Mutant('500 may be asked again',
           'again = error.status in (429, 503)',
           'again = error.status in (429, 500, 502, 503)', SERVER),
    Mutant('Retry-After is always 10',
           'max(2, math.ceil(10 if wait is None else wait))',
           '10', SERVER),
    Mutant('a model that is not there is the panel',
           'if config is None and not self.served.any_model:',
           'if config is None and False:', SERVER),
    Mutant('a member is asked with refine',
           'spares=(), refine=False, vote=False)',
           'spares=(), vote=False)', SERVER),
    Mutant('openrouter/fusion is listed',
           'if name != "openrouter/fusion" or wanted == name:',
           'if True:', SERVER),
    Mutant('ids are not unquoted',
           'wanted = unquote(answer.head.path[len("/v1/models/"):])',
           'wanted = answer.head.path[len("/v1/models/"):]', SERVER),
    Mutant('estimate plans the configured mode',
           'plan = estimate(dataclasses.replace(config, mode=mode),',
           'plan = estimate(config,', SERVER),
    Mutant("an error's reason is not counted as degraded",
           '        for entry in run.degraded:\n            self.add("fusion_degrad'
           'ed_total", code=entry["code"])',
           '        pass', SERVER),
    Mutant('no place for who waits',
           'self.server.draining or len(self.waiting) >= self.server.served.max_req'
           'uests:',
           'self.server.draining or len(self.waiting) >= 0:', SERVER),
    Mutant('the queue has no end of patience',
           'or now - answer.started > QUEUE_S]:',
           'or now - answer.started > 1e9]:', SERVER),
    Mutant('HEAD has a body',
           'bare = self.head is not None and self.head.method == "HEAD" or status ='
           '= 204',
           'bare = status == 204', SERVER),
    Mutant('any name is a written call',
           'if item.get("name") not in names or not',
           'if not item.get("name") or not', SERVER),
    Mutant('prose around tags is dropped',
           '    if at < len(text):\n        blocks = [unfenced(text)]',
           '    if not blocks:\n        blocks = [unfenced(text)]', SERVER),
    Mutant('parallel calls are kept',
           '        del calls[1:]',
           '        pass', SERVER),
    Mutant('required is not held',
           'if params.get("tools") and (choice == "required" or isinstance(choice, '
           'dict)):',
           'if params.get("tools") and isinstance(choice, dict):', SERVER),
    Mutant('bad calls stay beside good ones',
           'good = tuple(call for call in reply.tool_calls if call_fault(call, para'
           'ms) is None)',
           'good = reply.tool_calls', SERVER),
    Mutant('advice is of any question',
           '    said = json.dumps([run.owner, messages[:last + 1], config.source, c'
           'onfig.layers,',
           '    said = json.dumps([run.owner, messages[:1], config.source, config.l'
           'ayers,', SERVER),
    Mutant('no advice and not a word',
           '        run.degrade("advice_missing", "panel", "", "the writer goes on '
           'alone")',
           '        pass', SERVER),
    Mutant('usage_scope is not looked at with tools',
           'scope = "answer" if run.offered and "usage_scope" not in config.origins'
           ' else',
           'scope = "answer" if run.offered else', SERVER),
    Mutant('a list is a JSON object',
           'OBJECT = {"type": "object"}', 'OBJECT = {}', SERVER),
    Mutant('enum is not looked at',
           '    if "enum" in schema and value not in schema["enum"]:',
           '    if False:', SERVER),
    Mutant('a schema that is none is an error',
           'except (RecursionError, TypeError, ValueError, AttributeError):',
           'except (RecursionError, TypeError, ValueError):', SERVER),
    Mutant('a preset may raise the ceiling',
           '        ceilings.append(served[name].max_cost_usd)',
           '        ceilings = [served[name].max_cost_usd]', SERVER),
    Mutant('99 calls may be planned',
           'MAX_CALLS = 48 ',
           'MAX_CALLS = 99 ', SERVER),
    Mutant('smoke never fails',
           '            state, detail = "fail", "%s: %s" % (type(error)',
           '            state, detail = "ok", "%s: %s" % (type(error)', SERVER),
    Mutant('anyone may listen on 0.0.0.0',
           '    if not (near or tokens or args.insecure_no_auth):',
           '    if False:', SERVER),
    Mutant('SIGTERM is 130',
           '    return 0 if terms else 130',
           '    return 130', SERVER),
    Mutant('a second SIGTERM waits',
           '            os._exit(143)\n\n    def watch',
           '            pass\n\n    def watch', SERVER),
    Mutant('the json log is text',
           '        if args.log == "json":',
           '        if False:', SERVER),
    Mutant('the smallest context that is known',
           '"context_length": min(windows) if windows and None not in windows else '
           'None,',
           '"context_length": min(filter(None, windows), default=None),', SERVER),
    Mutant('answers cost what prompts cost',
           'mean([price.output for price in prices])',
           'mean([price.input for price in prices])', SERVER),
    Mutant('tokens of the answer in the header',
           '("x-litellm-total-tokens", receipt["tokens"])',
           '("x-litellm-total-tokens", result.usage.total)', SERVER),
    Mutant('the log has no errors',
           '        answer.note["error"] = "%s: %s" % (error.code, error.message)',
           '        pass', SERVER),
    Mutant('a tool turn runs the panel',
           '        return "tool_loop", "tool results came in"',
           '        return "fuse", "tool results came in"', SERVER),
    Mutant('a key of a nested block passes',
           '                if key not in REQUEST_BOUNDS:',
           '                if key.startswith("api"):', SERVER),
    Mutant('the breakers are not shown',
           '"presets": sorted(self.served.presets), "breakers": resting,',
           '"presets": sorted(self.served.presets), "breakers": {},', SERVER),
    Mutant('an empty FUSION_SERVER_KEY is none',
           '    if given and not tokens:',
           '    if False:', SERVER),
    Mutant('a form is dropped from the repair',
           'wanted = "" if form is None else',
           'wanted = "" if True else', SERVER),
    Mutant('arguments need not be an object',
           '    if json_type_of(arguments) is not dict:',
           '    if json_type_of(arguments) is None:', SERVER),
    Mutant('items are not looked at',
           'parts = [(item, schema.get("items", True), "%s[%d]" % (place, index))',
           'parts = [(item, True, "%s[%d]" % (place, index))', SERVER),
    Mutant('images go to all',
           '    if takes_images(member) or not text_bytes(messages)[1]:',
           '    if True:', SERVER),
    Mutant('the private network is not allowed',
           '("access-control-allow-private-network", "true"),',
           '', SERVER),
    Mutant('the choices are not counted',
           '    bound_calls(config, choices)',
           '    bound_calls(config)', SERVER),
    Mutant('a refused value is repeated whole',
           'clip(json.dumps(\n                value), 60) if isinstance(value, str)'
           ' else json_type(value)))',
           'json.dumps(\n                value)))', SERVER),
    Mutant('length beside chunks is taken',
           'if self.chunked and (length is not None or not head.minor):',
           'if self.chunked and not head.minor:', HTTP),
    Mutant('any coding is taken for chunked',
           'if self.chunked and coding.lower() != "chunked":',
           'if self.chunked and "chunked" not in coding.lower():', HTTP),
    Mutant('a length with a sign is taken',
           're.fullmatch("[0-9]{1,18}", length)',
           're.fullmatch("[+]?[0-9]{1,18}", length)', HTTP),
    Mutant('a length is what int takes',
           'if length is not None and not re.fullmatch("[0-9]{1,18}", length):',
           'if length is not None and not re.fullmatch("[0-9_ ]{1,18}", length):', HTTP),
    Mutant('the body has no limit by its length',
           '        self.left = int(length or 0)\n        self.bound(self.left)',
           '        self.left = int(length or 0)', HTTP),
    Mutant('the limit is one lower',
           'if size > self.most:',
           'if size >= self.most:', HTTP),
    Mutant("a chunk's size may be padded",
           '([0-9A-Fa-f]{1,8})[ \\t]*(;',
           '[ +]?([0-9A-Fa-f]{1,8})[ \\t]*(;', HTTP),
    Mutant('a chunk extension holds anything',
           '(;[\\t\\x20-\\x7e]*)?',
           '(;.*)?', HTTP),
    Mutant('trailers without end',
           'if self.trailer > 4096 or FIELD',
           'if FIELD', HTTP),
    Mutant('a lower-case method is taken',
           'rb"([A-Z]{1,20}) (',
           'rb"([A-Za-z]{1,20}) (', HTTP),
    Mutant('a target holds anything',
           '(\\*|/[\\x21-\\x7e]*) HTTP',
           '(\\*|/[^ ]*) HTTP', HTTP),
    Mutant('another version is 400',
           'raise refused(505 if version else 400',
           'raise refused(400 if version else 400', HTTP),
    Mutant('header values hold line feeds',
           '([\\t\\x20-\\x7e\\x80-\\xff]*)")',
           '([\\n\\t\\x20-\\x7e\\x80-\\xff]*)")', HTTP),
    Mutant('a target has any length',
           'if len(lines[0]) > 8192:',
           'if len(lines[0]) > 80_192:', HTTP),
    Mutant('99 headers',
           'HEAD_FIELDS = 100 ',
           'HEAD_FIELDS = 99 ', HTTP),
    Mutant('HTTP/1.0 needs a Host',
           'if minor and "host" not in headers or',
           'if "host" not in headers or', HTTP),
    Mutant('a host that begins like ours',
           'or name.startswith("127.") and plain',
           'or name.startswith("127.")', HTTP),
    Mutant('nonsense is waited out',
           'if not self.buffer[:1].isupper() or',
           'if', HTTP),
    Mutant('no empty line before a request',
           'if self.buffer[:2] == b"\\r\\n" and not self.scanned:',
           'if False:', HTTP),
    Mutant('continue never comes',
           'if head.headers.get("expect") and head.minor and not self.buffer:',
           'if False:', HTTP),
    Mutant('a slow head is waited for',
           'if self.state == "head" and took > HEAD_S and self.buffer:',
           'if False:', HTTP),
    Mutant('a large body has no more time',
           'took > BODY_S + self.held() / BODY_RATE:',
           'took > BODY_S:', HTTP),
    Mutant('idle connections stay',
           'idle > (1 if self.server.draining else KEEP_S)',
           'idle > (1 if self.server.draining else 1e9)', HTTP),
    Mutant('the time of a head begins with the connection',
           'if connection.state == "head" and not connection.buffer:\n             '
           '   connection.since = time.monotonic()',
           'if False:\n                connection.since = time.monotonic()', HTTP),
    Mutant('a refused connection is closed at once',
           '        connection.enter("linger")\n',
           '        self.drop(connection)\n        return\n        connection.enter'
           '("linger")\n', HTTP),
    Mutant('204 has a length',
           '        if status != 204:\n            fields += (("content-length"',
           '        if True:\n            fields += (("content-length"', HTTP),
    Mutant('HTTP/1.0 stays',
           '(self.minor == 1 or "keep-alive" in words)',
           'True', HTTP),
    Mutant('a connection that closes does not say so',
           'lines.append("connection: close")',
           'pass', HTTP),
    Mutant('no queue',
           'len(self.waiting) >= self.server.served.max_requests:',
           'self.running >= self.server.served.max_requests:', HTTP),
    Mutant('work without a limit',
           'while self.waiting and self.running < self.server.served.max_requests:',
           'while self.waiting:', HTTP),
    Mutant('the last to come is the first to run',
           'answer = self.waiting.popleft()',
           'answer = self.waiting.pop()', HTTP),
    Mutant('without a thread nobody is told',
           '                self.overloaded(answer)\n                return\n      '
           '      answer.paid',
           '                return\n            answer.paid', HTTP),
    Mutant('who waits is not started',
           '            self.running -= 1\n            self.start_waiting()',
           '            self.running -= 1', HTTP),
    Mutant('who left waits on',
           'for answer in [answer for answer in self.waiting if answer.connection.g'
           'one\n                       or',
           'for answer in [answer for answer in self.waiting if', HTTP),
    Mutant('what follows an answer is forgotten',
           '                    self.returned(connection)\n                    '
           'self.advance(connection)',
           '                    self.returned(connection)', HTTP),
    Mutant('503 is not to be retried',
           'again = error.status in (429, 503)',
           'again = error.status in (429,)', HTTP),
    Mutant('no limit of connections',
           'if len(self.connections) >= self.most and ready(self.listener)',
           'if False and ready(self.listener)', HTTP),
    Mutant('who works makes room',
           '                if connection.state != "busy"]\n',
           '                if True]\n', HTTP),
    Mutant('dropped connections are kept',
           'self.connections.pop(connection.sock, None)\n',
           'pass\n', HTTP),
    Mutant('draining keeps the listener',
           'self.selector.unregister(self.listener)\n        self.listener.close()',
           'self.selector.unregister(self.listener)', HTTP),
    Mutant('the smallest makes room',
           'self.refuse(max(unfinished, key=Connection.held)',
           'self.refuse(min(unfinished, key=Connection.held)', HTTP),
    Mutant('heartbeats after the end',
           'self.beating = not last',
           'self.beating = True', HTTP),
    Mutant('numbers of any size',
           'if not math.isfinite(float(digits)):',
           'if False:', HTTP),
    Mutant('100 is too deep',
           'if depth > MAX_DEPTH:',
           'if depth >= MAX_DEPTH:', HTTP),
    Mutant('an escaped surrogate is refused',
           '        except UnicodeEncodeError:\n            raise ValueError("it ho'
           'lds half',
           '            raise UnicodeEncodeError("utf-8", "", 0, 1, "")\n        ex'
           'cept UnicodeEncodeError:\n            raise ValueError("it holds half', HTTP),
    Mutant('a mark is taken',
           'strict_json(answer.body.decode())',
           'strict_json(answer.body.decode("utf-8-sig"))', HTTP),
    Mutant('any type of body',
           'if method == "POST" and (kind.lower() != "application/json" or',
           'if method == "POST" and (', HTTP),
    Mutant('405 names no methods',
           '"method_not_allowed", headers=[("allow", ", ".join(allow))])',
           '"method_not_allowed")', HTTP),
    Mutant('HTTP/1.0 is told to continue',
           'if head.headers.get("expect") and head.minor and',
           'if head.headers.get("expect") and', HTTP),
    Mutant('the end of a head in two parts is not seen',
           'max(0, self.scanned - 3), HEAD_BYTES + 4)',
           'self.scanned, HEAD_BYTES + 4)', HTTP),
    Mutant('a size line counts half a line end',
           'if len(buffer) > 1025:',
           'if len(buffer) > 1024:', HTTP),
    Mutant('lingering while one sends',
           'idle > LINGER_S or now - connection.wrote > BODY_S) or',
           'idle > LINGER_S) or', HTTP),
    Mutant('the listener rests for ever',
           '            self.selector.register(self.listener, self.readable, self.a'
           'ccept)\n        unfinished',
           '        unfinished', HTTP),
    Mutant('room is made for nobody',
           'and ready(self.listener) and',
           'and', HTTP),
    Mutant('a full buffer loses what is left',
           '                        self.rest = bytes(view)\n                      '
           '  return True',
           '                        return True', HTTP),
    Mutant('who reads nothing stays',
           'if not ready(self.sock, True, WRITE_S):',
           'if not ready(self.sock, True, 1000):', HTTP),
    Mutant('who sent much ahead is never read again',
           '            if len(connection.buffer) > PIPELINE_BYTES:\n              '
           '  self.forget(connection)\n                self.watch(connection)',
           '            pass', HTTP),
    Mutant('what follows a rest is forgotten',
           '            self.returned(connection)\n            self.advance(connect'
           'ion)\n\n    def give_back',
           '            self.returned(connection)\n\n    def give_back', HTTP),
    Mutant('pipelined out of order',
           'connection.enter("busy")\n',
           'pass\n', HTTP),
    Mutant('who left behind much is not seen',
           'if answer and len(connection.buffer) > PIPELINE_BYTES and hung_up(conne'
           'ction.sock):',
           'if False:', HTTP),
    Mutant('streams: receipt on every choice',
           'receipt = {"fusion": receipt_object(result, self.options)} if last else'
           ' {}',
           'receipt = {"fusion": receipt_object(result, self.options)}', STREAMS),
    Mutant('streams: chunk finish early',
           'delta = {"content": fields["text"]} if fields["text"] else {}',
           'delta = {"content": fields["text"]}', STREAMS),
    Mutant('streams: reasoning into content',
           'delta["reasoning_content"] = fields["reasoning"]',
           'delta["content"] = fields["reasoning"]', STREAMS),
    Mutant('streams: choice lost',
           'return found + self.chunk(delta, fields["choice"])',
           'return found + self.chunk(delta)', STREAMS),
    Mutant('streams: roles only first',
           'for index in range(self.choices))\n',
           'for index in range(1))\n', STREAMS),
    Mutant('streams: usage null lost',
           'usage = {"usage": None} if self.request.include_usage else {}',
           'usage = {}', STREAMS),
    Mutant('streams: usage chunk always',
           '        if self.request.include_usage:\n            found.append',
           '        if True:\n            found.append', STREAMS),
    Mutant('streams: no done',
           'return b"".join(found) + b"data: [DONE]\\n\\n"',
           'return b"".join(found)', STREAMS),
    Mutant('streams: fail without done',
           'return sse(error_object(error, degraded)) + b"data: [DONE]\\n\\n"',
           'return sse(error_object(error, degraded))', STREAMS),
    Mutant('streams: degraded lost',
           'found["fusion"] = {"degraded": list(degraded)}',
           'found["fusion"] = {"degraded": []}', STREAMS),
    Mutant('streams: tool index',
           '"function": {"arguments": call["function"]["arguments"]}}',
           '"function": call["function"]}', STREAMS),
    Mutant('streams: tool index 0',
           'opening = dict(call, index=number, function',
           'opening = dict(call, index=0, function', STREAMS),
    Mutant('streams: separator raw',
           '            text = text.replace(mark, "\\\\u%04x" % ord(mark))',
           '            pass', STREAMS),
    Mutant('streams: separator 85',
           'for mark in "\\x85\\u2028\\u2029":',
           'for mark in "\\u2028\\u2029":', STREAMS),
    Mutant('streams: surrogates crash',
           'return b"data: " + text.encode("utf-8", "replace") + b"\\n\\n"',
           'return b"data: " + text.encode("utf-8") + b"\\n\\n"', STREAMS),
    Mutant('streams: events always',
           'if self.options.get("events") and event.kind not in ("start", "answer")'
           ':',
           'if event.kind not in ("start", "answer"):', STREAMS),
    Mutant('streams: events of answer',
           'if self.options.get("events") and event.kind not in ("start", "answer")'
           ':',
           'if self.options.get("events") and event.kind not in ("start",):', STREAMS),
    Mutant('streams: progress always',
           'if self.options.get("progress") and event.kind in ("slot", "stage"):',
           'if event.kind in ("slot", "stage"):', STREAMS),
    Mutant('streams: ready counts running',
           '"ready": len(states) - states.count("running"),',
           '"ready": len(states),', STREAMS),
    Mutant('streams: stage lost',
           '            self.stage = fields["stage"]\n',
           '            pass\n', STREAMS),
    Mutant('streams: beat without comment',
           'return line.encode() + self.chunk({"content": ""}, fusion={"progress": '
           'progress})',
           'return self.chunk({"content": ""}, fusion={"progress": progress})', STREAMS),
    Mutant('streams: beat only comment',
           'return line.encode() + self.chunk({"content": ""}, fusion={"progress": '
           'progress})',
           'return line.encode()', STREAMS),
    Mutant('streams: members of layer',
           'self.members[fields["layer"], fields["slot"]] = fields["state"]',
           'self.members[fields["layer"]] = fields["state"]', STREAMS),
    Mutant('streams: no beat at all',
           'elif answer and answer.beating and now - connection.wrote > BEAT_S:',
           'elif False:', STREAMS),
    Mutant('streams: beats always',
           'elif answer and answer.beating and now - connection.wrote > BEAT_S:',
           'elif answer and answer.beating:', STREAMS),
    Mutant('streams: wrote not noted',
           'view = view[self.sock.send(view):]\n                    self.wrote = ti'
           'me.monotonic()',
           'view = view[self.sock.send(view):]', STREAMS),
    Mutant('streams: beats before headers',
           '            self.close = True  # HTTP/1.0 knows no chunks; the end of t'
           'he connection is the end\n',
           '            self.close = True\n        self.beating = True\n', STREAMS),
    Mutant('streams: close after failure',
           '            answer.close = True\n            if answer.stream:',
           '            if answer.stream:', STREAMS),
    Mutant('streams: failure without end',
           'answer.piece(answer.stream.fail(error, degraded), last=True)',
           'answer.piece(answer.stream.fail(error, degraded))', STREAMS),
    Mutant('streams: 1.0 kept',
           'self.close = True  # HTTP/1.0 knows no chunks; the end of the connectio'
           'n is the end',
           'pass', STREAMS),
    Mutant('streams: 1.0 chunked',
           'if not data or not self.head.minor:\n            return data',
           'if not data:\n            return data', STREAMS),
    Mutant('streams: no end of chunks',
           'ending = b"0\\r\\n\\r\\n" if last and self.head.minor else b""',
           'ending = b""', STREAMS),
    Mutant('streams: chunk size decimal',
           'return b"%x\\r\\n%s\\r\\n" % (len(data), data)',
           'return b"%d\\r\\n%s\\r\\n" % (len(data), data)', STREAMS),
    Mutant('streams: content type',
           '"text/event-stream; charset=utf-8"',
           '"text/plain; charset=utf-8"', STREAMS),
    Mutant('streams: begin late',
           '            if event.kind == "start":\n                answer.begin()',
           '            if event.kind == "slot" and not answer.status:\n           '
           '     answer.begin()', STREAMS),
    Mutant('streams: begin at once',
           '            answer.stream = dialect.stream(request, request.model, run.'
           'id, options)\n',
           '            answer.stream = dialect.stream(request, request.model, run.'
           'id, options)\n            answer.begin()\n', STREAMS),
    Mutant('streams: not live',
           'run = start_run(config, self.network, live=request.stream,',
           'run = start_run(config, self.network, live=False,', STREAMS),
    Mutant('streams: client stays',
           '            run.cancel.set("the client left")',
           '            pass', STREAMS),
    Mutant('streams: gone before run',
           '        if answer.connection.gone:  # it may have left before there was'
           ' a run to cancel',
           '        if False:', STREAMS),
    Mutant('streams: queue keeps gone',
           'for answer in [answer for answer in self.waiting if answer.connection.g'
           'one\n                       or now',
           'for answer in [answer for answer in self.waiting if False\n            '
           '           or now', STREAMS),
    Mutant('streams: cost header of unknown',
           'if receipt["cost_usd"] is not None:\n            cost = "%.10g"',
           'if True:\n            cost = "%s"', STREAMS),
    Mutant('streams: latency header',
           '("x-fusion-latency-s", receipt["timing_s"]["total"])',
           '("x-fusion-latency-s", receipt["timing_s"]["panel"])', STREAMS),
    Mutant('streams: tokens header',
           '("x-litellm-total-tokens", receipt["tokens"])',
           '("x-litellm-total-tokens", result.usage.prompt)', STREAMS),
    Mutant('streams: id differs',
           'answer.id, answer.run = run.id, run',
           'answer.run = run', STREAMS),
    Mutant('streams: drafts always',
           'if "drafts" in options.get("include", ()):',
           'if options.get("include", ()):', STREAMS),
    Mutant('streams: trace always',
           'if "trace" in options.get("include", ()):',
           'if options.get("include", ()):', STREAMS),
    Mutant('streams: trace with deltas',
           'if traced and event.kind not in ("delta", "answer", "end"):',
           'if traced and event.kind not in ("answer", "end"):', STREAMS),
    Mutant('streams: refusal lost',
           '"refusal": reply.text if reply.refusal else None}',
           '"refusal": None}', STREAMS),
    Mutant('streams: refusal lost in stream',
           'delta = {"refusal": reply.text} if reply.refusal else {}',
           'delta = {}', STREAMS),
    Mutant('streams: logprobs lost in stream',
           'self.chunk(delta, index, reply.finish, reply.logprobs, **receipt)',
           'self.chunk(delta, index, reply.finish, **receipt)', STREAMS),
    Mutant('streams: logprobs lost',
           '"logprobs": reply.logprobs,',
           '"logprobs": None,', STREAMS),
    Mutant('streams: finish stop',
           'self.chunk(delta, index, reply.finish, reply.logprobs',
           'self.chunk(delta, index, "stop", reply.logprobs', STREAMS),
    Mutant('streams: created changes',
           '"created": request.created, "model": model}',
           '"created": int(time.time() * 10), "model": model}', STREAMS),
    Mutant('streams: whole reasoning',
           'message["reasoning_content"] = reply.reasoning',
           'message["reasoning"] = reply.reasoning', STREAMS),
    Mutant('streams: whole tool calls',
           'message["tool_calls"] = list(reply.tool_calls)',
           'pass', STREAMS),
    Mutant('streams: should retry',
           '("x-should-retry", "true" if again else "false")',
           '("x-should-retry", "true")', STREAMS),
    Mutant('streams: retry after',
           'fields.append(("retry-after", max(2,',
           'fields.append(("retry-after", max(200,', STREAMS),
    Mutant('streams: a place that is free wakes nobody',
           'self.running -= 1\n            self.start_waiting()',
           'self.running -= 1', STREAMS),
    Mutant('streams: error type',
           'kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.s'
           'tatus < 499',
           'kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.s'
           'tatus < 599', STREAMS),
    Mutant('streams: turn not cancelled',
           '                self.turns.wait(SLICE_S)\n                run.check()',
           '                self.turns.wait(SLICE_S)', STREAMS),
    Mutant('streams: sleep not cancelled',
           'self.cancel.event.wait(max(0.0, seconds))',
           'time.sleep(max(0.0, seconds))', STREAMS),
    Mutant('streams: think filter half tag',
           'end = max(at, len(text) - len(self.close) + 1)  # half a tag may stand '
           'there',
           'end = len(text)', STREAMS),
    Mutant('streams: 499',
           '            answer.status = 499',
           '            answer.status = answer.status or 499', STREAMS),
    Mutant('streams: write waits forever',
           'if not ready(self.sock, True, WRITE_S):',
           'if not ready(self.sock, True, 3600):', STREAMS),
    Mutant('streams: beat waits',
           'if answer.beating and not self.rest and ready(self.sock, True):',
           'if answer.beating and not self.rest and ready(self.sock, True, 5.0):', STREAMS),
    Mutant('streams: breaker check',
           'if all(map(run.network.resting, asked)) and not replaying:',
           'if False:', STREAMS),
    Mutant('streams: panel asked of solo',
           'asked = config.synthesizer if mode in ALONE else config.panel + config.'
           'spares',
           'asked = config.panel + config.spares', STREAMS),
    Mutant('streams: halves',
           'self.half = content[-1:] if "\\ud800" <= content[-1:] < "\\udc00" else '
           '""',
           'self.half = ""', STREAMS),
    Mutant('streams: thought held lost',
           'thought = "" if (index, "thought") in run.shown else reply.reasoning',
           'thought = ""', STREAMS),
    Mutant('streams: thought twice',
           'run.shown.add((run.choice, "thought"))',
           'pass', STREAMS),
    Mutant('streams: role late',
           '{"role": "assistant", "content": ""}, index)',
           '{"content": ""}, index)', STREAMS),
    Mutant('streams: write never gives up',
           '                    if not ready(self.sock, True, WRITE_S):\n          '
           '              self.leave()',
           '                    ready(self.sock, True, WRITE_S)', STREAMS),
    Mutant('streams: choices not cancelled',
           'cancel, seed = Cancel(run.cancel), params',
           'cancel, seed = Cancel(), params', STREAMS),
    Mutant('streams: no leave when busy',
           'connection.leave()\n            if connection.state == "busy":  # its t'
           'hread',
           'if connection.state == "busy":  # its thread', STREAMS),
]

MUTANTS = WIRES + DRAFTS + ANSWERS + DOLLARS + SETTINGS + WIRE + FACES + SERVED


# ---- processes --------------------------------------------------------------------------------


def descendants(pid):
    """Process ids of all that a process has started, and of what those have started."""
    try:
        listing = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="]).decode()
    except OSError:  # there is no ps
        return set()
    parent_of = dict(map(int, line.split()) for line in listing.splitlines())
    found = {pid}
    while True:
        more = {child for child, parent in parent_of.items() if parent in found} - found
        if not more:
            return found - {pid}
        found |= more


def end(process):
    """Ends a pytest that still runs: as Ctrl-C does, so that its tests clean up, else by force."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
        return
    left = descendants(process.pid)
    process.kill()
    process.wait()
    for pid in left:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


class Verdict(NamedTuple):
    """What the tests said: `state` is passed, failed, late or broken, `test` the first failure.

    `shaky` are tests that failed once and passed when they ran alone.
    """

    state: str
    test: str
    seconds: float
    shaky: tuple = ()


def first_failure(output):
    """The first test that pytest's summary names, or the last thing that it said."""
    found = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+(?:\[.*?\](?= - |$))?)", output, re.MULTILINE)
    lines = [line for line in output.splitlines() if line.strip()]
    return found.group(1) if found else lines[-1] if lines else "nothing was said"


def wait(process, limit, stop):
    """Waits for pytest at most so many seconds; True if it came to its end."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline and not stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return True
    return False


def run_tests(text, tests, limit, stop, root):
    """Runs tests (arguments of pytest) on a file of this text, up to the first failure."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder, \
            open(os.path.join(folder, "output"), "w+b") as output:
        path = os.path.join(folder, "fusion.py")
        Path(path).write_bytes(text.encode())
        command = [sys.executable, *PYTEST, "--rootdir", str(root),
                   "--basetemp", os.path.join(folder, "temporary"), *tests]
        env = dict(os.environ, FUSION_PY=path, PYTHONDONTWRITEBYTECODE="1")
        env.setdefault("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        process = subprocess.Popen(command, cwd=str(root), env=env, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, start_new_session=True)
        try:
            ended = wait(process, limit, stop)
        finally:
            end(process)
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
    state = {0: "passed", 1: "failed"}.get(process.returncode, "broken") if ended else "late"
    return Verdict(state, first_failure(said), time.monotonic() - started)


def run_surely(text, tests, limit, stop, root):
    """Runs tests like run_tests; but a failure counts only if the test alone fails once more.

    A test that does not is left out from then on: on a busy machine it says nothing.
    """
    shaky, seconds = (), 0.0
    while True:
        left_out = ["--deselect=" + test for test in shaky]
        verdict = run_tests(text, tests + left_out, limit, stop, root)
        seconds += verdict.seconds
        if verdict.state == "failed":
            again = run_tests(text, [verdict.test], limit, stop, root)
            seconds += again.seconds
            if again.state == "passed":
                shaky += (verdict.test,)
                continue
        return verdict._replace(seconds=seconds, shaky=shaky)


# ---- the runner -------------------------------------------------------------------------------


def misfits(source, mutants):
    """A line for each mutant whose snippet does not stand exactly once in the file."""
    counts = [(mutant.name, source.count(mutant.old)) for mutant in mutants]
    return ["%s: the snippet %s" % (name, "stands there %d times" % count if count else "is lost")
            for name, count in counts if count != 1]


def for_each(items, work, report, jobs):
    """Calls work(item, stop) on so many threads, and report(item, result) here as they end.

    When this is left early, by Ctrl-C above all, `stop` is set and the threads are waited for.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(work, item, stop): item for item in items}
        try:
            for future in as_completed(futures):
                report(futures[future], future.result())
        finally:
            stop.set()
            for future in futures:
                future.cancel()


def red_tests(source, mutants, jobs, limit, root):
    """What is wrong with the unmutated file in the test files of these mutants, a line each."""
    found = []

    def report(tests, verdict):
        if verdict.state != "passed":
            found.append("%s, %s: %s" % (tests, verdict.state, verdict.test))

    files = sorted({tests for mutant in mutants for tests in mutant.tests.split()})
    for_each(files, lambda tests, stop: run_surely(source, [tests], limit, stop, root), report,
             jobs)
    return found


def line_of(mutant, verdict):
    """What is said of a mutant."""
    ends = {"passed": "SURVIVED " + mutant.tests + "".join(
                ", though %s failed once" % test for test in verdict.shaky),
            "failed": "killed by " + verdict.test,
            "late": "killed by timeout",
            "broken": "NOT RUN: " + verdict.test}
    return "%s: %s in %.1f s" % (mutant.name, ends[verdict.state], verdict.seconds)


def run(source, mutants, jobs=2, say=print, limit=LIMIT_S, root=ROOT):
    """Runs all mutants of a file, says a line for each, and returns the exit code."""
    for line in misfits(source, mutants):
        say(line)
    fitting = [mutant for mutant in mutants if source.count(mutant.old) == 1]
    red = red_tests(source, fitting, jobs, limit, root)
    if red:
        for line in red:
            say("the unmutated file: " + line)
        say("nothing was mutated: a red baseline proves nothing")
        return 1
    killed = []

    def report(mutant, verdict):
        say(line_of(mutant, verdict))
        if verdict.state in ("failed", "late"):
            killed.append(mutant)

    for_each(fitting, lambda mutant, stop: run_surely(
        source.replace(mutant.old, mutant.new), mutant.tests.split(), limit, stop, root),
        report, jobs)
    say("%d killed, %d survived" % (len(killed), len(fitting) - len(killed)))
    return 0 if len(killed) == len(mutants) else 1


def end_like_ctrl_c():
    """Has every usual signal end this program as Ctrl-C does.

    SIGINT too: a shell has it ignored in the background, and the tests would inherit that.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        ignored = number and signal.getsignal(number) == signal.SIG_IGN
        if number and (name == "SIGINT" or not ignored):
            signal.signal(number, signal.default_int_handler)


def main(argv):
    """Runs the chosen mutants and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", metavar="PART", default="",
                        help="only those with this in their name or tests")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at a time")
    args = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS
              if args.k.lower() in (mutant.name + " " + mutant.tests).lower()]
    if not chosen or args.jobs < 1:
        parser.error("there is no mutant with %r in its name or tests" % args.k if not chosen
                     else "--jobs takes a number from 1 on")
    source = Path(os.environ.get("FUSION_PY") or ROOT / "fusion.py").read_bytes().decode()
    end_like_ctrl_c()
    try:
        return run(source, chosen, args.jobs, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
