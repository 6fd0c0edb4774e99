import dataclasses
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from evosearch.errors import (
    BackendError,
    LedgerCorrupt,
    LedgerError,
    LedgerLocked,
    LedgerVersionError,
)
from evosearch.ledger import SCHEMA_VERSION, Ledger, Member
from evosearch.locks import lock_holder
from evosearch.measurement import Measurement, Status, Terms
from evosearch.policy import Policy

POLICIES = [Policy((n, 2 * n)) for n in range(1, 9)]
COSTS = [(1000 * n, 10 * n) for n in range(1, 9)]

# Records for ever, and says so after each; the parent kills it.
WRITER = """
import sys
from pathlib import Path
from evosearch.ledger import Ledger
from evosearch.measurement import Measurement, Status, Terms
from evosearch.policy import Policy
ledger = Ledger.create(Path(sys.argv[1]), {})
print("ready", flush=True)
for n in range(1, 1_000_000):
    policy = Policy((n,))
    ledger.record_ask("search", n, [policy], [(n, n)])
    metrics = {"error": 1 / n, "loss": 1.0, "margin": 0.5, "divergence": 0.1, "distortion": 0.2}
    ledger.record(Measurement(policy=policy, status=Status.OK, metrics=metrics), 0.0)
    print(policy.digest, flush=True)
"""


def measured(policy: Policy, error: float = 0.1) -> Measurement:
    metrics = {
        "error": error,
        "loss": 1 / 3,
        "margin": 0.5,
        "divergence": 1e-300,
        "distortion": 1e-9,
    }
    return Measurement(policy=policy, status=Status.OK, metrics=metrics, seconds=0.1 + 0.2)


def failed(policy: Policy, status: Status = Status.FAILED) -> Measurement:
    return Measurement(policy=policy, status=status, reason="it burnt: \n\u2622 'x'", seconds=2.5)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(
        tmp_path, {"state": "running", "nested": {"a": [1, 2.5, None, "x"]}}
    ) as made:
        yield made


@pytest.fixture
def asked(ledger: Ledger) -> Ledger:
    ledger.record_ask("search", 0, POLICIES, COSTS)
    return ledger


@contextmanager
def writing(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that records into `run`, killed at the end at the latest."""
    command = [sys.executable, "-c", WRITER, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_measurements_are_read_back_as_they_were(asked: Ledger) -> None:
    statuses = [s for s in Status if s not in (Status.OK, Status.DROPPED)]
    wanted = [measured(POLICIES[0]), measured(POLICIES[1], math.nextafter(0.1, 1))]
    wanted += [failed(p, s) for p, s in zip(POLICIES[2:], statuses, strict=False)]
    for stamp, measurement in enumerate(wanted):
        asked.record(measurement, float(stamp))
    with Ledger.open(asked.path.parent) as reader:
        assert list(reader.measurements().values()) == wanted


def test_raced_measurements_are_kept_apart_and_read_back_as_they_were(asked: Ledger) -> None:
    full = measured(POLICIES[0])
    raced = [
        Measurement(
            policy=POLICIES[0],
            status=Status.DROPPED,
            metrics=full.metrics,
            images=256,
            reason="worse than another",
        ),
        dataclasses.replace(measured(POLICIES[1]), images=1000, blocks=b"\x00\x01\xff\x00"),
    ]
    asked.record(full, 0.0)
    for measurement in raced:
        asked.record(measurement, 1.0, terms=Terms.RACED)
    with Ledger.open(asked.path.parent) as reader:
        assert list(reader.measurements().values()) == [full]
        assert list(reader.measurements(terms=Terms.RACED).values()) == raced
        assert reader.known(POLICIES, terms=Terms.RACED) == {m.policy.digest: m for m in raced}
        assert [e.measurement for e in reader.entries("search", terms=Terms.RACED)][:2] == raced


def test_measurements_are_listed_in_the_order_of_landing(asked: Ledger) -> None:
    order = [POLICIES[i] for i in (3, 0, 2)]
    for policy in order:
        asked.record(measured(policy), 0.0)
    assert list(asked.measurements()) == [policy.digest for policy in order]


def test_new_ledger_is_empty(ledger: Ledger) -> None:
    assert ledger.measurements() == {}
    assert ledger.entries("search") == []
    assert ledger.population() == []
    assert ledger.asked("search", 0) == []
    assert ledger.generations() == 0


def test_population_keeps_order_rank_and_infinite_crowding(asked: Ledger) -> None:
    members = [
        Member(policy=POLICIES[4], rank=1, crowding=math.inf),
        Member(policy=POLICIES[1], rank=0, crowding=1 / 3),
        Member(policy=POLICIES[4], rank=2, crowding=0.0),
    ]
    asked.record_population(0, members)
    assert asked.population() == asked.population(0) == members


def test_population_without_a_number_is_the_last_one(asked: Ledger) -> None:
    for generation in (0, 1, 2):
        member = Member(policy=POLICIES[generation], rank=0, crowding=0.5)
        asked.record_population(generation, [member])
    assert [member.policy for member in asked.population()] == [POLICIES[2]]
    assert [member.policy for member in asked.population(0)] == [POLICIES[0]]
    assert asked.population(7) == []


def test_asks_keep_their_order_and_their_duplicates(ledger: Ledger) -> None:
    policies = [POLICIES[i] for i in (2, 0, 2, 1)]
    ledger.record_ask("search", 5, policies, [COSTS[i] for i in (2, 0, 2, 1)])
    assert ledger.asked("search", 5) == [policy.digest for policy in policies]
    assert ledger.asked("search", 4) == ledger.asked("baseline", 5) == []


def test_asking_again_changes_nothing(asked: Ledger) -> None:
    asked.record_ask("search", 0, POLICIES[::-1], [(1, 1)] * len(POLICIES))
    assert asked.asked("search", 0) == [policy.digest for policy in POLICIES]
    assert [(e.macs, e.params) for e in asked.entries("search")] == COSTS


def test_population_recorded_again_changes_nothing(asked: Ledger) -> None:
    first = Member(policy=POLICIES[0], rank=0, crowding=1.0)
    asked.record_population(0, [first])
    asked.record_population(0, [Member(policy=POLICIES[1], rank=1, crowding=2.0)])
    assert asked.population(0) == [first]


def test_entries_are_the_distinct_policies_of_a_track_by_first_ask(ledger: Ledger) -> None:
    a, b, c = POLICIES[:3]
    ledger.record_ask("search", 0, [b, a, b], [(2, 2), (1, 1), (2, 2)])
    ledger.record_ask("baseline", 0, [c, a], [(3, 3), (1, 1)])
    ledger.record_ask("search", 1, [a, c], [(1, 1), (3, 3)])
    ledger.record(measured(a), 0.0)
    assert [entry.policy for entry in ledger.entries("search")] == [b, a, c]
    assert [entry.policy for entry in ledger.entries("baseline")] == [c, a]
    landed = [entry.measurement for entry in ledger.entries("baseline")]
    assert landed == [None, measured(a)]


def test_facts_are_read_back_as_they_were(ledger: Ledger) -> None:
    assert ledger.meta("nested") == {"a": [1, 2.5, None, "x"]}
    ledger.set_meta("state", "finished")
    ledger.set_meta("new", 1 / 3)
    assert (ledger.meta("state"), ledger.meta("new")) == ("finished", 1 / 3)


def test_unknown_fact_is_a_key_error(ledger: Ledger) -> None:
    with pytest.raises(KeyError, match="colour"):
        ledger.meta("colour")


def test_entries_are_those_of_one_track(asked: Ledger) -> None:
    asked.record_ask("baseline", 0, [Policy((99, 99))], [(1, 1)])
    asked.record(measured(POLICIES[0]), 10.0)
    asked.record(failed(POLICIES[1], Status.TIMEOUT), 14.0)
    asked.record(measured(Policy((99, 99))), 11.0)
    landed = [e.measurement for e in asked.entries("search") if e.measurement is not None]
    assert [m.status for m in landed] == [Status.OK, Status.TIMEOUT]


def test_second_writer_is_refused_by_the_name_of_the_first(ledger: Ledger) -> None:
    with pytest.raises(LedgerLocked, match=rf"in use by process {os.getpid()} on .*; wait"):
        Ledger.open(ledger.path.parent, write=True)


def test_ledger_is_not_made_where_somebody_writes(ledger: Ledger) -> None:
    with pytest.raises(LedgerLocked, match=rf"in use by process {os.getpid()}"):
        Ledger.create(ledger.path.parent, {})


def test_reader_sees_each_record_while_the_writer_goes_on(asked: Ledger) -> None:
    with Ledger.open(asked.path.parent) as reader:
        for count, policy in enumerate(POLICIES, start=1):
            asked.record(measured(policy), 0.0)
            assert len(reader.measurements()) == count


def test_two_readers_do_not_disturb_each_other(asked: Ledger) -> None:
    run = asked.path.parent
    with Ledger.open(run) as one, Ledger.open(run) as other:
        assert one.entries("search") == other.entries("search")


def test_closed_ledger_gives_the_lock_back(tmp_path: Path) -> None:
    Ledger.create(tmp_path, {}).close()
    assert lock_holder(tmp_path) is None
    Ledger.open(tmp_path, write=True).close()


def test_refused_open_gives_the_lock_back(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"nonsense " * 1000)
    with pytest.raises(LedgerCorrupt, match="damaged or is not a ledger"):
        Ledger.open(tmp_path, write=True)
    assert lock_holder(tmp_path) is None


def test_lock_holder_of_a_run_that_nobody_ever_wrote_is_none(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None


def test_killed_writer_leaves_every_record_that_it_was_told_of(tmp_path: Path) -> None:
    with writing(tmp_path) as process:
        assert process.stdout is not None
        told = [process.stdout.readline().strip() for _ in range(40)]
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().split("\n")[:-1]
    with Ledger.open(tmp_path) as reader:
        found = reader.measurements()
    assert list(found)[: len(told)] == told
    assert all(m.metrics["error"] == 1 / m.policy.keep[0] for m in found.values())


def test_living_writer_is_named_and_its_records_are_readable(tmp_path: Path) -> None:
    with writing(tmp_path) as process:
        with pytest.raises(LedgerLocked, match=rf"in use by process {process.pid} on "):
            Ledger.open(tmp_path, write=True)
        assert lock_holder(tmp_path) is not None
        assert process.stdout is not None
        digest = process.stdout.readline().strip()
        with Ledger.open(tmp_path) as reader:
            assert digest in reader.measurements()


def test_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    with writing(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock_holder(tmp_path) is None
        with Ledger.open(tmp_path, write=True) as ledger:
            ledger.record_ask("search", 10**6, POLICIES, COSTS)
            ledger.record(measured(POLICIES[0]), 0.0)


def test_copy_of_a_closed_ledger_is_the_whole_of_it(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    copy.mkdir()
    with Ledger.create(run, {}) as ledger:
        ledger.record_ask("search", 0, POLICIES, COSTS)
        ledger.record(measured(POLICIES[0]), 0.0)
    (copy / "ledger.sqlite").write_bytes((run / "ledger.sqlite").read_bytes())
    with Ledger.open(copy) as reader:
        assert list(reader.measurements().values()) == [measured(POLICIES[0])]


@pytest.mark.parametrize("name", ["a b", "100%", "x?mode=rwc", "y#z", "ü", "a:b"])
def test_run_may_have_any_name(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    run.mkdir()
    Ledger.create(run, {"fact": 1}).close()
    with Ledger.open(run) as reader:
        assert reader.meta("fact") == 1


def test_finished_ledger_leaves_no_scratch_files(tmp_path: Path) -> None:
    Ledger.create(tmp_path, {}).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.sqlite", "lock"]


@pytest.mark.parametrize("write", [True, False])
def test_directory_without_a_ledger_is_no_run(tmp_path: Path, write: bool) -> None:
    with pytest.raises(LedgerError, match=r"is not a run: it has no ledger\.sqlite"):
        Ledger.open(tmp_path, write=write)
    with pytest.raises(LedgerError, match=r"is not a run: it has no ledger\.sqlite"):
        Ledger.open(tmp_path / "missing", write=write)
    assert list(tmp_path.iterdir()) == []


def test_ledger_cannot_be_made_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot write to .*missing: No such file"):
        Ledger.create(tmp_path / "missing", {})


def damage(run: Path, change: Callable[[bytes], bytes]) -> None:
    """A ledger with a few records, closed and then changed."""
    with Ledger.create(run, {}) as ledger:
        ledger.record_ask("search", 0, POLICIES, COSTS)
        for policy in POLICIES:
            ledger.record(measured(policy), 0.0)
    path = run / "ledger.sqlite"
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("size", [10, 99, 101, 4096, 8192, 20_000])
def test_truncated_ledger_is_refused(tmp_path: Path, size: int) -> None:
    damage(tmp_path, lambda content: content[:size])
    with pytest.raises(LedgerCorrupt, match=r"ledger\.sqlite .*(damaged|not a ledger)"):
        Ledger.open(tmp_path)


def test_emptied_ledger_is_refused(tmp_path: Path) -> None:
    damage(tmp_path, lambda content: b"")
    with pytest.raises(LedgerCorrupt, match="is not a ledger of evosearch"):
        Ledger.open(tmp_path)


@pytest.mark.parametrize("start", [0, 100, 4096, 8192])
def test_garbled_ledger_is_refused(tmp_path: Path, start: int) -> None:
    damage(tmp_path, lambda content: content[:start] + b"\xa5" * 400 + content[start + 400 :])
    with pytest.raises(LedgerCorrupt, match=r"(?s)damaged.*restore it from a copy"):
        Ledger.open(tmp_path)


def foreign(run: Path) -> Path:
    path = run / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE recipes (cake TEXT)")
        database.commit()
    return path


@pytest.mark.parametrize("write", [True, False])
def test_database_of_somebody_else_is_refused(tmp_path: Path, write: bool) -> None:
    foreign(tmp_path)
    with pytest.raises(LedgerCorrupt, match=r"ledger\.sqlite is not a ledger of evosearch"):
        Ledger.open(tmp_path, write=write)


def test_database_of_somebody_else_is_left_as_it_was(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    before = path.read_bytes()
    with pytest.raises(LedgerCorrupt, match="is not a ledger of evosearch"):
        Ledger.open(tmp_path, write=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, 999])
def test_ledger_of_another_version_is_refused_with_both(tmp_path: Path, version: int) -> None:
    damage(tmp_path, lambda content: content)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        database.execute(f"PRAGMA user_version = {version}")
    sentence = rf"schema version {version}, this evosearch reads {SCHEMA_VERSION}; use the"
    with pytest.raises(LedgerVersionError, match=sentence):
        Ledger.open(tmp_path)


def test_record_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    damage(tmp_path, lambda content: content)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as database:
        database.execute("""UPDATE measurements SET metrics = '{"error": 0.1}'""")
        database.commit()
    with Ledger.open(tmp_path) as ledger, pytest.raises(LedgerCorrupt, match="damaged"):
        ledger.measurements()


def test_policy_is_measured_once(asked: Ledger) -> None:
    asked.record(measured(POLICIES[0], 0.1), 0.0)
    with pytest.raises(LedgerError, match="UNIQUE"):
        asked.record(measured(POLICIES[0], 0.9), 1.0)
    assert asked.measurements()[POLICIES[0].digest] == measured(POLICIES[0], 0.1)


def test_policy_that_nobody_asked_for_is_not_recorded(asked: Ledger) -> None:
    with pytest.raises(LedgerError, match="FOREIGN KEY"):
        asked.record(measured(Policy((77, 77))), 0.0)
    assert asked.measurements() == {}


def test_refused_record_leaves_the_ledger_usable(asked: Ledger) -> None:
    with pytest.raises(LedgerError, match="FOREIGN KEY"):
        asked.record(measured(Policy((77, 77))), 0.0)
    asked.record(measured(POLICIES[0]), 0.0)
    assert len(asked.measurements()) == 1


def test_half_an_ask_is_no_ask(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="shorter"):
        ledger.record_ask("search", 0, POLICIES, COSTS[:-1])
    assert ledger.asked("search", 0) == []


def test_reader_cannot_record(asked: Ledger) -> None:
    with (
        Ledger.open(asked.path.parent) as reader,
        pytest.raises(LedgerError, match="reading only"),
    ):
        reader.record(measured(POLICIES[0]), 0.0)


def test_full_disk_is_reported_as_one(ledger: Ledger) -> None:
    database = ledger._db
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")  # the disk ends here
    many = [Policy((n,)) for n in range(1, 3000)]
    with pytest.raises(BackendError, match="disk is full; free some space and resume"):
        ledger.record_ask("search", 0, many, [(1, 1)] * len(many))


def test_ledger_is_not_made_over_another(tmp_path: Path) -> None:
    Ledger.create(tmp_path, {"fact": "old"}).close()
    with pytest.raises(LedgerError, match=r"ledger"):
        Ledger.create(tmp_path, {"fact": "new"}).close()


def test_what_is_known_about_some_policies_is_known_about_no_others(asked: Ledger) -> None:
    for policy in POLICIES[:3]:
        asked.record(measured(policy), 0.0)
    asked.record(failed(POLICIES[3]), 0.0)
    some = [POLICIES[i] for i in (3, 1, 7, 1)]
    assert asked.known(some) == {
        POLICIES[3].digest: failed(POLICIES[3]),
        POLICIES[1].digest: measured(POLICIES[1]),
    }
    assert asked.known([]) == {}


def test_generations_are_counted_by_their_populations(asked: Ledger) -> None:
    counts = [asked.generations()]
    for generation in range(3):
        member = Member(policy=POLICIES[generation], rank=0, crowding=0.5)
        asked.record_population(generation, [member])
        counts.append(asked.generations())
    assert counts == [0, 1, 2, 3]


def test_disk_is_waited_for_once_a_second(asked: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = 100.0, []
    monkeypatch.setattr("evosearch.ledger.time.monotonic", lambda: now)
    asked._synced_at = now
    for step, policy in zip((0.0, 0.5, 0.5, 0.9, 5.0), POLICIES, strict=False):
        now += step
        asked.record(measured(policy), 0.0)
        ((level,),) = asked._rows("PRAGMA synchronous")
        waits.append(level == 2)
    assert waits == [False, False, True, False, True]


def test_what_was_not_waited_for_is_on_the_disk_a_second_later(
    asked: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = threading.Event()
    monkeypatch.setattr("evosearch.ledger._SYNC_EVERY_S", 0.2)
    monkeypatch.setattr("evosearch.ledger.os.fsync", lambda _: synced.set())
    asked._synced_at = time.monotonic() + 3600
    asked.record(measured(POLICIES[0]), 0.0)
    assert not synced.is_set()
    assert synced.wait(10)


def test_what_a_killed_launch_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite.123.tmp").write_bytes(b"half")
    Ledger.create(tmp_path, {}).close()
    assert {path.name for path in tmp_path.iterdir()} == {"ledger.sqlite", "lock"}


def test_a_ledger_that_cannot_be_made_leaves_no_lock(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Ledger.create(tmp_path, {"fact": object()})
    Ledger.create(tmp_path, {}).close()


# Whoever may read a run may look at it; root is somebody else first.
READER = """
import os, sys
from pathlib import Path
from evosearch.errors import LedgerError
from evosearch.ledger import Ledger
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    with Ledger.open(Path(sys.argv[1])) as ledger:
        print(len(ledger.measurements()))
except LedgerError as exc:
    print(exc)
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_run_in_a_directory_one_may_not_write_to_can_be_read(closed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = Ledger.create(folder, {})
        ledger.record_ask("search", 0, POLICIES, COSTS)
        ledger.record(measured(POLICIES[0]), 0.0)
        if closed:
            ledger.close()
        else:  # as if killed where the index is lost, too
            shutil.copytree(folder, folder / "copy")
            ledger.close()
            folder = folder / "copy"
            (folder / "ledger.sqlite-shm").unlink()
        for path in folder.iterdir():
            path.chmod(0o444)
        for directory in (folder, Path(name)):
            directory.chmod(0o555)
        command = [sys.executable, "-c", READER, str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        for directory in (Path(name), folder):
            directory.chmod(0o755)
    if closed:
        assert done.stdout == "1\n", done.stderr
    else:
        assert "let its owner run `evosearch status` there, or copy the directory" in done.stdout


def test_an_estimate_is_never_known_as_a_measurement(asked: Ledger) -> None:
    full = measured(POLICIES[0])
    for policy in POLICIES[:2]:
        estimate = Measurement(
            policy=policy, status=Status.DROPPED, metrics=full.metrics, images=256, reason="worse"
        )
        asked.record(estimate, 0.0, terms=Terms.RACED)
    asked.record(full, 1.0)
    assert asked.known(POLICIES) == {POLICIES[0].digest: full}
    raced = asked.known(POLICIES, terms=Terms.RACED)
    assert {known.status for known in raced.values()} == {Status.DROPPED}
    assert asked.known(POLICIES, terms=Terms.CHECK) == {}


def test_the_file_stays_sound_when_the_disk_is_not_waited_for(
    asked: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NORMAL keeps the order of what is written; OFF would not, and a power cut could ruin it."""
    now, levels = 100.0, []
    monkeypatch.setattr("evosearch.ledger.time.monotonic", lambda: now)
    asked._synced_at = now
    for step, policy in zip((0.0, 5.0, 0.5), POLICIES, strict=False):
        now += step
        asked.record(measured(policy), 0.0)
        levels += asked._rows("PRAGMA synchronous")
    normal, full = (1,), (2,)
    assert levels == [normal, full, normal]
