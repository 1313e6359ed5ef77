"""Where a profile comes from when it is asked for by a GPU's name, and what `auto` makes of what is found."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from cca_attention.profiles import places, store
from cca_attention.profiles.reading import ProfileError
from cca_attention.profiles.store import ProfileNotFound, load_profile
from cca_attention.verify.sample_profile import TEXT

ORDER = ("here", "environment", "user", "package", "bundled")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The places where names are looked up, all empty."""
    found = {name: tmp_path / name for name in ORDER}
    found["package"] = tmp_path / "site" / "a_package" / "tuned"
    for folder in found.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(found["here"])
    monkeypatch.setenv(places.ENVIRONMENT, str(found["environment"]))
    monkeypatch.setattr(places, "user_folder", lambda: found["user"])
    monkeypatch.setattr(places, "bundled_folder", lambda: found["bundled"])
    monkeypatch.syspath_prepend(tmp_path / "site")
    install(tmp_path / "site", "a-package", "a_package.tuned")
    return found


def install(site: Path, name: str, value: str) -> None:
    """What an installed package leaves of itself, with one entry point."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{places.ENTRY_POINTS}]\n{name} = {value}\n")
    importlib.invalidate_caches()
    places.entry_points.cache_clear()


def put(folder: Path, created: str, name: str = "any-name.yaml") -> None:
    """A profile in `folder` that is known by its time."""
    (folder / name).write_text(TEXT.replace("2026-11-22T10:00:00+00:00", created))


def test_names_are_looked_up_in_order(folders: dict[str, Path]) -> None:
    with pytest.raises(ProfileNotFound, match="to make one: cca-tune --gpu a100 --ctx 131072"):
        load_profile("a100")
    for place in reversed(ORDER):
        put(folders[place], place)
        for name in ("a100", "A100-80GB", "NVIDIA A100-SXM4-80GB", "a100_80gb"):
            assert load_profile(name).created == place
    with pytest.raises(ProfileNotFound, match="h200"):
        load_profile("h200")


def test_other_files_in_the_way_are_passed_over_but_a_broken_profile_is_not(folders: dict[str, Path]) -> None:
    (folders["here"] / "a.yaml").write_bytes(b"\xff\xfe not text: [")
    (folders["here"] / "docker-compose.yaml").write_text("schema: something/else\nservices: {}\n")
    (folders["here"] / "folder.yaml").mkdir()
    (folders["user"] / "deeper").mkdir()
    put(folders["user"] / "deeper", "user")
    assert load_profile("a100").created == "user"
    (folders["here"] / "b.yaml").write_text("schema: cca-profile/1.0\ndevice: {}\n")
    with pytest.raises(ProfileError, match=r"b\.yaml has \d+ mistakes"):
        load_profile("a100")


def test_auto_is_the_gpu_at_hand(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ProfileNotFound, match="PyTorch finds no GPU here"):
        load_profile("auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    put(folders["here"], "here")
    with pytest.raises(ProfileNotFound, match=r"no profile for the GPU .auto."):
        load_profile("auto")  # nobody asked for what lies in the current folder
    put(folders["user"], "user")
    assert load_profile("auto").created == "user"


@pytest.mark.parametrize("missing", ["nowhere.yaml", Path("nowhere")])
def test_a_path_that_is_not_there_is_said_so(missing: str | Path) -> None:
    with pytest.raises(ProfileNotFound, match="there is no profile file nowhere"):
        load_profile(missing)


def test_several_folders_of_the_environment_are_looked_at_in_turn(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "second").mkdir()
    both = os.pathsep.join(str(path) for path in (folders["environment"], tmp_path / "second", ""))
    monkeypatch.setenv(places.ENVIRONMENT, both)
    put(tmp_path / "second", "second")
    assert load_profile("a100").created == "second"
    put(folders["environment"], "first")
    assert load_profile("a100").created == "first"


def test_a_place_that_is_named_and_not_there_is_an_error(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(places.ENVIRONMENT, "/nowhere/at/all")
    with pytest.raises(ProfileError, match="CCA_PROFILE_PATH names the folder /nowhere/at/all, which is not there"):
        load_profile("a100")
    monkeypatch.delenv(places.ENVIRONMENT)
    for value in ("a_package.missing", "no_such_package", "../a_package", "a_package:run"):
        install(tmp_path / "site", "wrong", value)
        with pytest.raises(ProfileError, match=r"the entry point .wrong. of"):
            load_profile("a100")


def test_a_package_is_not_imported_to_find_its_profiles(folders: dict[str, Path]) -> None:
    (folders["package"].parent / "__init__.py").write_text("raise RuntimeError('imported')")
    put(folders["package"], "package")
    assert load_profile("a100").created == "package"


def test_the_bundled_and_the_users_folder_are_different_places() -> None:
    assert store.user_folder() != store.bundled_folder() and store.bundled_folder().name == "data"


def test_of_two_installations_of_a_package_the_first_on_the_path_counts(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "nearer", "a-package", "a_package.missing")
    monkeypatch.syspath_prepend(tmp_path / "nearer")
    with pytest.raises(ProfileError, match=r"the entry point .a-package. of .* names no folder: a_package.missing"):
        places.places()
    install(tmp_path / "nearer", "a-package", "a_package.tuned")
    assert [place.what for place in places.places()].count("package a-package") == 1
