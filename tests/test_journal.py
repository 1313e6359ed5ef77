"""The journal: nothing finished is lost, nothing torn is believed, nothing damaged is passed over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from cca_attention.autotune.journal import Journal, JournalError, Key

KEY = Key("compile", "forward", "0" * 64, "B1-T128", "block_q=64", "sm_80", "3.7.1")
KEYS = [replace(KEY, config=f"block_q={n}") for n in range(40)]


def test_what_is_added_is_found_by_the_next_run(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        assert journal.get(KEY) is None
        journal.add([(KEY, {"seconds": 1.5}), (KEYS[1], {"seconds": 2.5})])
        journal.add([(KEY, {"seconds": 3.5})])
        assert journal.get(KEY) == {"seconds": 3.5}
    with Journal(tmp_path) as journal:
        assert len(journal) == 2
        assert journal.get(KEY) == {"seconds": 3.5}
        assert journal.get(KEYS[1]) == {"seconds": 2.5}


@pytest.mark.parametrize("field", Key.__dataclass_fields__)
def test_every_field_of_a_key_counts(tmp_path: Path, field: str) -> None:
    with Journal(tmp_path) as journal:
        journal.add([(KEY, {})])
        assert journal.get(replace(KEY, **{field: "other"})) is None


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_a_torn_last_line_is_dropped_and_the_next_record_is_whole(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path) as journal:
        journal.add((key, {"note": "x" * 5000}) for key in KEYS[:3])
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(tmp_path) as journal:
        assert [journal.get(key) is not None for key in KEYS[:3]] == [True, True, False]
        journal.add([(KEYS[3], {})])
    assert [json.loads(line)["key"]["config"] for line in path.read_text().splitlines()] == [
        KEYS[0].config,
        KEYS[1].config,
        KEYS[3].config,
    ]


def test_a_journal_that_is_only_a_torn_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"version": 1, "key": {"pha' + b"x" * 9000)
    with Journal(tmp_path) as journal:
        assert len(journal) == 0
        journal.add([(KEY, {})])
    with Journal(tmp_path) as journal:
        assert len(journal) == 1


@pytest.mark.parametrize(
    "damage", [b"not json\n", b'{"version": 1}\n', b'{"version": 9, "key": {}, "value": {}}\n', b"\xff\xfe\n"]
)
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, damage: bytes) -> None:
    with Journal(tmp_path) as journal:
        journal.add([(KEY, {})])
        journal.add([(KEYS[1], {})])
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + lines[1])
    with pytest.raises(JournalError, match=r"journal\.jsonl, line 2, is not a record"):
        Journal(tmp_path)
    assert path.read_bytes() == lines[0] + damage + lines[1]


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match=f"the cache directory {tmp_path}/file cannot be written"):
        Journal(tmp_path / "file")
    with pytest.raises(JournalError, match="cannot be written: Is a directory"):
        (tmp_path / "odd" / "journal.jsonl").mkdir(parents=True)
        Journal(tmp_path / "odd")


def test_a_run_sees_what_another_has_found(tmp_path: Path) -> None:
    with Journal(tmp_path) as one, Journal(tmp_path) as other:
        other.add([(KEY, {"by": "other"})])
        assert one.get(KEY) is None
        one.refresh()
        assert one.get(KEY) == {"by": "other"}
        other.add([(KEYS[1], {})])
        one.add([(KEYS[2], {})])
        assert one.get(KEYS[1]) == {} and other.get(KEYS[2]) is None


def test_a_torn_line_of_another_run_is_not_read_before_it_is_whole_or_gone(tmp_path: Path) -> None:
    with Journal(tmp_path) as one, (tmp_path / "journal.jsonl").open("ab") as other:
        one.add([(KEY, {})])
        other.write(b'{"version": 1, "key"')
        other.flush()
        one.refresh()
        assert len(one) == 1
        one.add([(KEYS[1], {})])
    with Journal(tmp_path) as journal:
        assert len(journal) == 2


def test_a_full_disk_is_one_clear_line_and_loses_only_what_did_not_fit(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import resource, signal, sys
        from pathlib import Path
        from cca_attention.autotune.journal import Journal, JournalError, Key
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        with Journal(Path(sys.argv[1])) as journal:
            for n in range(100):
                try:
                    journal.add([(Key("compile", "k", "0", "p", f"n={n}", "sm_80", "3.7.1"), {"note": "z" * 3000})])
                except JournalError as error:
                    print(n, error)
                    break
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    number, _, message = done.stdout.strip().partition(" ")
    assert message == f"{tmp_path / 'journal.jsonl'} cannot be written: File too large", done
    with Journal(tmp_path) as journal:
        assert len(journal) == int(number) == 6
        journal.add([(KEY, {})])
    with Journal(tmp_path) as journal:
        assert len(journal) == 7


def test_a_run_that_is_killed_again_and_again_loses_nothing_that_was_finished() -> None:
    """At 60 random moments; `python tests/data/killed_runs.py 200` does it 200 times."""
    program = Path(__file__).parent / "data" / "killed_runs.py"
    beside = {**os.environ, "PYTHONSAFEPATH": ""}  # it imports what lies beside it
    done = subprocess.run([sys.executable, str(program), "60"], capture_output=True, text=True, timeout=240, env=beside)
    assert done.returncode == 0, done.stderr
    kills, completed, finished = map(int, done.stdout.split())
    assert kills == 60 and completed >= 1 and finished > 100


def test_two_runs_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from cca_attention.autotune.journal import Journal, Key
        with Journal(Path(sys.argv[1])) as journal:
            for n in range(100):
                key = Key("compile", sys.argv[2], "0", "p", f"n={n}", "sm_80", "3.7.1")
                journal.add([(key, {"note": "y" * (n * 97 % 5000)})])
    """)
    runs = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in ("a", "b")]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    with Journal(tmp_path) as journal:
        assert len(journal) == 200


def test_a_killed_writer_leaves_every_record_that_it_reported(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from cca_attention.autotune.journal import Journal, Key
        with Journal(Path(sys.argv[1])) as journal:
            for n in range(10**9):
                journal.add([(Key("compile", "k", "0", "p", f"n={n}", "sm_80", "3.7.1"), {"note": "z" * 3000})])
                print(n, flush=True)
    """)
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    reported = [int(run.stdout.readline()) for _ in range(25)]
    run.kill()
    reported += [int(line) for line in run.stdout.read().split("\n") if line]
    run.wait()
    with Journal(tmp_path) as journal:
        known = {n for n in reported if journal.get(Key("compile", "k", "0", "p", f"n={n}", "sm_80", "3.7.1"))}
    assert known == set(reported)
