"""The authors' pickles are read without running anything in them, and with every size checked."""

import builtins
import copyreg
import functools
import importlib
import io
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_ilora import convert_reference_sasrec
from hf_ilora.reference import pickle_reader
from hf_ilora.reference.convert_models import load_reference_state_dict
from hf_ilora.reference.pickle_reader import UnsafePickleError, read_frame, read_state_dict
from hf_ilora.reference.published_sequences import load_reference_sequences
from tests.reference.published_sasrec import Call, save

# Files of torch.save.


def equal(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


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


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zip_format", [True, False])
def test_a_pickled_gru4rec_or_caser_is_read_as_its_state_dict(other_reference, authors_modules, tmp_path, zip_format):
    path = tmp_path / "model.pt"
    save(other_reference, path, zip_format)
    assert equal(load_reference_state_dict(path), other_reference.state_dict())
    save(other_reference.state_dict(), path, zip_format)
    assert equal(load_reference_state_dict(path), other_reference.state_dict())


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
    path = tmp_path / "lstm.pt"
    save(nn.LSTM(2, 2), path, zip_format)
    with pytest.raises(UnsafePickleError, match=r"names torch\.nn\.modules\.rnn\.LSTM"):
        load_reference_state_dict(path)
    save({"epoch": 3, "state_dict": {}}, path, zip_format)
    with pytest.raises(ValueError, match="'epoch' is a int: expected a tensor; of a checkpoint, save the state dict"):
        load_reference_state_dict(path)
    save({("a", "b"): torch.zeros(2)}, path, zip_format)
    with pytest.raises(
        ValueError, match="contains a dict: expected the authors' SASRec, GRU4Rec or Caser, or its state dict"
    ):
        load_reference_state_dict(path)
    save([1, 2], path, zip_format)
    with pytest.raises(
        ValueError, match="contains a list: expected the authors' SASRec, GRU4Rec or Caser, or its state dict"
    ):
        load_reference_state_dict(path)


def test_a_module_inside_itself_is_refused(reference, authors_modules, tmp_path):
    reference._modules["mh_attn"]._modules["parent"] = reference
    save(reference, tmp_path / "sasrec.pt", True)
    with pytest.raises(ValueError, match="contains objects inside themselves"):
        load_reference_state_dict(tmp_path / "sasrec.pt")


def test_a_module_with_several_heads_is_refused(reference, authors_modules, tmp_path):
    reference.mh_attn.num_heads = 2
    save(reference, tmp_path / "sasrec.pt", True)
    with pytest.raises(ValueError, match=r"mh_attn\.num_heads is not 1"):
        load_reference_state_dict(tmp_path / "sasrec.pt")


# Files that would run code.


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
            load_reference_sequences(path)
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


def test_a_registered_extension_cannot_bypass_the_list(tmp_path):
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
        b"(S'module'\nctorch\nFloatStorage\nNNtQ.",  # is a class, but not a model
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
    for load in (load_reference_state_dict, load_reference_sequences):
        with pytest.raises(ValueError, match=str(path)):
            load(path)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:Duplicate name", "ignore:invalid escape")
@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_files_raise_and_damaged_ones_raise_nothing_but_value_errors(
    reference, authors_modules, tmp_path, zip_format
):
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
        (lambda members: [*members, ("sasrec/code/model.py", b"")], r"contains the member 'sasrec/code/model\.py'"),
        (lambda members: [*members, ("../evil", b"")], r"contains the member '\.\./evil'"),
        (lambda members: [*members, members[0]], "contains a member twice"),
        (lambda members: [*members, ("other/data.pkl", members[0][1])], "contains a member twice"),
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
    with pytest.raises(ValueError, match="contains the member 'script/"):
        load_reference_state_dict(tmp_path / "script.pt")


class Tensor:
    """Pickles as a tensor that claims any shape over a storage of `storage_numel` numbers."""

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
        assert load_reference_sequences(path).to_pydict() == EXPECTED_SEQUENCES


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
    assert load_reference_sequences(tmp_path / "train_data.df").to_pydict() == EXPECTED_SEQUENCES


COLUMNS = r"with columns seq, len_seq and next \("


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (frame().drop(columns="len_seq"), f"{COLUMNS}KeyError: 'len_seq'"),
        (frame(len_seq=[3, 6, 1]), f"{COLUMNS}ValueError: len_seq exceeds the length of seq"),
        (frame(len_seq=[3, -1, 1]), f"{COLUMNS}.*found a int"),
        (frame(seq=[["a"] * 5, [1] * 5, [2] * 5]), f"{COLUMNS}.*found a str"),
        (frame(next=[None, 1, 2]), f"{COLUMNS}.*found a float"),
        (frame(next=[1, 2**31, 2]), f"{COLUMNS}ArrowInvalid"),
        (frame(next=[1, 2**70, 2]), f"{COLUMNS}OverflowError"),
        (frame(seq=["[1, 2, 3]", "[1, 2, 3, 4, 5]", "[1]"]).astype({"seq": object}), f"{COLUMNS}.*found a str"),
        ([1, 2, 3], r"in the layout of pandas 0\.20 to 2 \(AttributeError"),
    ],
)
def test_another_frame_is_refused(tmp_path, table, message):
    path = tmp_path / "train_data.df"
    path.write_bytes(pickle.dumps(table))
    with pytest.raises(ValueError, match=f"is not a DataFrame {message}"):
        load_reference_sequences(path)


def test_a_frame_that_runs_code_or_is_cut_off_is_refused(tmp_path):
    marker, path = tmp_path / "code_ran", tmp_path / "train_data.df"
    frame(other=[Call(os.system, f"touch {marker}")] * 3).to_pickle(path)
    with pytest.raises(UnsafePickleError, match=r"names posix\.system"):
        load_reference_sequences(path)
    frame().to_pickle(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 11):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is not a whole pickle"):
            load_reference_sequences(path)
    generator = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            load_reference_sequences(path)
        except ValueError:
            continue
    assert not marker.exists()


# --- sizes are checked against the bytes of the file ---


def zip_of(data_pkl: bytes, numbers: int = 1000) -> bytes:
    """A file of torch.save with one storage of float32."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", data_pkl)
        archive.writestr("a/version", "3")
        archive.writestr("a/data/0", b"\0" * 4 * numbers)
    return content.getvalue()


def tensor_of(shape: bytes, stride: bytes) -> bytes:
    """Opcodes of a tensor in that storage; shape and stride are opcodes that push numbers."""
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuM\xe8\x03tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0(" + shape + b"t(" + stride + b"t\x89NtR"


def named(tensors: list[bytes]) -> bytes:
    return b"}(" + b"".join(b"X\x04\0\0\0%04d" % place + each for place, each in enumerate(tensors)) + b"u"


SHARED_TUPLE, PAIR = b"))\x86q\0", b"h\0h\0\x86q\0"
ONES = b"K\x01" * 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # 60,000 rows that are all the same list; and such a list, filled after it is referred to
        (pickle.dumps([[0] * 20_000] * 60_000, 2), "hold more than"),
        (b"\x80\x02]q\0](" + b"h\0" * 100_000 + b"eh\0(" + b"K\x01" * 20_000 + b"e0.", "hold more than"),
        # ten references to the level below, forty times; and a long text, again and again
        (b"\x80\x02](K\x01e" + b"".join(b"q%c](" % n + b"h%c" % n * 10 + b"e" for n in range(40)) + b".", "hold more"),
        (pickle.dumps(["a" * 100_000] * 100_000, 2), "hold more than"),
        (b"\x80\x02)" + b"\x85" * 100_000 + b".", "inside each other"),
        (b"\x80\x02" + b"](" * 5_000 + b"e" * 5_000 + b".", "inside each other"),
        (b"\x80\x02]q\0h\0a.", "inside themselves"),
        # keys that take forever to hash, or are nested too deeply
        (b"\x80\x02}" + SHARED_TUPLE + PAIR * 60 + b"K\x01s.", "containers as keys"),
        (b"\x80\x02})" + b"\x85" * 300 + b"K\x01s.", "containers as keys"),
        (b"\x80\x02\x8f(" + SHARED_TUPLE + PAIR * 60 + b"\x90.", "containers as keys"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "numbers its objects"),
        (b"(cos\nsystem\nX\x02\0\0\0lso.", "uses OBJ"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"a.", "not a whole pickle"),
        (b"\x80\x02](h\x05e.", "not a whole pickle"),
        (b"\x80\x02K\x01K\x02a.", "not a whole pickle"),
        (b"0.", "not a whole pickle"),
    ],
)
def test_pickles_that_describe_too_much_for_their_size_are_refused_before_anything_is_built(
    tmp_path, monkeypatch, content, message
):
    def built(*_):
        pytest.fail("the pickle was loaded")

    monkeypatch.setattr(pickle_reader._RecordingUnpickler, "__init__", built)
    path = tmp_path / "frame.df"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_frame(path)
    path.write_bytes(zip_of(content))
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("data_pkl", "message"),
    [
        (tensor_of(ONES, ONES), "has 100000 dimensions: expected at most 8"),
        (tensor_of(b"M\xe8\x03" * 100_000, ONES), "has 100000 dimensions"),
        (tensor_of(b"K\x02" * 2, b"K\x01"), "has 2 dimensions"),
        (tensor_of(b"M\xe8\x03" * 8, b"K\0" * 8), "its shape does not fit"),
        (named([tensor_of(b"M\xe8\x03", b"K\x01")] * 5), "5,000 numbers in its tensors and 1,000 in the file"),
    ],
)
def test_shapes_and_shared_storages_are_checked_against_the_bytes(tmp_path, data_pkl, message):
    path = tmp_path / "sasrec.pt"
    path.write_bytes(zip_of(b"\x80\x02" + (data_pkl if data_pkl.startswith(b"}") else named([data_pkl])) + b"."))
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)
    path.write_bytes(zip_of(b"\x80\x02" + named([tensor_of(b"K\x0aK\x05", b"K\x05K\x01")] * 3) + b"."))
    assert {tuple(tensor.shape) for tensor in read_state_dict(path).values()} == {(10, 5)}  # the control


def test_a_name_that_is_repeated_makes_one_class(tmp_path, monkeypatch):
    made = []
    find_class = pickle_reader._RecordingUnpickler.find_class

    def finds(self, module, name):
        made.append(find_class(self, module, name))
        return made[-1]

    monkeypatch.setattr(pickle_reader._RecordingUnpickler, "find_class", finds)
    path = tmp_path / "frame.df"
    path.write_bytes(b"\x80\x02(" + b"cpandas\nDataFrame\n" * 5_000 + b"t.")
    with pytest.raises(ValueError, match="not a DataFrame"):
        read_frame(path)
    assert len(made) == 5_000 and len(set(made)) == 1
