"""Saved models whose files contradict each other or are absurd are refused by sizes, before anything is built."""

import dataclasses
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    Catalogue,
    GRU4RecConfig,
    GRU4RecForNextItem,
    ILoraConfig,
    ILoraForRecommendation,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.loading import load_recommender
from hf_ilora.models.next_item import catalogue as catalogue_module
from tests.models.ilora.ilora_fixtures import NUM_ITEMS, catalogue, fresh_model, recommender, tokenizer
from tests.tiny_language_models import base_llm

SIZES = {"num_items": NUM_ITEMS, "hidden_size": 8}
ROWS = [[1, 2, 3], [4, 5]]


def saved(kind: str, folder):
    """Save a tiny model, and return the function that loads it."""
    if kind == "llm":
        base_llm().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return load_language_model
    if kind == "ilora":
        fresh_model(item_head="residual").save_pretrained(folder)
        return lambda path: ILoraForRecommendation.from_pretrained(path, llm=base_llm())
    model = {
        "sasrec": recommender,
        "gru4rec": lambda: GRU4RecForNextItem(GRU4RecConfig(**SIZES)),
        "caser": lambda: CaserForNextItem(CaserConfig(**SIZES)),
        "popularity": lambda: PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS)),
        "counts": lambda: TransitionCountsForNextItem.fit(ROWS, TransitionCountsConfig(num_items=NUM_ITEMS)),
    }[kind]()
    model.save_pretrained(folder)
    return type(model).from_pretrained


def change_config(folder, text: str | None = None, **changes) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    of_part = changes.pop("part", None)
    (content if of_part is None else content[of_part]).update(changes)
    path.write_text(json.dumps(content) if text is None else text)


ABSURD = [
    ("sasrec", "num_hidden_layers"),
    ("sasrec", "num_items"),
    ("sasrec", "hidden_size"),
    ("sasrec", "max_length"),
    ("sasrec", "intermediate_size"),
    ("gru4rec", "num_hidden_layers"),
    ("gru4rec", "num_items"),
    ("caser", "max_length"),
    ("caser", "num_horizontal_filters"),
    ("popularity", "num_items"),
    ("counts", "num_transitions"),
    ("ilora", "rank"),
    ("ilora", "num_experts"),
    ("llm", "num_hidden_layers"),
    ("llm", "vocab_size"),
    ("llm", "hidden_size"),
]


@pytest.mark.parametrize(("kind", "field"), ABSURD)
def test_sizes_that_the_weights_do_not_have_are_refused(tmp_path, kind, field):
    load = saved(kind, tmp_path)
    load(tmp_path)  # the control
    whole = (tmp_path / "config.json").read_text()
    for value in (10**6, 10**30, -1, "8", None):
        if value is None and field == "intermediate_size":
            continue  # its default
        change_config(tmp_path, **{field: value})
        if kind == "llm" and not isinstance(value, int):
            continue  # for transformers to judge
        with pytest.raises(ValueError, match=rf"{field}|shape|weights of|no model|tensor"):
            load(tmp_path)
        change_config(tmp_path, whole)


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 10**6), ("hidden_size", 10**12), ("num_items", 31)])
def test_sizes_of_the_recommender_in_an_ilora_are_refused(tmp_path, field, value):
    load = saved("ilora", tmp_path)
    change_config(tmp_path, **{"part": "recommender_config", field: value})
    with pytest.raises(ValueError, match="restore the folder"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["null", "[]", "3", "{}", "[" * 100_000, '{"model_type": "other"}', "{"])
@pytest.mark.parametrize("kind", ["sasrec", "ilora"])
def test_an_invalid_config_is_refused(tmp_path, kind, text):
    load = saved(kind, tmp_path)
    change_config(tmp_path, text)
    for loads in (load, load_recommender):
        with pytest.raises((ValueError, OSError), match=r"config\.json|model.type"):
            loads(tmp_path)


def test_a_folder_without_a_model_is_named(tmp_path):
    for model_class in (SASRecForNextItem, ILoraForRecommendation):
        with pytest.raises(ValueError, match=r"has no config\.json"):
            model_class.from_pretrained(tmp_path)


def test_a_model_is_not_loaded_by_the_class_of_another(tmp_path):
    saved("gru4rec", tmp_path)
    for model_class in (SASRecForNextItem, ILoraForRecommendation):
        with pytest.raises(ValueError, match=r"config\.json of .* has model_type 'gru4rec': expected '(sasrec|ilora)'"):
            model_class.from_pretrained(tmp_path)


def test_broken_weights_are_named(tmp_path):
    load = saved("sasrec", tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    state.pop("model.position_embedding.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing keys, such as model\.position_embedding\.weight"):
        load(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors of .* is broken"):
        load(tmp_path)


# --- configurations ---

CONFIGS = [SASRecConfig, GRU4RecConfig, CaserConfig, PopularityConfig, TransitionCountsConfig, ILoraConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_no_field_takes_a_number_that_is_not_finite(config_class):
    numbers = {name for name, value in vars(config_class()).items() if isinstance(value, float)} | {"lora_alpha"}
    for name in numbers & {field.name for field in dataclasses.fields(config_class)}:
        for value in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(ValueError, match=name):
                config_class(**{name: value})


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("wrong", [{"dtype": "evil"}, {"id2label": 3}, {"num_labels": "x"}])
def test_fields_of_transformers_raise_value_errors_too(config_class, wrong):
    with pytest.raises(ValueError, match=rf"{config_class.__name__} was given a value of a wrong type"):
        config_class(**wrong)


WRONG = [
    ("sasrec", {"num_items": -1}, "num_items is -1"),
    ("sasrec", {"hidden_dropout": 2}, "hidden_dropout is 2"),
    ("sasrec", {"block_type": "other"}, "block_type is 'other'"),
    ("sasrec", {"hidden_size": 7}, "hidden_size 7 is not divisible"),
    ("sasrec", {"layer_norm_eps": -1.0}, "layer_norm_eps is -1"),
    ("gru4rec", {"initializer_range": -1.0}, "initializer_range is -1"),
    ("caser", {"popularity_power": -1}, "popularity_power is -1"),
    ("counts", {"gap_decay": 0}, "gap_decay is 0"),
    ("popularity", {"max_length": 0}, "max_length is 0"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG)
def test_values_that_replace_saved_ones_are_checked(tmp_path, kind, changes, message):
    load = saved(kind, tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*correct the argument"):
        load(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, ignore_mismatched_sizes=True, **changes)
    for loads in (AutoConfig.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            loads(tmp_path, **changes)
    config = AutoConfig.from_pretrained(tmp_path)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_config(config)


def test_values_that_replace_saved_ones_of_an_ilora_are_checked(tmp_path):
    saved("ilora", tmp_path)
    with pytest.raises(ValueError, match="router_noise is -1"):
        ILoraConfig.from_pretrained(tmp_path, router_noise=-1)
    with pytest.raises(ValueError, match="rank 7 is not divisible by num_experts 4"):
        AutoConfig.from_pretrained(tmp_path, rank=7)


@pytest.mark.parametrize(
    "model_class", [SASRecForNextItem, GRU4RecForNextItem, CaserForNextItem, PopularityForNextItem]
)
def test_a_model_takes_its_own_configuration_only(model_class):
    for config in (None, 3, {"num_items": 3}, TransitionCountsConfig(num_items=3)):
        with pytest.raises(
            ValueError, match=rf"is a {type(config).__name__}: expected a {model_class.config_class.__name__}"
        ):
            model_class(config)


# --- catalogues ---


def with_catalogue(folder):
    model = recommender()
    model.catalogue = catalogue()
    model.save_pretrained(folder)
    return folder / "items.parquet"


def test_a_catalogue_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"items\.parquet is a pipe or a device: expected a parquet file"):
        Catalogue.from_parquet(tmp_path / "items.parquet")


@pytest.mark.parametrize("kind", ["sasrec", "ilora"])
def test_a_catalogue_that_is_a_folder_is_not_passed_over(tmp_path, kind):
    load = saved(kind, tmp_path)
    (tmp_path / "items.parquet").unlink(missing_ok=True)
    (tmp_path / "items.parquet").mkdir()
    with pytest.raises(ValueError, match=r"items\.parquet is not a file"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"items\.parquet is a folder: expected a parquet file"):
        Catalogue.from_parquet(tmp_path / "items.parquet")


def test_a_tiny_file_of_many_rows_is_refused_by_its_footer(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue_module, "_ALWAYS_ALLOWED_BYTES", 1 << 20)
    path = with_catalogue(tmp_path)
    schema, rows = pq.read_schema(path), 10**6
    columns = [pa.repeat(pa.scalar("a" if pa.types.is_string(each.type) else 1, each.type), rows) for each in schema]
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"claims to contain 1,000,000 rows, about 24,000,000 bytes in memory"):
        Catalogue.from_parquet(path)
    with pytest.raises(ValueError, match="claims to contain 1,000,000 rows"):
        SASRecForNextItem.from_pretrained(tmp_path)


# --- configurations ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SASRecConfig(num_items=3, hidden_size=-3), "hidden_size is -3: expected at least 1"),
        (lambda: SASRecConfig(num_items="3"), "num_items"),
        (lambda: SASRecConfig(num_items=3, intermediate_size=0), "intermediate_size is 0"),
        (lambda: setattr(SASRecConfig(num_items=3), "hidden_size", "wide"), "hidden_size"),
        (lambda: CaserConfig(num_items=3, num_horizontal_filters=0), "num_horizontal_filters is 0"),
        (lambda: GRU4RecConfig(num_items=3, hidden_dropout=2), "hidden_dropout is 2"),
        (lambda: SASRecConfig(num_items=3, ed_weight=-0.1), "ed_weight is -0.1: expected at least 0"),
        (lambda: SASRecConfig(num_items=3, score_temperature=0), "score_temperature is 0: expected a positive number"),
        (lambda: PopularityConfig(num_items=0), "num_items is 0"),
        (lambda: ILoraConfig(rank=3), "rank 3 is not divisible"),
        (lambda: ILoraConfig(recommender_config={"model_type": "sasrec", "hidden_size": None}), "hidden_size"),
    ],
)
def test_wrong_values_are_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_changed_configuration_is_checked_too():
    config = SASRecConfig(num_items=3)
    config.num_attention_heads = 7
    with pytest.raises(ValueError, match="hidden_size 64 is not divisible by num_attention_heads 7"):
        config.validate()


def test_a_model_of_another_catalogue_gives_its_layers(tmp_path, caplog):
    with_catalogue(tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(31, 8\): expected \(51, 8\)"):
        SASRecForNextItem.from_pretrained(tmp_path, num_items=50)
    model = SASRecForNextItem.from_pretrained(tmp_path, num_items=50, ignore_mismatched_sizes=True)
    assert (model.config.num_items, model.catalogue) == (50, None)
    assert "has 30 items and the model 50: it is ignored" in caplog.text
    expected = recommender().state_dict()
    for name, tensor in model.state_dict().items():
        same = tensor.shape == expected[name].shape and torch.equal(tensor, expected[name])
        assert same == (name not in ("model.item_embedding.weight", "head.weight")), name
    assert model.head.weight is model.model.item_embedding.weight
    assert model.recommend([[50, 3]], top_k=48)[0].max() <= 50
    assert SASRecForNextItem.from_pretrained(tmp_path, ignore_mismatched_sizes=True).catalogue == catalogue()
