"""A pytest plugin: ``pytest --cca-profile FILE`` holds every config of a profile to the oracle in your own suite.

Each entry of the profile becomes a test, ``cca-attention::<kernel>[<problem>]``: its config, forced on small shapes of
the entry's kind, has to equal the oracle. On a machine with a GPU that is on the GPU, elsewhere in Triton's
interpreter. It loads nothing of this package unless the option is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .profiles.schema import Entry

OPTION = "--cca-profile"


class NotVerifiedError(AssertionError):
    """A config that does not equal the oracle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("cca-attention").addoption(
        OPTION, action="append", default=[], metavar="FILE",
        help="add a test for each config of a cca-attention profile: equal to the oracle, or failed (repeatable)",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the tests, whichever files were asked for; -k and -m choose among them as among the others."""
    for path in config.getoption(OPTION):
        tests = _ProfileTests.from_parent(session, name="cca-attention", nodeid="cca-attention", profile=path)
        items += tests.collect()


class _ProfileTests(pytest.Collector):
    """The configs of one profile."""

    def __init__(self, *, profile: str, **rest: Any) -> None:
        super().__init__(**rest)
        self._profile = profile

    def collect(self) -> Iterator[pytest.Item]:
        """One test for each entry."""
        from .profiles.store import ProfileError, load_profile

        try:
            profile = load_profile(Path(self._profile))
        except ProfileError as error:
            raise pytest.UsageError(f"{OPTION}: {error}") from error
        if not profile.entries:
            raise pytest.UsageError(f"{OPTION}: {self._profile} has no config to test")
        for entry in profile.entries:
            yield _ConfigTest.from_parent(self, name=f"{entry.kernel}[{entry.problem}]", entry=entry)


class _ConfigTest(pytest.Item):
    """The gate of one config."""

    def __init__(self, *, entry: Entry, **rest: Any) -> None:
        super().__init__(**rest)
        self._entry = entry

    def runtest(self) -> None:
        """Fail unless the config passes; not run is a kernel of one GPU without that."""
        import torch

        from .configs import architecture
        from .kernels.tunable import Tunable
        from .profiles.configs import as_config
        from .verify.gate import check_config

        entry = self._entry
        archs = Tunable.REGISTRY[entry.kernel].archs
        if archs and architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu")) not in archs:
            pytest.skip(f"{entry.kernel} runs on {', '.join(archs)} only, and there is none here")
        evidence = check_config(entry.kernel, as_config(entry.kernel, entry.config), problem=entry.problem)
        self.add_report_section("call", "cca-attention", f"{evidence.cases} cases in mode {evidence.mode}")
        if not evidence.ok:
            raise NotVerifiedError(f"{entry.kernel} {dict(entry.config)}: {evidence.outcome}: {evidence.message}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The message alone, for a config that failed."""
        if isinstance(excinfo.value, NotVerifiedError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[str, None, str]:
        """Where and what it is."""
        return "cca-attention", None, f"cca-attention::{self.name}"
