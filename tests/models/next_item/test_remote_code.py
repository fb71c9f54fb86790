"""Next-item models bring their code along: they load where hf_ilora is not installed, and score the same there."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    Catalogue,
    GRU4RecConfig,
    GRU4RecForNextItem,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.models import next_item
from tests.hidden_package import run_without_hf_ilora

NUM_ITEMS = 12
ROWS = [[1, 2, 3, 2], [3, 1, 2, 5, 6], [7], [4, 4, 1]]
HISTORIES = [[3, 1], [5, 2, 1, 3], [8]]
SIZES = {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": 6, "initializer_range": 0.5}

# Loads each folder, prints what the model answers, and saves it once more.
PROGRAM = """
import json
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

folders, histories, again = json.loads(sys.argv[1])
answers = {}
for name, folder in folders.items():
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained):
        try:
            load(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError("loaded without trust")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__module__.startswith("transformers_modules."), type(config)
    item_ids, scores = model.recommend(histories, top_k=3)
    titles = [model.catalogue.titles(row) for row in item_ids]
    answers[name] = [type(model).__name__, type(config).__name__, titles, scores.tolist()]
    model.save_pretrained(f"{again}/{name}")
print(json.dumps(answers))
"""


def models() -> dict:
    torch.manual_seed(0)
    trained = {
        "sasrec": SASRecForNextItem(SASRecConfig(**SIZES)),
        "gru4rec": GRU4RecForNextItem(GRU4RecConfig(**SIZES)),
        "caser": CaserForNextItem(CaserConfig(**SIZES)),
    }
    ids = list(range(1, NUM_ITEMS + 1))
    catalogue = Catalogue(pa.table({"item_id": ids, "raw_id": ids, "title": [f"Title {i}" for i in ids]}))
    counted = {
        "popularity": PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS)),
        "transition_counts": TransitionCountsForNextItem.fit(ROWS, TransitionCountsConfig(num_items=NUM_ITEMS)),
    }
    for model in (trained | counted).values():
        model.catalogue = catalogue
    return {name: model.eval() for name, model in (trained | counted).items()}


def answer(model) -> list:
    item_ids, scores = model.recommend(HISTORIES, top_k=3)
    titles = [model.catalogue.titles(row) for row in item_ids]
    return [type(model).__name__, type(model.config).__name__, titles, scores.tolist()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of each model, and what each answers here."""
    folder = tmp_path_factory.mktemp("saved")
    expected = {}
    for name, model in models().items():
        model.save_pretrained(folder / name)
        expected[name] = answer(model)
    return folder, expected


def code_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.py")}


@pytest.mark.slow
def test_every_model_answers_the_same_without_the_package(saved, tmp_path):
    folder, expected = saved
    folders = {name: str(folder / name) for name in expected}
    arguments = json.dumps([folders, HISTORIES, str(tmp_path / "again")])
    printed = run_without_hf_ilora(PROGRAM, arguments, home=tmp_path)
    answers = json.loads(printed.splitlines()[-1])
    assert set(answers) == set(expected)
    for name, (*classes_and_titles, scores) in expected.items():
        assert answers[name][:-1] == classes_and_titles
        # Sums may be taken in another order there: the number of threads differs.
        np.testing.assert_allclose(answers[name][-1], scores, rtol=1e-5)
    # Saved there, it has the same code, and the installed package reads it.
    for name in expected:
        assert code_files(tmp_path / "again" / name) == code_files(folder / name)
        loaded = AutoModel.from_pretrained(tmp_path / "again" / name)
        assert type(loaded).__module__.startswith("hf_ilora.") and answer(loaded) == expected[name]
    other = models()["sasrec"]
    torch.nn.init.normal_(other.model.final_norm.weight)
    assert answer(other) != expected["sasrec"]


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_the_installed_classes_come_before_the_code_in_the_folder(saved, trust):
    folder, expected = saved
    for name in expected:
        model = AutoModel.from_pretrained(folder / name, **trust)
        config = AutoConfig.from_pretrained(folder / name, **trust)
        assert type(model).__module__.startswith("hf_ilora.") and type(config).__module__.startswith("hf_ilora.")
        assert answer(model) == expected[name]


def test_a_folder_contains_the_code_of_its_model_and_no_other(saved):
    folder, expected = saved
    sources = {path.name: path.read_text() for path in Path(next_item.__path__[0]).glob("*.py")}
    kinds = {"sasrec": "sasrec", "gru4rec": "gru4rec", "caser": "caser"}
    kinds |= {"popularity": "counting", "transition_counts": "counting"}
    for name in expected:
        code = code_files(folder / name)
        assert code.items() <= sources.items()
        own = {file for file in code if file.startswith(("modeling_", "configuration_"))}
        own.discard("configuration_next_item.py")
        assert own == {f"modeling_{kinds[name]}.py", f"configuration_{kinds[name]}.py"}


def test_a_folder_saved_twice_is_as_saved_once(saved, tmp_path):
    folder, expected = saved
    model = AutoModel.from_pretrained(folder / "sasrec")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (folder / "sasrec").iterdir()}
    assert (tmp_path / "config.json").read_text() == (folder / "sasrec" / "config.json").read_text()
    assert answer(AutoModel.from_pretrained(tmp_path)) == expected["sasrec"]


def test_checkpoints_of_a_trainer_contain_the_code_and_the_catalogue(saved, tmp_path):
    folder, expected = saved
    model = AutoModel.from_pretrained(folder / "sasrec")
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True), processing_class=model.catalogue)
    trainer.save_model(tmp_path / "checkpoint")
    assert code_files(tmp_path / "checkpoint") == code_files(folder / "sasrec")
    assert answer(AutoModel.from_pretrained(tmp_path / "checkpoint")) == expected["sasrec"]
