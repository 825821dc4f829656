"""The study in its storage: numbers, claims, take-over, and a journal whose writer died."""

import os
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState

from llama_lab.errors import ConfigError, RunError
from llama_lab.sweep import owner
from llama_lab.sweep.methods import PrunerSettings, SamplerSettings
from llama_lab.sweep.owner import BEAT, OWNER, PARENT, is_abandoned, is_alive, me
from llama_lab.sweep.settings import Direction, SweepSettings
from llama_lab.sweep.space import parse_space
from llama_lab.sweep.storage import cut_half_record, in_use, open_storage, storage_address
from llama_lab.sweep.study import open_study

SPACE = parse_space({"x": "interval(0.0,1.0)", "c": "choice(a,b)"}, [])


@pytest.fixture(params=["journal", "sqlite"])
def address(request, tmp_path):
    return storage_address(None if request.param == "journal" else f"sqlite:///{tmp_path}/study.db", tmp_path)


def opened(address, n_trials=5, **changed):
    settings = SweepSettings(
        sampler=SamplerSettings(name="tpe"), pruner=PrunerSettings(name="none"), n_trials=n_trials, **changed
    )
    storage = open_storage(address)
    return open_study("s", storage, settings, SPACE, directions=[Direction.minimize], n_trials=n_trials)


def finish(study, claim, value=0.0):
    study.study.tell(claim.number, value)
    study.release(claim.number)


@pytest.fixture
def dead() -> str:
    """The name of a process of this machine that is gone."""
    code = "from llama_lab.sweep.owner import me; print(me())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_n_trials_is_the_total_of_all_starts(address):
    for expected in ([0, 1, 2], [3, 4], []):
        study = opened(address)
        numbers = []
        while (claim := study.claim()) and len(numbers) < 3:
            numbers.append(claim.number)
            finish(study, claim, claim.point["x"])
            if len(numbers) == 3:
                break
        assert numbers == expected
    assert study.is_over()
    assert [trial.number for trial in study.trials()] == list(range(5))


OTHER_PROCESS = """
import sys
from tests.unit.test_sweep_study import opened
study = opened(sys.argv[1])
print(study.claim().number, study.claim().number, flush=True)
sys.stdin.read()
"""


def test_two_processes_share_a_study_without_a_trial_twice(address):
    study = opened(address)
    numbers = [study.claim().number]
    command = [sys.executable, "-c", OTHER_PROCESS, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        numbers += [int(number) for number in other.stdout.readline().split()]
        numbers += [study.claim().number, study.claim().number]
        assert sorted(numbers) == list(range(5))
        assert study.claim() is None
        assert not study.is_over()
    assert study.claim().number == numbers[1]  # the other process is gone now


def test_abandoned_trial_is_taken_over_under_its_number_with_its_point(address, dead):
    first = opened(address)
    claim = first.claim()
    for key in (OWNER, PARENT):
        first.storage.set_trial_system_attr(claim.trial_id, key, dead)
    again = opened(address)
    taken = again.claim()
    assert (taken.number, taken.point, taken.went_on) == (claim.number, claim.point, True)
    trial = again.study.get_trials()[0]
    assert trial.state is TrialState.RUNNING
    assert trial.system_attrs[PARENT] == me()
    assert again.claim().number == 1


def test_killed_between_claim_and_draw_is_taken_over_too(address, dead, monkeypatch):
    monkeypatch.setattr(owner, "me", lambda: dead)
    study = opened(address)
    study.study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING))
    waiting = study.study.get_trials()[0]
    owner.want(study.storage, waiting._trial_id)
    study.storage.set_trial_state_values(waiting._trial_id, state=TrialState.RUNNING)
    monkeypatch.undo()
    taken = opened(address).claim()
    assert taken.number == 0
    assert set(taken.point) == {"x", "c"}


def test_resumed_study_draws_what_it_would_have_drawn(address, tmp_path):
    undisturbed = opened(str(tmp_path / "other.journal"), n_trials=14)
    killed = opened(address, n_trials=14)
    for number in range(14):
        if number % 3 == 2:
            killed = opened(address, n_trials=14)  # a new process
        one, other = undisturbed.claim(), killed.claim()
        assert one.point == other.point
        value = (one.point["x"] - 0.3) ** 2
        finish(undisturbed, one, value)
        finish(killed, other, value)
    assert len({claim["x"] for claim in (t.params for t in killed.trials())}) == 14


def test_what_others_have_made_is_no_study_of_ours(address, tmp_path):
    study = opened(address)
    study.study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(RunError, match=r"trials under the name s that llama_lab did not make.*study_name=NAME"):
        opened(address).check_same({"model.name": "a"}, str(tmp_path / "empty"))
    assert not study.study.user_attrs.get("llama_lab:identity")


def test_a_folder_with_runs_of_others_is_none_for_a_new_study(address, tmp_path):
    (tmp_path / "runs" / "0").mkdir(parents=True)
    (tmp_path / "runs" / "0" / "run.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"holds runs that are not of this study: .*runs/0\. Type .*hydra\.sweep\.dir=FOLDER"
    ):
        opened(address).check_same({"model.name": "a"}, str(tmp_path / "runs"))
    opened(address).check_same({"model.name": "a"}, str(tmp_path / "none"))
    opened(address).check_same({"model.name": "a"}, str(tmp_path / "runs"))  # its own by then


def test_other_settings_are_another_study(address):
    opened(address).check_same({"model.name": "a", "search of x": "interval(0,1)"}, "folder")
    opened(address).check_same({"model.name": "a", "search of x": "interval(0,1)"}, "folder")
    with pytest.raises(RunError, match=r"model.name: a then, b now.*study_name=NAME"):
        opened(address).check_same({"model.name": "b", "search of x": "interval(0,1)"}, "folder")
    with pytest.raises(RunError, match="study_name"):
        open_study(
            "s",
            open_storage(address),
            opened(address).settings,
            SPACE,
            directions=[Direction.maximize],
            n_trials=5,
        )


def test_baseline_comes_first_and_what_it_leaves_out_is_drawn(address):
    study = opened(address)
    study.given = [{"c": "b"}]
    claim = study.claim()
    assert claim.number == 0
    assert claim.point["c"] == "b"
    assert 0 <= claim.point["x"] <= 1


def test_owner_is_known_to_be_alive_or_dead(dead):
    assert is_alive(me()) is True
    assert is_alive(dead) is False
    host, pid, start = me().rsplit("|", 2)
    assert is_alive(f"{host}|{pid}|{int(start) - 100}") is False  # the number was given again
    assert is_alive(f"another-{host}|{pid}|{start}") is None


@pytest.mark.parametrize(("age_s", "abandoned"), [(1, False), (100, True)])
def test_trial_of_another_machine_is_judged_by_its_silence(age_s, abandoned):
    attrs = {OWNER: "elsewhere|1|0.00", BEAT: time.time() - age_s}
    trial = optuna.trial.create_trial(state=TrialState.RUNNING, system_attrs=attrs)
    assert is_abandoned(trial, grace_s=90) is abandoned


def test_half_a_record_is_cut_off_before_the_next(tmp_path):
    address = storage_address(None, tmp_path)
    study = opened(address)
    finish(study, study.claim(), 1.0)
    whole = (tmp_path / "study.journal").read_bytes()
    for torn in (whole[:-1], whole + b'{"op_code": 5, "worker_i', whole + b"\0\0", whole[:-40]):
        (tmp_path / "study.journal").write_bytes(torn)
        again = opened(address)
        claim = again.claim()
        finish(again, claim, 2.0)
        assert [trial.value for trial in opened(address).trials()][-1] == 2.0
    assert (tmp_path / "study.journal").read_bytes().endswith(b"\n")


def test_what_is_cut(tmp_path):
    file = tmp_path / "j"
    for content, left in [(b"", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb", b"a\n"), (b"a", b"")]:
        file.write_bytes(content)
        assert cut_half_record(str(file)) == len(content) - len(left)
        assert file.read_bytes() == left


def test_addresses_hold_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage_address(None, tmp_path / "x") == str(tmp_path / "x" / "study.journal")
    assert storage_address("a.journal", tmp_path) == str(tmp_path / "a.journal")
    assert storage_address("sqlite:///a.db", tmp_path) == f"sqlite:///{tmp_path}/a.db"
    assert storage_address("postgresql://me@host/db", tmp_path) == "postgresql://me@host/db"
    wrongs = [("study", "study.journal"), ("grpc://host", "grpc://HOST:PORT")]
    in_memory = ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&cache=shared&uri=true"]
    for wrong, said in [*wrongs, *((address, "in memory") for address in in_memory)]:
        with pytest.raises(ConfigError, match=said):
            storage_address(wrong, tmp_path)


@pytest.mark.parametrize("folder", ["plain", "with a %20 and a blank"])
@pytest.mark.parametrize(
    "address",
    ["sqlite:///s.db", "sqlite:///s.db?timeout=5", "sqlite+pysqlite:///s.db", "sqlite:///file:s.db?mode=rwc&uri=true"],
)
def test_sqlite_addresses_name_one_file_in_every_folder(tmp_path, monkeypatch, folder, address):
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    whole = storage_address(address, tmp_path)
    monkeypatch.chdir(tmp_path)
    optuna.create_study(storage=open_storage(whole), study_name="mine")
    monkeypatch.chdir("/")
    assert [study.study_name for study in open_storage(whole).get_all_studies()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert [path.name for path in (tmp_path / folder).iterdir()] == ["s.db"]


def test_storages_that_cannot_be_opened(tmp_path):
    for name, content in [
        ("no.journal", "at all\n"),
        ("a.log", "hello world\n"),
        ("b.log", '{"a": 1}\n'),
        ("c.log", "[1]\n"),
        ("d.log", "somebody's only line"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(RunError, match=rf"{name} is no journal of a study, or damaged: line 1 .*Name another file"):
            open_storage(str(tmp_path / name))
        assert (tmp_path / name).read_text() == content
    os.mkfifo(tmp_path / "pipe.journal")
    with pytest.raises(RunError, match=r"pipe.journal is no file"):
        open_storage(str(tmp_path / "pipe.journal"))
    for content in ('{"op_code":99}\n', '{"op_code":0}\n', '{"op_code":4,"study_id":[]}\n'):
        (tmp_path / "new.journal").write_text(content)
        with pytest.raises(RunError, match=r"new.journal is damaged, or of another version of Optuna"):
            open_storage(str(tmp_path / "new.journal"))
    with pytest.raises((RunError, ConfigError), match="oracle"):
        open_storage("oracle://host/db")
    if os.geteuid() != 0:
        with pytest.raises(RunError, match="cannot be opened"):
            open_storage("/proc/x/study.journal")


def test_a_journal_that_is_damaged_later_is_told_by_its_line(tmp_path):
    address = storage_address(None, tmp_path)
    study = opened(address)
    finish(study, study.claim(), 1.0)
    lines = (tmp_path / "study.journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "study.journal").write_bytes(b"".join(lines[:-1]) + lines[-1][:20] + b"\n")
    with pytest.raises(RunError, match=f"line {len(lines)} is no record"):
        open_storage(address)


def test_a_database_that_cannot_be_written_any_more_is_told_in_one_message(tmp_path):
    address = storage_address(f"sqlite:///{tmp_path}/study.db", tmp_path)
    study = opened(address)
    with sqlite3.connect(tmp_path / "study.db") as db:
        db.execute("drop table trials")
    told = r"study.db cannot be read or written any more: .*trials.*same command"
    with pytest.raises(RunError, match=told), in_use(address):
        study.claim()
