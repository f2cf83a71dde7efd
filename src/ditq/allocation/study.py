"""A search in an Optuna study: resumable, and shared by any number of processes without a coordinator.

Optuna's storage assigns each trial number to one process. The number of a trial is its *slot* in the search. The
individual of a slot depends only on the seed and on the results of earlier generations. So every process can derive
its work from its slots, nothing is evaluated twice, and the result depends neither on the number of processes nor on
when they were killed.

A process increments a counter on its trials to show that it is alive. If a counter does not change for ``patience``
seconds, other processes take over the slot. Each process measures that time with its own clock. Processes of the same
machine see at once that another has ended.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from ditq import digests
from ditq.allocation.evolution import Scored
from ditq.allocation.space import Genome, Space
from ditq.errors import CheckpointError, DitqError, UsageError, warn
from ditq.owner import is_gone, owner
from ditq.reading import cut

if TYPE_CHECKING:
    from collections.abc import Iterator

    import optuna

NAME = "ditq-search"
PATIENCE = 30.0  # seconds without a change of the counter until a process counts as dead
POLL = 0.2  # seconds between reads of the storage while there is nothing to do

# Keys of user attributes: the identity of the study; the slot that a trial repeats; the counter and the process of a
# trial; what was measured besides the fitness; what both must agree with.
IDENTITY, REPEATS, ALIVE, OWNER, DETAILS, CHECKSUM = "identity", "repeats", "alive", "owner", "details", "checksum"


class Strategy(Protocol):
    """Chooses the individuals of each generation."""

    def generation(
        self, number: int, space: Space, scored: Sequence[Scored], earlier: Collection[Genome], random: Random
    ) -> list[Genome]:
        """New individuals as a pure function of all earlier ones; an empty list if there are no more."""


class NotYet(Exception):  # noqa: N818
    """The individual of a slot depends on results that are still missing."""


@dataclass
class Schedule:
    """Maps the slots of a search to individuals."""

    strategy: Strategy
    space: Space
    seed: int
    generations: list[list[Genome]] = field(default_factory=list)

    def genome(self, slot: int, values: Mapping[int, float]) -> Genome | None:
        """The individual of a slot; None if the space does not have as many.

        Args:
            slot: number of the slot, from 0.
            values: fitness by slot, of all evaluated slots.

        Raises:
            NotYet: an earlier generation is not complete.
        """
        start, number = 0, 0
        while True:
            if number == len(self.generations):
                if any(s not in values for s in range(start)):
                    raise NotYet
                earlier = [genome for members in self.generations for genome in members]
                scored = [(genome, values[s]) for s, genome in enumerate(earlier)]
                random = Random(f"{self.seed}/{number}")
                self.generations.append(self.strategy.generation(number, self.space, scored, earlier, random))
            members = self.generations[number]
            if slot < start + len(members):
                return members[slot - start]
            if not members:
                return None
            start, number = start + len(members), number + 1


@dataclass(frozen=True)
class Measured:
    """The fitness of an individual, and numbers that are stored with it: JSON values."""

    fitness: float
    details: dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """Results of a search.

    Attributes:
        scored: every individual with its fitness, in the order of slots.
        evaluated: number of individuals that this process evaluated.
        details: what was stored with each fitness, in the same order.
    """

    scored: tuple[Scored, ...]
    evaluated: int
    details: tuple[dict[str, Any], ...] = ()

    @property
    def best(self) -> Scored:
        """The individual with the smallest fitness; the earliest one if several are equal."""
        return min(self.scored, key=lambda individual: individual[1])


def run(
    space: Space,
    strategy: Strategy,
    evaluate: Callable[[Genome], float | Measured],
    *,
    trials: int,
    seed: int = 0,
    storage: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    name: str = NAME,
    patience: float = PATIENCE,
    on_trial: Callable[[int, int, float], None] | None = None,
) -> Trials:
    """Evaluates ``trials`` individuals, or all that exist, together with all other processes on the same storage.

    Returns when all are evaluated, by this process or by others. A second call with more ``trials`` continues.

    Args:
        space: the search space.
        strategy: chooses the individuals.
        evaluate: fitness of a genome, smaller is better, with details if it returns :class:`Measured`; must depend
            only on the genome and ``identity``.
        trials: number of individuals to evaluate, over all processes.
        seed: of the strategy.
        storage: a file, created if it is missing, or the URL of a database. Machines can share a file through a
            shared folder. None: memory.
        identity: everything that the fitness depends on. A storage with another identity is refused.
        name: of the study; begins with :data:`NAME`. The storage may hold other studies whose names begin so.
        patience: seconds without a change of its counter after which a process counts as dead.
        on_trial: called with (evaluated by all processes, trials, best fitness so far).

    Raises:
        UsageError: Optuna is not installed; the storage belongs to another search, or is not a storage.
        CheckpointError: a stored result was edited or is damaged.
    """
    study = open_study(storage, json.loads(json.dumps(identity or {})), name)
    schedule = Schedule(strategy, space, seed)
    watch = _Watch(study, patience, str(storage))
    done, reported = 0, -1
    with watch.beating():
        while True:
            slots = watch.slots()
            values = watch.values(slots)
            finished = [value for slot, value in values.items() if slot < trials]
            if on_trial and finished and len(finished) != reported:
                reported = len(finished)
                on_trial(reported, trials, min(finished))
            job = watch.ready(schedule, values, trials)
            if job is not None:
                trial, slot, genome = job
                _record(trial, space, genome)
                result = evaluate(genome)
                measured = result if isinstance(result, Measured) else Measured(result, {})
                # Optuna would count NaN as a failed trial, and the slot would be repeated forever.
                value = math.inf if math.isnan(measured.fitness) else float(measured.fitness)
                _finish(study, trial, slot, value, json.loads(json.dumps(measured.details)))
                watch.held.remove(trial)
                done += 1
            elif watch.can_take(schedule, slots, values, trials):
                watch.take()
            elif _finished(schedule, values, trials):
                break
            else:
                watch.wait()
    individuals = [(schedule.genome(slot, values), slot) for slot in range(trials)]
    return Trials(
        tuple((genome, values[slot]) for genome, slot in individuals if genome is not None),
        done,
        tuple(watch.details[slot] for genome, slot in individuals if genome is not None),
    )


def open_study(storage: str | Path | None, identity: dict[str, Any], name: str = NAME) -> optuna.Study:
    """The study in a storage, created if it is missing.

    Raises:
        UsageError: as :func:`run`.
    """
    try:
        import optuna
        from optuna.storages import InMemoryStorage, JournalStorage, RDBStorage

        from ditq.allocation.journal import Journal
    except ImportError as error:
        raise UsageError("Searches need Optuna: pip install 'ditq[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if storage is None:
            opened: Any = InMemoryStorage()
        elif "://" in str(storage):
            opened = RDBStorage(str(storage))
        else:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            opened = JournalStorage(Journal(str(storage)))
        others = [other for other in optuna.get_all_study_names(opened) if not other.startswith(NAME)]
        options: dict[str, Any] = {"study_name": name, "load_if_exists": True, "sampler": _fixed_value_sampler()}
        study = None if others else optuna.create_study(storage=opened, **options)
    except DitqError:
        raise
    except OSError as error:
        raise UsageError(f"The storage {storage} cannot be opened: {error}.") from error
    except Exception as error:  # a file that is not a journal fails in many ways, a database in those of its driver
        raise UsageError(
            f"{storage} is not a storage of a search ({cut(f'{type(error).__name__}: {error}')}). "
            "Choose another --storage."
        ) from error
    if study is None:
        raise UsageError(f"The storage {storage} belongs to another study, {others[0]!r}. Choose another --storage.")
    if IDENTITY not in study.user_attrs:
        study.set_user_attr(IDENTITY, identity)
    stored = study.user_attrs[IDENTITY]  # another process may have written it first
    if not isinstance(stored, dict):
        raise UsageError(f"{storage} is not a storage of a search: its identity is damaged. Choose another --storage.")
    differing = "; ".join(
        f"{key} is {_short(stored.get(key))} there, {_short(identity.get(key))} here"
        for key in {**stored, **identity}
        if stored.get(key) != identity.get(key)
    )
    if differing:
        raise UsageError(
            f"The storage {storage} belongs to another study: {differing}. Choose another --storage, or use the "
            "settings of that study to continue it."
        )
    return study


class _Watch:
    """One process's view of a study: the trials it holds, and the counters of other processes."""

    def __init__(self, study: optuna.Study, patience: float, storage: str) -> None:
        self.study, self.patience, self.storage = study, patience, storage
        self.held: list[optuna.Trial] = []
        self.details: dict[int, dict[str, Any]] = {}  # by slot, of all evaluated slots
        self._waited = 0.0
        self._counters: dict[int, tuple[Any, float]] = {}  # by trial: its counter, and when that changed last

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Increments the counters of the held trials; at the end of the block, returns those not evaluated."""
        stop = threading.Event()

        def beat() -> None:
            count = 0
            while not stop.wait(self.patience / 5):
                count += 1
                for trial in list(self.held):
                    try:
                        trial.set_user_attr(ALIVE, count)
                    except Exception:  # the trial has just finished; a lost storage also fails in the search itself
                        continue

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            for trial in self.held:
                self._fail(trial.number)

    def slots(self) -> dict[int, list[Any]]:
        """All trials by slot, in order. Marks trials of dead processes as failed."""
        trials = self.study.get_trials(deepcopy=False)
        held = {trial.number for trial in self.held}
        slots: dict[int, list[Any]] = {}
        fresh = 0
        for trial in trials:
            slot = trial.user_attrs.get(REPEATS)
            if slot is None:
                slot, fresh = fresh, fresh + 1
            elif not isinstance(slot, int):
                raise CheckpointError(f"{self.storage} is damaged: the slot of trial {trial.number} is no number.")
            slots.setdefault(slot, []).append(trial)
            if trial.state.name == "RUNNING" and trial.number not in held and self._is_dead(trial):
                self._fail(trial.number)
        self.fresh = fresh
        return slots

    def values(self, slots: Mapping[int, Sequence[Any]]) -> dict[int, float]:
        """Fitness by slot, of all evaluated slots.

        Raises:
            CheckpointError: a result is not the one that was stored.
        """
        values: dict[int, float] = {}
        for slot, attempts in slots.items():
            for trial in attempts:
                if trial.state.name != "COMPLETE":
                    continue
                result, details = trial.values, trial.user_attrs.get(DETAILS, {})
                numbers = [value for value in result if isinstance(value, int | float)]  # SQLite keeps any type
                if (
                    len(result) != 1
                    or len(numbers) != 1
                    or trial.user_attrs.get(CHECKSUM) != _checksum(trial.number, slot, numbers[0], details)
                ):
                    raise CheckpointError(
                        f"{self.storage}: the result of trial {trial.number} does not match its checksum: the storage "
                        "is damaged, or was edited. Choose another --storage."
                    )
                values[slot], self.details[slot] = result[0], details
        return values

    def ready(
        self, schedule: Schedule, values: Mapping[int, float], trials: int
    ) -> tuple[optuna.Trial, int, Genome] | None:
        """A held trial that can be evaluated now, with its slot and its individual.

        Held trials that are not needed are returned as failed.
        """
        slots = self.slots() if self.held else {}
        slot_of = {trial.number: slot for slot, attempts in slots.items() for trial in attempts}
        for trial in list(self.held):
            slot = slot_of[trial.number]
            if any(t.number == trial.number and t.state.name == "FAIL" for t in slots[slot]):
                self.held.remove(trial)  # another process counted this one as dead
                continue
            earlier = [t for t in slots[slot] if t.number < trial.number and t.state.name != "FAIL"]
            try:
                genome = None if earlier or slot >= trials else schedule.genome(slot, values)
            except NotYet:
                continue
            if genome is not None:
                return trial, slot, genome
            self.held.remove(trial)
            self._fail(trial.number)
        return None

    def can_take(
        self, schedule: Schedule, slots: Mapping[int, Sequence[Any]], values: Mapping[int, float], trials: int
    ) -> bool:
        """Whether there is a slot to take. Queues a new trial for a slot whose trials all failed."""
        for slot, attempts in slots.items():
            if slot < trials and all(t.state.name == "FAIL" for t in attempts) and _exists(schedule, slot, values):
                self._repeat(slot)
                return True
        if any(t.state.name == "WAITING" for attempts in slots.values() for t in attempts):
            return True
        return not self.held and self.fresh < trials and _exists(schedule, self.fresh, values)

    def take(self) -> None:
        """Takes a trial, or a new one."""
        trial = self.study.ask()
        self.held.append(trial)
        trial.set_user_attr(OWNER, owner())

    def wait(self) -> None:
        """Waits for the results of other processes, and says so once if that takes longer."""
        self._waited += POLL
        if self._waited - POLL <= 1 < self._waited:
            warn(
                "Waiting for other processes of this search to finish their individuals. A process that does not "
                f"answer for {self.patience:.0f} seconds counts as dead, and its individuals are evaluated here."
            )
        time.sleep(POLL)

    def _repeat(self, slot: int) -> None:
        import optuna

        # Two processes may do this at once. The earliest trial of a slot counts, see ready().
        waiting = optuna.trial.TrialState.WAITING
        self.study.add_trial(optuna.create_trial(state=waiting, user_attrs={REPEATS: slot}))

    def _is_dead(self, trial: Any) -> bool:
        """Whether the process of a trial has ended, or its counter did not change for ``patience`` seconds."""
        if is_gone(str(trial.user_attrs.get(OWNER))):
            return True
        count, now = trial.user_attrs.get(ALIVE), time.monotonic()
        previous, since = self._counters.setdefault(trial.number, (count, now))
        if previous != count:
            self._counters[trial.number] = (count, now)
            return False
        return now - since > self.patience

    def _fail(self, number: int) -> None:
        import optuna

        self.study.tell(number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


def _finish(study: optuna.Study, trial: optuna.Trial, slot: int, value: float, details: dict[str, Any]) -> None:
    """Stores the result of a trial, unless another process took this one for dead meanwhile."""
    from optuna.exceptions import UpdateFinishedTrialError

    with suppress(UpdateFinishedTrialError):
        if details:
            trial.set_user_attr(DETAILS, details)
        trial.set_user_attr(CHECKSUM, _checksum(trial.number, slot, value, details))
        study.tell(trial, value, skip_if_finished=True)


def _checksum(number: int, slot: int, value: float, details: Mapping[str, Any]) -> str:
    """What ties a result to its trial and slot: the individual of a slot follows from the results of earlier ones."""
    return digests.of_json([number, slot, float(value).hex(), *([details] if details else [])])


def _exists(schedule: Schedule, slot: int, values: Mapping[int, float]) -> bool:
    """Whether a slot has an individual, or may have one once missing results are there."""
    try:
        return schedule.genome(slot, values) is not None
    except NotYet:
        return True


def _finished(schedule: Schedule, values: Mapping[int, float], trials: int) -> bool:
    return all(slot in values or not _exists(schedule, slot, values) for slot in range(trials))


def _record(trial: optuna.Trial, space: Space, genome: Genome) -> None:
    """Stores choices as Optuna parameters, so that Optuna's tools can show and plot a search."""
    sampler: Any = trial.study.sampler
    for gene, possible, choice in zip(space.genes, space.choices, genome, strict=True):
        sampler.value = choice
        trial.suggest_categorical(gene.name, possible)
    for name, value in space.averages(genome).items():
        trial.set_user_attr(name, value)


def _fixed_value_sampler() -> Any:
    """An Optuna sampler that returns its attribute ``value``."""
    from optuna.samplers import BaseSampler

    class FixedValueSampler(BaseSampler):
        value: Any = None

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.value

    return FixedValueSampler()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
