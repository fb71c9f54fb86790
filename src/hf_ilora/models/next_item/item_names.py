"""Finds items by their raw ids or titles, with close matches for unknown titles."""

import difflib
import logging
from collections.abc import Iterable, Mapping
from functools import cached_property
from numbers import Integral

import numpy as np
import torch

from .catalogue import Catalogue
from .histories import shortened

logger = logging.getLogger(__name__)

# Finding similar titles compares with every title, which takes about 0.5 s per 100,000.
_MAX_TITLES_TO_COMPARE = 100_000
_CLOSE_MATCHES = 3


class ItemNames:
    """Maps raw ids and titles to item ids.

    Args:
        catalogue: catalogue of the model.
    """

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue

    def item_ids(self, names: Iterable, fuzzy: bool = False) -> list[int]:
        """The item ids, 1..num_items, of `names`.

        Args:
            names: raw ids or titles, or dictionaries with `raw_id` or `title` for text that could be either.
            fuzzy: for a text that is neither, take the item with the closest title, and log a warning that names it.

        Raises:
            ValueError: for an unknown name, with the closest titles; a text that names several items; and anything that
                is not a name.
        """
        if isinstance(names, torch.Tensor | np.ndarray):
            names = names.tolist()
        if isinstance(names, str | bytes | Mapping) or not isinstance(names, Iterable):
            found = shortened(names)
            raise ValueError(f"found {found}: expected a list of raw ids or titles, such as {self._example()}")
        names = list(names)
        item_ids = [self._known(name) for name in names]
        if fuzzy:
            item_ids = [
                self._closest(name) if item_id is None else item_id
                for name, item_id in zip(names, item_ids, strict=True)
            ]
        unknown = [name for name, item_id in zip(names, item_ids, strict=True) if item_id is None]
        if unknown:
            raise ValueError(self._unknown(unknown, len(names)))
        return item_ids

    def closest(self, title: str, count: int = _CLOSE_MATCHES) -> list[int]:
        """The items whose titles are closest to a text, at most `count`; titles that begin with the text come first."""
        folded = _folded(title)
        if not folded:
            return []
        begun = [
            each for each in self._items_of_folded if each.startswith(folded) and not each[len(folded) :][:1].isalnum()
        ]
        close = sorted(begun, key=len)[:count]
        if len(self._items_of_folded) <= _MAX_TITLES_TO_COMPARE:
            close += difflib.get_close_matches(folded, self._items_of_folded, count)
        return [item_id for each in dict.fromkeys(close) for item_id in self._items_of_folded[each]][:count]

    def _known(self, name) -> int | None:
        """The item with this name, or None for an unknown name."""
        if type(name) not in (int, str):  # nearly all names are, and skip the slow checks
            if isinstance(name, Mapping):
                if "raw_id" in name:
                    return self._with_raw_id(name["raw_id"])
                if isinstance(name.get("title"), str):
                    return self._with_title(name["title"])
            if isinstance(name, bool) or not isinstance(name, str | Integral):
                raise ValueError(
                    f"found {shortened(name)} in place of an item: expected a raw id or a title, such as "
                    f"{self._example()}"
                )
        by_raw_id = self.catalogue.item_id_of.get(name)
        if not isinstance(name, str):
            return by_raw_id
        if by_raw_id is None:
            return self._with_title(name)
        if self._items_of_title.get(name, [by_raw_id]) != [by_raw_id]:
            raise ValueError(
                f"{name!r} is the raw id of an item and the title of another: pass {{'raw_id': {name!r}}} or "
                f"{{'title': {name!r}}} instead"
            )
        return by_raw_id

    def _with_raw_id(self, raw_id) -> int | None:
        if isinstance(raw_id, bool) or not isinstance(raw_id, str | Integral):
            raise ValueError(f"found {shortened(raw_id)} as a raw id: expected integers or strings as in the catalogue")
        return self.catalogue.item_id_of.get(raw_id)

    def _with_title(self, title: str) -> int | None:
        item_ids = self._items_of_title.get(title, [])
        if len(item_ids) > 1:
            raw_ids = ", ".join(map(repr, self.catalogue.raw_ids(item_ids[:5])))
            raise ValueError(
                f"{title!r} is the title of {len(item_ids)} items: expected the raw id of one, such as {raw_ids}"
            )
        return item_ids[0] if item_ids else None

    def _closest(self, name) -> int | None:
        """The item whose title is closest to an unknown name."""
        title = name.get("title") if isinstance(name, Mapping) else name
        found = self.closest(title, 1) if isinstance(title, str) else []
        if not found:
            return None
        (closest,) = self.catalogue.titles(found)
        item_id = self._with_title(closest)
        logger.warning("%r is taken for %r (raw id %r)", title, closest, *self.catalogue.raw_ids([item_id]))
        return item_id

    def _unknown(self, unknown: list, num_names: int) -> str:
        name = unknown[0]
        title = name.get("title", name.get("raw_id")) if isinstance(name, Mapping) else name
        message = f"{title!r} is neither a raw id nor a title of the {len(self.catalogue)} items of the catalogue"
        if len(unknown) == num_names > 1:
            message = f"none of the {num_names} items is known: {message}"
        elif len(unknown) > 1:
            message = f"{len(unknown)} of the {num_names} items are unknown: {message}"
        has_numbers = isinstance(self.catalogue.table["raw_id"][0].as_py(), int)
        if not isinstance(title, str):
            return message if has_numbers else f"{message}, whose raw ids are strings: expected {self._example()}"
        close = self.closest(title)
        if close:
            pairs = zip(self.catalogue.titles(close), self.catalogue.raw_ids(close), strict=True)
            shown = ", ".join(f"{each!r} (raw id {its_id!r})" for each, its_id in pairs)
            return f"{message}: closest are {shown}; pass fuzzy=True to take the closest title"
        if has_numbers and title.isdigit():
            return f"{message}, whose raw ids are numbers: expected {self._example()}"
        if not has_numbers and len(self.catalogue) <= _MAX_TITLES_TO_COMPARE:
            raw_ids = difflib.get_close_matches(title, self.catalogue.item_id_of, _CLOSE_MATCHES)
            if raw_ids:
                return f"{message}: the closest raw ids are {', '.join(map(repr, raw_ids))}"
        return f"{message}: expected names such as {self._example()}; leave out unknown items"

    def _example(self) -> str:
        (raw_id,), (title,) = self.catalogue.raw_ids([1]), self.catalogue.titles([1])
        return f"{raw_id!r} or {title!r}"

    @cached_property
    def _items_of_title(self) -> dict[str, list[int]]:
        items = {}
        for item_id, title in enumerate(self.catalogue.table["title"].to_pylist(), start=1):
            items.setdefault(title, []).append(item_id)
        return items

    @cached_property
    def _items_of_folded(self) -> dict[str, list[int]]:
        """The items of each title, ignoring case and white space."""
        items = {}
        for title, item_ids in self._items_of_title.items():
            items.setdefault(_folded(title), []).extend(item_ids)
        return items


def _folded(title: str) -> str:
    return " ".join(title.casefold().split())


__all__ = ["ItemNames"]
