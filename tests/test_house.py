"""How large a file, a function and a list of parameters may be. Docstrings do not count: they are as long as users need."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mutants import MUTANTS, NATIVE

import fastbn

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fastbn"
FILES = sorted(path for path in LIBRARY.rglob("*") if path.suffix in {".py", ".pyx", ".pxi", ".pxd", ".hpp", ".cpp"})
# A room of its own with all the Numba kernels, and the text that all others are compared with.
LONG_FILES = {"kernels/numba.py", "reference.py"}
MOST_LINES, MOST_IN_FUNCTION, MOST_PARAMETERS = 450, 60, 8
DOCSTRING = re.compile(r'^[ \t]*[rf]?"""(?:[^"\\]|\\.|"(?!""))*"""[ \t]*$', re.MULTILINE)
PYTHON_HEAD = re.compile(r"^(?P<indent>[ \t]*)(?:async[ ]+)?(?:def|cdef|cpdef)\b[^\n=:]*?(?P<name>\w+)\((?P<rest>.*)", re.MULTILINE)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the sources do not lie beside the tests")


class Function(NamedTuple):
    """A function of any of the three languages."""

    name: str
    line: int
    lines: int  # without its docstring
    parameters: int


def lines_of(text: str) -> int:
    """Lines of a file without its docstrings."""
    return len(DOCSTRING.sub("", text).splitlines()) - len(DOCSTRING.findall(text))


def _rows(node: ast.FunctionDef | ast.AsyncFunctionDef) -> range:
    assert node.end_lineno is not None
    return range(node.lineno, node.end_lineno + 1)


def in_python(text: str) -> Iterator[Function]:
    """The functions of a .py file, nested ones and methods among them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = (n for n in ast.walk(node) if n is not node and isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            lines = len(set(_rows(node)).difference(*map(_rows, inner)))  # functions inside count for themselves
            first = node.body[0]
            if ast.get_docstring(node) is not None and first.end_lineno is not None:
                lines -= first.end_lineno - first.lineno + 1
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [a.arg for a in arguments if a.arg not in ("self", "cls", "ctx")]
            yield Function(node.name, node.lineno, lines, len(names))


def closed_at(text: str, start: int) -> int:
    """Where the bracket that is open at `start` is closed."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[i], 0)
        if not depth:
            return i
    raise AssertionError(f"a bracket is never closed: {text[start - 40 : start + 40]!r}")


def parts_of(parameters: str) -> int:
    """How many parameters a list names: its commas outside of brackets, those of templates too."""
    bare, before = parameters, None
    while before != bare:
        before, bare = bare, re.sub(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|<[^<>()]*>", "", bare)
    names = [part.strip() for part in bare.split(",")]
    return 0 if names == ["void"] else len([name for name in names if name and name not in ("self", "*", "/")])


def blank(text: str, pattern: str) -> str:
    """A text in which what matches is spaces, so that lines stay where they are."""
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)


def in_cython(text: str) -> Iterator[Function]:
    """The functions of a .pyx or .pxi file: a head, and what is indented deeper."""
    bare = blank(text, r'#[^\n]*|"""(?:[^"\\]|\\.|"(?!""))*"""|"(?:[^"\\\n]|\\.)*"')
    for head in PYTHON_HEAD.finditer(bare):
        if re.match(r"\s*cdef\s+(extern|class|struct|enum|union|packed|readonly)\b", head[0]):
            continue
        start = head.start("rest")
        end = closed_at(bare, start)
        if ":" not in bare[end:].partition("\n")[0]:
            continue  # a declaration, or a value
        first = bare[: head.start()].count("\n")
        rows, body = bare.split("\n"), bare[:end].count("\n") + 1
        inner, last = len(head["indent"]), body - 1
        for number in range(body, len(rows)):
            row = rows[number]
            if row.strip() and len(row) - len(row.lstrip()) <= inner:
                break
            last = number if row.strip() else last
        own = "\n".join(text.split("\n")[first : last + 1])
        yield Function(head["name"], first + 1, lines_of(own), parts_of(bare[start:end]))


def in_cpp(text: str) -> Iterator[Function]:
    """The functions of a .hpp or .cpp file: what has a list of parameters before a brace, outside of other functions."""
    strings = r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)'"
    bare = blank(text, rf"//[^\n]*|/\*.*?\*/|(?:^|(?<=\n))[ \t]*#(?:[^\n\\]|\\.)*|{strings}")
    at, since = 0, 0
    while at < len(bare):
        if bare[at] in ";}":
            since = at + 1
        elif bare[at] == "{":
            head = bare[since:at]
            found = re.search(r"(~?\w+|operator[^\w\s(]+)\s*\(", head)
            kind = re.match(r"\s*(?:template\s*<[^{};]*?>\s*)?(namespace|struct|class|union|enum|extern)\b[^()]*$", head)
            if found and re.search(r"\)[^():]*:[^:].*\w$", head, re.DOTALL):
                at = closed_at(bare, at + 1) + 1  # a member's first value
                continue
            if found and not kind:
                start, end = since + found.end(), closed_at(bare, at + 1)
                line = bare[: since + found.start()].count("\n") + 1
                lines = bare[since : end + 1].strip().count("\n") + 1
                yield Function(found[1], line, lines, parts_of(bare[start : closed_at(bare, start)]))
                at = end
            elif "=" in head and not kind:
                at = closed_at(bare, at + 1)  # values
            since = at + 1
        at += 1


def functions_of(path: Path) -> list[Function]:
    """The functions of a source file."""
    read = in_python if path.suffix == ".py" else in_cpp if path.suffix in {".hpp", ".cpp"} else in_cython
    return list(read(path.read_text()))


# Whose parameters are prescribed: what users call, and what torch registers.
PUBLIC = {name for name in vars(fastbn) if not name.startswith("_")} | {"batch_norm", "batch_norm_forward", "fused_batch_norm", "__init__"}
# Parts of one loop, inlined into it, whose variables these are.
INLINED = {"sum_blocks", "sum_rows", "store_totals", "along", "map_row"}
REGISTERED = {"torch/operators.py", "torch/parts.py"}


def name_of(path: Path) -> str:
    """A file's name in the library."""
    return path.relative_to(LIBRARY).as_posix()


@pytest.fixture(params=[path for path in FILES if name_of(path) not in LONG_FILES], ids=name_of)
def path(request: pytest.FixtureRequest) -> Path:
    """Each file that has no exemption."""
    found: Path = request.param
    return found


def test_a_file_has_no_more_lines_than_one_keeps_in_mind(path: Path) -> None:
    assert lines_of(path.read_text()) <= MOST_LINES


def test_a_function_fits_on_a_screen(path: Path) -> None:
    assert [f for f in functions_of(path) if f.lines > MOST_IN_FUNCTION] == []


def test_a_function_has_no_more_parameters_than_one_can_tell_apart(path: Path) -> None:
    free = name_of(path) in REGISTERED
    long = [f for f in functions_of(path) if f.parameters > MOST_PARAMETERS and f.name not in PUBLIC | INLINED]
    assert free or long == []


PYTHON = '''def f(self, a, *, b):
    """Two
    lines."""
    def g(): pass

    return 1
'''
CYTHON = '''cdef class C:
    cdef f(
        self, a, C[T] b, (int, int) c
    ) noexcept:
        """One."""
        x = f(1)

    def g(self): pass

cdef int v = g(1)
'''
CPP = """// f() {
int a[] = {1, 2};
auto g = h(1);
namespace n {
struct S {
    S() : a{1} {
    }
};
template <class A, class B>
int f(A<int, 3> a, B b, void (*p)(int, int)) {
    if (a) { b('{'); }
}
}
"""


@pytest.mark.parametrize(
    ("suffix", "text", "expected"),
    [
        (".py", PYTHON, [("f", 1, 3, 2), ("g", 4, 1, 0)]),
        (".pyx", CYTHON, [("f", 2, 4, 3), ("g", 8, 1, 0)]),
        (".hpp", CPP, [("S", 6, 2, 0), ("f", 10, 4, 3)]),
    ],
)
def test_functions_are_found(suffix: str, text: str, expected: list[tuple[str, int, int, int]], tmp_path: Path) -> None:
    """What the tests above count, in each language."""
    file = (tmp_path / "file").with_suffix(suffix)
    file.write_text(text)
    assert [tuple(f) for f in functions_of(file)] == expected


def test_each_change_that_a_test_must_notice_can_be_made() -> None:
    gone = [mutant.old for mutant in MUTANTS + NATIVE if mutant.old not in (LIBRARY / mutant.file).read_text()]
    assert not gone
