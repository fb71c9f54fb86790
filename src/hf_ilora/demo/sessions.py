"""The state of a demo: what its visitors share, and the history, new items and answers of each of them."""

import copy
import logging
from collections.abc import Sequence

import pyarrow as pa

from hf_ilora.downloads import DownloadError
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER
from hf_ilora.titles.encoders import TF_IDF, TitleEncoder, encode_titles, item_title_embeddings
from hf_ilora.titles.item_titles import ItemTitles
from hf_ilora_cli.shown_text import shown

from .answers import Answer, answer_of
from .completion import TitleSearch, begin_words, folded
from .shown_models import ShownModel

logger = logging.getLogger(__name__)

MATCHES = 8  # titles that are offered at once
# A visitor who adds items gets copies of the models, which grow with them.
MAX_NEW_ITEMS = 20
MAX_TITLE_LENGTH = 200
_NEIGHBOURS = 3  # known titles that are reported for a new one


class Demo:
    """The models and titles that all visitors share.

    Args:
        models: the models from `load_models`.
        top_k: number of recommendations of each model.
        title_encoder: encoder that places new items by their titles, see `encode_titles`; None for a demo without new
            items.
        trust_remote_code: run code that comes with the title encoder.

    Raises:
        ValueError: for `top_k` below 1, an encoder that cannot be used, and titles that cannot be encoded.
    """

    def __init__(
        self,
        models: Sequence[ShownModel],
        *,
        top_k: int = 10,
        title_encoder: str | None = EMBEDDED_ENCODER,
        trust_remote_code: bool = False,
    ):
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: expected at least 1")
        self.models, self.top_k = list(models), top_k
        self.catalogue = models[0].model.catalogue
        self.search = TitleSearch(self.catalogue)
        self.takes_new_items = title_encoder is not None and any(each.takes_new_items for each in models)
        if self.takes_new_items:
            self._encode_catalogue(title_encoder, trust_remote_code)
        for shown_model in models:  # the first call of a model takes longer than others
            shown_model.model.recommend([[1]], 1, exclude_seen=False)

    def _encode_catalogue(self, title_encoder: str, trust_remote_code: bool) -> None:
        """Encode the titles of the catalogue before the first visitor needs them."""
        remedy = "name another --title_encoder, or show the models without new items: --new_items false"
        if title_encoder == TF_IDF:
            raise ValueError(f"the vectors of tf-idf depend on all titles, so a new title has none: {remedy}")
        try:
            logger.info("encoding the titles of %d items, unless they are in the cache", len(self.catalogue))
            self.encoder = TitleEncoder(title_encoder, trust_remote_code=trust_remote_code)
            self.title_embeddings = item_title_embeddings(self.catalogue, self.encoder)
        except (ValueError, OSError, DownloadError) as error:
            raise ValueError(f"titles cannot be encoded, so new items have no place: {error}; {remedy}") from error


class Session:
    """The state of one visitor.

    Args:
        demo: the models and titles that all visitors share.

    Attributes:
        history: item ids, oldest first, each once.
        new_titles: titles of the items that the visitor has added; their ids follow those of the catalogue.
        offered: the item id of each label that is offered.
    """

    def __init__(self, demo: Demo):
        self.demo = demo
        self.history: list[int] = []
        self.new_titles: list[str] = []
        self.offered: dict[str, int] = {}
        self._models = [each.model for each in demo.models]
        self._item_titles: list[ItemTitles] = []  # one for each copied model; empty until the first new item

    @property
    def new_items(self) -> list[int]:
        """The item ids of `new_titles`."""
        first = len(self.demo.catalogue) + 1
        return list(range(first, first + len(self.new_titles)))

    def title(self, item_id: int) -> str:
        """The title of an item, in one line and with hidden characters made visible."""
        num_items = len(self.demo.catalogue)
        known = item_id <= num_items
        return shown(self.demo.catalogue.titles([item_id])[0] if known else self.new_titles[item_id - num_items - 1])

    def complete(self, text: str) -> list[str]:
        """Offer the items whose titles complete a text, and return their labels."""
        text = text[:MAX_TITLE_LENGTH]
        words = folded(text).split()
        items = zip(self.new_items, self.new_titles, strict=True)
        found = [item for item, title in items if words and begin_words(words, folded(title))]
        found = [item for item in [*found, *self.demo.search.complete(text, MATCHES)] if item not in self.history]
        self.offered = {}
        for item in found[:MATCHES]:
            label = self.title(item)
            if label in self.offered:
                label = f"{label} ({shown(*self.demo.catalogue.raw_ids([item]))})"
            self.offered[label] = item
        return list(self.offered)

    def add(self, label: str) -> bool:
        """Add an offered item to the history; return False if the label is no longer offered."""
        item = self.offered.pop(label, None)
        if item is None or item in self.history:
            return False
        self.history.append(item)
        return True

    def add_new_item(self, title: str) -> list[str]:
        """Add an item to the visitor's copies of the models that take one.

        Args:
            title: title of the item.

        Returns:
            The most similar known titles, whose vectors the models average for the new item.

        Raises:
            ValueError: for a blank title, one that is too long or exists already, too many new items, and a demo that
                takes none.
        """
        title = " ".join(title.split())
        if not self.demo.takes_new_items:
            raise ValueError(
                "this demo takes no new items: expected a title encoder and a model that takes items without training"
            )
        if not folded(title) or len(title) > MAX_TITLE_LENGTH:
            raise ValueError(f"the title has {len(title)} characters: expected words of 1 to {MAX_TITLE_LENGTH}")
        if len(self.new_titles) >= MAX_NEW_ITEMS:
            raise ValueError(f"there are {MAX_NEW_ITEMS} new items: expected no more; reload the page to start again")
        titles = [*self.demo.catalogue.table["title"].to_pylist(), *self.new_titles]
        if title.casefold() in (each.strip().casefold() for each in titles):
            raise ValueError(f"{shown(title)} exists already: search for it")
        vectors = encode_titles([title], self.demo.encoder)
        if not self._item_titles:
            self._copy_models()
        nearest, _ = self._item_titles[0].nearest_items([title], min(_NEIGHBOURS, len(titles)), vectors)
        neighbours = [self.title(item) for item in nearest[0].tolist()]
        number = len(self.new_titles) + 1
        for item_titles in self._item_titles:
            item_titles.add_items([(self._new_raw_id(number), title)], vectors)
        self.new_titles.append(title)
        return neighbours

    def answers(self) -> list[Answer]:
        """Ask each model what comes after the history."""
        history = list(self.history)  # a copy: the visitor may change the history meanwhile
        return [answer_of(model, history, self.demo.top_k, self.new_items) for model in self._models]

    def _copy_models(self) -> None:
        """Give the visitor copies of the models that take new items."""
        for place, shown_model in enumerate(self.demo.models):
            if shown_model.takes_new_items:
                self._models[place] = copy.deepcopy(shown_model.model)
                titles = ItemTitles(self._models[place], title_embeddings=self.demo.title_embeddings)
                self._item_titles.append(titles)

    def _new_raw_id(self, number: int) -> int | str:
        """A raw id that the catalogue does not have, of the type of the others."""
        raw_ids = self.demo.catalogue.table["raw_id"]
        if pa.types.is_integer(raw_ids.type):
            return max(raw_ids.to_pylist()) + number
        return max(raw_ids.to_pylist(), key=len) + f"-new-{number}"


__all__ = ["MATCHES", "MAX_TITLE_LENGTH", "Demo", "Session"]
