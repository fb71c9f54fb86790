"""Sequence data sets: chronological histories, split by a named protocol, with the catalogue of their items."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, DatasetInfo, Features
from datasets.table import InMemoryTable
from huggingface_hub import CommitInfo

from hf_ilora.files import folder_written_whole
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.hub_upload import upload

from .cards import card_to_publish, sequences_card
from .columns import training_counts
from .external_histories import read_external_histories
from .hub import read_folder_or_hub
from .protocol_settings import SEVERAL_TARGETS
from .schema import (
    SPLIT_COLUMNS,
    catalogue_features,
    check_columns,
    check_item_ids,
    raw_id_type,
    split_columns,
    split_features,
)
from .sources import DataSource, source_to_publish
from .storage import (
    CARD_FILE,
    CATALOGUE_FILE,
    DATA_FILES,
    DESCRIPTION_FILE,
    FILES,
    REMEDY,
    SPLITS,
    content_digest,
    json_digest,
    read_description,
    read_parquet,
    write_description,
    write_parquet,
)
from .workspace import dataset_of


class SequenceDatasets(DatasetDict):
    """The splits train, validation and test of one protocol, with the catalogue that explains their item ids.

    Every split has the columns `user_id` (raw), `history` (list of int32 item ids, oldest first) and `target` (int32).
    Validation and test also have `candidates` (list of int32) unless they were switched off. Under protocols with
    several targets per user, they have `relevant_items` (list of int32): all targets, distinct and in chronological
    order, so that the first is `target`. Rows are in the order of the raw user ids, and chronological within a user.
    Item ids run 1..num_items; 0 is padding and never occurs.

    `map`, which may add columns, and `filter` return `SequenceDatasets`. Other methods of `DatasetDict`, such as
    `select_columns`, return a plain `DatasetDict`.

    Args:
        splits: a Dataset for each of "train", "validation" and "test".
        catalogue: titles and raw ids of the items, with `year` (may be null) and `genres`. The data set replaces its
            column `count` by the occurrences of each item in the train split, 0 for items that training never sees.
        protocol: the settings that made the splits, JSON types only; `protocol["name"]` is the name.
        source: where the interactions come from, which decides whether the data set may be published; None if it is
            unknown.
    """

    def __init__(
        self,
        splits: dict[str, Dataset],
        catalogue: Catalogue,
        protocol: dict,
        source: DataSource | None = None,
    ):
        if not isinstance(catalogue, Catalogue):
            raise TypeError(
                f"catalogue is a {type(catalogue).__name__}: expected a Catalogue, made of a pyarrow.Table of the items"
            )
        missing = [name for name in catalogue_features("int64") if name not in catalogue.table.column_names]
        if missing:
            raise ValueError(f"the catalogue has no {', '.join(missing)}: expected the column, empty where unknown")
        if set(splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(sorted(splits)) or 'none'}: expected {', '.join(SPLITS)}")
        super().__init__({name: splits[name] for name in SPLITS})
        self.catalogue = catalogue.with_counts(training_counts(splits["train"], len(catalogue)))
        self.protocol, self.source = protocol, source

    def map(self, *arguments: Any, **options: Any) -> DatasetDict:
        """As `DatasetDict.map`; the result keeps the catalogue, with the counts of its train split.

        Returns:
            SequenceDatasets, or a plain DatasetDict if `map` removed one of the columns above or changed its type.
        """
        return self._with_splits(super().map(*arguments, **options))

    def filter(self, *arguments: Any, **options: Any) -> DatasetDict:
        """As `DatasetDict.filter`; the result keeps the catalogue, with the counts of its train split."""
        return self._with_splits(super().filter(*arguments, **options))

    def _with_splits(self, splits: DatasetDict) -> DatasetDict:
        for name, dataset in self.items():
            own = split_columns(dataset)
            if {column: splits[name].features.get(column) for column in own} != {
                column: dataset.features[column] for column in own
            }:
                return splits
        return SequenceDatasets(splits, self.catalogue, self.protocol, self.source)

    @property
    def num_items(self) -> int:
        """Number of items in the catalogue, which is also the largest item id."""
        return len(self.catalogue)

    @property
    def raw_ids(self) -> np.ndarray:
        """(num_items,) raw ids in the order of item ids."""
        return self.catalogue.table["raw_id"].to_numpy()

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the protocol, the catalogue and all rows in order.

        It depends only on values, not on the machine or the chunking. It ignores further columns of the catalogue, such
        as a price, and of the splits, because no model reads them. Each access reads the current content, which takes
        about a second for 20 million interactions.
        """
        digests = {name: content_digest(split.select_columns(split_columns(split))) for name, split in self.items()}
        catalogue_digest = content_digest(self.catalogue.table.select(list(catalogue_features("int64"))))
        return json_digest({"protocol": self.protocol, "catalogue": catalogue_digest, "splits": digests})

    def save(self, directory: str | os.PathLike) -> None:
        """Write train, validation, test and items as parquet, sequences.json and README.md to `directory`.

        The folder is written whole or not at all: if the save fails or is killed, an earlier output stays unchanged.
        `datasets.load_dataset(directory, "sequences")` and `load_dataset(directory, "catalogue")` read it too, so all
        files of splits have the same columns, with empty lists for columns that a split lacks.

        Raises:
            ValueError: `directory` is a file, or contains files that no earlier save wrote and that would be deleted;
                or the splits differ in further columns.
        """
        features = self._stored_features()
        with folder_written_whole(directory, replaceable_files=FILES) as folder:
            for name, dataset in self.items():
                write_parquet(dataset, folder / f"{name}.parquet", features)
            items = self._stored_items()
            write_parquet(items, folder / CATALOGUE_FILE, items.features)
            fingerprint = self.fingerprint
            card = self._card(Path(directory).resolve().name, fingerprint)
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            counts = {name: len(dataset) for name, dataset in self.items()}
            description = {
                "protocol": self.protocol,
                "num_items": self.num_items,
                "counts": counts,
                "fingerprint": fingerprint,
            }
            if self.source is not None:
                description["source"] = self.source.to_json()
            write_description(folder, description)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        allow_restricted_license: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> CommitInfo:
        """Publish the files that `save` writes as a data set on the Hub, in one commit; it is safe to repeat.

        A card that was edited on the Hub stays; only the metadata by which `load_dataset` finds the files are updated.

        Args:
            repo_id: "user/name", or "name" of the token's user; created if it does not exist.
            license: the licence to publish under, by its name on the Hub ("cc-by-4.0"); None for that of `source`.
            allow_restricted_license: publish data whose licence forbids that or sets conditions, such as MovieLens.
            commit_message, commit_description: title and body of the commit message.
            private: make a new repository private; None leaves it to the Hub's setting.
            token: None uses HF_TOKEN or the token of `hf auth login`.
            revision: branch; created from main if it does not exist.
            create_pr: propose the commit as a pull request.
            parent_commit: fail unless this is the latest commit of the branch.

        Returns:
            The commit, or the latest one if nothing has changed.

        Raises:
            PermissionError: the token is missing or wrong, or may not write there.
            ValueError: the licence restricts publication, the source is unknown, a private repository was requested
                and a public one exists, or somebody else pushes a commit during the upload; otherwise as `save`.
            OSError: the Hub cannot be reached.
        """
        source = source_to_publish(self.source, license, allow_restricted_license)
        published = SequenceDatasets(self, self.catalogue, self.protocol, source)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "data"
            published.save(folder)
            fingerprint = read_description(folder)["fingerprint"]
            return upload(
                {name: folder / name for name in DATA_FILES},
                repo_id,
                repo_type="dataset",
                card=lambda name, existing: card_to_publish(published._card(name, fingerprint), existing),
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent_commit,
            )

    def _card(self, name: str, fingerprint: str) -> str:
        """The card of the data set under `name`, on the Hub or in the working directory."""
        counts = {split: len(dataset) for split, dataset in self.items()}
        columns = list(self._stored_features())
        return sequences_card(name, self.protocol, self.num_items, counts, columns, self.source, fingerprint)

    def _stored_features(self) -> Features:
        """The columns of the files of all splits: those of sequences that any split has, and further ones.

        Raises:
            ValueError: the splits differ in further columns.
        """
        own: dict[str, Any] = {}
        further: dict[str, dict[str, Any]] = {}
        for name, dataset in self.items():
            own |= {column: dataset.features[column] for column in split_columns(dataset)}
            further[name] = {
                column: feature for column, feature in dataset.features.items() if column not in SPLIT_COLUMNS
            }
            if further[name] != further["train"]:
                raise ValueError(
                    f"train has the further columns {sorted(further['train']) or 'none'} and {name} has "
                    f"{sorted(further[name]) or 'none'}: expected the same in all splits, with the same types; add "
                    "them with sequences.map, or remove them"
                )
        return Features({column: own[column] for column in SPLIT_COLUMNS if column in own} | further["train"])

    def _stored_items(self) -> Dataset:
        """The catalogue without the column that is computed from the splits."""
        table = self.catalogue.table.drop_columns("count")
        further = Features.from_arrow_schema(table.select(self.catalogue.metadata_columns).schema)
        features = Features({**catalogue_features(raw_id_type(table, "raw_id")), **further})
        return Dataset(InMemoryTable(table), info=DatasetInfo(features=features), fingerprint=CATALOGUE_FILE)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "SequenceDatasets":
        """Read what `save` or `push_to_hub` wrote, and check that it is complete and unchanged.

        The tables are read into memory: ML-20M takes about 0.3 GB under leave_one_out and 1.1 GB under temporal_users.
        (Memory-mapping would need an Arrow copy of every parquet file in a cache folder that is never emptied.)

        Args:
            source: a folder, or the name of a data set on the Hub, "user/name".
            revision: branch, tag or commit of a data set on the Hub; None for main.
            token: None uses HF_TOKEN or the token of `hf auth login`.
            cache_dir: folder for files from the Hub; None for the default cache of huggingface_hub.
            local_files_only: read that cache without asking the Hub, as with HF_HUB_OFFLINE=1.

        Raises:
            FileNotFoundError: the folder, the data set or one of its files is missing.
            PermissionError: the Hub does not accept the token.
            ValueError: files are damaged, changed, of another version or do not belong together; or the revision does
                not exist or is given for a folder.
            OSError: the Hub cannot be reached.
        """
        return read_folder_or_hub(
            source,
            DATA_FILES,
            cls._read,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    @classmethod
    def from_parquet(
        cls, folder: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None
    ) -> "SequenceDatasets":
        """Read histories that another program, such as Spark or Ray Data, has written as folders of parquet parts.

        `folder` contains the folders train, validation, test and items; parts are read in the order of their names.
        The splits have `user_id` (integer or string), `history` (list of item ids, oldest first, not empty) and
        `target` (item id). Validation and test may have `candidates` (list of item ids including the target, of the
        same length in every row). The items have `item_id` (1 to the number of items, each once), `raw_id` and
        `title`, and may have the other columns of a catalogue. Further columns of the splits are ignored.

        `datasets` copies the splits once to Arrow files in its cache and maps these to memory, so the splits may be
        larger than memory.

        Args:
            folder: the folder of these four folders.
            cache_dir: folder of the Arrow files; None for the cache of `datasets`.

        Raises:
            FileNotFoundError: a folder is missing.
            ValueError: a part is not parquet, a column is missing or has another type, a value is null, a history is
                empty, an id is outside the catalogue, or rows differ in their number of candidates.
        """
        return cls(*read_external_histories(Path(folder), cache_dir))

    @classmethod
    def _read(cls, directory: Path) -> "SequenceDatasets":
        description = read_description(directory)
        protocol, num_items = description["protocol"], description["num_items"]
        source = description.get("source")

        path = directory / CATALOGUE_FILE
        table = read_parquet(path, num_items)
        features = catalogue_features(raw_id_type(table, "raw_id"))
        check_columns(table.select([name for name in table.column_names if name in features]), features, path)
        if not np.array_equal(table["item_id"].to_numpy(), np.arange(1, num_items + 1)):
            raise ValueError(
                f"{path} has {len(table)} items: expected the item ids 1 to {num_items} in order, the num_items of "
                f"{DESCRIPTION_FILE}; {REMEDY}"
            )
        try:
            catalogue = Catalogue(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REMEDY}") from error
        splits = {}
        for name in SPLITS:
            path, rows = directory / f"{name}.parquet", description["counts"][name]
            splits[name] = _read_split(path, rows, name, protocol, num_items)
        loaded = cls(splits, catalogue, protocol, None if source is None else DataSource.from_json(source))
        fingerprint = loaded.fingerprint
        if fingerprint != description["fingerprint"]:
            raise ValueError(
                f"the files in {directory} have the fingerprint {fingerprint}: expected {description['fingerprint']}, "
                f"as {DESCRIPTION_FILE} says; a file was changed or comes from another save: {REMEDY}"
            )
        return loaded


def _read_split(path: Path, rows: int, name: str, protocol: dict, num_items: int) -> Dataset:
    """Read the file of a split and check it."""
    table = read_parquet(path, rows)
    has_several_targets, has_candidates = protocol["name"] in SEVERAL_TARGETS, protocol["num_candidates"] > 0
    further = [column for column in table.column_names if column not in SPLIT_COLUMNS]
    id_type = raw_id_type(table, "user_id")
    if name == "train":
        features = split_features(id_type, False)
        for column in set(split_features(id_type, has_candidates, has_several_targets)) - set(features):
            # Train files have the columns of the other splits, as empty lists; earlier versions left them out.
            is_list = column in table.column_names and pa.types.is_list(table.schema.field(column).type)
            if is_list and pc.list_flatten(table[column]).length() == 0:
                table = table.drop_columns(column)
    else:
        features = split_features(id_type, has_candidates, has_several_targets)
    own = table.drop_columns(further)
    check_columns(own, features, path)
    check_item_ids(own, num_items, path)
    more = Features.from_arrow_schema(table.select(further).schema)
    return dataset_of(table.select([*features, *further]), Features({**features, **more}), name)


__all__ = ["SequenceDatasets"]
