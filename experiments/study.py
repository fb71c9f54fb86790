"""A study: named runs that use one another. It runs them in the order of their needs, several at a time.

A `Row` describes a run, which is done once for each seed. A study does missing runs, resumes killed ones, and keeps and
checks finished ones. The settings of a row may be chosen on validation among trials, which are runs of the study too.
"""

import json
import logging
import re
import statistics
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from experiments.recipe_runs import record_of_run
from hf_ilora import SequenceDatasets
from hf_ilora.data.storage import read_description
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.runs import ProgramFailed, is_finished, read_record

logger = logging.getLogger(__name__)

CHOOSING_METRIC = "masked/ndcg@10"
# Recipes that draw nothing at random: one run serves all seeds.
_WITHOUT_SEED = ("fit_counts",)
_STUDENTS = ("train_sasrec", "distill_sasrec")
_TRAINING = (*_STUDENTS, "train_ilora")

_Node = TypeVar("_Node")


@dataclass(frozen=True)
class Row:
    """Runs of one kind, one for each seed.

    Args:
        name: name of the row, and of its folder in the study's folder.
        title: its name in the tables.
        recipe: the recipe, such as train_sasrec; None for a model that the run of another row writes too.
        config: YAML file of the recipe, or name of a shipped one.
        options: settings that override the config's. In a text, {name} is replaced by the folder of that row's run with
            the same seed.
        settings_from: a row whose chosen settings this one starts from; `options` override them.
        trials: settings to choose from on validation; the first one if nothing is tuned. They override `options`.
        seeds: number of seeds, the first ones of the study.
        seed_offset: added to the seed of the recipe, so that a student and its teacher start differently.
        shuffled_titles: whether the run reads a copy of the data whose titles are permuted over the items.
        model: folder of the model in the run's folder; for a row without a recipe, a path with {name} as in `options`.
        kind: the kind of model that a plot shows.
        claimed: whether the tables show its quality on the test split.
        twin: its control: a row that it is compared with, beside the reference of all rows.
    """

    name: str
    title: str
    recipe: str | None
    config: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    settings_from: str | None = None
    trials: Sequence[Mapping[str, object]] = ({},)
    seeds: int = 1
    seed_offset: int = 0
    shuffled_titles: bool = False
    model: str = ""
    kind: str = "student"
    claimed: bool = False
    twin: str | None = None

    @property
    def reads(self) -> set[str]:
        """Names of the rows whose runs this row's runs use."""
        values = [self.model]
        for settings in (self.options, *self.trials):
            for value in settings.values():
                values += map(str, value) if isinstance(value, list | tuple) else [str(value)]
        return {name for value in values for name in re.findall(r"\{(\w+)\}", value)}

    @property
    def has_seeds(self) -> bool:
        """Whether the runs of two seeds differ."""
        return self.recipe not in (None, *_WITHOUT_SEED)


@dataclass(frozen=True)
class Task:
    """A run: of a row's chosen settings, or of one of its trials."""

    row: str
    seed: int
    trial: int | None = None


class Study:
    """The runs of some rows in one folder.

    Args:
        rows: the rows; of several runs that can begin, those of earlier rows do.
        folder: folder of the study.
        data_dir: folder of the prepared data set.
        seeds: seeds of the study.
        trial_seeds: number of seeds, the first ones, over which a trial's metric is averaged.
        tune: whether settings are chosen among the trials; otherwise the first trial is taken.
        threads: CPU threads of a run.

    Raises:
        ValueError: rows name unknown rows, or one another in a cycle.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        folder: Path,
        data_dir: str,
        seeds: Sequence[int],
        *,
        trial_seeds: int = 1,
        tune: bool = True,
        threads: int = 1,
    ):
        self.rows = {row.name: row for row in rows}
        self.folder, self.data_dir, self.seeds, self.tune, self.threads = folder, data_dir, seeds, tune, threads
        self.trial_seeds = seeds[:trial_seeds]
        self._shuffling = threading.Lock()
        for row in rows:
            named = row.reads | {name for name in (row.settings_from, row.twin) if name is not None}
            if unknown := named - set(self.rows):
                raise ValueError(
                    f"row {row.name} names {', '.join(sorted(unknown))}: expected other rows, {', '.join(self.rows)}"
                )
        order = TopologicalSorter({row.name: self._needs(row) for row in rows})
        order.prepare()  # raises a ValueError on a cycle

    def _needs(self, row: Row) -> set[str]:
        return row.reads | ({row.settings_from} if row.settings_from else set())

    # --- the runs ---

    def seeds_of(self, row: Row) -> list[int]:
        """The seeds of a row's runs."""
        return list(self.seeds[: row.seeds] if row.has_seeds else self.seeds[:1])

    def tasks(self, names: Collection[str]) -> dict[Task, set[Task]]:
        """The runs of these rows and all runs that they need, each with the runs that must come before it."""
        graph: dict[Task, set[Task]] = {}

        def add(task: Task) -> None:
            if task in graph:
                return
            row = self.rows[task.row]
            before = {self._final(name, task.seed) for name in row.reads}
            if row.settings_from:
                before.add(self._final(row.settings_from, self.seeds[0]))  # it comes after the trials of that row
            if task.trial is None and self.is_tuned(row):
                before |= {Task(row.name, seed, trial) for trial in range(len(row.trials)) for seed in self.trial_seeds}
            graph[task] = before
            for each in before:
                add(each)

        for name in names:
            for seed in self.seeds_of(self.rows[name]):
                add(Task(name, seed))
        return graph

    def _final(self, name: str, seed: int) -> Task:
        return Task(name, seed if self.rows[name].has_seeds else self.seeds[0])

    def is_tuned(self, row: Row) -> bool:
        """Whether the settings of a row are chosen among several."""
        return self.tune and len(row.trials) > 1

    def run(self, names: Collection[str], parallel: int) -> None:
        """Do the missing runs of these rows, `parallel` at a time.

        A failed run stops only the runs that need it.

        Raises:
            ProgramFailed: runs failed; the message names them.
        """
        graph = self.tasks(names)
        place = {name: number for number, name in enumerate(self.rows)}
        done = []

        def run(task: Task) -> None:
            self.run_task(task)
            done.append(task)
            logger.info("%d of %d runs are finished", len(done), len(graph))

        failures = run_graph(graph, run, parallel, key=lambda task: (task.seed, place[task.row], task.trial is None))
        if failures:
            text = "; ".join(f"{task.row}, seed {task.seed}: {error}" for task, error in failures.items())
            raise ProgramFailed(
                f"{len(failures)} of {len(graph)} runs failed, and the runs that need them were skipped: {text}", 1
            )

    def run_task(self, task: Task) -> None:
        """Do one run unless it is finished."""
        row = self.rows[task.row]
        if row.recipe is None:
            return
        settings = self._settings_of(task)
        folder = self._folder(row, settings, task.seed)
        options: list[object] = [] if row.config is None else [row.config]
        for name, value in {**row.options, **settings}.items():
            values = value if isinstance(value, list | tuple) else [value]
            options += [f"--{name}", *(self._filled(_word(each), task.seed) for each in values)]
        data_dir = self.data_dir
        if row.shuffled_titles:
            data_dir = str(self.folder / "shuffled_titles" / f"seed-{task.seed}")
            with self._shuffling:
                save_with_shuffled_titles(self.data_dir, data_dir, task.seed)
        options += ["--data_dir", data_dir]
        if row.has_seeds and row.recipe in _TRAINING:
            options += ["--seed", task.seed + row.seed_offset, "--disable_tqdm", "true"]
        record = record_of_run(row.recipe, options, folder, self.threads)
        fingerprint = read_description(Path(data_dir))["fingerprint"]
        if record["data_fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} contains a run on data with fingerprint {record['data_fingerprint']}: expected "
                f"{fingerprint}, that of {data_dir}; choose another output_dir, or delete the folder"
            )
        for name in sorted(row.reads):
            if self.rows[name].recipe is not None:
                _check_older(self.folder_of(self.rows[name], task.seed), folder)
        if row.recipe in _STUDENTS:
            logger.info("%s: validation NDCG@10 %.4f", folder, _chosen_by(record))

    def _filled(self, text: str, seed: int) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: str(self.folder_of(self.rows[found[1]], seed)), text)

    # --- their settings and folders ---

    def settings(self, row: Row) -> dict[str, object]:
        """The chosen settings of a row, with those of its `settings_from`."""
        if not self.is_tuned(row):
            return self._settings(row, row.trials[0])
        return self._settings(row, max(self.trials(row), key=lambda trial: trial[1])[0])

    def _settings_of(self, task: Task) -> dict[str, object]:
        row = self.rows[task.row]
        return self.settings(row) if task.trial is None else self._settings(row, row.trials[task.trial])

    def _settings(self, row: Row, trial: Mapping[str, object]) -> dict[str, object]:
        earlier = self.settings(self.rows[row.settings_from]) if row.settings_from else {}
        return {**{name: value for name, value in earlier.items() if name not in row.options}, **trial}

    def trials(self, row: Row) -> list[tuple[Mapping[str, object], float]]:
        """The trials of a row, each with its metric on validation, averaged over the seeds of trials."""
        result = []
        for trial in row.trials:
            folders = [self._folder(row, self._settings(row, trial), seed) for seed in self.trial_seeds]
            result.append((trial, statistics.mean(_chosen_by(read_record(each / "run.json")) for each in folders)))
        return result

    def folder_of(self, row: Row, seed: int) -> Path:
        """The folder of a row's run."""
        if row.recipe is None:
            return Path(self._filled(row.model, seed))
        return self._folder(row, self.settings(row), seed)

    def _folder(self, row: Row, settings: Mapping[str, object], seed: int) -> Path:
        if not row.has_seeds:
            return self.folder / row.name
        return self.folder / row.name / _label(settings) / f"seed-{seed}"

    def model_of(self, row: Row, seed: int) -> Path:
        """The folder of the model that a row's run wrote."""
        folder = self.folder_of(row, seed)
        return folder if row.recipe is None else folder / row.model

    def is_whole(self, row: Row) -> bool:
        """Whether all runs of a row, and all runs that they need, are finished."""
        order = TopologicalSorter(self.tasks([row.name])).static_order()
        return all(self._is_done(task) for task in order)  # in order: the settings of a run depend on earlier runs

    def _is_done(self, task: Task) -> bool:
        row = self.rows[task.row]
        return row.recipe is None or is_finished(self._folder(row, self._settings_of(task), task.seed))

    def runs_behind(self, row: Row, seed: int) -> set[Path]:
        """The folders of a run and of all runs that it uses; together they are the cost of its model."""
        folders = set() if row.recipe is None else {self.folder_of(row, seed)}
        return folders.union(*(self.runs_behind(self.rows[name], seed) for name in row.reads))


def run_graph(
    graph: Mapping[_Node, Collection[_Node]],
    run: Callable[[_Node], object],
    parallel: int,
    key: Callable[[_Node], object],
) -> dict[_Node, Exception]:
    """Run nodes after those that they need, several at a time.

    Args:
        graph: for each node, the nodes that it needs.
        run: runs one node.
        parallel: number of nodes that run at a time.
        key: of the nodes that can begin, those with the lowest keys begin first.

    Returns:
        The errors of the nodes that failed. The nodes that need them have not run.
    """
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    ready: list[_Node] = []
    running: dict[Future, _Node] = {}
    failures: dict[_Node, Exception] = {}
    with ThreadPoolExecutor(parallel) as pool:
        while True:
            ready = sorted([*ready, *sorter.get_ready()], key=key)
            while ready and len(running) < parallel:
                node = ready.pop(0)
                running[pool.submit(run, node)] = node
            if not running:
                return failures
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                node, error = running.pop(future), future.exception()
                if error is None:
                    sorter.done(node)
                elif isinstance(error, Exception):
                    logger.error("%s failed: %s", node, error)
                    failures[node] = error
                else:
                    raise error


def save_with_shuffled_titles(data_dir: str, folder: str, seed: int) -> None:
    """Save a copy of a data set whose titles are permuted over the items, unless `folder` has it.

    Raises:
        ValueError: `folder` contains another data set.
    """
    sequences = SequenceDatasets.load(data_dir)
    table = sequences.catalogue.table
    order = np.random.default_rng(seed).permutation(len(table))
    for name in {"title", "year", "genres"} & set(table.column_names):
        table = table.set_column(table.column_names.index(name), name, table[name].take(pa.array(order)))
    shuffled = SequenceDatasets(dict(sequences), Catalogue(table), sequences.protocol, sequences.source)
    if not Path(folder).exists():
        shuffled.save(folder)
    elif read_description(Path(folder))["fingerprint"] != shuffled.fingerprint:
        raise ValueError(f"{folder} is no shuffled copy of {data_dir}: delete it, or choose another output_dir")


def _check_older(used: Path, folder: Path) -> None:
    """Raise a ValueError if the run in `folder` began before the run in `used`, which it uses."""
    started = [datetime.fromisoformat(read_record(each / "run.json")["started"]) for each in (used, folder)]
    if started[0] > started[1]:
        raise ValueError(
            f"{folder} is older than {used}, which it uses: expected the newer of the two; delete {folder} to run it "
            "again"
        )


def _chosen_by(record: dict) -> float:
    return record["metrics"]["validation"][CHOOSING_METRIC]["mean"]


def _label(settings: Mapping[str, object]) -> str:
    """The name of the folder of a run with these settings."""
    if not settings:
        return "configured"
    return re.sub(r"[^\w.,-]+", "", json.dumps(dict(settings), separators=(",", "-")))


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
