"""The authors' SASRec: same scores after conversion, and files that are read without running anything in them."""

import builtins
import copyreg
import functools
import importlib
import io
import json
import math
import os
import pickle
import random
import runpy
import subprocess
import sys
import types
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ilora import Catalogue, SASRecForNextItem, convert_reference_sasrec
from hf_ilora.reference.convert_sasrec import (
    UnsafePickleError,
    load_reference_interactions,
    load_reference_state_dict,
    reference_catalogue,
)
from tests.paths import PROJECT

REFERENCE = PROJECT.parent / "shared" / "reference"
RECIPE = PROJECT / "recipes" / "convert_reference_sasrec.py"
NUM_ITEMS, HIDDEN, LENGTH = 11, 8, 5


# The published network as plain modules, right-padded with id N, written from the formula.


class MultiHeadAttention(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.num_heads = 1
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q, x, real):
        length = q.shape[1]
        scores = self.linear_q(q) @ self.linear_k(x).transpose(1, 2) / math.sqrt(q.shape[2])  # (batch, length, length)
        visible = torch.ones(length, length).tril().bool() & real[:, None, :]
        return self.softmax(scores.masked_fill(~visible, -1e9)) @ self.linear_v(x) + q


class PositionwiseFeedForward(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.w_1, self.w_2 = nn.Conv1d(hidden, hidden, 1), nn.Conv1d(hidden, hidden, 1)
        self.layer_norm, self.relu = nn.LayerNorm(hidden), nn.ReLU()

    def forward(self, z):
        return self.layer_norm(self.w_2(self.relu(self.w_1(z.transpose(1, 2)))).transpose(1, 2) + z)


class SASRec(nn.Module):
    def __init__(self, hidden, item_num, state_size):
        super().__init__()
        self.item_num = np.int64(item_num)  # as read from a data frame
        self.device = torch.device("cpu")
        self.item_embeddings = nn.Embedding(item_num + 1, hidden)
        self.positional_embeddings = nn.Embedding(state_size, hidden)
        self.emb_dropout = nn.Dropout(0.1)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(hidden) for _ in range(3))
        self.mh_attn, self.feed_forward = MultiHeadAttention(hidden), PositionwiseFeedForward(hidden)
        self.s_fc = nn.Linear(hidden, item_num)

    def user_embedding(self, ids, lengths):
        real = ids != int(self.item_num)
        x = (self.item_embeddings(ids) + self.positional_embeddings.weight) * real.unsqueeze(-1)
        f = self.feed_forward(self.ln_2(self.mh_attn(self.ln_1(x), x, real)))
        return self.ln_3(f * real.unsqueeze(-1))[torch.arange(len(ids)), lengths - 1]  # (batch, hidden)

    def forward(self, ids, lengths):
        return self.s_fc(self.user_embedding(ids, lengths))


@pytest.fixture
def reference():
    """The published network with weights far from their initial values, layer normalisations included."""
    torch.manual_seed(0)
    model = SASRec(HIDDEN, NUM_ITEMS, LENGTH).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


@pytest.fixture
def authors_modules(monkeypatch):
    """The classes above under the authors' module names, so that they are pickled as the authors' files are."""
    for module, classes in (
        ("recommender", ()),
        ("recommender.A_SASRec_final_bce_llm", (SASRec,)),
        ("SASRecModules_ori", (MultiHeadAttention, PositionwiseFeedForward)),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{c.__name__: c for c in classes}))
        for authors_class in classes:
            monkeypatch.setattr(authors_class, "__module__", module)


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
def test_every_weight_counts(reference):
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
        ({"ln_1.weight": torch.zeros(HIDDEN, dtype=torch.int64)}, "ln_1.weight is no tensor of floating-point numbers"),
        ({"ln_1.weight": [0.0] * HIDDEN}, "ln_1.weight is no tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(reference, changes, message):
    state_dict = {name: value for name, value in (reference.state_dict() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_reference_sasrec(state_dict)


# Goldens: the authors' trained weights.


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


# Files of torch.save.


def equal(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def save(value, path, zip_format):
    torch.save(value, path, _use_new_zipfile_serialization=zip_format)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickled_module_and_its_state_dict_are_read_alike(reference, authors_modules, tmp_path, zip_format):
    path = tmp_path / "sasrec.pt"
    save(reference, path, zip_format)
    assert equal(load_reference_state_dict(path), reference.state_dict())
    save(reference.state_dict(), path, zip_format)
    assert equal(load_reference_state_dict(path), reference.state_dict())
    save(dict(reference.state_dict()), path, zip_format)
    assert equal(load_reference_state_dict(path), reference.state_dict())


def test_reading_a_module_calls_nothing_that_it_names(reference, authors_modules, tmp_path, monkeypatch):
    save(reference, tmp_path / "sasrec.pt", True)

    def fail(*_):
        raise AssertionError("a function of the file was called")

    monkeypatch.setattr(nn.Module, "__setstate__", fail)
    for name in ("_rebuild_parameter", "_rebuild_tensor_v2"):
        monkeypatch.setattr(torch._utils, name, fail)
    for module in ("recommender", "recommender.A_SASRec_final_bce_llm", "SASRecModules_ori"):
        monkeypatch.delitem(sys.modules, module)
    assert equal(load_reference_state_dict(tmp_path / "sasrec.pt"), reference.state_dict())


def test_slices_transposes_and_other_number_types_are_read(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"slice": whole[1:3, 2:5], "transpose": whole.T, "half": whole.half(), "long": whole.long()}
    tensors |= {"double": whole.double(), "bfloat16": whole.bfloat16(), "scalar": torch.tensor(3.0)}
    for zip_format in (True, False):
        save(tensors, tmp_path / "tensors.pt", zip_format)
        assert equal(load_reference_state_dict(tmp_path / "tensors.pt"), tensors)


def test_a_safetensors_file_with_the_authors_names_is_read(reference, tmp_path):
    path = tmp_path / "sasrec.safetensors"
    save_file(reference.state_dict(), path)
    assert equal(load_reference_state_dict(path), reference.state_dict())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_reference_state_dict(path)


@pytest.mark.parametrize("zip_format", [True, False])
def test_another_model_is_named_and_refused(tmp_path, zip_format):
    path = tmp_path / "gru.pt"
    save(nn.GRU(2, 2), path, zip_format)
    with pytest.raises(UnsafePickleError, match=r"names torch\.nn\.modules\.rnn\.GRU"):
        load_reference_state_dict(path)
    save({"epoch": 3, "state_dict": {}}, path, zip_format)
    with pytest.raises(ValueError, match="'epoch' is a int: expected a tensor; of a checkpoint, give the state dict"):
        load_reference_state_dict(path)
    save({("a", "b"): torch.zeros(2)}, path, zip_format)
    with pytest.raises(ValueError, match="holds a dict: expected the authors' SASRec module or its state dict"):
        load_reference_state_dict(path)
    save([1, 2], path, zip_format)
    with pytest.raises(ValueError, match="holds a list: expected the authors' SASRec module or its state dict"):
        load_reference_state_dict(path)


def test_a_module_inside_itself_is_refused(reference, authors_modules, tmp_path):
    reference._modules["mh_attn"]._modules["parent"] = reference
    save(reference, tmp_path / "sasrec.pt", True)
    with pytest.raises(ValueError, match="is not a module of torch"):
        load_reference_state_dict(tmp_path / "sasrec.pt")


def test_a_module_with_several_heads_is_refused(reference, authors_modules, tmp_path):
    reference.mh_attn.num_heads = 2
    save(reference, tmp_path / "sasrec.pt", True)
    with pytest.raises(ValueError, match=r"mh_attn\.num_heads is not 1"):
        load_reference_state_dict(tmp_path / "sasrec.pt")


# Files that would run code.


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class CallOfState(Call):
    """Pickles as `function.__setstate__(state)`, if the reader looks for such a method."""

    def __reduce__(self):
        return self.call[0], (), self.call[1][0]


def attacks(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    nested = pickle.dumps(Call(os.system, f"touch {marker}"))
    return {
        "posix.system": Call(os.system, f"touch {marker}"),
        "builtins.eval": Call(eval, touch),
        "builtins.exec": Call(exec, touch),
        "builtins.getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "builtins.__import__": Call(builtins.__import__, "os"),
        "functools.partial": Call(functools.partial(os.system, f"touch {marker}")),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "_?pickle.loads": Call(pickle.loads, nested),
        "torch.serialization.load": Call(torch.load, str(marker)),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, nested),
        "torch._utils._rebuild_wrapper_subclass": Call(torch._utils._rebuild_wrapper_subclass, eval),
        "torch._tensor._rebuild_from_type_v2": Call(torch._tensor._rebuild_from_type_v2, eval, str, (), touch),
        "numpy.load": Call(np.load, str(marker)),
        "copyreg._reconstructor": Call(copyreg._reconstructor, object, object, None),
    }


def written_as(content, form, path):
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "pickle of protocol 0":
        path.write_bytes(pickle.dumps(content, protocol=0))
    else:
        save(content, path, form == "zip")


FORMS = ["zip", "legacy", "plain pickle", "pickle of protocol 0"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", sorted(attacks("marker")))
def test_a_file_that_runs_code_is_refused_by_the_name_it_calls(tmp_path, form, name):
    marker, path = tmp_path / "code_ran", tmp_path / "sasrec.pt"
    attack = attacks(marker)[name]
    for content in (attack, {"item_embeddings.weight": attack}):
        written_as(content, form, path)
        refused = name.replace("copyreg", "(copyreg|copy_reg)").replace(
            "builtins.getattr", "(builtins.getattr|importlib)"
        )
        with pytest.raises(UnsafePickleError, match=f"names {refused}"):
            load_reference_state_dict(path)
        with pytest.raises(ValueError, match=r"names|is not a whole pickle|not a DataFrame"):
            load_reference_interactions(path)
        assert not marker.exists()


def test_the_attacks_do_run_code_when_nothing_stops_them(tmp_path):
    marker, path = tmp_path / "code_ran", tmp_path / "sasrec.pt"
    save(attacks(marker)["posix.system"], path, True)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "content",
    [
        Call(torch._utils._rebuild_tensor_v2, "storage", 0, (2,), (1,), False, {}),
        Call(torch._utils._rebuild_tensor_v2),
        Call(torch._utils._rebuild_parameter, eval, True, {}),
        Call(torch._utils._rebuild_parameter, Call(torch._utils._rebuild_parameter, 1, True, {}), True, {}),
        Call(nn.Linear, 2, 2),
        CallOfState(nn.Linear, {"_parameters": {"weight": print}, "_buffers": {}, "_modules": {}}),
        CallOfState(nn.Linear, {"_parameters": 1, "_buffers": {}, "_modules": {}}),
        CallOfState(nn.Linear, ({}, {"arguments": 1})),
    ],
)
def test_odd_arguments_to_permitted_names_do_no_harm(tmp_path, form, content):
    path = tmp_path / "sasrec.pt"
    written_as(content, form, path)
    with pytest.raises(ValueError, match=str(path)):
        load_reference_state_dict(path)


def test_a_pickle_inside_a_tensor_stays_numbers(tmp_path):
    marker, path = tmp_path / "code_ran", tmp_path / "sasrec.pt"
    nested = torch.frombuffer(bytearray(pickle.dumps(Call(os.system, f"touch {marker}"))), dtype=torch.uint8)
    for zip_format in (True, False):
        save({"weight": nested}, path, zip_format)
        assert equal(load_reference_state_dict(path), {"weight": nested})
        assert not marker.exists()


def test_a_registered_extension_cannot_pass_by_the_list(tmp_path):
    marker, path = tmp_path / "code_ran", tmp_path / "sasrec.pt"
    copyreg.add_extension("posix", "system", 200)
    try:
        by_number = pickle.dumps(Call(os.system, f"touch {marker}"), protocol=2)
        pickle.loads(by_number)  # puts the function into the cache
        assert b"system" not in by_number and marker.exists()
        marker.unlink()
        path.write_bytes(by_number)
        with pytest.raises(UnsafePickleError, match=r"names posix\.system"):
            load_reference_state_dict(path)
    finally:
        copyreg.remove_extension("posix", "system", 200)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02ctorch\nFloatStorage\nq\x00}X\x04\x00\x00\x00nameX\x04\x00\x00\x00evilsb.",  # sets an attribute
        b"\x80\x02ccollections\nOrderedDict\n}X\x0c\x00\x00\x00__setstate__Nsb.",
        b"\x80\x02ctorch\nFloatStorage\nN}\x92.",  # keyword arguments
        b"\x80\x02K\x01)R.",  # calls a number
        b"\x80\x02X\x06\x00\x00\x00moduleQ.",  # a persistent id that is a string
        b"(S'module'\nctorch\nFloatStorage\nNNtQ.",  # stands for a class, but then is no model
        b"\x80\x02(X\x07\x00\x00\x00storagecposix\nsystem\ntQ.",
        b"\x80\x02(r\xff\xff\xff\xff.",  # memo number 4294967295
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x70.",  # a byte array of 8 exabytes
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x63.",
        b".",
        b"PK",
        b"PK\x03\x04" + bytes(100),
        b"",
        b"hello, world",
    ],
)
def test_broken_pickles_raise_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "sasrec.pt"
    path.write_bytes(content)
    for load in (load_reference_state_dict, load_reference_interactions):
        with pytest.raises(ValueError, match=str(path)):
            load(path)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:Duplicate name", "ignore:invalid escape")
@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_and_damaged_files_raise_or_read_the_same_names(reference, authors_modules, tmp_path, zip_format):
    path = tmp_path / "sasrec.pt"
    save(reference, path, zip_format)
    whole = path.read_bytes()
    generator = random.Random(0)
    for size in [*range(0, 200, 11), *(generator.randrange(len(whole)) for _ in range(30)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(path)):
            load_reference_state_dict(path)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            convert_reference_sasrec(load_reference_state_dict(path))
        except ValueError:
            continue


# Sizes and members of the archive.


def rewritten(path, change):
    """Write the zip at `path` again with its members as `change` returns them."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data, *compression in change(members):
            archive.writestr(name, data, *compression)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: [*members, ("sasrec/code/model.py", b"")], r"holds the member 'sasrec/code/model\.py'"),
        (lambda members: [*members, ("../evil", b"")], r"holds the member '\.\./evil'"),
        (lambda members: [*members, members[0]], "holds a member twice"),
        (lambda members: [*members, ("other/data.pkl", members[0][1])], "holds a member twice"),
        (lambda members: members[1:], "lacks data.pkl"),
        (lambda members: [(*member, zipfile.ZIP_DEFLATED) for member in members], "not compressed"),
        (lambda members: [(n, b"big" if n.endswith("byteorder") else d) for n, d in members], "is not little-endian"),
        (lambda members: [m for m in members if not m[0].endswith("data/0")], "data/0 has 0 bytes: expected 6 numbers"),
        (
            lambda members: [(n, d[:-4] if n.endswith("data/0") else d) for n, d in members],
            "data/0 has 20 bytes: expected 6 numbers of torch.float32",
        ),
    ],
)
def test_an_archive_with_other_members_is_refused(tmp_path, change, message):
    path = tmp_path / "sasrec.pt"
    save({"weight": torch.zeros(2, 3)}, path, True)
    rewritten(path, lambda members: members)  # negative control: writing it again changes nothing
    assert equal(load_reference_state_dict(path), {"weight": torch.zeros(2, 3)})
    rewritten(path, change)
    with pytest.raises(ValueError, match=message):
        load_reference_state_dict(path)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_an_archive_of_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="holds the member 'script/"):
        load_reference_state_dict(tmp_path / "script.pt")


class Tensor:
    """Pickles as a tensor of any claims over a storage of `numel` numbers."""

    def __init__(self, storage_numel, offset, shape, stride):
        self.claims = storage_numel, offset, shape, stride

    def __reduce__(self):
        storage_numel, offset, shape, stride = self.claims
        return torch._utils._rebuild_tensor_v2, (Persistent(storage_numel), offset, shape, stride, False, {})


class Persistent:
    def __init__(self, numel):
        self.numel = numel


class ClaimPickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", value.numel) if isinstance(value, Persistent) else None


@pytest.mark.parametrize(
    ("claims", "refused"),
    [
        ((6, 0, (2, 3), (3, 1)), False),
        ((6, 1, (2, 3), (3, 1)), True),  # ends outside
        ((6, 0, (7,), (1,)), True),
        ((6, 0, (10**9,), (0,)), True),  # many numbers out of one
        ((6, -1, (2,), (1,)), True),
        ((6, 5, (2,), (-1,)), True),
        ((6, 0, (2, -1), (1, 1)), True),
        ((6, 0, (-2, -3), (3, 1)), True),
        ((6, 0, (2,), (10**30,)), True),
        ((6, 0, (1,), (10**30,)), True),
        ((6, 0, (2, 3), (1,)), True),
        ((6, 0, (0,), (1,)), True),
        ((6, 0, (2.0,), (1,)), True),
        ((6, True, (2,), (1,)), True),
        ((6, 0, [2], [1]), True),
        ((7, 0, (2, 3), (3, 1)), True),
        ((10**18, 0, (2, 3), (3, 1)), True),
        ((-6, 0, (2, 3), (3, 1)), True),
        ((0, 0, (2, 3), (3, 1)), True),
    ],
)
def test_sizes_are_checked_against_the_bytes(tmp_path, claims, refused):
    path = tmp_path / "sasrec.pt"
    buffer = io.BytesIO()
    ClaimPickler(buffer, protocol=2).dump({"weight": Tensor(*claims)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sasrec/data.pkl", buffer.getvalue())
        archive.writestr("sasrec/data/0", torch.arange(6.0).numpy().tobytes())
    if refused:
        with pytest.raises(ValueError, match=str(path)):
            load_reference_state_dict(path)
    else:
        assert equal(load_reference_state_dict(path), {"weight": torch.arange(6.0).reshape(2, 3)})


@pytest.mark.parametrize(
    ("claimed", "stored", "refused"), [(6, 6, False), (6, 7, True), (7, 7, True), (2**62, 2**62, True)]
)
def test_sizes_of_the_older_format_are_checked_against_the_bytes(tmp_path, claimed, stored, refused):
    path = tmp_path / "sasrec.pt"
    parts = [
        0x1950A86A20F9469CFC6C,
        1001,
        {"little_endian": True},
        {"weight": Tensor(claimed, 0, (2, 3), (3, 1))},
        ["0"],
    ]
    with open(path, "wb") as file:
        for part in parts:
            ClaimPickler(file, protocol=2).dump(part)
        file.write(stored.to_bytes(8, "little") + torch.arange(6.0).numpy().tobytes())
    if refused:
        with pytest.raises(ValueError, match=r"expected \d+ numbers of torch\.float32"):
            load_reference_state_dict(path)
    else:
        assert equal(load_reference_state_dict(path), {"weight": torch.arange(6.0).reshape(2, 3)})


# Pickled pandas frames.


def frame(seq=None, **columns):
    """Histories padded with item 11, as the authors write them."""
    seq = [[3, 0, 7, 11, 11], [1, 2, 3, 4, 5], [9, 11, 11, 11, 11]] if seq is None else seq
    table = pd.DataFrame({"seq": seq, "len_seq": [3, 5, 1], "next": [4, 0, 10], **columns})
    table.columns = table.columns.astype(object)  # as before pandas 3
    return table


EXPECTED_SEQUENCES = {"history": [[4, 1, 8], [2, 3, 4, 5, 6], [10]], "target": [5, 1, 11]}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickled_frame_gives_unpadded_histories_under_our_ids(tmp_path, protocol):
    path = tmp_path / "train_data.df"
    rated = [[(item, 0 if item == 11 else 5) for item in row] for row in frame()["seq"]]
    for table in (
        frame(),
        frame(rated, next=[(4, 3), (0, 1), (10, 5)]),
        frame([[np.int64(item) for item in row] for row in frame()["seq"]]),
        frame(other=[0.5, 1.5, 2.5], title=["a", "b", "c"]).astype({"title": object, "next": "int32"}),
        pd.concat([frame(), frame()]).iloc[3:],  # another index
        frame().set_index(pd.Index([5, 7, 9])),
    ):
        table.to_pickle(path, protocol=protocol)
        assert load_reference_interactions(path).to_pydict() == EXPECTED_SEQUENCES


def test_a_frame_in_the_layout_before_pandas_1_3_is_read(tmp_path):
    class OldLayout(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, pd.DataFrame):
                return copyreg.__newobj__, (pd.DataFrame,), {"_data": value._mgr, "_typ": "dataframe"}
            if type(value) is type(frame()._mgr):
                blocks = [{"values": block.values, "mgr_locs": block.mgr_locs.indexer} for block in value.blocks]
                items = [value.items[block.mgr_locs.indexer] for block in value.blocks]
                state = (
                    value.axes,
                    [b["values"] for b in blocks],
                    items,
                    {"0.14.1": {"axes": value.axes, "blocks": blocks}},
                )
                return copyreg.__newobj__, (type(value),), state
            return NotImplemented

    with open(tmp_path / "train_data.df", "wb") as file:
        OldLayout(file, protocol=4).dump(frame(other=[0.5, 1.5, 2.5]))
    assert load_reference_interactions(tmp_path / "train_data.df").to_pydict() == EXPECTED_SEQUENCES


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (frame().drop(columns="len_seq"), "KeyError: 'len_seq'"),
        (frame(len_seq=[3, 6, 1]), "len_seq exceeds the length of seq"),
        (frame(len_seq=[3, -1, 1]), "found a int"),
        (frame(seq=[["a"] * 5, [1] * 5, [2] * 5]), "found a str"),
        (frame(next=[None, 1, 2]), "found a float"),
        (frame(next=[1, 2**31, 2]), "ArrowInvalid"),
        (frame(next=[1, 2**70, 2]), "OverflowError"),
        (frame(seq=["[1, 2, 3]", "[1, 2, 3, 4, 5]", "[1]"]).astype({"seq": object}), "found a str"),
        ([1, 2, 3], "AttributeError"),
    ],
)
def test_another_frame_is_refused(tmp_path, table, message):
    path = tmp_path / "train_data.df"
    path.write_bytes(pickle.dumps(table))
    with pytest.raises(ValueError, match=f"is not a DataFrame with columns seq, len_seq and next .*{message}"):
        load_reference_interactions(path)


def test_a_frame_that_runs_code_or_is_cut_off_is_refused(tmp_path):
    marker, path = tmp_path / "code_ran", tmp_path / "train_data.df"
    frame(other=[Call(os.system, f"touch {marker}")] * 3).to_pickle(path)
    with pytest.raises(UnsafePickleError, match=r"names posix\.system"):
        load_reference_interactions(path)
    frame().to_pickle(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 11):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole pickle"):
            load_reference_interactions(path)
    generator = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_reference_interactions(path)
        except ValueError:
            continue
    assert not marker.exists()


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


def test_a_catalogue_of_ours_is_taken_as_it_is(tmp_path):
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
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    runpy.run_path(str(RECIPE), run_name="__main__")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_writes_a_folder_that_speaks_titles(reference, authors_modules, tmp_path):
    save(reference, tmp_path / "sasrec.pt", True)
    pq.write_table(titles(), tmp_path / "items.parquet")
    output_dir = tmp_path / "new" / "sasrec"
    command = [sys.executable, RECIPE, tmp_path / "sasrec.pt", output_dir, "--items", tmp_path / "items.parquet"]
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


def test_the_command_replaces_an_earlier_conversion(reference, tmp_path, monkeypatch):
    save(reference.state_dict(), tmp_path / "sasrec.pt", True)
    output_dir = tmp_path / "sasrec"
    earlier = convert_reference_sasrec(reference.state_dict() | {"s_fc.bias": torch.zeros(NUM_ITEMS)})
    earlier.save_pretrained(output_dir)
    Catalogue(pa.table({"item_id": [1], "raw_id": [1], "title": ["stale"]})).to_parquet(output_dir / "items.parquet")
    convert(monkeypatch, tmp_path / "sasrec.pt", output_dir)
    data_files = [name for name in sorted(os.listdir(output_dir)) if not name.endswith(".py")]
    assert data_files == ["config.json", "model.safetensors"]
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
    with pytest.raises(ValueError, match=f"holds {problem}: expected a new folder or an earlier conversion"):
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
