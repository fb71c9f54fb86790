"""recipes/prepare_reference_data.py on a small folder of published form."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import SASRecForNextItem, SequenceDatasets
from hf_ilora.models.loading import check_catalogue

NUM_ITEMS, HIDDEN, LENGTH = 6, 4, 10


@pytest.fixture
def source(tmp_path):
    rows = {"history": [[0, 1, 2], [5, 4, 3, 2]], "target": [3, 0]}
    tables = {
        "items": {"item_id": list(range(NUM_ITEMS)), "title": list("ABCDEF")},
        "train": rows,
        "validation": rows | {"candidates": [[3, 5], [1, 0]]},
        "test": rows | {"candidates": [[3, 5], [1, 0]]},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    square, vector = (HIDDEN, HIDDEN), (HIDDEN,)
    shapes = {"item_embeddings.weight": (NUM_ITEMS + 1, HIDDEN), "positional_embeddings.weight": (LENGTH, HIDDEN)}
    shapes |= {"s_fc.weight": (NUM_ITEMS, HIDDEN), "s_fc.bias": (NUM_ITEMS,)}
    for name in ("linear_q", "linear_k", "linear_v"):
        shapes |= {f"mh_attn.{name}.weight": square, f"mh_attn.{name}.bias": vector}
    for name in ("w_1", "w_2"):
        shapes |= {f"feed_forward.{name}.weight": (*square, 1), f"feed_forward.{name}.bias": vector}
    for name in ("ln_1", "ln_2", "ln_3", "feed_forward.layer_norm"):
        shapes |= {f"{name}.weight": vector, f"{name}.bias": vector}
    torch.manual_seed(0)
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "sasrec.safetensors")
    return tmp_path


def test_published_files_become_a_data_set_and_a_model_of_one_catalogue(run_recipe, source, tmp_path):
    output = tmp_path / "out"
    settings = {"source": source, "sasrec": source / "sasrec.safetensors"}
    run = run_recipe("prepare_reference_data", output_dir=output, **settings)
    sequences = SequenceDatasets.load(output / "data")
    assert sequences["test"]["target"][:] == [4, 1]
    model = SASRecForNextItem.from_pretrained(output / "sasrec")
    assert check_catalogue(model, "sasrec", sequences.num_items, sequences.raw_ids)
    assert model.catalogue.titles([1, 6]) == ["A", "F"]
    assert run.record["status"] == "finished" and run.record["data_fingerprint"] == sequences.fingerprint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_from": "lastfm"}, "invalid choice: 'lastfm'"),
        ({"source": "nowhere"}, "nowhere"),
        ({"max_history": 2}, "max_history is 2 and min_history 3: expected max_history to be at least min_history"),
    ],
)
def test_bad_settings_are_named(run_recipe, source, tmp_path, settings, message):
    with pytest.raises((ValueError, OSError)) as raised:
        run_recipe("prepare_reference_data", output_dir=tmp_path / "out", **{"source": source} | settings)
    assert message in str(raised.value)
