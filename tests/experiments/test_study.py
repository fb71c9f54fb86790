"""A study does its missing runs, each after those that it uses, and chooses settings on validation."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from experiments import study as study_module
from experiments.language_rows import REFERENCE, SETTINGS, TABLES, language_rows
from experiments.study import Row, Study, run_graph, save_with_shuffled_titles
from hf_ilora import SequenceDatasets
from hf_ilora.runs import ProgramFailed, parse_arguments
from hf_ilora.runs.recipe_files import load_recipe
from tests.paths import RECIPES
from tests.synthetic import cyclic_sequences

# The fake recipe's quality on validation, by a word of its options.
QUALITY = {"0.2": 0.7, "0.3": 0.9, "0.4": 0.8}


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The runs that a fake recipe did, in their order: folder and options. `failing` in a folder makes it fail."""
    sequences = cyclic_sequences(num_users=20)
    sequences.save(tmp_path / "data")
    runs = []

    def fake(recipe, options, folder, threads):
        words = list(map(str, options))
        if (folder / "run.json").exists():
            return json.loads((folder / "run.json").read_text())
        if "failing" in str(folder):
            raise ProgramFailed("no memory", 1)
        runs.append((str(folder.relative_to(tmp_path / "study")), words))
        folder.mkdir(parents=True)
        begun_at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=len(runs))
        value = next((QUALITY[word] for word in words if word in QUALITY), 0.5)
        data = words[words.index("--data_dir") + 1]
        record = {
            "status": "finished", "started": begun_at.isoformat(), "configuration": {}, "seed": 1,
            "data_fingerprint": SequenceDatasets.load(data).fingerprint, "git": None, "durations_seconds": {},
            "metrics": {"validation": {"masked/ndcg@10": {"mean": value}}},
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(record))
        return record

    monkeypatch.setattr(study_module, "record_of_run", fake)
    return runs


ROWS = [
    Row("counts", "counts", "fit_counts", model="transition_counts"),
    Row(
        "teacher",
        "teacher",
        "train_sasrec",
        "beauty/sasrec",
        trials=({}, {"hidden_dropout": 0.3}, {"hidden_dropout": 0.4}),
        seeds=2,
    ),
    Row(
        "student",
        "student",
        "distill_sasrec",
        "beauty/sasrec",
        {"teacher": ["{teacher}", "{counts}/transition_counts"], "use_cpu": True},
        settings_from="teacher",
        seeds=2,
        seed_offset=100,
    ),
    Row("popularity", "popularity", None, model="{counts}/popularity"),
    Row("shuffled", "shuffled", "train_sasrec", "beauty/sasrec", shuffled_titles=True),
]


def study_of(rows, tmp_path, seeds=(1, 2, 3), **settings) -> Study:
    return Study(rows, tmp_path / "study", str(tmp_path / "data"), seeds, **settings)


def test_runs_come_after_those_that_they_use_with_the_settings_that_are_best_on_validation(begun, tmp_path):
    study = study_of(ROWS, tmp_path)
    study.run(["student", "popularity"], parallel=2)
    folders = [folder for folder, _ in begun]
    chosen = "teacher/hidden_dropout-0.3"
    assert set(folders) == {
        "counts", "teacher/configured/seed-1", f"{chosen}/seed-1", "teacher/hidden_dropout-0.4/seed-1",
        f"{chosen}/seed-2", "student/hidden_dropout-0.3/seed-1", "student/hidden_dropout-0.3/seed-2",
    }  # fmt: skip
    assert len(folders) == 7  # the trial of the chosen settings is the run of its seed
    options = dict(begun)["student/hidden_dropout-0.3/seed-2"]
    assert options[0] == "beauty/sasrec"
    place = options.index("--teacher")
    teacher, counts = tmp_path / "study" / chosen / "seed-2", tmp_path / "study" / "counts" / "transition_counts"
    assert options[place + 1 : place + 3] == [str(teacher), str(counts)]
    assert " ".join(options[place + 3 :]).startswith("--use_cpu true --hidden_dropout 0.3 --data_dir")
    assert options[options.index("--seed") + 1] == "102"
    assert study.model_of(study.rows["popularity"], 1) == tmp_path / "study" / "counts" / "popularity"
    assert study.runs_behind(study.rows["student"], 2) == {
        tmp_path / "study" / "student/hidden_dropout-0.3/seed-2", teacher, counts.parent,
    }  # fmt: skip


def test_finished_runs_are_kept(begun, tmp_path):
    for _ in range(2):
        study_of(ROWS, tmp_path).run(["student"], parallel=1)
    assert len(begun) == 7


def test_without_tuning_the_first_trial_is_taken(begun, tmp_path):
    study_of(ROWS, tmp_path, tune=False).run(["student"], parallel=1)
    assert [folder for folder, _ in begun if "teacher" in folder] == [
        "teacher/configured/seed-1", "teacher/configured/seed-2",
    ]  # fmt: skip


def test_a_failed_run_stops_only_the_runs_that_need_it(begun, tmp_path):
    rows = [
        Row("failing", "failing", "train_sasrec"),
        Row("needs", "needs", "distill_sasrec", options={"teacher": "{failing}"}),
        Row("other", "other", "train_sasrec"),
    ]
    study = study_of(rows, tmp_path)
    with pytest.raises(ProgramFailed, match=r"1 of 3 runs failed, .*failing, seed 1: no memory"):
        study.run(["needs", "other"], parallel=1)
    assert [folder for folder, _ in begun] == ["other/configured/seed-1"]
    assert [study.is_whole(row) for row in rows] == [False, False, True]


def test_a_student_of_a_teacher_that_was_trained_anew_is_refused(begun, tmp_path):
    study = study_of(ROWS, tmp_path)
    study.run(["student"], parallel=1)
    (tmp_path / "study" / "counts" / "run.json").unlink()
    (tmp_path / "study" / "counts").rmdir()
    with pytest.raises(ProgramFailed, match=r"is older than .*counts, which it uses"):
        study.run(["student"], parallel=1)


def test_runs_on_other_data_are_refused(begun, tmp_path):
    study_of(ROWS, tmp_path).run(["counts"], parallel=1)
    cyclic_sequences(num_users=21).save(tmp_path / "data")
    with pytest.raises(ProgramFailed, match="contains a run on data with fingerprint"):
        study_of(ROWS, tmp_path).run(["counts"], parallel=1)


def test_rows_that_do_not_fit_together_are_refused(begun, tmp_path):
    with pytest.raises(ValueError, match="row a names b: expected other rows"):
        study_of([Row("a", "a", "train_sasrec", options={"teacher": "{b}"})], tmp_path)
    rows = [Row(x, x, "train_sasrec", options={"teacher": f"{{{y}}}"}) for x, y in ("ab", "ba")]
    with pytest.raises(ValueError, match="cycle"):
        study_of(rows, tmp_path)


def test_a_graph_runs_the_lowest_keys_first_among_those_that_can():
    order = []
    graph = {"d": {"a"}, "c": set(), "b": {"c"}, "a": set()}
    assert run_graph(graph, order.append, 1, key=str) == {}
    assert order == ["a", "c", "b", "d"]


def test_titles_are_permuted_and_nothing_else(begun, tmp_path):
    save_with_shuffled_titles(str(tmp_path / "data"), str(tmp_path / "shuffled"), seed=1)
    original, shuffled = (SequenceDatasets.load(tmp_path / name) for name in ("data", "shuffled"))
    assert shuffled.raw_ids.tolist() == original.raw_ids.tolist()
    titles = [each.catalogue.table["title"].to_pylist() for each in (original, shuffled)]
    assert titles[0] != titles[1] and sorted(titles[0]) == sorted(titles[1])
    assert shuffled["test"].to_dict() == original["test"].to_dict()
    save_with_shuffled_titles(str(tmp_path / "data"), str(tmp_path / "shuffled"), seed=1)
    with pytest.raises(ValueError, match="is no shuffled copy"):
        save_with_shuffled_titles(str(tmp_path / "data"), str(tmp_path / "shuffled"), seed=2)


def test_a_row_with_shuffled_titles_reads_the_copy_of_its_seed(begun, tmp_path):
    study_of(ROWS, tmp_path).run(["shuffled"], parallel=1)
    [(_, options)] = begun
    data = Path(options[options.index("--data_dir") + 1])
    assert data == tmp_path / "study" / "shuffled_titles" / "seed-1" and data.is_dir()


@pytest.mark.parametrize("data", SETTINGS)
def test_the_rows_on_language_fit_together_and_have_as_many_trials(data, begun, tmp_path):
    rows = {row.name: row for row in language_rows(SETTINGS[data])}
    study = study_of(list(rows.values()), tmp_path, seeds=[1])
    names = {name for table in TABLES.values() for name in table}
    study.run(names, parallel=1)
    recipes = {row.name: row.recipe for row in rows.values()}
    commands = {}
    for folder, words in begun:
        options = tuple(word for word in words if word.startswith("--"))
        commands[recipes[folder.partition("/")[0]], options] = [*words, "--output_dir", folder]
    for (recipe, _), words in commands.items():  # one for each set of options, since parsing takes time
        parse_arguments(load_recipe(RECIPES / f"{recipe}.py").ARGUMENTS, words)
    for name in names:
        assert not rows[name].claimed or rows[name].seeds >= 3 or not rows[name].has_seeds
    assert len(rows[REFERENCE].trials) >= sum(len(rows[name].trials) for name in ("start", "ensemble_counts"))
    for name in ("start", "ensemble", "ensemble_counts"):
        assert rows[f"tf_idf_{name}"].trials == rows[name].trials and rows[name].twin == f"tf_idf_{name}"


def test_a_language_model_and_its_control_read_the_same_prompts_of_users_that_their_sasrec_has_not_seen():
    rows = {row.name: row for row in language_rows(SETTINGS["beauty"])}
    ilora, plain, gate = (rows[name].options for name in ("ilora", "plain_llm", "ilora_gate"))
    assert ilora["train_fraction"][0] == gate["train_fraction"][1] and ilora["train_fraction"][1] == 1.0
    changed = {name for name in plain if plain[name] != ilora.get(name)}
    assert changed == {"lora_learning_rate_factor", "num_experts", "item_placeholders"}
    assert plain["lora_learning_rate_factor"] == 0
    for name in ("mixture_ilora", "mixture_both_ilora", "ilora_start"):
        row = rows[name]
        control = rows[row.twin]
        as_control = {key: str(value).replace("{ilora", "{plain_llm") for key, value in row.options.items()}
        assert as_control == {key: str(value) for key, value in control.options.items()}
    # A sample of users that one recipe draws is the sample of the other, if both draw with the same seed.
    asked, mixed = rows["ilora_labels"].options, rows["mixture_ilora"].options
    assert asked["budget"] == mixed["validation_users"] and "seed" not in asked | mixed
