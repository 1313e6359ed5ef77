"""Who may import whom: the arrows between our modules, and no folder of ours by its bare name."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE_DIR: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

ATTENTION = {"attention", "arguments", "configs", "fused", "replay", "cache", "cache_state", "cache_op"}
FRONT = {"spec", "problem", "kernels", "profiles", *ATTENTION}
COMMANDS = {"cli", *(f"cli_{name}" for name in ("bench", "cards", "peers", "plan", "profile", "runs", "verify"))}
BEHIND_COMMANDS = {"__init__", "verify", "autotune", "ci", "terminal", "bench", *COMMANDS}
ARROWS: dict[str, set[str]] = {
    **{name: set() for name in ("spec", "terminal")},
    "problem": {"spec"},
    "kernels": {"spec", "problem"},
    "profiles": {"spec", "problem", "kernels"},
    **dict.fromkeys((*sorted(ATTENTION), "models", "__init__"), FRONT),
    "verify": FRONT | {"__init__"},
    "autotune": FRONT | {"__init__", "verify"},
    **dict.fromkeys(("ci", "bench"), FRONT | {"__init__", "verify", "autotune"}),
    **dict.fromkeys((*sorted(COMMANDS), "pytest_plugin"), FRONT | BEHIND_COMMANDS),
}
SHARED_BY_HOPPER = {f"hopper.{module}" for module in ("limits", "pipeline", "keys", "queries")}
SHARED_BY_KERNELS = {"primitives", "tunable", "layout", "enqueue"} | SHARED_BY_HOPPER
STANDS_IN_FOR = {name: name for name in ("forward", "backward_dq", "backward_dkv")} | {"backward_dcore": "backward_dkv"}
"""Kernels for one architecture: they share the work and the tensors of the portable kernel that they stand in for."""


def modules() -> dict[str, Path]:
    """Our modules by dotted name below the package; the front door itself is `__init__`."""
    return {
        ".".join((*name.split(".")[1:], *path.relative_to(ROOT / folder).with_suffix("").parts)): path
        for name, folder in PACKAGE_DIR.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def imports(module: str, source: str) -> Iterator[str]:
    """Full dotted names of all that `module` imports, wherever in it and under whatever condition."""
    package = ["cca_attention", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(filter(None, (*parents, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def crossed_arrows(module: str, source: str) -> Iterator[str]:
    """Imports of `module` that the arrows do not allow."""
    layer, _, inner = module.partition(".")
    if layer not in ARROWS:
        yield f"{module} has no place in ARROWS"
        return
    for name in imports(module, source):
        top, *below = name.split(".")
        if module == "kernels.reference":
            if top not in sys.stdlib_module_names | {"torch"}:
                yield f"{module} imports {name}: it may import only torch"
        elif top == "cca_attention":
            target = below[0] if below and below[0] in ARROWS else "__init__"
            if target not in ARROWS[layer] | {layer}:
                yield f"{module} imports {name}"
            in_kernels = layer == target == "kernels" and not inner.endswith("__init__")
            imported = ".".join(below[1:])
            shared = SHARED_BY_KERNELS | {STANDS_IN_FOR.get(inner.removeprefix("hopper."), "tunable")}
            if in_kernels and not any(f"{imported}.".startswith(f"{part}.") for part in shared):
                yield f"{module} imports {name}, another kernel file"


def bare_imports(source: str) -> list[str]:
    """Imports of our folders by their own names, which belong to others: `kernels` is Hugging Face's."""
    ours = {folder for folder in PACKAGE_DIR.values() if "/" not in folder}
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [node.module or ""]
    return [name for name in names if name.split(".")[0] in ours]


def test_no_folder_is_imported_by_its_bare_name() -> None:
    others = [path for folder in ("tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    sources = {path: path.read_text() for path in (*modules().values(), *others)}
    assert not {path.name: bare_imports(source) for path, source in sources.items() if bare_imports(source)}


def test_a_bare_name_is_seen() -> None:
    assert bare_imports("import kernels.forward") and bare_imports("from verify import tolerance")
    assert not bare_imports("from ..kernels.forward import x\nfrom cca_attention.kernels import forward")


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_arrows(module: str) -> None:
    assert not list(crossed_arrows(module, modules()[module].read_text()))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.forward", "from .pooling import pooling_kernel"),
        ("kernels.forward", "from . import reference"),
        ("kernels.forward", "from ..verify import tolerance"),
        ("kernels.reference", "from ..spec import CCASpec"),
        ("kernels.reference", "import numpy as np"),
        ("kernels.primitives", "from .. import attention"),
        ("problem", "from .kernels import tunable"),
        ("spec", "import cca_attention"),
        ("attention", "def late():\n    import cca_attention.autotune.search"),
        ("cache", "from .verify.inputs import draw"),
        ("models.__init__", "from ..autotune import tune"),
        ("models.llama", "from .. import verify"),
        ("profiles.store", "from ..autotune import devices"),
        ("verify.gate", "from cca_attention.autotune import tune"),
        ("__init__", "from .cli import tune_main"),
        ("surprise", ""),
    ],
)
def test_a_crossed_arrow_is_seen(module: str, source: str) -> None:
    assert list(crossed_arrows(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kernels.forward", "from ..problem import Problem\nfrom .primitives import attend\nimport triton"),
        ("kernels.__init__", "from . import forward"),
        ("kernels.reference", "import math\nfrom torch import Tensor"),
        ("autotune.tune", "from ..verify.checks import check\nfrom ..profiles import store\nfrom . import search"),
        ("__init__", "from .attention import cca_attention"),
    ],
)
def test_a_permitted_arrow_is_let_through(module: str, source: str) -> None:
    assert not list(crossed_arrows(module, source))
