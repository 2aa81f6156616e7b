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
MONEY = "tests/test_money.py"
MORE = "tests/test_more.py"
PROXY = "tests/test_proxy.py"
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
           "            written = each_choice(run, choices, lambda view, index: synthesize(",
           "            drafts = tuple(draft._replace(letter=letter_of(len(drafts) - 1 - index))\n"
           "                           for index, draft in enumerate(drafts))\n"
           "            written = each_choice(run, choices, lambda view, index: synthesize(",
           WIRING),
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
           'return Spending(usage, None, "unknown")', 'return Spending(usage, 0.0, "unknown")',
           MONEY),
    Mutant("a model without a price runs under a ceiling",
           "        price = self.price\n", "        price = self.price or LOCAL_PRICE\n", MONEY),
    Mutant("the cost that a backend reports is passed over",
           "known = isinstance(cost, (int, float)) and", "known = False and", MONEY),
    Mutant("configured prices are passed over",
           "if member.model in config.prices:", "if False:", MONEY),
    Mutant("a remote backend is free for calling itself local",
           "if known is not None or not backend.loopback:", "if known is not None:", MONEY),
    Mutant("layers are cut before samples",
           "    if config.samples > 1:\n", "    if config.samples > 1 and config.layers == 1:\n",
           MONEY),
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
           "if not configured and not any(", "if False and not any(", CONFIG),
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
           " and not ready(connection.sock.plain)", "", TRANSPORT),
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
           "piece = self.response.read1(65536)\n            self.stop_if_ended()",
           "piece = self.response.read1(65536)", MORE),
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
           '"vote": args.vote, ', "", TALK),
    Mutant("a doctor that found something broken ends with 0",
           "return 1 if failed_lines else 0", "return 0", DOCTOR),
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

MUTANTS = WIRES + DRAFTS + ANSWERS + DOLLARS + SETTINGS + WIRE + FACES


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
