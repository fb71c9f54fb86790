"""Formats recommendations as lines of text: titles to read, a table for other programs, or JSON."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa

from hf_ilora_cli.shown_text import shown

FORMS = ("titles", "table", "json")
_OWN_COLUMNS = 4  # user, rank, item and score; columns of the catalogue follow


def recommendation_lines(
    tables: Iterable[pa.Table], form: str, heading: Callable[[object], str] = "Recommended to {}:".format
) -> Iterator[str]:
    """Format recommendations as lines.

    Args:
        tables: tables with the columns of `recommend_all`, in its order; a user's rows may continue in the next table.
        form: "titles", a heading for each user and the items below; "table", a row for each item, with tabs between the
            columns; or "json", an object for each user.
        heading: returns the heading of a user, given the user's id.
    """
    if form == "table":
        yield from _table_lines(tables)
        return
    rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
    for user, items in itertools.groupby(rows, key=lambda row: next(iter(row.items()))):
        if form == "json":
            recommendations = [dict(list(item.items())[1:]) for item in items]
            yield json.dumps({user[0]: user[1], "recommendations": recommendations}, default=str)
        else:
            yield shown(heading(user[1]))
            yield from title_lines(items)


def title_lines(items: Iterable[dict]) -> Iterator[str]:
    """A line for each item: its rank, title (or raw id without one), score and further columns."""
    for item in items:
        others = [
            f"{name} {_text(value)}"
            for name, value in list(item.items())[_OWN_COLUMNS:]
            if name != "title" and value is not None
        ]
        title = item.get("title", item["item_id"])
        yield shown("  ".join([f"{item['rank']:3d}. {title}  ({item['score']:.2f})", *others]))


def _table_lines(tables: Iterable[pa.Table]) -> Iterator[str]:
    for number, table in enumerate(tables):
        if number == 0:
            yield _row(table.column_names)
        for row in table.to_pylist():
            yield _row([_text(value) for value in row.values()])


def _row(values: Sequence[str]) -> str:
    return "\t".join(map(shown, values))


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


__all__ = ["FORMS", "recommendation_lines", "title_lines"]
