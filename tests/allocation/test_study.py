"""Searches in an Optuna study: shared by processes, killed and resumed, refused when they are not the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from toy import EVOLUTION, IDENTITY, toy_fitness, toy_space

from ditq.allocation import Evolution, Fixed, Trials, run
from ditq.allocation.study import NAME
from ditq.errors import DitqError, UsageError

HERE = Path(__file__).parent


def search(storage: Path | None = None, trials: int = 24, **options: object) -> Trials:
    defaults: dict[str, object] = {"identity": IDENTITY, "storage": storage, "patience": 1.0}
    return run(toy_space(), EVOLUTION, toy_fitness, trials=trials, **{**defaults, **options})  # type: ignore[arg-type]


def start(storage: Path, log: Path, trials: int, seconds: float, patience: float = 1.0) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    arguments = [str(HERE / "toy.py"), str(storage), str(log), str(trials), str(seconds), str(patience)]
    return subprocess.Popen([sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path})


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(log: Path, count: int) -> None:
    for _ in range(600):
        if len(lines(log)) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{len(lines(log))} of {count} evaluations after 30 s")


def test_a_search_finds_the_best_of_what_it_saw() -> None:
    result = search()
    assert len(result.scored) == result.evaluated == 24
    assert result.best == min(result.scored, key=lambda x: x[1])
    assert result.best[1] < toy_fitness((64,) * 6)


def test_a_finished_search_evaluates_nothing_again_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    storage = tmp_path / "search"
    first = search(storage)
    again = search(storage)
    assert (again.scored, again.evaluated) == (first.scored, 0)
    longer = search(storage, trials=30)
    assert (longer.scored[:24], longer.evaluated) == (first.scored, 6)
    assert longer.scored == search(trials=30).scored


def test_two_processes_share_the_work_without_duplicates(tmp_path: Path) -> None:
    storage, log = tmp_path / "search", tmp_path / "log"
    workers = [start(storage, log, 24, 0.1) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert len(lines(log)) == len(set(lines(log))) == 24
    # The result is that of one process.
    result = search(storage)
    assert (result.scored, result.evaluated) == (search().scored, 0)
    study = optuna.load_study(study_name=NAME, storage=_journal(storage))
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len({tuple(t.params.items()) for t in complete}) == len(complete) == 24


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    storage, log = tmp_path / "search", tmp_path / "log"
    worker = start(storage, log, 24, 0.1)
    wait_for(log, 11)
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    before = len(lines(log))
    result = search(storage, patience=1e9)  # a process of this machine is known to have ended
    assert result.scored == search().scored
    assert 24 - before <= result.evaluated <= 24 - before + 1  # the interrupted trial is evaluated again


def test_an_interrupted_search_returns_its_trial(tmp_path: Path) -> None:
    storage = tmp_path / "search"
    calls = 0

    def evaluate(genome: tuple[int, ...]) -> float:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return toy_fitness(genome)

    with pytest.raises(KeyboardInterrupt):
        run(toy_space(), EVOLUTION, evaluate, trials=24, storage=storage, identity=IDENTITY)
    # The trial is free at once, without waiting for `patience`.
    result = search(storage, patience=1e9)
    assert (result.scored, result.evaluated) == (search().scored, 20)


def test_others_take_over_from_a_process_that_died(tmp_path: Path) -> None:
    storage, log = tmp_path / "search", tmp_path / "log"
    slow = start(storage, log, 8, 1000)
    wait_for(log, 1)
    slow.kill()
    slow.wait(10)
    result = search(storage, trials=8, patience=1e9)
    assert result.evaluated == 8
    assert result.scored == search(trials=8).scored


def test_others_take_over_from_a_process_of_another_machine_that_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, log = tmp_path / "search", tmp_path / "log"
    slow = start(storage, log, 8, 1000)
    wait_for(log, 1)
    slow.kill()
    slow.wait(10)
    monkeypatch.setattr("ditq.owner._machine", lambda: "another")
    assert search(storage, trials=8, patience=0.3).evaluated == 8


def test_a_slow_process_that_is_alive_keeps_its_trial(tmp_path: Path) -> None:
    storage, log = tmp_path / "search", tmp_path / "log"
    slow = start(storage, log, 8, 4.0)  # four times the patience
    wait_for(log, 1)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match="Waiting for other processes of this search"):
        result = search(storage, trials=8)
    assert time.monotonic() - begin > 1.5
    assert result.evaluated == 7
    assert slow.wait(30) == 0
    assert len(lines(log)) == 1


def test_a_space_with_fewer_individuals_than_trials_ends() -> None:
    space = toy_space((128, 128))
    result = run(space, EVOLUTION, toy_fitness, trials=1000)
    assert len(result.scored) == sum(space.legal((a, b)) for a in space.choices[0] for b in space.choices[1])
    assert len(run(space, Fixed(((64, 64), (128, 32))), toy_fitness, trials=10).scored) == 2


def test_nan_counts_as_the_worst() -> None:
    result = run(toy_space(), EVOLUTION, lambda g: float("nan") if g == (64,) * 6 else toy_fitness(g), trials=10)
    assert result.scored[0][1] == float("inf")
    assert result.best[1] < 1e9


def test_progress_tells_the_best_so_far() -> None:
    seen: list[tuple[int, int, float]] = []
    result = search(trials=10, on_trial=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == list(range(1, 11))
    bests = [best for _, _, best in seen]
    assert bests == sorted(bests, reverse=True)
    assert bests[-1] == result.best[1]


def test_the_storage_of_another_study_is_refused(tmp_path: Path) -> None:
    storage = tmp_path / "search"
    search(storage, trials=3)
    with pytest.raises(UsageError, match="belongs to another study: model is 'toy' there, 'other' here") as error:
        search(storage, identity={**IDENTITY, "model": "other"})
    assert "--storage" in str(error.value)
    assert "seed" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("values", lambda values: [values[0] + 1e-9]),
        ("values", lambda values: []),
        ("values", lambda values: ["xxx"]),
        ("values", lambda values: [None]),
        ("user_attr", lambda attribute: {"checksum": "0" * 16} if "checksum" in attribute else attribute),
    ],
)
def test_an_edited_result_is_refused(key: str, change: Callable[[Any], Any], tmp_path: Path) -> None:
    storage = tmp_path / "search"
    search(storage, trials=12)
    lines = [json.loads(line) for line in storage.read_text().splitlines()]
    edited = next(line for line in reversed(lines) if key in line and line[key] != change(line[key]))
    edited[key] = change(edited[key])
    storage.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DitqError, match="does not match its checksum|is not a storage of a search"):
        search(storage, trials=24)


def test_exchanged_results_are_refused(tmp_path: Path) -> None:
    storage = tmp_path / "search"
    search(storage, trials=12)
    lines = [json.loads(line) for line in storage.read_text().splitlines()]
    first, *_, last = (line for line in lines if line.get("values"))
    first["values"], last["values"] = last["values"], first["values"]
    storage.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DitqError, match="does not match its checksum"):
        search(storage, trials=12)


def test_a_storage_of_somebody_elses_study_is_refused_and_left_alone(tmp_path: Path) -> None:
    storage = tmp_path / "search"
    optuna.create_study(study_name="mine", storage=_journal(storage))
    before = storage.read_bytes()
    with pytest.raises(UsageError, match="'mine'"):
        search(storage)
    assert storage.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a journal\n", b'{"a": 1}\n', b"\x00\xff\x00\xff"])
def test_a_file_that_is_no_storage_is_refused(content: bytes, tmp_path: Path) -> None:
    storage = tmp_path / "search"
    storage.write_bytes(content)
    with pytest.raises(UsageError, match="is not a storage of a search"):
        search(storage)
    with pytest.raises(UsageError, match="cannot be opened|is not a storage"):
        search(tmp_path)


def test_a_database_is_a_storage_too(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    small = Evolution(population=3, top_k=1, crossover=1, mutation=1)
    first = run(toy_space(), small, toy_fitness, trials=5, storage=storage)
    assert run(toy_space(), small, toy_fitness, trials=5, storage=storage).evaluated == 0
    assert first.scored == run(toy_space(), small, toy_fitness, trials=5).scored


def test_missing_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"ditq\[search\]"):
        search()


def _journal(path: Path) -> optuna.storages.JournalStorage:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))


def test_an_error_of_optuna_without_words_is_still_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(optuna, "get_all_study_names", fail)
    with pytest.raises(UsageError, match="not a storage of a search .AssertionError"):
        search(tmp_path / "search")
