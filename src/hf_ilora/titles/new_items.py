"""Adds items to a trained model: rows of its catalogue and of its item tables."""

import copy
from collections.abc import Iterable, Mapping

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import nn

from hf_ilora.data.columns import is_string, repeated_values
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.next_item_head import NextItemHead
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel

Items = Iterable[tuple[int | str, str]] | Mapping[int | str, str] | pa.Table | pd.DataFrame | datasets.Dataset


def new_items_table(items: Items, catalogue: Catalogue) -> pa.Table:
    """The rows that new items add to a catalogue.

    Args:
        items: (raw id, title) pairs, a dictionary of titles by raw id, or a table (of pyarrow, pandas or datasets) with
            the columns `raw_id` (or `item_id`), `title` and optionally others of the catalogue, such as `year`.
        catalogue: the catalogue to add to.

    Returns:
        The columns of the catalogue. `count` is 0; columns that the items lack are null, and `genres` empty.

    Raises:
        ValueError: there are no items; a column is missing or has another type; raw ids are repeated, already in the
            catalogue or of another type; or a title is missing or blank.
    """
    given = _as_table(items)
    if not len(given):
        raise ValueError("there are no items to add: expected at least one (raw id, title)")
    schema = catalogue.table.schema
    raw_ids = _raw_ids(given["raw_id"], schema.field("raw_id").type)
    repeated = repeated_values(raw_ids)
    if len(repeated):
        raise ValueError(f"raw id {repeated[0].as_py()!r} occurs more than once: expected one title per new item")
    known = catalogue.table["raw_id"]
    existing = known.filter(pc.is_in(known, value_set=raw_ids))
    if len(existing):
        raise ValueError(
            f"raw id {existing[0].as_py()!r} is in the catalogue already ({len(existing)} of the {len(raw_ids)} are): "
            "expected new items; leave out those that the model knows"
        )
    for raw_id, title in zip(raw_ids.to_pylist(), given["title"].to_pylist(), strict=True):
        if not isinstance(title, str) or not title.strip():
            raise ValueError(
                f"the title of item {raw_id!r} is {title!r}: expected text, by which the item gets its place; give it "
                "a title or leave it out"
            )
    first = len(catalogue) + 1
    columns = {"item_id": pa.array(range(first, first + len(given))), "raw_id": raw_ids, "title": given["title"]}
    defaults = {"year": None, "genres": [], "count": 0}
    for name in schema.names[3:]:
        column = given[name] if name in given.column_names and name != "count" else [defaults.get(name)] * len(given)
        columns[name] = column
    try:
        return pa.table({name: columns[name] for name in schema.names}).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise ValueError(f"the new items do not fit the catalogue ({error}): expected {schema.to_string()}") from error


def _as_table(items: Items) -> pa.Table:
    """A table with the columns raw_id and title, and further ones if `items` is a table."""
    if isinstance(items, datasets.Dataset):
        items = items.with_format("arrow")[:]
    elif isinstance(items, Catalogue):
        items = items.table
    elif isinstance(items, pd.DataFrame):
        items = pa.Table.from_pandas(items, preserve_index=False)
    elif isinstance(items, Mapping):
        items = items.items()
    if not isinstance(items, pa.Table):
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise ValueError(f"items is {items!r}: expected (raw id, title) pairs, or a table with these columns")
        pairs = list(items)
        wrong = next((pair for pair in pairs if not isinstance(pair, tuple | list) or len(pair) != 2), None)
        if wrong is not None:
            raise ValueError(f"an item is {wrong!r}: expected (raw id, title), or a table with these columns")
        return _table_of_pairs(pairs)
    names = items.column_names
    if "raw_id" not in names and "item_id" in names:  # as load_interactions calls it
        items = items.rename_columns(["raw_id" if name == "item_id" else name for name in names])
    missing = [name for name in ("raw_id", "title") if name not in items.column_names]
    if missing:
        raise ValueError(
            f"the items have no column {', '.join(missing)} (found: {', '.join(names)}): expected raw_id (or item_id) "
            "and title"
        )
    return items


def _table_of_pairs(pairs: list) -> pa.Table:
    raw_ids, titles = ([pair[place] for pair in pairs] for place in (0, 1))
    try:
        return pa.table({"raw_id": pa.array(raw_ids), "title": titles})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"raw ids or titles are of several types ({error}): expected one type of each") from error


def _raw_ids(column: pa.ChunkedArray, expected: pa.DataType) -> pa.Array:
    """The raw ids in the type of the catalogue: int64 or string."""
    if column.null_count:
        raise ValueError(f"{column.null_count} of the new items have no raw id: expected one for each")
    is_text = is_string(column.type)
    if is_text != is_string(expected) or not (is_text or pa.types.is_integer(column.type)):
        raise ValueError(
            f"the raw ids of the new items are {column.type} (the first is {column[0].as_py()!r}): expected "
            f"{expected}, as in the catalogue of the model; cast them"
        )
    return column.cast(expected).combine_chunks()


def item_tables(model: EncoderForNextItem) -> list[nn.Parameter]:
    """The tables with a row per item: the input embeddings and the head, or one table if they are tied.

    Raises:
        TypeError: the model has no such tables.
        ValueError: teacher embeddings are not folded, or the weights are spread over processes.
    """
    if not isinstance(model, EncoderForNextItem):
        raise TypeError(
            f"model is a {type(model).__name__}, which has no trained table of items: expected a SASRecForNextItem, "
            "GRU4RecForNextItem or CaserForNextItem"
        )
    if model.config.teacher_embedding_size is not None:
        raise ValueError(
            "the model has teacher embeddings, which new items lack: call model.fold_teacher_embeddings() first"
        )
    tables = [model.get_input_embeddings().weight, model.head.weight]
    if not tables[0].numel():
        raise ValueError("the weights are spread over processes (ZeRO-3): save the model, load it in one process")
    return tables[:1] if tables[0] is tables[1] else tables


@torch.no_grad()
def set_item_rows(
    model: EncoderForNextItem, item_ids: torch.Tensor, rows: list[torch.Tensor], bias: float | None
) -> None:
    """Set the rows of items, one tensor (items, size) for each of `item_tables`, and their bias in the head."""
    for table, values in zip(item_tables(model), rows, strict=True):
        table[item_ids.to(table.device)] = values.to(table)
    if bias is not None:
        model.head.bias[item_ids.to(model.head.bias.device)] = bias


@torch.no_grad()
def add_item_rows(
    model: EncoderForNextItem, rows: list[torch.Tensor], bias: float | None, catalogue: Catalogue
) -> None:
    """Add items to a model, in place.

    Args:
        model: the model.
        rows: a tensor (items, size) for each of `item_tables`.
        bias: bias of the new items in the head; None for a head without biases.
        catalogue: the catalogue of all items, the new ones last.
    """
    tables = [_grown(table, values) for table, values in zip(item_tables(model), rows, strict=True)]
    config = copy.copy(model.config)  # another model may share it
    config.num_items = len(catalogue)
    for module in model.modules():
        if isinstance(module, NextItemPreTrainedModel | NextItemHead):
            module.config = config
    embedding, head = model.get_input_embeddings(), model.head
    embedding.weight, head.weight = tables[0], tables[-1]
    embedding.num_embeddings = head.out_features = len(catalogue) + 1
    if bias is not None:
        head.bias = _grown(head.bias, torch.full((len(rows[0]),), bias))
    if config.popularity_power:
        model.item_counts = F.pad(model.item_counts, (0, len(rows[0])))  # never drawn as negatives
    model.catalogue = catalogue


def _grown(table: nn.Parameter, rows: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.cat([table.detach(), rows.to(table)]), requires_grad=table.requires_grad)


__all__ = ["Items", "add_item_rows", "item_tables", "new_items_table", "set_item_rows"]
