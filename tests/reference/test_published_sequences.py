"""Published rows under our ids, by hand, and the released files themselves."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ilora import SASRecForNextItem, SequenceDatasets, build_sequences, convert_reference_sasrec, load_movielens
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.reference.convert_models import load_reference_state_dict, reference_catalogue
from hf_ilora.reference.published_sequences import load_published_sequences
from tests.paths import SHARED
from tests.synthetic import cyclic_sequences

REFERENCE = SHARED / "reference"
NUM_ITEMS = 6
TRAIN = {"history": [[6], [0], [0, 1, 2], [6, 6, 3, 4, 5], [0, 1, 2, 3, 4]], "target": [0, 1, 3, 0, 5]}
ROWS = {"history": [[0, 1, 2], [5, 4, 3, 2]], "target": [3, 0], "candidates": [[3, 5], [1, 0]]}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, items={"item_id": range(NUM_ITEMS), "title": ["A", "B ", "", "D", "A", "F"]})
    write(tmp_path, train=TRAIN, validation=ROWS, test=ROWS)
    return tmp_path


def write(folder, **tables):
    for name, columns in tables.items():
        pq.write_table(pa.table({key: list(values) for key, values in columns.items()}), folder / f"{name}.parquet")


def rows_of(split):
    return list(zip(split["history"], split["target"], strict=True))


def test_ids_are_shifted_and_short_or_padded_rows_are_dropped(folder, tmp_path):
    sequences = load_published_sequences(folder, max_history=4)
    assert rows_of(sequences["train"]) == [([1, 2, 3], 4), ([4, 5, 6], 1), ([2, 3, 4, 5], 6)]
    assert sequences["train"]["user_id"][:] == ["train-2", "train-3", "train-4"]
    assert rows_of(sequences["test"]) == [([1, 2, 3], 4), ([6, 5, 4, 3], 1)]
    assert sequences["test"]["candidates"][:] == [[4, 6], [2, 1]]
    assert sequences["test"]["user_id"][:] == ["test-0", "test-1"]
    assert sequences.catalogue.raw_ids(range(1, NUM_ITEMS + 1)) == list(range(NUM_ITEMS))
    assert sequences.catalogue.titles(range(1, NUM_ITEMS + 1)) == ["A", "B", "unknown", "D", "A", "F"]
    sequences.save(tmp_path / "saved")
    loaded = SequenceDatasets.load(tmp_path / "saved")
    assert loaded.fingerprint == sequences.fingerprint
    assert loaded.protocol == {
        "name": "published", "min_history": 3, "max_history": 4, "num_candidates": 2, "rebuilt": None,
    }  # fmt: skip


def test_min_history_keeps_shorter_rows_but_never_padding_alone(folder):
    sequences = load_published_sequences(folder, min_history=1)
    assert rows_of(sequences["train"])[0] == ([1], 2) and len(sequences["train"]) == 4


def test_rebuilt_train_rows_are_mapped_through_their_raw_ids(folder, tmp_path):
    rebuilt = cyclic_sequences(num_users=12, num_items=30, protocol="temporal_users")
    write(tmp_path, items={"item_id": range(130), "title": [f"T{item}" for item in range(130)]})
    (tmp_path / "train.parquet").unlink()
    sequences = load_published_sequences(folder, rebuilt=rebuilt)
    raw_ids = [None, *rebuilt.raw_ids.tolist()]
    expected = [
        ([raw_ids[item] for item in row["history"]], raw_ids[row["target"]], str(row["user_id"]))
        for row in rebuilt["train"]
    ]  # raw id = published id + 1 = our id
    assert [(row["history"], row["target"], row["user_id"]) for row in sequences["train"]] == expected
    assert sequences.protocol["rebuilt"] == rebuilt.protocol
    write(tmp_path, items={"item_id": range(NUM_ITEMS), "title": ["T"] * NUM_ITEMS})
    with pytest.raises(ValueError, match=r"raw ids from 100 to 129: expected integers 1 to 6"):
        load_published_sequences(folder, rebuilt=rebuilt)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"items": {"item_id": [0, 2], "title": ["A", "B"]}}, "expected the published ids from 0"),
        ({"items": {"item_id": [0, 1]}}, "expected a column title of kind string"),
        ({"test": {**ROWS, "candidates": [[3, 5], [1, 2]]}}, "the target among them"),
        ({"test": {**ROWS, "candidates": [[3, 7], [1, 0]]}}, r"ids 0 to 7 in candidates: expected .* 0 to 5"),
        ({"test": {**ROWS, "history": [[0], [1]]}}, "1 history items: expected at least min_history=3"),
        ({"test": {"history": ROWS["history"], "target": ["x", "y"]}}, "expected a column target of kind int"),
        ({"train": {"history": [[0]], "target": [1]}}, "no row of train has 3 history items"),
    ],
)
def test_files_that_are_not_the_published_ones_are_refused(folder, tables, message):
    write(folder, **tables)
    with pytest.raises(ValueError, match=message):
        load_published_sequences(folder)


def test_missing_train_rows_and_bad_settings_are_refused(folder):
    (folder / "train.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*train\.parquet"):
        load_published_sequences(folder)
    with pytest.raises(ValueError, match="min_history is 0"):
        load_published_sequences(folder, min_history=0)


def released(name):
    if not REFERENCE.is_dir():
        pytest.skip("needs ../shared/reference beside the project")
    return REFERENCE / f"llara_{name}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["movielens", "lastfm"])
def test_the_converted_sasrec_reproduces_its_figures_on_the_saved_data(name, tmp_path):
    source = released(name)
    rebuilt = None
    if name == "movielens":
        options = {"protocol": "temporal_users", "min_rating": 3, "num_candidates": 0}
        rebuilt = build_sequences(*load_movielens("ml-100k"), **options)
    load_published_sequences(source, rebuilt=rebuilt).save(tmp_path / "data")
    sequences = SequenceDatasets.load(tmp_path / "data")
    model = convert_reference_sasrec(load_reference_state_dict(source / "sasrec_original.safetensors"))
    model.catalogue = reference_catalogue(tmp_path / "data" / "items.parquet", model.config.num_items)
    model.save_pretrained(tmp_path / "sasrec")
    model = SASRecForNextItem.from_pretrained(tmp_path / "sasrec")
    assert model.catalogue.titles([1]) == sequences.catalogue.titles([1])
    summary = json.loads((source / "summary.json").read_text())
    assert len(sequences["train"]) == {"movielens": 66_127, "lastfm": 47_872}[name]
    for split in ("validation", "test"):
        ranks = rank_split(model, sequences[split])
        assert len(ranks.candidates) == summary[split]["rows"]
        assert (ranks.candidates == 1).mean() == pytest.approx(summary[split]["hr@1_of_20_candidates"], abs=1e-6)
        assert (ranks.unmasked <= 10).mean() == pytest.approx(summary[split]["full_rank_hr@10"], abs=1e-6)


@pytest.mark.slow
def test_no_published_movielens_row_belongs_to_a_train_user():
    """Every published window is the end of one user's history; those users come after all train users."""
    interactions, items = load_movielens("ml-100k")
    options = {"protocol": "temporal_users", "min_rating": 3, "num_candidates": 0}
    sequences = load_published_sequences(released("movielens"), rebuilt=build_sequences(interactions, items, **options))
    users, raw_items, times, ratings = (
        np.asarray(interactions[name][:]) for name in ("user_id", "item_id", "timestamp", "rating")
    )
    liked = {}  # user -> item (our id is MovieLens' own) -> time
    for user, item, time in zip(*(values[ratings >= 3].tolist() for values in (users, raw_items, times)), strict=True):
        liked.setdefault(user, {})[item] = time

    def owners(window):
        """Users whose newest items these are, whatever the order within a second."""
        return [
            user
            for user, time_of in liked.items()
            if all(item in time_of for item in window)
            and [time_of[item] for item in window] == sorted(time_of.values())[-len(window) :]
        ]

    found = {}
    for name in ("validation", "test"):
        owners_of_rows = [owners([*history, target]) for history, target in rows_of(sequences[name])]
        assert all(len(users_of_row) == 1 for users_of_row in owners_of_rows)
        found[name] = {users_of_row[0] for users_of_row in owners_of_rows}
        assert len(found[name]) == len(sequences[name])
    train_users = {int(user) for user in sequences["train"]["user_id"]}
    assert len(train_users) == 943 * 8 // 10
    assert not train_users & (found["validation"] | found["test"]) and not found["validation"] & found["test"]
    first = {user: min(time_of.values()) for user, time_of in liked.items()}
    assert max(first[user] for user in train_users) <= min(first[user] for user in found["validation"])
    assert max(first[user] for user in found["validation"]) <= min(first[user] for user in found["test"])
    # Every train row is a window of its user's history, in time.
    for row in sequences["train"].shuffle(seed=0).select(range(500)):
        window_times = [liked[int(row["user_id"])][item] for item in [*row["history"], row["target"]]]
        assert window_times == sorted(window_times) and 3 <= len(row["history"]) <= 10
