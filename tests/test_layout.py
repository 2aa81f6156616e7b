"""Holds how fusion.py is written: its sections, the direction of its references, its sizes.

Each rule is a checker from source text to findings ("LINE: what"), and each checker has a
test that shows it a broken text, since a test that cannot fail is a defect.
"""

import ast
import bisect
import functools
import glob
import io
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import tokenize
import warnings
from typing import NamedTuple

import pytest

from conftest import FUSION_PY, ROOT

MAX_LINES = 8000
MAX_COLUMNS = 100
MAX_FUNCTION = 60
LONG_FUNCTION = "build_parser"
MAX_MEDIAN = 14
MAX_PERCENTILE_95 = 50
MAX_NESTING = 4
MAX_MAIN = 25

RULE = re.compile(r"# -{80,98}")
BANNER = re.compile(r"# \[(\d\d)\] (\w+): (.+)")
CONTENTS = re.compile(r"\s+(\d\d)\s+(\w+)\s+(.+)")
SPEAKING = {"header", "terminal", "talk", "cli", "fake"}
LATE_IMPORTS = (
    "ssl",
    "urllib.request",
    "http.server",
    "http.client",
    "asyncio",
    "concurrent.futures",
    "subprocess",
    "difflib",
    "sqlite3",
    "readline",
)
TOP_LEVEL = {"fusion.py", "presets", "eval_tasks.json", "tests", "README.md", "LICENSE"}
DEVELOPERS_PATH = re.compile(
    r"(?<![\w.~$}])/(work/|home/[A-Za-z]|Users/[A-Za-z]|root/(\w|\.pyenv))|[A-Z]:\\+Users\\"
)

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = FUNCTIONS + COMPREHENSIONS + (ast.ClassDef, ast.Lambda)
COMPOUNDS = tuple(
    getattr(ast, name)
    for name in ("If", "For", "AsyncFor", "While", "With", "AsyncWith", "Try", "TryStar", "Match")
    if hasattr(ast, name)
)

# sys.stdlib_module_names came with Python 3.10; these are the ones of 3.9 that a program uses.
STDLIB_OF_39 = """
    __future__ abc argparse array ast asyncio atexit base64 binascii bisect bz2 calendar cmd
    code codecs collections concurrent configparser contextlib contextvars copy csv ctypes
    curses dataclasses datetime decimal difflib dis email encodings enum errno faulthandler
    fcntl filecmp fnmatch fractions ftplib functools gc getopt getpass gettext glob grp gzip
    hashlib heapq hmac html http imaplib importlib inspect io ipaddress itertools json keyword
    linecache locale logging lzma mailbox marshal math mimetypes mmap msvcrt multiprocessing
    netrc ntpath numbers operator os pathlib pickle pkgutil platform plistlib posixpath pprint
    profile pty pwd queue quopri random re readline resource runpy sched secrets select
    selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat
    statistics string stringprep struct subprocess symtable sys sysconfig syslog tarfile
    tempfile termios textwrap threading time timeit token tokenize trace traceback tracemalloc
    tty types typing unicodedata unittest urllib uuid venv warnings wave weakref webbrowser
    winreg winsound wsgiref xml xmlrpc zipapp zipfile zipimport zlib zoneinfo
"""
STDLIB = set(getattr(sys, "stdlib_module_names", None) or STDLIB_OF_39.split())


# ---- reading --------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def parse(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


@functools.lru_cache(maxsize=None)
def tokens(source):
    return tuple(tokenize.generate_tokens(io.StringIO(source).readline))


@functools.lru_cache(maxsize=None)
def comments(source):
    """The comment of each line that has one: {line: text}."""
    found = (token for token in tokens(source) if token.type == tokenize.COMMENT)
    return {token.start[0]: token.string for token in found}


def functions(source):
    return [node for node in ast.walk(parse(source)) if isinstance(node, FUNCTIONS)]


def length(function):
    return function.end_lineno - function.lineno + 1


class Section(NamedTuple):
    number: str
    noun: str
    phrase: str
    line: int


@functools.lru_cache(maxsize=None)
def sections(source):
    """The banners of a file from top to bottom; "[05] transport: phrase"."""
    lines = source.split("\n")
    found = []
    for line in sorted(comments(source)):
        match = BANNER.fullmatch(lines[line - 1])
        if match:
            found.append(Section(*match.groups(), line))
    return tuple(found)


def place(source, line):
    """Which section a line is in: 0 for the header, 1 for the first section and so on."""
    return bisect.bisect_right([section.line for section in sections(source)], line)


def noun(source, position):
    return "header" if position == 0 else sections(source)[position - 1].noun


# ---- names ----------------------------------------------------------------------------------


def names_bound_by(node):
    """The names that this one node binds in the scope in which it stands."""
    if isinstance(node, FUNCTIONS + (ast.ClassDef,)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ExceptHandler) and node.name:
        return [node.name]
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    return []


def bindings(nodes):
    """{name: first line} for each name that statements bind in their own scope."""
    bound, elsewhere, waiting = {}, set(), list(nodes)
    while waiting:
        node = waiting.pop()
        for name in names_bound_by(node):
            bound[name] = min(node.lineno, bound.get(name, node.lineno))
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere.update(node.names)
        if not isinstance(node, SCOPES):
            waiting.extend(ast.iter_child_nodes(node))
    return {name: line for name, line in bound.items() if name not in elsewhere}


def parameters(arguments):
    found = getattr(arguments, "posonlyargs", []) + arguments.args + arguments.kwonlyargs
    return found + [extra for extra in (arguments.vararg, arguments.kwarg) if extra]


class GlobalReads(ast.NodeVisitor):
    """Collects (name, line) of each name that is read and is a global of the module."""

    def __init__(self):
        self.found = []
        self.scopes = []  # (belongs to a class, names), outermost first

    def visit_Name(self, node):
        local = any(node.id in names for _, names in self.scopes)
        if isinstance(node.ctx, ast.Load) and not local:
            self.found.append((node.id, node.lineno))

    def visit_all(self, nodes):
        for node in nodes:
            if node is not None:
                self.visit(node)

    def inside(self, names, nodes, of_class=False):
        """Visits nodes in a new scope; the names of a class are not seen in its functions."""
        outer = self.scopes
        self.scopes = [scope for scope in outer if not scope[0]] + [(of_class, names)]
        self.visit_all(nodes)
        self.scopes = outer

    def visit_FunctionDef(self, node):
        names = {parameter.arg for parameter in parameters(node.args)}
        self.visit_all(node.decorator_list + [node.returns])
        self.visit_signature(node.args)
        self.inside(names.union(bindings(node.body)), node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_signature(self, arguments):
        self.visit_all(parameter.annotation for parameter in parameters(arguments))
        self.visit_all(arguments.defaults + arguments.kw_defaults)

    def visit_Lambda(self, node):
        self.visit_signature(node.args)
        self.inside({parameter.arg for parameter in parameters(node.args)}, [node.body])

    def visit_ClassDef(self, node):
        self.visit_all(node.decorator_list + node.bases + node.keywords)
        self.inside(set(bindings(node.body)), node.body, of_class=True)

    def visit_comprehension_of(self, node):
        first, *others = node.generators
        self.visit(first.iter)
        names = set(bindings(loop.target for loop in node.generators))
        inner = [getattr(node, field, None) for field in ("elt", "key", "value")]
        for loop in node.generators:
            inner += [loop.target, *loop.ifs]
        self.inside(names, inner + [loop.iter for loop in others])

    visit_ListComp = visit_comprehension_of
    visit_SetComp = visit_comprehension_of
    visit_DictComp = visit_comprehension_of
    visit_GeneratorExp = visit_comprehension_of


@functools.lru_cache(maxsize=None)
def global_reads(source):
    visitor = GlobalReads()
    visitor.visit(parse(source))
    return tuple(visitor.found)


# ---- checkers: sections ---------------------------------------------------------------------


def untrue_contents(source):
    """The table of contents in the docstring against the banners."""
    docstring = ast.get_docstring(parse(source), clean=False) or ""
    matches = [CONTENTS.fullmatch(line) for line in docstring.split("\n")]
    listed = [match.groups() for match in matches if match]
    real = [tuple(section[:3]) for section in sections(source)]
    if not real:
        return ["1: no section has a banner"]
    findings = ["1: in the contents but not in the file: %s %s: %s" % row for row in listed
                if row not in real]
    findings += ["1: not in the contents: %s %s: %s" % row for row in real if row not in listed]
    if not findings and listed != real:
        findings.append("1: the contents have another order, or a row twice")
    return findings


def bad_banners(source):
    """Numbers that do not rise, banners without rules, comments that are nearly banners."""
    lines = [""] + source.split("\n") + [""]
    findings = []
    for line in comments(source):
        if not lines[line].startswith("# ["):
            continue
        if not BANNER.fullmatch(lines[line]):
            findings.append("%d: not of the form '# [05] noun: phrase'" % line)
        elif not RULE.fullmatch(lines[line - 1]) or not RULE.fullmatch(lines[line + 1]):
            findings.append("%d: a banner stands between two rules of dashes" % line)
    found = sections(source)
    for above, below in zip(found, found[1:]):
        if below.number <= above.number:
            findings.append("%d: [%s] below [%s]" % (below.line, below.number, above.number))
    return findings


def downward_references(source):
    """Names that are mentioned in a section above the one that defines them."""
    home = {name: place(source, line) for name, line in bindings(parse(source).body).items()}
    findings = []
    for name, line in global_reads(source):
        here = place(source, line)
        if home.get(name, 0) > here:
            route = noun(source, here), noun(source, home[name])
            findings.append("%d: %s (section %s -> section %s)" % (line, name, *route))
    return findings


def defined_again(source):
    """Functions and classes whose name an earlier section has; calls above would reach them."""
    home = bindings(parse(source).body)
    findings = []
    for node in parse(source).body:
        if not isinstance(node, FUNCTIONS + (ast.ClassDef,)):
            continue
        if place(source, home[node.name]) != place(source, node.lineno):
            findings.append("%d: %s is also at line %d" % (node.lineno, node.name, home[node.name]))
    return findings


# ---- checkers: sizes ------------------------------------------------------------------------


def long_functions(source):
    findings = []
    for function in functions(source):
        exempt = function.name == LONG_FUNCTION and function in parse(source).body
        if length(function) > MAX_FUNCTION and not exempt:
            findings.append("%d: %s has %d lines" % (function.lineno, function.name,
                                                     length(function)))
    return findings


def long_on_the_whole(source):
    lengths = sorted(length(function) for function in functions(source)) or [0]
    median = statistics.median(lengths)
    percentile = lengths[math.ceil(0.95 * len(lengths)) - 1]
    findings = []
    if median > MAX_MEDIAN:
        findings.append("1: the median function has %g lines" % median)
    if percentile > MAX_PERCENTILE_95:
        findings.append("1: the 95th percentile of function lengths is %d lines" % percentile)
    return findings


def is_elif(node, parent):
    return (isinstance(node, ast.If) and isinstance(parent, ast.If)
            and parent.orelse == [node] and node.col_offset == parent.col_offset)


def compounds(parent, depth=0):
    """(depth, line) of each compound statement below a node, not into nested definitions."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, FUNCTIONS + (ast.ClassDef, ast.Lambda)):
            continue
        deeper = isinstance(node, COMPOUNDS) and not is_elif(node, parent)
        if deeper:
            yield depth + 1, node.lineno
        yield from compounds(node, depth + deeper)


def deep_nesting(source):
    findings = []
    for function in functions(source):
        for depth, line in compounds(function):
            if depth == MAX_NESTING + 1:
                findings.append("%d: nested %d deep in %s" % (line, depth, function.name))
    return findings


def bad_lines(source):
    """Too many lines, too long ones, tabs, whitespace at their ends."""
    lines = source.split("\n")
    findings = []
    if source.count("\n") > MAX_LINES:
        findings.append("%d: more than %d lines" % (source.count("\n"), MAX_LINES))
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_COLUMNS:
            findings.append("%d: %d columns" % (number, len(line)))
        if "\t" in line:
            findings.append("%d: a tab" % number)
        if line != line.rstrip():
            findings.append("%d: whitespace at the end" % number)
    return findings


def packed_lines(source):
    """Statements that do not begin their line, and semicolons."""
    lines = source.split("\n")
    findings = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.stmt):
            before = lines[node.lineno - 1].encode()[:node.col_offset]
            if before.strip():
                findings.append("%d: a statement does not begin its line" % node.lineno)
    for token in tokens(source):
        if token.type == tokenize.OP and token.string == ";":
            findings.append("%d: a semicolon" % token.start[0])
    return findings


def long_main(source):
    mains = [node for node in parse(source).body
             if isinstance(node, FUNCTIONS) and node.name == "main"]
    if len(mains) != 1:
        return ["1: %d functions main" % len(mains)]
    if length(mains[0]) > MAX_MAIN:
        return ["%d: main has %d lines" % (mains[0].lineno, length(mains[0]))]
    return []


# ---- checkers: conduct ----------------------------------------------------------------------


def global_statements(source):
    return ["%d: global %s" % (node.lineno, ", ".join(node.names))
            for node in ast.walk(parse(source)) if isinstance(node, ast.Global)]


def is_broad(expression):
    """True for Exception, BaseException and tuples that hold them."""
    if isinstance(expression, ast.Tuple):
        return any(is_broad(element) for element in expression.elts)
    name = getattr(expression, "id", getattr(expression, "attr", None))
    return name in ("Exception", "BaseException")


def is_broad_suppress(node):
    """True for contextlib.suppress(Exception), which is a broad except by another name."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "id", getattr(node.func, "attr", None))
    return name == "suppress" and any(is_broad(argument) for argument in node.args)


def careless_excepts(source):
    """Bare excepts, and broad ones without a comment that names their boundary."""
    said = comments(source)
    findings = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            findings.append("%d: a bare except" % node.lineno)
        elif is_broad(getattr(node, "type", None)) or is_broad_suppress(node):
            near = said.get(node.lineno - 1, "") + said.get(node.lineno, "")
            if "boundary" not in near:
                findings.append("%d: broad, and no comment names the boundary" % node.lineno)
    return findings


def imported_by(node):
    """The modules that a node may import, with their parents; relative ones begin with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        return [module] + ["%s.%s" % (module, alias.name) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        name = getattr(node.func, "id", getattr(node.func, "attr", None))
        return [str(node.args[0].value)] if name in ("__import__", "import_module") else []
    return []


def foreign_imports(source):
    return ["%d: %s is not in the standard library" % (node.lineno, module)
            for node in ast.walk(parse(source)) for module in imported_by(node)
            if module.partition(".")[0] not in STDLIB]


def outside_functions(parent):
    """All nodes that run when the file is imported."""
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, FUNCTIONS + (ast.Lambda,)):
            yield node
            yield from outside_functions(node)


def early_imports(source):
    """Modules that cost time at each start and are imported at its very beginning."""
    findings = []
    for node in outside_functions(parse(source)):
        for module in imported_by(node):
            if (module + ".").startswith(tuple(late + "." for late in LATE_IMPORTS)):
                findings.append("%d: import %s in the function that needs it"
                                % (node.lineno, module))
    return sorted(set(findings))


def bad_docstrings(source):
    """Public names without one, and first lines that are not a sentence."""
    findings = []
    for node in ast.walk(parse(source)):
        if not isinstance(node, FUNCTIONS + (ast.ClassDef,)):
            continue
        docstring = ast.get_docstring(node)
        public = node in parse(source).body and not node.name.startswith("_")
        if public and not docstring:
            findings.append("%d: %s has no docstring" % (node.lineno, node.name))
        if docstring and not docstring.split("\n")[0].endswith("."):
            findings.append("%d: the first line of %s's docstring has no period"
                            % (node.lineno, node.name))
    return findings


def streams_used(source):
    """(what, line) of each print, sys.stdout and sys.stderr."""
    for name, line in global_reads(source):
        if name == "print":
            yield name, line
    for node in ast.walk(parse(source)):
        owner = getattr(getattr(node, "value", None), "id", None)
        if isinstance(node, ast.Attribute) and owner == "sys":
            if node.attr.strip("_") in ("stdout", "stderr"):
                yield "sys." + node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            for alias in node.names:
                if alias.name.strip("_") in ("stdout", "stderr"):
                    yield "from sys import " + alias.name, node.lineno


def stray_output(source):
    findings = []
    for what, line in streams_used(source):
        section = noun(source, place(source, line))
        if section not in SPEAKING:
            findings.append("%d: %s in section %s" % (line, what, section))
    return findings


# ---- checkers: interpreters, repository -----------------------------------------------------


def compile_warnings(source):
    """What this Python objects to, with warnings (invalid escapes) taken for errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(source, "fusion.py", "exec", dont_inherit=True)
        except (SyntaxError, Warning) as error:
            return ["%d: %s" % (getattr(error, "lineno", None) or 1, error)]
    return []


def refused_by(python, source):
    """What another Python objects to when it compiles the text."""
    code = "import sys; compile(sys.stdin.buffer.read(), 'fusion.py', 'exec')"
    command = [python, "-W", "error", "-c", code]
    result = subprocess.run(command, input=source.encode(), stderr=subprocess.PIPE)
    if result.returncode == 0:
        return []
    said = result.stderr.decode("utf-8", "replace")
    line = re.search(r'"fusion\.py", line (\d+)', said)
    return ["%s: %s" % (line.group(1) if line else 1, said.strip().split("\n")[-1])]


def python36():
    found = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.6*/bin/python")))
    return found[-1] if found else None


def stray_entries(paths):
    """Top-level names that do not belong there."""
    names = {path.partition("/")[0] for path in paths}
    return sorted(name for name in names if name not in TOP_LEVEL and not name.startswith("."))


def repository_paths():
    """What git keeps or would keep; without git, what lies there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL)
    except OSError:
        return [path.name for path in ROOT.iterdir()]
    listed = result.stdout.decode("utf-8", "replace").split("\0")
    if result.returncode != 0 or listed == [""]:
        return [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    return [path for path in listed if path]


def developers_paths(source):
    """Lines that name a folder of one person's machine."""
    return ["%d: %s" % (number, line.strip())
            for number, line in enumerate(source.split("\n"), 1) if DEVELOPERS_PATH.search(line)]


def texts():
    """The test files, fusion.py and the README: [(path, text)]."""
    paths = [path for path in sorted((ROOT / "tests").rglob("*")) if path.is_file()]
    paths = [path for path in paths if "__pycache__" not in path.parts]
    for path in paths + [FUSION_PY, ROOT / "README.md"]:
        if path.exists():
            yield path, path.read_text(encoding="utf-8", errors="replace")


# ---- the file holds -------------------------------------------------------------------------

CHECKERS = [
    untrue_contents,
    bad_banners,
    downward_references,
    defined_again,
    long_functions,
    long_on_the_whole,
    deep_nesting,
    bad_lines,
    packed_lines,
    long_main,
    global_statements,
    careless_excepts,
    foreign_imports,
    early_imports,
    bad_docstrings,
    stray_output,
    compile_warnings,
]


@pytest.fixture(scope="module")
def source():
    return FUSION_PY.read_bytes().decode("utf-8")


def report(findings, name=FUSION_PY.name):
    if findings:
        pytest.fail("\n".join("%s:%s" % (name, finding) for finding in findings), pytrace=False)


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_file(source, checker):
    report(checker(source))


def test_parses_on_python36(source):
    if not python36():
        pytest.skip("no Python 3.6 here")
    report(refused_by(python36(), source))


@pytest.mark.skipif(FUSION_PY != ROOT / "fusion.py", reason="another file is tested")
def test_top_level_of_repository():
    strays = stray_entries(repository_paths())
    assert not strays, "does not belong in the top level: " + ", ".join(strays)


def test_no_developers_paths():
    for path, text in texts():
        report(developers_paths(text), path.name)


# ---- the checkers find what is broken -------------------------------------------------------


def made_of(docstring, *parts):
    """A file with a docstring and sections; each part is (number, noun, phrase, code)."""
    blocks = ['"""%s"""\n' % docstring]
    for number, name, phrase, code in parts:
        rule = "# " + "-" * 97
        banner = "# [%s] %s: %s" % (number, name, phrase)
        blocks.append("\n".join([rule, banner, rule, textwrap.dedent(code)]))
    return "\n".join(blocks)


def two(above, below):
    """A file with the sections basics and types."""
    return made_of("", ("01", "basics", "small things", above), ("02", "types", "nouns", below))


def indented(*headers):
    """Nested headers with a pass in the innermost."""
    rows = ["    " * depth + header for depth, header in enumerate(headers)]
    return "\n".join(rows + ["    " * len(headers) + "pass"]) + "\n"


def long_function(lines, name="f"):
    return "def %s():\n" % name + "    x = 1\n" * (lines - 1)


CONTENTS_TEXT = """A file.

    01  basics  small things
    02  types   nouns
"""
BASICS = ("01", "basics", "small things", "x = 1")
TYPES = ("02", "types", "nouns", "y = 2")
FIVE_DEEP = ("if a:", "for b in c:", "while d:", "with e:", "try:")

GOOD = {
    untrue_contents: [made_of(CONTENTS_TEXT, BASICS, TYPES)],
    bad_banners: [made_of("", BASICS, ("05",) + TYPES[1:])],
    downward_references: [
        two("def f(later):\n    return later, [g for g in later]", "def g(): pass\nlater = 1"),
        two("class A:\n    g = 1\n    h = g", "def g(): pass"),
        two("x = 1", "def f():\n    return g(x)\ndef g(): pass"),
        two("def f():\n    import g\n    return lambda h: g.h + h.g", "g = h = 1"),
        two("def f():\n    def g(): pass\n    def h():\n        return g\n    return h", "g = 1"),
        two("try:\n    pass\nexcept OSError as g:\n    pass\nprint(g)", "g = 1"),
    ],
    defined_again: [two("if x:\n    def f(): pass\nelse:\n    def f(): pass", "class A: pass")],
    long_functions: [long_function(60), long_function(200, "build_parser"),
                     "@a\n@b\n" + long_function(60)],
    long_on_the_whole: [long_function(14), long_function(3) * 19 + long_function(60)],
    deep_nesting: [
        indented("def f():", *FIVE_DEEP[:4]),
        indented("def f():", *FIVE_DEEP[:4], "def g():", "if h:"),
        "def f():\n    if a:\n        b()\n" + "    elif a:\n        b()\n" * 9,
    ],
    bad_lines: ["x = 1\n" * MAX_LINES, "x" * 100 + "\n", 'x = """\n\n"""\n'],
    packed_lines: ["if x:\n    y = ';'\nelse:\n    z = 1  # ;\n", "é = 1\nx = {'a': 1}\n"],
    long_main: [long_function(25, "main")],
    global_statements: ["def f():\n    x = 1\n    def g():\n        nonlocal x\n        x = 2\n"],
    careless_excepts: [
        "try:\n    f()\nexcept Exception:  # boundary: the tool call\n    pass\n",
        "try:\n    f()\n# The boundary of a worker thread.\nexcept BaseException:\n    pass\n",
        "try:\n    f()\nexcept (OSError, ValueError):\n    pass\n",
        "with suppress(OSError):\n    f()\n",
    ],
    foreign_imports: ["import json, os.path\nfrom http import server\n__import__('json')\n"],
    early_imports: ["import os\nfrom http import HTTPStatus\ndef f():\n    import ssl\n"
                    "import urllib.parse\n"],
    bad_docstrings: ["def f():\n    '''Does it.\n\n    More'''\ndef _g(): pass\n"
                     "class A:\n    '''A thing.'''\n    def h(self): pass\n"],
    stray_output: [
        two("def f(print):\n    print(1)\n    sys.exit(2)\n", "'print()'"),
        made_of("", ("10", "terminal", "the screen", "print(1, file=sys.stderr)")),
        "print('needs a newer Python')\nsys.stderr.flush()\n",
    ],
    compile_warnings: [r"x = '\\d' + r'\d'" + "\n"],
}

BAD = {
    untrue_contents: [
        "x = 1\n",
        made_of("No contents.", BASICS),
        made_of(CONTENTS_TEXT, BASICS),
        made_of(CONTENTS_TEXT, TYPES, BASICS),
        made_of(CONTENTS_TEXT, BASICS, ("03",) + TYPES[1:]),
        made_of(CONTENTS_TEXT, BASICS, ("02", "kinds", "nouns", "")),
        made_of(CONTENTS_TEXT, BASICS, ("02", "types", "verbs", "")),
        made_of(CONTENTS_TEXT + "    02  types   nouns\n", BASICS, TYPES),
    ],
    bad_banners: [
        made_of("", TYPES, BASICS),
        made_of("", BASICS, BASICS),
        made_of("", BASICS).replace("# [01] basics:", "# [1] basics:"),
        made_of("", BASICS).replace("# [01] basics:", "# [01] basics -"),
        "# [01] basics: no rules\n",
        "# ---\n# [01] basics: short rules\n# ---\n",
        "# " + "-" * 97 + "\n# [01] basics: half a frame\n",
    ],
    downward_references: [
        two("x = y", "y = 1"),
        two("def f():\n    return g()", "def g(): pass"),
        two("def f(x=y): pass", "y = 1"),
        two("def f(x: y): pass", "class y: pass"),
        two("def f() -> y: pass", "class y: pass"),
        two("@y\ndef f(): pass", "def y(): pass"),
        two("class A(y): pass", "class y: pass"),
        two("class A:\n    y = 1\n    def f(self):\n        return y", "y = 1"),
        two("x = [y for x in z]", "y = 1"),
        two("x = [y for y in y]", "y = 1"),
        two("f = lambda x: y", "y = 1"),
        two("def f():\n    [y for y in ()]\n    return y", "y = 1"),
        two("def f():\n    def g():\n        return y\n    return g", "y = 1"),
        two("def f():\n    x.y = y.z", "y = 1"),
        two("def f():\n    return '%s' % f'{y}'", "y = 1"),
        two("def f():\n    return json", "import json"),
        two("def f():\n    return y", "try:\n    y = 1\nexcept OSError:\n    y = 2"),
        two("def f():\n    return y", "for y in (): pass"),
        two("def f():\n    return y", "with x as (z, y): pass"),
        two("def f():\n    global y\n    y = 1\n    return y", "y = 1"),
    ],
    defined_again: [two("def f(): pass", "def f(): pass"), two("f = None", "class f: pass")],
    long_functions: [
        long_function(61),
        "class A:\n" + textwrap.indent(long_function(61, "build_parser"), "    "),
        "async " + long_function(61),
    ],
    long_on_the_whole: [long_function(15), long_function(3) * 18 + long_function(51) * 2],
    deep_nesting: [
        indented("def f():", *FIVE_DEEP[:4], "if g:"),
        indented("def f():", *FIVE_DEEP[:4], "async with g:").replace("def", "async def"),
        indented("def f():", "def g():", *FIVE_DEEP[:4], "for h in i:"),
        indented("def f():", *FIVE_DEEP[:3], "if g:") + " " * 16 + "else:\n"
        + " " * 20 + "if h:\n" + " " * 24 + "pass\n",
    ],
    bad_lines: ["x = 1\n" * (MAX_LINES + 1), "x" * 101 + "\n", "if x:\n\ty = 1\n", "x = 1 \n", "'''\n  \n'''",
                "x = 1\r\n"],
    packed_lines: [
        "if x: y = 1\n",
        "x = 1; y = 2\n",
        "x = 1;\n",
        "if x:\n    pass\nelse: pass\n",
        "try: f()\nfinally:\n    pass\n",
        "def f(x,\n      y): return x\n",
        "class A: pass\n",
        "é = 1; y = 2\n",
    ],
    long_main: [long_function(26, "main"), "x = 1\n", long_function(3, "main") * 2],
    global_statements: ["def f():\n    global x\n    x = 1\n"],
    careless_excepts: [
        "try:\n    f()\nexcept:  # boundary\n    pass\n",
        "try:\n    f()\nexcept Exception:\n    pass\n",
        "try:\n    f()\nexcept BaseException as error:  # all of them\n    pass\n",
        "try:\n    f()\nexcept (OSError, Exception):\n    pass  # boundary\n",
        "# boundary\n\ntry:\n    f()\nexcept builtins.Exception:\n    pass\n",
        "with contextlib.suppress(Exception):\n    f()\n",
    ],
    foreign_imports: [
        "import numpy\n",
        "import json, requests.adapters\n",
        "def f():\n    from yaml import load\n",
        "from . import json\n",
        "import_module('tomli')\n",
    ],
    early_imports: [
        "import ssl\n",
        "import os, subprocess as s\n",
        "from urllib.request import urlopen\n",
        "from urllib import request\n",
        "from concurrent import futures\n",
        "try:\n    import readline\nexcept ImportError:\n    pass\n",
        "class A:\n    import asyncio.events\n",
        "http = __import__('http.client')\n",
    ],
    bad_docstrings: [
        "def f(): pass\n",
        "class A:\n    x = 1\n",
        "def f():\n    '''Does it'''\n",
        "def f():\n    '''Does it\n    all.'''\n",
        "class A:\n    '''A thing.'''\n    def g(self):\n        '''Goes'''\n",
    ],
    stray_output: [
        two("print(1)", ""),
        two("x = 1", "def f(out=print): pass"),
        two("def f():\n    sys.stdout.write('')", ""),
        two("x = sys.__stderr__", ""),
        two("def f():\n    from sys import stderr", ""),
    ],
    compile_warnings: [r"x = '\d'" + "\n", "x = (\n", "x is 'y'\n"],
}


def samples(table):
    for checker, texts_of_it in table.items():
        for number, text in enumerate(texts_of_it, 1):
            yield pytest.param(checker, text, id="%s-%d" % (checker.__name__, number))


def test_each_checker_has_samples():
    assert set(GOOD) == set(BAD) == set(CHECKERS)


@pytest.mark.parametrize("checker, text", list(samples(BAD)))
def test_checker_finds(checker, text):
    findings = checker(text)
    assert findings
    assert all(re.match(r"\d+: .", finding) for finding in findings)


@pytest.mark.parametrize("checker, text", list(samples(GOOD)))
def test_checker_lets_pass(checker, text):
    assert checker(text) == []


def test_downward_reference_is_named():
    text = two("def f():\n    return g()", "def g(): pass")
    line = text.split("\n").index("    return g()") + 1
    assert downward_references(text) == ["%d: g (section basics -> section types)" % line]


def test_header_is_above_all_sections():
    text = "import os\n" + two("x = os", "y = x")
    assert downward_references(text) == []
    assert downward_references("x = y\n" + text) == ["1: y (section header -> section types)"]


def test_banner_inside_a_string_is_no_section():
    text = made_of("", BASICS, ("02", "page", "html", "x = '''\n# [03] not: one\n'''"))
    assert [section.noun for section in sections(text)] == ["basics", "page"]


def test_python36_refuses():
    if not python36():
        pytest.skip("no Python 3.6 here")
    assert refused_by(python36(), "if (x := 1):\n    pass\n")
    assert refused_by(python36(), "x = '\\d'\n")
    assert refused_by(python36(), "x = 'é'\nprint(f'{x}')\n") == []


def test_stray_entries_are_found():
    assert stray_entries(["fusion.py", "tests/run", ".ci/run", "presets/a.json"]) == []
    assert stray_entries(["setup.py", "docs/a/b.md", "LICENSE"]) == ["docs", "setup.py"]


@pytest.mark.parametrize("path", ["work/main/x", "home/jane/x", "Users/Jane", "root/main"])
def test_developers_paths_are_found(path):
    assert developers_paths("x = 1\ny = '/%s'\n" % path) == ["2: y = '/%s'" % path]


@pytest.mark.parametrize("text", ["~/work/x", "/homework/", "https://a.example/home/x", "/root"])
def test_harmless_paths_pass(text):
    assert developers_paths(text) == []


def test_standard_library_lists_agree():
    if not hasattr(sys, "stdlib_module_names"):
        pytest.skip("this Python has no list of its own")
    assert set(STDLIB_OF_39.split()) <= sys.stdlib_module_names
