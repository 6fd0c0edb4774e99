import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evosearch.errors import ConfigMismatch, LedgerCorrupt, LedgerLocked, LedgerVersionError
from evosearch.fidelity.journal import Journal

SETTINGS = {"truth": {"lr": 0.01, "epochs": 1}, "macs": "0.4,0.5", "nothing": None}

# Appends for ever, and says so after each; the parent kills it.
WRITER = """
import sys
from pathlib import Path
from evosearch.fidelity.journal import Journal
journal = Journal.open(Path(sys.argv[1]), {})
for n in range(1_000_000):
    journal.append("score", n=n, filler="x" * 5000)
    print(n, flush=True)
"""


def test_records_are_there_when_opened_again(tmp_path: Path) -> None:
    with Journal.open(tmp_path, SETTINGS) as journal:
        journal.append("score", value=1 / 3, keep=(1, 2))
        journal.append("truth", reason="a\nb \u2622")
    with Journal.open(tmp_path, SETTINGS) as journal:
        assert journal.of_kind("score") == [{"kind": "score", "value": 1 / 3, "keep": [1, 2]}]
        assert journal.of_kind("truth")[0]["reason"] == "a\nb \u2622"


@pytest.mark.parametrize("torn", [b"", b'{"kind": "score", "va', b"\x00\xff"])
def test_a_torn_last_line_is_cut_off_and_written_over(tmp_path: Path, torn: bytes) -> None:
    with Journal.open(tmp_path, SETTINGS) as journal:
        journal.append("score", value=1)
    with journal.path.open("ab") as stream:
        stream.write(torn)
    for count in (2, 3):
        with Journal.open(tmp_path, SETTINGS) as journal:
            journal.append("score", value=count)
            assert [record["value"] for record in journal.of_kind("score")] == [1, 2, 3][:count]


def test_a_torn_header_is_an_empty_journal(tmp_path: Path) -> None:
    (tmp_path / "fidelity.jsonl").write_bytes(b'{"kind":"evosearch-fid')
    with Journal.open(tmp_path, SETTINGS) as journal:
        journal.append("score", value=1)
    with Journal.open(tmp_path, SETTINGS) as journal:
        assert len(journal.records) == 1


def test_a_killed_writer_loses_nothing_that_it_was_told_is_there(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(20):
        told = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else told
    with Journal.open(tmp_path, {}) as journal:
        numbers = [record["n"] for record in journal.of_kind("score")]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > last


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"truth": {"lr": 0.1, "epochs": 1}}, r"truth\.lr = 0\.01, now it is 0\.1"),
        ({"macs": "0.4,0.6"}, r"macs = '0\.4,0\.5', now it is '0\.4,0\.6'"),
        ({"nothing": 3}, "nothing = None, now it is 3"),
    ],
)
def test_other_settings_are_refused_by_name(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    Journal.open(tmp_path, SETTINGS).close()
    with pytest.raises(ConfigMismatch, match=told):
        Journal.open(tmp_path, {**SETTINGS, **changes})
    # A refusal leaves no lock behind.
    Journal.open(tmp_path, SETTINGS).close()


def test_tuples_and_lists_are_the_same_setting(tmp_path: Path) -> None:
    Journal.open(tmp_path, {"on": ("test", "held-out")}).close()
    Journal.open(tmp_path, {"on": ["test", "held-out"]}).close()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with Journal.open(tmp_path, SETTINGS) as journal:
        journal.append("score", value=1)
        journal.append("score", value=2)
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join([lines[0], lines[1][:-5], lines[2], ""]))
    with pytest.raises(LedgerCorrupt, match="line 2 is damaged"):
        Journal.open(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "line", ['{"kind": "something"}', '{"kind": "evosearch-fidelity", "settings": {}}']
)
def test_another_file_is_no_journal(tmp_path: Path, line: str) -> None:
    (tmp_path / "fidelity.jsonl").write_text(f"{line}\n")
    with pytest.raises(LedgerCorrupt, match="is not a journal"):
        Journal.open(tmp_path, SETTINGS)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    header = {"kind": "evosearch-fidelity", "version": 99, "settings": {}}
    (tmp_path / "fidelity.jsonl").write_text(json.dumps(header) + "\n")
    with pytest.raises(LedgerVersionError, match="has version 99"):
        Journal.open(tmp_path, {})


def test_only_one_process_writes(tmp_path: Path) -> None:
    with (
        Journal.open(tmp_path, SETTINGS),
        pytest.raises(LedgerLocked, match="is in use"),
    ):
        Journal.open(tmp_path, SETTINGS)


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path) -> None:
    program = f"""
import pathlib, resource, signal
from evosearch.errors import BackendError
from evosearch.fidelity.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = pathlib.Path({str(tmp_path)!r})
journal = Journal.open(directory, {{}})
journal.append("score", value=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10,) * 2)
try:
    journal.append("score", value="x" * 100)
except BackendError as exc:
    print(exc)
journal.close()
Journal.open(directory, {{}}).close()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "free some space and run the same command again" in done.stdout
    with Journal.open(tmp_path, {}) as journal:
        assert journal.records == [{"kind": "score", "value": 1}]
        journal.append("score", value=2)
