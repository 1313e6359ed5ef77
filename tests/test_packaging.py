"""The package as it is published: what is in it, what importing it loads, and who may import whom."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cca_attention

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
PACKAGE_DIR: dict[str, str] = SETUPTOOLS["package-dir"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


# --- what is in it -----------------------------------------------------------------------------------------------


def test_every_folder_with_an_init_is_a_listed_package() -> None:
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in PACKAGE_DIR.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(SETUPTOOLS["packages"])


def shipped_files() -> set[str]:
    """Every file of our folders but the notes in Markdown, under its name in the wheel."""
    return {
        "/".join((*name.split("."), *path.relative_to(ROOT / folder).parts))
        for name, folder in PACKAGE_DIR.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """A wheel built from a copy of the sources, so that nothing left in a build folder can be in it."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in PACKAGE_DIR.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    child = subprocess.run([sys.executable, "-I", "-c", build, dist], cwd=source, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return zipfile.Path(next(dist.glob("*.whl")))


@pytest.mark.timeout(300)
def test_the_wheel_holds_every_file_of_our_folders_and_no_other(wheel: zipfile.Path) -> None:
    names = {name for name in wheel.root.namelist() if ".dist-info/" not in name and name[-1] != "/"}
    assert "cca_attention/py.typed" in names
    assert names == shipped_files()


@pytest.mark.timeout(300)
def test_the_wheel_carries_its_licence_and_its_commands(wheel: zipfile.Path) -> None:
    metadata = wheel / f"cca_attention-{PROJECT['version']}.dist-info"
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()
    commands = (metadata / "entry_points.txt").read_text()
    assert all(f"{name} = {target}" in commands for name, target in PROJECT["scripts"].items())


@pytest.mark.parametrize("name", PROJECT["scripts"])
def test_every_command_resolves(name: str) -> None:
    point = importlib.metadata.EntryPoint(name, PROJECT["scripts"][name], "console_scripts")
    assert callable(point.load())


def test_the_version_is_said_once() -> None:
    assert cca_attention.__version__ == PROJECT["version"]


def test_nothing_puts_the_root_on_the_import_path() -> None:
    """With a conftest.py there, or tests that are a package, our `kernels/` hides an installed one."""
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


# --- the pins ----------------------------------------------------------------------------------------------------


def pin_complaints(constraints: str, requirements: list[str], python: str) -> Iterator[str]:
    """What is wrong with the pins on one Python: not exact, given twice, missing, or outside of a range."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, str] = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in constraints.splitlines())):
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate(environment):
            continue
        exact = re.fullmatch(r"==([\w.]+)", str(pin.specifier))
        if not exact:
            yield f"{line} is not an exact pin"
        elif pins.setdefault(canonicalize_name(pin.name), exact[1]) != exact[1]:
            yield f"{pin.name} is pinned twice"
    for wanted in map(Requirement, requirements):
        if wanted.marker and not wanted.marker.evaluate(environment):
            continue
        version = pins.get(canonicalize_name(wanted.name))
        if version is None:
            yield f"{wanted.name} is not pinned"
        elif not wanted.specifier.contains(version):
            yield f"{wanted.name} is pinned to {version}, outside of {wanted.specifier}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_inside_its_range(python: str) -> None:
    extras = PROJECT["optional-dependencies"].values()
    requirements = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"], *chain(*extras)]
    assert not list(pin_complaints((ROOT / "constraints.txt").read_text(), requirements, python))


@pytest.mark.parametrize(
    ("constraints", "complaint"),
    [
        ("torch==2.8.0", "torch is pinned to 2.8.0, outside of >=2.9"),
        ("torch>=2.9", "torch>=2.9 is not an exact pin"),
        ("torch==2.9.0; python_version < '3.11'", "torch is not pinned"),
        ("torch==2.9.0\ntorch==2.13.0", "torch is pinned twice"),
    ],
)
def test_a_bad_pin_is_seen(constraints: str, complaint: str) -> None:
    assert complaint in list(pin_complaints(constraints, ["torch>=2.9"], "3.11"))


# --- what importing it loads -------------------------------------------------------------------------------------

TOOLS = {"transformers", "optuna", "ray", "typer", "rich", "matplotlib"}
UNWANTED = TOOLS | {f"cca_attention.{name}" for name in ("autotune", "verify", "ci", "cli", "models")}


def unwanted_modules(statement: str) -> set[str]:
    """Which of UNWANTED a fresh interpreter has loaded after `statement`."""
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    child = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return UNWANTED & set(child.stdout.split())


def test_importing_the_package_loads_no_tool() -> None:
    assert unwanted_modules("import cca_attention") == set()


def test_a_loaded_tool_is_seen() -> None:
    assert unwanted_modules("import cca_attention.verify, rich") >= {"cca_attention.verify", "rich"}


# --- who may import whom -----------------------------------------------------------------------------------------

ATTENTION = {"attention", "arguments", "fused", "cache", "cache_state", "cache_op"}
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
SHARED_BY_KERNELS = {"primitives", "tunable", "layout"} | SHARED_BY_HOPPER
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
