"""The package as it is published: what is in it, and what importing it loads."""

from __future__ import annotations

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
