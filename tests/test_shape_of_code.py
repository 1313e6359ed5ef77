"""The shape of our code, held by tests instead of by review; CONTRIBUTING.md says it in words.

A rule looks at one module and says what is wrong with it. Before it is trusted with our own code, it is shown
snippets that break it and snippets that keep it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ["src", *sorted(init.parent.name for init in ROOT.glob("*/__init__.py"))]
ALL = [*LIBRARY, "tests", "benchmarks", "examples", "docs"]

MAX_FILE, MAX_KERNEL_FILE = 300, 425
MAX_FUNCTION, MAX_KERNEL_BODY = 40, 90
MAX_KERNEL_ARGUMENTS = 32
DRAWERS = {"util", "utils", "common", "helper", "helpers", "misc"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
READS_ENVIRONMENT = {"profiles/places.py": 'os.environ.get(ENVIRONMENT, "")'}  # in which folders profiles are
READS_ENVIRONMENT["autotune/host.py"] = 'os.environ["CUDA_VISIBLE_DEVICES"] = handle'  # written: a worker's one GPU

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: its path below the root and its text."""

    path: str
    source: str

    @property
    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.source))

    @property
    def functions(self) -> Iterator[Function]:
        return (node for node in self.nodes if isinstance(node, Function))

    @property
    def kernels(self) -> Iterator[Function]:
        return filter(is_kernel, self.functions)


Finding = tuple[int, str]  # the line, and what is wrong there


def is_kernel(function: Function) -> bool:
    """Whether Triton or Gluon compiles it: `@triton.jit`, `@gluon.jit`, `@jit`, with or without arguments."""
    names = (ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list)
    return any(name in ("triton.jit", "gluon.jit", "jit") for name in names)


def is_constexpr(annotation: ast.expr | None) -> bool:
    """Whether a name so annotated is known when the kernel is compiled."""
    return annotation is not None and ast.unparse(annotation) in ("tl.constexpr", "gl.constexpr")


def parameters(function: Function) -> list[ast.arg]:
    """All parameters, whatever their kind."""
    args = function.args
    starred = [arg for arg in (args.vararg, args.kwarg) if arg]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *starred]


def docstring_lines(function: Function) -> int:
    """Lines that the docstring takes."""
    first = function.body[0]
    return (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last."""
    statements = function.body[1:] if docstring_lines(function) else function.body
    return (statements[-1].end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def short_files(module: Module) -> Iterator[Finding]:
    limit = MAX_KERNEL_FILE if any(module.kernels) else MAX_FILE
    lines = len(module.source.splitlines())
    if lines > limit:
        yield lines, f"a file of {lines} lines, more than {limit}"


def short_functions(module: Module) -> Iterator[Finding]:
    for function in module.functions:
        lines = (function.end_lineno or 0) - function.lineno + 1 - docstring_lines(function)
        if not is_kernel(function) and lines > MAX_FUNCTION:
            yield function.lineno, f"{function.name} has {lines} lines, more than {MAX_FUNCTION}"


def short_kernels(module: Module) -> Iterator[Finding]:
    for kernel in module.kernels:
        lines, arguments = body_lines(kernel), len(parameters(kernel))
        if lines > MAX_KERNEL_BODY:
            yield kernel.lineno, f"the body of {kernel.name} has {lines} lines, more than {MAX_KERNEL_BODY}"
        if arguments > MAX_KERNEL_ARGUMENTS:
            yield kernel.lineno, f"{kernel.name} has {arguments} arguments, more than {MAX_KERNEL_ARGUMENTS}"


def capitals_are_constexpr(module: Module) -> Iterator[Finding]:
    for kernel in module.kernels:
        for arg in parameters(kernel):
            if is_constexpr(arg.annotation) != arg.arg.isupper():
                yield arg.lineno, f"{arg.arg} of {kernel.name}: capitals and tl.constexpr go together"
        nodes = list(ast.walk(kernel))
        said = {node.target for node in nodes if isinstance(node, ast.AnnAssign) and is_constexpr(node.annotation)}
        for node in (node for node in nodes if isinstance(node, ast.Name) and node not in said):
            if isinstance(node.ctx, ast.Store) and node.id.isupper():
                yield node.lineno, f"{kernel.name} assigns {node.id} and does not say tl.constexpr"


def masked_loads_have_other(module: Module) -> Iterator[Finding]:
    for node in module.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            given = {"pointer", "mask", "other"} & {keyword.arg for keyword in node.keywords}
            given |= set(("pointer", "mask", "other")[: len(node.args)])
            if "mask" in given and "other" not in given:
                yield node.lineno, "tl.load with a mask and no other: masked lanes are undefined on a GPU"


def no_environment_variables(module: Module) -> Iterator[Finding]:
    source = module.source.replace(READS_ENVIRONMENT.get(module.path, "\0"), "None", 1)
    for node in Module(module.path, source).nodes:
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        if isinstance(node, ast.Attribute):
            names = {node.attr}
        for name in sorted(names & ENVIRONMENT):
            yield node.lineno, f"os.{name}: options are parameters"


def public_names_have_docstrings(module: Module) -> Iterator[Finding]:
    tree = ast.parse(module.source)
    if ast.get_docstring(tree) is None:
        yield 1, "the module has no docstring"
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for node in (node for scope in (tree, *classes) for node in scope.body):
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if ast.get_docstring(node) is None and not decorators & {"overload", "setter"}:
            yield node.lineno, f"{node.name} has no docstring"


def host_code_is_annotated(module: Module) -> Iterator[Finding]:
    for function in module.functions:
        missing = [arg.arg for arg in parameters(function) if arg.annotation is None]
        missing = [arg for arg in missing if arg not in ("self", "cls")]
        missing += ["return"] if function.returns is None else []
        if missing and not is_kernel(function):
            yield function.lineno, f"{function.name} has no type for {', '.join(missing)}"


def no_drawers(module: Module) -> Iterator[Finding]:
    for part in {*Path(module.path).with_suffix("").parts} & DRAWERS:
        yield 1, f"{part}: name a file after what is in it"


# --- the rules and the snippets that prove them ------------------------------------------------------------------


LINE = "    x = 1\n"


def plant(source: str, path: str = "kernels/planted.py") -> Module:
    return Module(path, source)


def jit(parameters: str = "x", body: str = "pass") -> Module:
    return plant(f"@triton.jit\ndef planted_kernel({parameters}):\n    '''Say it.'''\n    {body}\n")


@dataclass(frozen=True)
class Rule:
    """A check, the folders that it holds for, modules that break it and modules that keep it."""

    check: Callable[[Module], Iterator[Finding]]
    folders: list[str]
    bad: tuple[Module, ...]
    good: tuple[Module, ...]


RULES = [
    Rule(
        short_files,
        ALL,
        bad=(plant("x = 1\n" * 301), plant(jit().source + "x = 1\n" * 422)),
        good=(plant("x = 1\n" * 300), plant(jit().source + "x = 1\n" * 421)),
    ),
    Rule(
        short_functions,
        ALL,
        bad=(plant("def f():\n" + LINE * 40), plant("class A:\n  def f(self):\n" + LINE * 40)),
        good=(plant("def f():\n" + LINE * 39), plant("def f():\n    '''A.\n\n    B.\n    '''\n" + LINE * 39)),
    ),
    Rule(
        short_kernels,
        LIBRARY,
        bad=(
            jit(body="x = 1\n" + LINE * 90),
            plant("@triton.jit(do_not_specialize=['x'])\ndef f(x):\n" + LINE * 91),
            jit(parameters=", ".join(f"x{i}" for i in range(33))),
        ),
        good=(jit(body="x = 1\n" + LINE * 89), jit(parameters=", ".join(f"x{i}" for i in range(32)))),
    ),
    Rule(
        capitals_are_constexpr,
        LIBRARY,
        bad=(jit("HEADS"), jit("heads: tl.constexpr"), jit("sizes", body="HEADS, tokens = sizes")),
        good=(
            jit("q_ptr, heads, BLOCK_Q: tl.constexpr", body="first = heads * BLOCK_Q"),
            jit("BLOCK_Q: tl.constexpr", body="HALF: tl.constexpr = BLOCK_Q // 2"),
        ),
    ),
    Rule(
        masked_loads_have_other,
        LIBRARY,
        bad=(jit(body="y = tl.load(x, mask=m)"), jit(body="y = tl.load(x, m)")),
        good=(
            jit(body="y = tl.load(x)"),
            jit(body="y = tl.load(x, mask=m, other=0.0)"),
            jit(body="y = tl.load(x, m, 0.0)"),
        ),
    ),
    Rule(
        no_environment_variables,
        LIBRARY,
        bad=(
            plant("import os\nx = os.environ['X']"),
            plant("import os as system\nx = system.getenv('X')"),
            plant("from os import environ"),
            *(plant(f"{text}\n" * 2, path) for path, text in READS_ENVIRONMENT.items()),
        ),
        good=(plant("import os\nx = os.cpu_count()"), *(plant(text, path) for path, text in READS_ENVIRONMENT.items())),
    ),
    Rule(
        public_names_have_docstrings,
        LIBRARY,
        bad=(
            plant("x = 1"),
            plant("'''Module.'''\ndef f(): ..."),
            plant("'''Module.'''\nclass A:\n    '''Class.'''\n    def f(self): ..."),
            plant("'''Module.'''\n@triton.jit\ndef f(x): ..."),
        ),
        good=(plant("'''Module.'''\ndef _f(): ...\nclass _A:\n    def f(self): ..."),),
    ),
    Rule(
        host_code_is_annotated,
        LIBRARY,
        bad=(
            plant("def f(x) -> None: ..."),
            plant("def _f(x: int): ..."),
            plant("class A:\n    def f(self, *args) -> None: ..."),
            plant("class A:\n    @staticmethod\n    def f(x) -> None: ..."),
        ),
        good=(jit(), plant("class A:\n    def f(self, x: int, *, y: int = 1) -> None: ...")),
    ),
    Rule(
        no_drawers,
        ALL,
        bad=(plant("", "kernels/utils.py"), plant("", "src/cca_attention/common/shape.py")),
        good=(plant("", "kernels/primitives.py"),),
    ),
]


def name(rule: Rule) -> str:
    return rule.check.__name__


def ours(folders: list[str]) -> list[Module]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_a_planted_defect_is_seen(rule: Rule) -> None:
    assert all(list(rule.check(module)) for module in rule.bad)


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_good_code_is_let_through(rule: Rule) -> None:
    assert [finding for module in rule.good for finding in rule.check(module)] == []


@pytest.mark.parametrize("rule", RULES, ids=name)
def test_our_code_keeps_the_rule(rule: Rule) -> None:
    broken = [f"{m.path}:{line}: {what}" for m in ours(rule.folders) for line, what in rule.check(m)]
    assert not broken, "\n".join(broken)


def test_the_rules_see_our_code() -> None:
    assert all(ours([folder]) for folder in [*LIBRARY, "tests"])
    assert any(module.kernels for module in ours(["kernels"]))
