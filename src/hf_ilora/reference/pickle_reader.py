"""Reads the authors' pickles without running anything in them; no other module of hf_ilora reads pickles.

A pickle is a program that names functions and calls them. This module only records the calls. Each name on a list
becomes an inert `_Record` class that keeps arguments and state; any other name raises an error before anything happens.
Plain code then reads tensors and columns from the records and checks every size against the bytes in the file. No
function or class of torch, numpy, pandas or the authors is called, so odd arguments to them do no harm. In contrast,
torch's `weights_only` unpickler calls the functions on its list, cannot read whole modules of the older format, and
accepts further classes only through a process-wide list.
"""

import copyreg
import io
import math
import os
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

_STORAGE_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_TENSOR_FUNCTIONS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETER_FUNCTION = "torch._utils._rebuild_parameter"
# A class is pickled under "__main__" if its script runs as a program, not as an imported module.
_MODULE_CLASSES = {
    f"{module}.{name}"
    for module in (
        "__main__",
        "main",
        "SASRec",
        "SASRecModules_ori",
        "A_SASRec_final_bce_llm",
        "recommender.A_SASRec_final_bce_llm",
        "recommender.SASRecModules_ori",
    )
    for name in ("SASRec", "GRU", "Caser", "MultiHeadAttention", "PositionwiseFeedForward")
} | {
    f"torch.nn.modules.{name}"
    for name in (
        "activation.ReLU",
        "activation.Softmax",
        "container.ModuleList",
        "container.Sequential",
        "conv.Conv1d",
        "conv.Conv2d",
        "dropout.Dropout",
        "linear.Linear",
        "normalization.LayerNorm",
        "rnn.GRU",
        "sparse.Embedding",
    )
}
_NUMPY_SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_NUMPY_ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
_NUMPY_BUFFERS = {"numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}
_DICTIONARY = "collections.OrderedDict"
_COMMON_NAMES = {"numpy.dtype", "builtins.set", "_codecs.encode", _DICTIONARY} | _NUMPY_SCALARS
_WEIGHT_NAMES = (
    _COMMON_NAMES | {"torch.device", _PARAMETER_FUNCTION} | _TENSOR_FUNCTIONS | _STORAGE_DTYPES.keys() | _MODULE_CLASSES
)
_SLICE = "builtins.slice"
_FRAME_NAMES = (
    _COMMON_NAMES
    | {"numpy.ndarray", _SLICE, "pandas._libs.internals._unpickle_block"}
    | {"pandas.DataFrame", "pandas.core.frame.DataFrame"}
    | {"pandas.core.internals.BlockManager", "pandas.core.internals.managers.BlockManager"}
    | {"pandas.Index", "pandas.core.indexes.base.Index", "pandas.core.indexes.base._new_Index"}
    | {"pandas.RangeIndex", "pandas.core.indexes.range.RangeIndex", "pandas.core.indexes.numeric.Int64Index"}
    | _NUMPY_ARRAYS
    | _NUMPY_BUFFERS
)

_ZIP_MEMBER = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+)"
)
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LONGEST_NAME = 100
_MAX_DIMENSIONS = 8
_MAX_USES_OF_NUMBERS = 4  # an item table may also be the table of the head


class UnsafePickleError(ValueError):
    """A pickle names a class or function that is not on the list; nothing in it was run."""


def read_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read names and tensors from a file of `torch.save` with the authors' SASRec, GRU4Rec or Caser or its state dict.

    Args:
        path: a file in either of torch's two formats.

    Raises:
        UnsafePickleError: the pickle names a class or function that is not on the list.
        ValueError: the file is truncated or of another kind, or its sizes do not fit its bytes.
    """
    path = Path(path)
    root, storages = _read_saved(path)
    if isinstance(root, dict) and _all_strings(root):
        tensors = {name: _tensor(value, storages, f"{path}: {name!r}") for name, value in root.items()}
    elif _is(root, _MODULE_CLASSES):
        tensors = _module_tensors(root, storages, path)
    else:
        raise ValueError(
            f"{path} contains a {_kind(root)}: expected the authors' SASRec, GRU4Rec or Caser, or its state dict"
        )
    numbers = sum(tensor.numel() for tensor in tensors.values())
    stored = sum(storage.numel() for storage in storages.values())
    if numbers > _MAX_USES_OF_NUMBERS * stored:
        raise ValueError(
            f"{path} has {numbers:,} numbers in its tensors and {stored:,} in the file: expected no more than "
            f"{_MAX_USES_OF_NUMBERS} tensors to share them"
        )
    return tensors


def read_tensor(path: str | os.PathLike) -> torch.Tensor:
    """Read the one tensor in a file of `torch.save`, such as DLLM2Rec's `all_embeddings.pt`.

    Raises:
        UnsafePickleError: the pickle names a class or function that is not on the list.
        ValueError: the file is truncated or of another kind, or its sizes do not fit its bytes.
    """
    path = Path(path)
    root, storages = _read_saved(path)
    return _tensor(root, storages, f"{path}: it")


def read_frame(path: str | os.PathLike) -> dict[Any, Any]:
    """Read the columns of a pickled pandas DataFrame: name -> (rows,) values.

    Values may be records of numpy numbers: pass them to `integer` to get whole numbers.

    Raises:
        UnsafePickleError: the pickle names a class or function that is not on the list.
        ValueError: the file is truncated, or is not a DataFrame in a known layout.
    """
    path = Path(path)
    frame, _ = _unpickle(io.BytesIO(path.read_bytes()), _FRAME_NAMES, path)
    try:
        return _frame_columns(frame)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a DataFrame in the layout of pandas 0.20 to 2 ({type(error).__name__}: {error}): read it "
            "where it was written, and save its columns as parquet"
        ) from error


def integer(value: Any) -> int:
    """A whole number of at least 0 from a DataFrame: the value, or the first of a tuple such as (id, rating).

    Raises:
        ValueError: the value is anything else.
    """
    if type(value) is tuple:
        value = value[0]
    if _is(value, _NUMPY_SCALARS):
        value = np.frombuffer(value.arguments[1], dtype=_dtype(value.arguments[0])).item()
    if not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"expected item ids and lengths of at least 0, found a {_kind(value)}")
    return int(value)


# --- from pickles to records ---


class _Record:
    """One object of a pickle: the name of its function or class, the arguments, and the state to set."""

    __slots__ = ("arguments", "state")
    name = ""

    def __new__(cls, *arguments):
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    def __setstate__(self, state):
        self.state = state


class _RecordedDictionary(dict):
    """An OrderedDict of the pickle; attributes that the pickle sets on it are ignored."""

    def __setstate__(self, state):
        pass


class _Storage(_Record):
    """The bytes of a tensor, which the file stores under the key in `arguments`."""

    __slots__ = ()
    name = "storage"


class _RecordingUnpickler(pickle.Unpickler):
    """Finds no functions but the constructors of records; see the module docstring.

    Attributes:
        storages: key -> (dtype, number of elements) of each storage that the pickle refers to.
    """

    def __init__(self, stream: io.BytesIO, allowed: set[str], path: Path):
        super().__init__(stream)
        self.allowed = allowed
        self.path = path
        self.classes: dict[str, type] = {}
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def find_class(self, module: str, name: str):
        # Protocols below 3 use Python 2's names.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full_name = f"{module}.{name}"
        if full_name not in self.allowed:
            raise UnsafePickleError(
                f"{self.path} names {full_name}, which no file of the authors' models does: it was not run. Only their "
                "SASRec, GRU4Rec and Caser can be read; if the file claims to be one, do not open it by other means"
            )
        if full_name == _DICTIONARY:
            return _RecordedDictionary
        if full_name not in self.classes:  # one class for each name
            self.classes[full_name] = type(name, (_Record,), {"__slots__": (), "name": full_name})
        return self.classes[full_name]

    def persistent_load(self, pid):
        match pid:
            # The older format stores the source code of each module class, which is ignored.
            case ("module", type() as module_class, _, _) if issubclass(module_class, _Record):
                return module_class
            case ("storage", type() as storage, str() as key, _, int() as numel, *view) if (
                issubclass(storage, _Record) and storage.name in _STORAGE_DTYPES and numel > 0 and view in ([], [None])
            ):
                found = (_STORAGE_DTYPES[storage.name], numel)
                if self.storages.setdefault(key, found) == found:
                    return _Storage(key)
        raise UnsafePickleError(f"{self.path} refers to data in a way that torch.save does not: it was not read")


class _Outline:
    """An object that a pickle would build, as the number of its plain values and the outlines of the objects in it."""

    __slots__ = ("depth", "parts", "size")

    def __init__(self, parts: Iterable):
        self.size, self.parts, self.depth = 1, [], 1
        self.add(parts)

    def add(self, parts: Iterable) -> None:
        for part in parts:
            if isinstance(part, _Outline):
                self.parts.append(part)
                self.depth = max(self.depth, part.depth + 1)  # `part` may grow later
            else:
                self.size += part


_PLAIN_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_PLAIN_VALUES |= {"NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "PERSID", "EXT1", "EXT2", "EXT4"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_TEXTS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_EMPTY = {"EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET"}
_FROM_MARK = {"LIST", "TUPLE", "DICT", "FROZENSET"}
_ADD_FROM_MARK = {"APPENDS", "SETITEMS", "ADDITEMS"}
# Opcode -> number of objects that it takes from the stack to build one object, or to add them to the object below.
_FROM_STACK = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "BINPERSID": 1}
_CALLS = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_ADD_FROM_STACK = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
_KEYS = {"DICT": 2, "SETITEMS": 2, "SETITEM": 2, "ADDITEMS": 1, "FROZENSET": 1}  # every n-th object is a key
# Files of the authors have less than one object per byte, even if shared objects count as often as they occur.
_MAX_OBJECTS_PER_BYTE = 8
_ALWAYS_ALLOWED_OBJECTS = 100_000
_MAX_DEPTH = 500
_LARGEST_KEY = 8
_BYTES_PER_OBJECT = 16  # how many bytes of a text count as an object


def _check_expansion(stream: io.BytesIO, path: Path) -> None:
    """Follow the next pickle of the stream without building anything, and refuse it if it describes too much.

    A pickle can refer to one object many times, so that a few bytes describe lists of any length. It can nest
    containers endlessly, and use large containers as keys, which take long to hash.

    Raises:
        UnsafePickleError: the pickle does so, or uses operations that no file of the authors needs.
    """
    start = stream.tell()
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        place = marks.pop()
        objects = stack[place:]
        del stack[place:]
        return objects

    def last(count: int) -> list:
        if len(stack) < count + (marks[-1] if marks else 0):
            raise ValueError("it takes more objects than there are")
        objects = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return objects

    # Frames of the authors have a million small tuples of numbers, so tuples of the same size share an outline.
    small: dict[tuple[int, ...], _Outline] = {}

    def outline(parts: list) -> _Outline:
        if any(isinstance(part, _Outline) for part in parts):
            return _Outline(parts)
        shared = small.get(tuple(parts))
        return small.setdefault(tuple(parts), _Outline(parts)) if shared is None else shared

    position = start
    for opcode, argument, position in pickletools.genops(stream):
        name, parts = opcode.name, ()
        if name in _PLAIN_VALUES:
            stack.append(1)
        elif name in _TEXTS:
            stack.append(1 + len(argument) // _BYTES_PER_OBJECT)
        elif name in _EMPTY:
            stack.append(_Outline(()))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            number = len(memo) if name == "MEMOIZE" else argument
            # Picklers number objects consecutively; a larger number would only allocate memory.
            if number > position - start:
                raise UnsafePickleError(f"{path} numbers its objects in a way that no pickler does: it was not read")
            memo[number] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _FROM_MARK:
            parts = since_mark()
            stack.append(_Outline(parts))
        elif name in _ADD_FROM_MARK:
            parts = since_mark()
            _extend(stack[-1], parts)
        elif name in _FROM_STACK:
            stack.append(outline(last(_FROM_STACK[name])))
        elif name in _CALLS:
            stack.append(_Outline(last(_CALLS[name])))
        elif name in _ADD_FROM_STACK:
            parts = last(_ADD_FROM_STACK[name])
            _extend(stack[-1], parts)
        elif name == "STACK_GLOBAL":
            last(2)
            stack.append(1)
        elif name == "POP" and not (marks and marks[-1] == len(stack)):
            last(1)
        elif name in ("POP", "POP_MARK"):
            since_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UnsafePickleError(f"{path} uses {name}, which no file of the authors' models does: it was not read")
        if stack and isinstance(stack[-1], _Outline) and stack[-1].depth > _MAX_DEPTH:
            raise _nested(path)
        keys = parts[:: _KEYS[name]] if name in _KEYS else ()
        if any(isinstance(key, _Outline) and (key.parts or key.size > _LARGEST_KEY) for key in keys):
            raise UnsafePickleError(f"{path} uses large containers as keys, which no file of the authors' models does")
    size = position - start
    limit = _ALWAYS_ALLOWED_OBJECTS + _MAX_OBJECTS_PER_BYTE * size
    if isinstance(stack[-1], _Outline) and _expanded_size(stack[-1], limit, path) > limit:
        raise UnsafePickleError(
            f"{path} refers to the same objects again and again: its {size:,} bytes hold more than {limit:,} values. "
            "No file of the authors does: it was not read"
        )


def _extend(container: _Outline | int, parts: list) -> None:
    if not isinstance(container, _Outline):
        raise ValueError("it adds objects to a plain value")
    container.add(parts)


def _nested(path: Path) -> UnsafePickleError:
    return UnsafePickleError(
        f"{path} contains objects inside themselves, or more than {_MAX_DEPTH} inside each other. No file of the "
        "authors does: it was not read"
    )


def _expanded_size(root: _Outline, limit: int, path: Path) -> int:
    """The number of values in `root`, counted as often as they occur, or some number above `limit`."""
    sizes: dict[int, int] = {}
    waiting = [(root, iter(root.parts))]
    inside = {id(root)}
    while waiting:
        outline, parts = waiting[-1]
        for part in parts:
            if id(part) in inside or len(waiting) > _MAX_DEPTH:
                raise _nested(path)
            if id(part) not in sizes:
                inside.add(id(part))
                waiting.append((part, iter(part.parts)))
                break
        else:
            waiting.pop()
            inside.remove(id(outline))
            sizes[id(outline)] = min(limit + 1, outline.size + sum(sizes[id(part)] for part in outline.parts))
    return sizes[id(root)]


def _unpickle(stream: io.BytesIO, allowed: set[str], path: Path) -> tuple[Any, dict[str, tuple[torch.dtype, int]]]:
    """The next pickle of the stream as records, containers and plain values, and the storages it refers to."""
    start = stream.tell()
    try:
        _check_expansion(stream, path)
        stream.seek(start)
        copyreg.clear_extension_cache()  # cached objects would bypass find_class
        unpickler = _RecordingUnpickler(stream, allowed, path)
        return unpickler.load(), unpickler.storages
    except UnsafePickleError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(
            f"{path} is not a whole pickle ({type(error).__name__}: {error}): download the file again"
        ) from error


def _is(value: Any, names: set[str]) -> bool:
    return isinstance(value, _Record) and value.name in names


def _kind(value: Any) -> str:
    return value.name if isinstance(value, _Record) else type(value).__name__


def _all_strings(values: Iterable) -> bool:
    return all(type(value) is str for value in values)


# --- from the two formats of torch.save to tensors ---


def _read_saved(path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    content = path.read_bytes()
    return _read_zip(content, path) if content.startswith(b"PK") else _read_legacy(content, path)


def _read_zip(content: bytes, path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for info in archive.infolist():
            stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not _ZIP_MEMBER.fullmatch(info.filename) or not stored:
                raise ValueError(
                    f"{path} contains the member {info.filename!r}, which torch.save does not write: expected only "
                    "data.pkl, version and the tensors' data, not compressed"
                )
        if "data.pkl" not in members or len(members) < len(archive.infolist()):
            raise ValueError(f"{path} lacks data.pkl or contains a member twice: it is not a file of torch.save")
        if sum(info.file_size for info in members.values()) > len(content):
            raise ValueError(f"{path} declares more data than it contains: it is not a file of torch.save")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError(f"{path} is not little-endian: save it again on an ordinary machine")
        root, expected = _unpickle(io.BytesIO(archive.read(members["data.pkl"])), _WEIGHT_NAMES, path)
        storages = {}
        for key, (dtype, numel) in expected.items():
            data = archive.read(members[f"data/{key}"]) if f"data/{key}" in members else b""
            storages[key] = _numbers(data, dtype, numel, f"{path}: data/{key}")
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"{path} is not a whole zip file ({error}): download the file again") from error
    return root, storages


def _read_legacy(content: bytes, path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    stream = io.BytesIO(content)
    magic_number, _ = _unpickle(stream, _WEIGHT_NAMES, path)
    if magic_number != _LEGACY_MAGIC_NUMBER:
        raise ValueError(f"{path} is a pickle, but not of torch.save: expected the authors' .pt file")
    protocol, _ = _unpickle(stream, _WEIGHT_NAMES, path)
    system, _ = _unpickle(stream, _WEIGHT_NAMES, path)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(f"{path} is not a little-endian file of torch.save of protocol {_LEGACY_PROTOCOL}")
    root, expected = _unpickle(stream, _WEIGHT_NAMES, path)
    keys, _ = _unpickle(stream, _WEIGHT_NAMES, path)
    if type(keys) is not list or not _all_strings(keys) or sorted(keys) != sorted(expected):
        raise ValueError(f"{path} contains other data than it refers to: it is not a file of torch.save")
    storages = {}
    for key in keys:
        dtype, numel = expected[key]
        stored = int.from_bytes(stream.read(8), "little")
        data = stream.read(min(numel * dtype.itemsize, len(content))) if stored == numel else b""
        storages[key] = _numbers(data, dtype, numel, f"{path}: data {key}")
    if stream.read(1):
        raise ValueError(f"{path} has more bytes after its last tensor: it is not a file of torch.save")
    return root, storages


def _numbers(data: bytes, dtype: torch.dtype, numel: int, where: str) -> torch.Tensor:
    if len(data) != numel * dtype.itemsize:
        raise ValueError(f"{where} has {len(data)} bytes: expected {numel} numbers of {dtype}; download the file again")
    return torch.frombuffer(bytearray(data), dtype=dtype)  # (numel,)


def _module_tensors(root: _Record, storages: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module record and its children, named as in a state dict."""
    tensors = {}
    waiting, seen = [("", root)], set()
    while waiting:
        prefix, module = waiting.pop()
        state = module.state if isinstance(module.state, dict) else {}
        tables = [state.get(name) for name in ("_parameters", "_buffers", "_modules")]
        is_module = all(isinstance(table, dict) and _all_strings(table) for table in tables)
        if not is_module or id(module) in seen or len(prefix) > _LONGEST_NAME:
            raise ValueError(f"{path}: {prefix or 'it'} is not a module of torch: expected the authors' model")
        if state.get("num_heads", 1) != 1:
            raise ValueError(f"{path}: {prefix}num_heads is not 1: the reference block has one attention head")
        seen.add(id(module))
        parameters, buffers, children = tables
        for name, value in (parameters | buffers).items():
            if value is not None:
                tensors[f"{prefix}{name}"] = _tensor(value, storages, f"{path}: {prefix}{name}")
        for name, child in children.items():
            if not _is(child, _MODULE_CLASSES):
                raise ValueError(f"{path}: {prefix}{name} is a {_kind(child)}: expected a module of torch")
            waiting.append((f"{prefix}{name}.", child))
    return tensors


def _tensor(value: Any, storages: dict[str, torch.Tensor], where: str) -> torch.Tensor:
    if _is(value, {_PARAMETER_FUNCTION}) and value.arguments:
        value = value.arguments[0]
    if not _is(value, _TENSOR_FUNCTIONS):
        raise ValueError(f"{where} is a {_kind(value)}: expected a tensor; of a checkpoint, save the state dict in it")
    match value.arguments:
        case (_Storage(arguments=(key,)), int() as offset, tuple() as shape, tuple() as stride, *_):
            numbers = storages[key]  # (numel,)
            if len(shape) > _MAX_DIMENSIONS or len(shape) != len(stride):
                raise ValueError(f"{where} has {len(shape)} dimensions: expected at most {_MAX_DIMENSIONS}")
            whole = all(type(number) is int and 0 <= number <= len(numbers) for number in (offset, *shape, *stride))
            if whole and 0 < math.prod(shape) <= len(numbers):
                last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
                if last < len(numbers):
                    return numbers.as_strided(shape, stride, offset)
    raise ValueError(f"{where}: its shape does not fit the bytes in the file; it is not a file of torch.save")


# --- from a pickled DataFrame to columns ---


def _frame_columns(frame: Any) -> dict[Any, Any]:
    """Column name -> values, from the record of a DataFrame; another layout raises various errors."""
    state = frame.state
    manager = state["_mgr"] if "_mgr" in state else state["_data"]  # "_data" before pandas 1.1
    if manager.state is None:
        blocks, axes = manager.arguments
        blocks = [block.arguments[:2] for block in blocks]
    else:  # before pandas 1.3
        axes, _, _, extra = manager.state
        blocks = [(block["values"], block["mgr_locs"]) for block in extra["0.14.1"]["blocks"]]
    labels = _array(axes[0].arguments[1]["data"])  # (columns,)
    columns = {}
    for values, places in blocks:
        places = slice(*places.arguments) if _is(places, {_SLICE}) else _array(places)
        columns |= zip(labels[places], _array(values), strict=True)  # values: (columns of the block, rows)
    return columns


def _array(record: Any) -> np.ndarray:
    if _is(record, _NUMPY_BUFFERS):
        data, dtype, shape, order = record.arguments
    else:
        _, shape, dtype, is_fortran, data = record.state
        order = "F" if is_fortran else "C"
    if type(data) is list:  # an array of objects
        return np.fromiter(data, dtype=object, count=len(data)).reshape(shape)
    return np.frombuffer(data, dtype=_dtype(dtype)).reshape(shape, order=order)


def _dtype(record: Any) -> np.dtype:
    kind, byte_order = record.arguments[0], record.state[1]
    if not re.fullmatch("[iuf][1248]", kind) or byte_order not in ("<", "|"):
        raise ValueError(f"expected little-endian numbers, found {byte_order}{kind}")
    return np.dtype(f"<{kind}")


__all__ = ["UnsafePickleError", "integer", "read_frame", "read_state_dict", "read_tensor"]
