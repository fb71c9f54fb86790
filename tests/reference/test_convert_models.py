"""Conversion of the authors' models: equal scores, titles, and the command."""

import json
import math
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from hf_ilora import (
    CaserForNextItem,
    Catalogue,
    GRU4RecForNextItem,
    SASRecForNextItem,
    convert_reference,
    convert_reference_caser,
    convert_reference_gru4rec,
    convert_reference_sasrec,
)
from hf_ilora.reference.convert_models import load_reference_state_dict, reference_catalogue
from hf_ilora.reference.pickle_reader import UnsafePickleError
from hf_ilora.runs.recipe_files import load_recipe
from tests.paths import PROJECT
from tests.reference.published_gru_and_caser import GRU, Caser
from tests.reference.published_sasrec import HIDDEN, LENGTH, NUM_ITEMS, Call, save

REFERENCE = PROJECT.parent / "shared" / "reference"
RECIPE = PROJECT / "recipes" / "convert_reference_sasrec.py"


def histories():
    """Ids of the reference, right-padded, of every length from 1 to LENGTH; and the lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.arange(1, LENGTH + 1)
    ids = torch.randint(0, NUM_ITEMS, (LENGTH, LENGTH), generator=generator)
    return ids.masked_fill(torch.arange(LENGTH) >= lengths.unsqueeze(1), NUM_ITEMS), lengths


def to_our_ids(reference_ids, num_items):
    return torch.where(reference_ids == num_items, 0, reference_ids + 1)


# Conversion.


@torch.no_grad()
def test_the_converted_model_scores_as_the_published_formula(reference):
    ids, lengths = histories()
    model = convert_reference_sasrec(reference.state_dict())
    right_padded = to_our_ids(ids, NUM_ITEMS)
    left_padded = torch.stack([row.roll(LENGTH - int(n)) for row, n in zip(right_padded, lengths, strict=True)])
    for input_ids in (right_padded, left_padded):
        output = model(input_ids=input_ids)
        torch.testing.assert_close(output.user_embedding, reference.user_embedding(ids, lengths), atol=1e-5, rtol=0)
        torch.testing.assert_close(output.logits[:, 1:], reference(ids, lengths), atol=1e-5, rtol=0)
        assert output.logits[:, 0].eq(-math.inf).all()


@torch.no_grad()
def test_every_weight_changes_the_scores(reference):
    ids, _ = histories()
    state_dict = reference.state_dict()
    scores = convert_reference_sasrec(state_dict)(input_ids=to_our_ids(ids, NUM_ITEMS)).logits[:, 1:]
    for name in state_dict:
        # Softmax ignores what is added to all keys: the bias of linear_k is the one weight without effect.
        changed = state_dict | {name: state_dict[name] + 0.5 * torch.randn_like(state_dict[name])}
        difference = convert_reference_sasrec(changed)(input_ids=to_our_ids(ids, NUM_ITEMS)).logits[:, 1:] - scores
        assert (difference.abs().max() > 1e-3) == (name != "mh_attn.linear_k.bias"), name


def test_item_i_becomes_i_plus_1_and_the_padding_id_becomes_0(reference):
    table = convert_reference_sasrec(reference.state_dict()).model.item_embedding.weight
    torch.testing.assert_close(table[1:], reference.item_embeddings.weight[:NUM_ITEMS], atol=0, rtol=0)
    torch.testing.assert_close(table[0], reference.item_embeddings.weight[NUM_ITEMS], atol=0, rtol=0)


@torch.no_grad()
def test_a_saved_conversion_scores_the_same_and_is_not_the_given_tensors(reference, tmp_path):
    ids, _ = histories()
    state_dict = reference.state_dict()
    model = convert_reference_sasrec(state_dict)
    model.save_pretrained(tmp_path)
    loaded = SASRecForNextItem.from_pretrained(tmp_path)
    input_ids = to_our_ids(ids, NUM_ITEMS)
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, model(input_ids=input_ids).logits)
    before = model.model.layers[0].attention.q_proj.weight.clone()
    state_dict["mh_attn.linear_q.weight"].zero_()
    assert model.model.layers[0].attention.q_proj.weight.equal(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ln_2.bias": None}, "missing ln_2.bias; unexpected nothing"),
        ({"gru.weight_ih_l0": torch.zeros(2)}, "missing nothing; unexpected gru.weight_ih_l0"),
        ({"fc_4096_64.weight": torch.zeros(2)}, "DLLM2Rec's projection of LLM embeddings"),
        (
            {"s_fc.bias": torch.zeros(NUM_ITEMS + 1)},
            r"s_fc.bias has shape \(12,\): expected one that fits the 11 items",
        ),
        ({"ln_3.weight": torch.zeros(HIDDEN + 1)}, r"ln_3.weight has shape \(9,\)"),
        ({"feed_forward.w_1.weight": torch.zeros(HIDDEN, HIDDEN, 3)}, r"w_1.weight has shape \(8, 8, 3\)"),
        ({"positional_embeddings.weight": torch.zeros(LENGTH, 7)}, r"positional_embeddings.weight has shape \(5, 7\)"),
        ({"item_embeddings.weight": torch.zeros(HIDDEN)}, r"item_embeddings.weight has shape \(8,\)"),
        ({"item_embeddings.weight": torch.zeros(1, HIDDEN)}, r"item_embeddings.weight has shape \(1, 8\)"),
        (
            {"ln_1.weight": torch.zeros(HIDDEN, dtype=torch.int64)},
            "ln_1.weight is not a tensor of floating-point numbers",
        ),
        ({"ln_1.weight": [0.0] * HIDDEN}, "ln_1.weight is not a tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(reference, changes, message):
    state_dict = {name: value for name, value in (reference.state_dict() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_reference_sasrec(state_dict)


# GRU4Rec and Caser.


@torch.no_grad()
def test_gru4rec_and_caser_score_as_the_published_formulas(other_reference):
    ids, lengths = histories()
    model = convert_reference(other_reference.state_dict())
    assert type(model) is (GRU4RecForNextItem if isinstance(other_reference, GRU) else CaserForNextItem)
    scores, right_padded = other_reference(ids, lengths), to_our_ids(ids, NUM_ITEMS)
    left_padded = torch.stack([row.roll(LENGTH - int(n)) for row, n in zip(right_padded, lengths, strict=True)])
    for input_ids in (right_padded, left_padded):
        output = model(input_ids=input_ids)
        expected = other_reference.user_embedding(ids, lengths)
        torch.testing.assert_close(output.user_embedding, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.logits[:, 1:], scores, atol=1e-4, rtol=0)
        item_ids, log_probabilities = model.recommend(input_ids, top_k=3, exclude_seen=False)
        best = scores.log_softmax(-1).topk(3)
        assert (item_ids - 1).equal(best.indices)
        torch.testing.assert_close(log_probabilities, best.values, atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_weight_of_gru4rec_and_caser_changes_the_scores(other_reference):
    ids, _ = histories()
    state_dict = other_reference.state_dict()
    scores = convert_reference(state_dict)(input_ids=to_our_ids(ids, NUM_ITEMS)).logits[:, 1:]
    for name in state_dict:
        changed = state_dict | {name: state_dict[name] + 0.5 * torch.randn_like(state_dict[name])}
        difference = convert_reference(changed)(input_ids=to_our_ids(ids, NUM_ITEMS)).logits[:, 1:] - scores
        assert difference.abs().max() > 1e-3, name


@torch.no_grad()
def test_a_saved_gru4rec_or_caser_scores_the_same(other_reference, tmp_path):
    ids, lengths = histories()
    convert_reference(other_reference.state_dict()).save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(
        loaded(input_ids=to_our_ids(ids, NUM_ITEMS)).logits[:, 1:], other_reference(ids, lengths), atol=1e-4, rtol=0
    )


def test_a_history_longer_than_the_window_is_read_from_its_newest_items():
    torch.manual_seed(0)
    model = convert_reference(Caser(HIDDEN, NUM_ITEMS, LENGTH).state_dict())
    long = torch.randint(1, NUM_ITEMS + 1, (3, LENGTH + 4))
    for found, expected in zip(
        model.recommend(long, exclude_seen=False),
        model.recommend(long[:, -LENGTH:], exclude_seen=False),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("convert", "build", "changes", "message"),
    [
        (convert_reference_gru4rec, GRU, {"gru.bias_hh_l0": None}, "authors' GRU4Rec: missing gru.bias_hh_l0"),
        (convert_reference_gru4rec, GRU, {"gru.weight_ih_l0_reverse": torch.zeros(2)}, "gru.weight_ih_l0_reverse"),
        (convert_reference_gru4rec, GRU, {"gru.weight_hh_l0": torch.zeros(24, 7)}, r"has shape \(24, 7\)"),
        (convert_reference_gru4rec, GRU, {"fc_4096_64.bias": torch.zeros(2)}, "DLLM2Rec's projection"),
        (convert_reference_gru4rec, Caser, {}, "not the authors' GRU4Rec: missing gru.bias_hh_l0"),
        (convert_reference_caser, GRU, {}, "not the authors' Caser: missing horizontal_cnn.0.bias"),
        (convert_reference_caser, Caser, {"horizontal_cnn.1.bias": None}, "missing horizontal_cnn.1.bias"),
        (convert_reference_caser, Caser, {"vertical_cnn.weight": torch.zeros(5)}, r"has shape \(5,\): expected 4 dim"),
        (convert_reference_caser, Caser, {"horizontal_cnn.2.weight": torch.zeros(3, 1, 4, 7)}, r"shape \(3, 1, 4, 7\)"),
        (
            convert_reference_caser,
            Caser,
            {"s_fc.weight": torch.zeros(NUM_ITEMS, 8)},
            r"s_fc.weight has shape \(11, 8\)",
        ),
        (
            convert_reference_caser,
            Caser,
            {"item_embeddings.weight": torch.zeros(8)},
            "item_embeddings.weight has shape",
        ),
    ],
)
def test_weights_of_another_model_are_refused(convert, build, changes, message):
    state_dict = build(HIDDEN, NUM_ITEMS, LENGTH).state_dict() | changes
    with pytest.raises(ValueError, match=message):
        convert({name: value for name, value in state_dict.items() if value is not None})


# Golden values: the authors' trained weights.


def golden(name, folder):
    if not (REFERENCE / folder).is_dir():
        pytest.skip("the golden files of the published programs (../shared/reference) are not here")
    return REFERENCE / folder / name


@pytest.mark.parametrize("folder", ["llara_movielens", "llara_lastfm"])
@torch.no_grad()
def test_the_authors_weights_give_their_embeddings_and_scores(folder):
    state_dict = load_reference_state_dict(golden("sasrec_original.safetensors", folder))
    expected = load_file(golden("golden_test.safetensors", folder))
    model = convert_reference_sasrec(state_dict)
    ids = to_our_ids(expected["input_seq_right_padded"], model.config.num_items)
    output = model(input_ids=ids)
    torch.testing.assert_close(output.user_embedding, expected["user_embedding"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits[:16, 1:], expected["scores"], atol=1e-4, rtol=0)
    table = model.model.item_embedding.weight
    torch.testing.assert_close(table[1:], state_dict["item_embeddings.weight"][:-1], atol=0, rtol=0)


@pytest.mark.parametrize("folder", ["llara_movielens", "llara_lastfm"])
@pytest.mark.parametrize("split", ["validation", "test"])
@torch.no_grad()
def test_the_authors_weights_give_their_metrics(folder, split):
    model = convert_reference_sasrec(load_reference_state_dict(golden("sasrec_original.safetensors", folder)))
    expected = json.loads(golden("summary.json", folder).read_text())[split]
    rows = pq.read_table(golden(f"{split}.parquet", folder)).to_pylist()
    histories = [torch.tensor(row["history"][-10:]) + 1 for row in rows]
    logits = model(input_ids=nn.utils.rnn.pad_sequence(histories, batch_first=True)).logits  # (rows, num_items + 1)
    targets = torch.tensor([row["target"] for row in rows]) + 1
    candidates = torch.tensor([row["candidates"] for row in rows]) + 1  # (rows, 20)
    best = candidates.gather(1, logits.gather(1, candidates).argmax(1, keepdim=True)).squeeze(1)
    ranks = (logits > logits.gather(1, targets.unsqueeze(1))).sum(1)  # 0 is best
    hits = ranks < 10
    found = {
        "rows": len(rows),
        "hr@1_of_20_candidates": (best == targets).double().mean().item(),
        "full_rank_hr@10": hits.double().mean().item(),
        "full_rank_ndcg@10": (hits / torch.log2(ranks + 2.0)).double().mean().item(),
    }
    assert found == pytest.approx(expected, abs=1e-4)


# Titles and the command.


def titles(ids=range(NUM_ITEMS), **columns):
    return pa.table({"item_id": list(ids), "title": [f"title {i}" for i in ids], **columns})


def test_titles_follow_the_shift_of_the_ids(tmp_path):
    path = tmp_path / "items.parquet"
    pq.write_table(titles(), path)
    catalogue = reference_catalogue(path, NUM_ITEMS)
    assert catalogue.titles([1, NUM_ITEMS]) == ["title 0", f"title {NUM_ITEMS - 1}"]
    assert catalogue.raw_ids([1]) == [0]
    pq.write_table(titles(raw_id=[f"B{i}" for i in range(NUM_ITEMS)]), path)
    assert reference_catalogue(path, NUM_ITEMS).item_ids(["B3"]) == [4]


def test_a_catalogue_with_our_ids_stays_unchanged(tmp_path):
    ids = range(1, NUM_ITEMS + 1)
    ours = Catalogue(titles(ids, raw_id=[f"B{i}" for i in ids]))
    ours.to_parquet(tmp_path / "items.parquet")
    assert reference_catalogue(tmp_path / "items.parquet", NUM_ITEMS) == ours


@pytest.mark.parametrize("ids", [range(2, NUM_ITEMS + 2), range(NUM_ITEMS + 1), [0] * NUM_ITEMS])
def test_titles_under_other_ids_are_refused(tmp_path, ids):
    pq.write_table(titles(ids), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=f"expected the reference's ids 0 to {NUM_ITEMS - 1}, once each"):
        reference_catalogue(tmp_path / "items.parquet", NUM_ITEMS)


def convert(monkeypatch, *arguments):
    weights, output_dir, *options = map(str, arguments)
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--weights", weights, "--output_dir", output_dir, *options])
    load_recipe(RECIPE).main()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_writes_a_folder_with_titles(reference, authors_modules, tmp_path):
    save(reference, tmp_path / "sasrec.pt", True)
    pq.write_table(titles(), tmp_path / "items.parquet")
    output_dir = tmp_path / "new" / "sasrec"
    command = [sys.executable, RECIPE, "--weights", tmp_path / "sasrec.pt", "--output_dir", output_dir]
    command += ["--items", tmp_path / "items.parquet"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (
        "SASRec with 11 items, hidden size 8, the newest 5 items of a history, titles such as 'title 0'" in run.stderr
    )
    model = SASRecForNextItem.from_pretrained(output_dir)
    assert model.catalogue == reference_catalogue(tmp_path / "items.parquet", NUM_ITEMS)
    item_ids, scores = model.recommend(torch.tensor([[4, 1, 8]]), top_k=3, exclude_seen=False)
    with torch.no_grad():
        expected = reference(torch.tensor([[3, 0, 7, 11, 11]]), torch.tensor([3])).log_softmax(-1).topk(3)
    assert (item_ids - 1).equal(expected.indices)
    torch.testing.assert_close(scores, expected.values, atol=1e-5, rtol=0)
    assert model.catalogue.titles(item_ids[0]) == [f"title {i}" for i in expected.indices[0]]
    assert os.listdir(output_dir.parent) == ["sasrec"]


def test_the_command_converts_a_pickled_caser(authors_modules, tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    caser = Caser(HIDDEN, NUM_ITEMS, LENGTH).eval()
    save(caser, tmp_path / "Caser_movielens.pt", True)
    with caplog.at_level("INFO"):
        convert(monkeypatch, tmp_path / "Caser_movielens.pt", tmp_path / "caser")
        convert(monkeypatch, tmp_path / "Caser_movielens.pt", tmp_path / "caser")
    assert "Caser with 11 items, hidden size 8, the newest 5 items of a history, no titles" in caplog.text
    with torch.no_grad():
        expected = caser(torch.tensor([[3, 0, 7, 11, 11]]), torch.tensor([3])).log_softmax(-1).topk(3)
    loaded = CaserForNextItem.from_pretrained(tmp_path / "caser")
    item_ids, scores = loaded.recommend([[4, 1, 8]], top_k=3, exclude_seen=False)
    assert (item_ids - 1).equal(expected.indices)
    torch.testing.assert_close(scores, expected.values, atol=1e-5, rtol=0)


def test_the_command_replaces_an_earlier_conversion(reference, tmp_path, monkeypatch):
    save(reference.state_dict(), tmp_path / "sasrec.pt", True)
    output_dir = tmp_path / "sasrec"
    earlier = convert_reference_sasrec(reference.state_dict() | {"s_fc.bias": torch.zeros(NUM_ITEMS)})
    earlier.save_pretrained(output_dir)
    Catalogue(pa.table({"item_id": [1], "raw_id": [1], "title": ["stale"]})).to_parquet(output_dir / "items.parquet")
    convert(monkeypatch, tmp_path / "sasrec.pt", output_dir)
    written = {name for name in os.listdir(output_dir) if not name.endswith(".py")}
    assert written == {"config.json", "model.safetensors"}
    head = SASRecForNextItem.from_pretrained(output_dir).head
    torch.testing.assert_close(head.bias[1:], reference.s_fc.bias)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"thesis.txt": "mine"}, "thesis.txt"),
        ({"config.json": '{"model_type": "bert"}', "model.safetensors": "mine"}, "another model"),
        ({"model.safetensors": "mine"}, "another model"),
    ],
)
def test_the_command_overwrites_no_foreign_folder(reference, tmp_path, monkeypatch, files, problem):
    save(reference.state_dict(), tmp_path / "sasrec.pt", True)
    output_dir = tmp_path / "sasrec"
    output_dir.mkdir()
    for name, text in files.items():
        (output_dir / name).write_text(text)
    before = content(output_dir)
    with pytest.raises(ValueError, match=f"contains {problem}: expected a new folder or an earlier conversion"):
        convert(monkeypatch, tmp_path / "sasrec.pt", output_dir)
    assert content(output_dir) == before


def test_the_command_leaves_an_earlier_conversion_whole_when_a_file_is_refused(reference, tmp_path, monkeypatch):
    output_dir, marker = tmp_path / "sasrec", tmp_path / "code_ran"
    convert_reference_sasrec(reference.state_dict()).save_pretrained(output_dir)
    before = content(output_dir)
    save(Call(os.system, f"touch {marker}"), tmp_path / "attack.pt", True)
    with pytest.raises(UnsafePickleError, match=r"names posix\.system"):
        convert(monkeypatch, tmp_path / "attack.pt", output_dir)
    save(reference.state_dict(), tmp_path / "sasrec.pt", True)
    pq.write_table(titles(range(3)), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="has 3 rows"):
        convert(monkeypatch, tmp_path / "sasrec.pt", output_dir, "--items", tmp_path / "items.parquet")
    assert content(output_dir) == before and not marker.exists()
