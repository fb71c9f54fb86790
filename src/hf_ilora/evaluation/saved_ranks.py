"""Saves the ranks of every user in a parquet file, so that separate runs can be compared user by user."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_ilora.evaluation.ranking import SplitRanks
from hf_ilora.files import written_whole
from hf_ilora.models.next_item.catalogue import open_parquet

RANKINGS = ("masked", "unmasked", "candidates", "new_items", "relevant")
_METADATA_KEY = b"hf_ilora"


def parquet_name(label: str) -> str:
    """The file name for a model's label, such as "iLoRA (outputs/ilora)": readable, and different for every label."""
    readable = re.sub(r"[^\w.-]+", "-", label.partition(" (")[0]).strip("-.")
    return f"{readable}-{hashlib.sha256(label.encode()).hexdigest()[:8]}.parquet"


@dataclass(frozen=True)
class RanksSource:
    """The model and the data of saved ranks.

    Args:
        model: name or folder of the model.
        data_fingerprint: content hash of the data set (`SequenceDatasets.fingerprint`).
        split: "validation" or "test".
    """

    model: str
    data_fingerprint: str
    split: str


@dataclass(frozen=True)
class SavedRanks:
    """One row per user of an evaluation split, in its order.

    Args:
        table: user_id and the int64 columns rank_masked and rank_unmasked; rank_candidates if the split has candidates;
            rank_new_items if new items were ranked, 0 for users whose target is not new; and rank_relevant, lists of
            equal length padded with 0, if the split has several relevant items per user.
        source: the model and the data.
    """

    table: pa.Table
    source: RanksSource

    @classmethod
    def from_ranks(cls, user_ids: pa.Array, ranks: SplitRanks, source: RanksSource) -> "SavedRanks":
        """Combine the ranks of a split with its user ids, (users,)."""
        columns = {f"rank_{name}": vars(ranks)[name] for name in RANKINGS if vars(ranks)[name] is not None}
        if ranks.relevant is not None:
            width = ranks.relevant.shape[1]
            columns["rank_relevant"] = pa.FixedSizeListArray.from_arrays(pa.array(ranks.relevant.ravel()), width)
        return cls(pa.table({"user_id": user_ids, **columns}), source)

    def ranks(self, ranking: str) -> np.ndarray:
        """The int64 ranks of one of `RANKINGS`: (users, relevant) for "relevant", (users,) for the others.

        Raises:
            ValueError: for another name, and for ranks that were not computed.
        """
        if ranking not in RANKINGS:
            raise ValueError(f"ranking is {ranking!r}: expected one of {', '.join(RANKINGS)}")
        if f"rank_{ranking}" not in self.table.column_names:
            kinds = {"new_items": "new items", "relevant": "several relevant items per user"}
            kind = kinds.get(ranking, ranking)
            raise ValueError(
                f"the ranks of {self.source.model} come from data without {kind}: expected ranking masked or unmasked"
            )
        column = self.table[f"rank_{ranking}"].combine_chunks()
        if ranking == "relevant":
            return column.flatten().to_numpy().reshape(len(column), -1)
        return column.to_numpy()

    def ranks_of_ranked_users(self, ranking: str) -> np.ndarray:
        """The ranks of the users whose target was ranked; see `ranks`."""
        ranks = self.ranks(ranking)
        return ranks if ranks.ndim == 2 else ranks[ranks > 0]

    def check_same_users(self, other: "SavedRanks") -> None:
        """Raise a ValueError unless both have the same users of the same split of the same data."""
        for name in ("data_fingerprint", "split"):
            mine, theirs = asdict(self.source)[name], asdict(other.source)[name]
            if mine != theirs:
                raise ValueError(
                    f"the runs differ in {name}: {self.source.model} has {mine}, {other.source.model} has {theirs}; "
                    "evaluate both models on the same data set and split"
                )
        mine, theirs = self.table["user_id"], other.table["user_id"]
        if not mine.equals(theirs):
            common = len(set(mine.to_pylist()) & set(theirs.to_pylist()))
            raise ValueError(
                f"the runs have different users or orders: {self.source.model} has {len(mine)}, {other.source.model} "
                f"has {len(theirs)}, {common} in common; evaluate both models on the same data set and split"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the parquet file, whole or not at all."""
        metadata = {_METADATA_KEY: json.dumps(asdict(self.source)).encode()}
        with written_whole(Path(path)) as unfinished:
            pq.write_table(self.table.replace_schema_metadata(metadata), unfinished)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SavedRanks":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: when there is no file at `path`.
            ValueError: when the file is not one of saved ranks.
        """
        try:
            with open_parquet(path, "evaluate the model again") as file:
                table = file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no saved ranks at {path}: expected a parquet file of `hf-ilora evaluate`"
            ) from error
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} is not a whole parquet file ({error}): evaluate the model again") from error
        expected = ["user_id", *(f"rank_{ranking}" for ranking in RANKINGS)]
        metadata = table.schema.metadata or {}
        found = table.column_names
        is_whole = found[:3] == expected[:3] and found == [name for name in expected if name in found]
        if not is_whole or _METADATA_KEY not in metadata:
            raise ValueError(
                f"{path} has the columns {', '.join(table.column_names)}: expected saved ranks of "
                f"`hf-ilora evaluate`, with {', '.join(expected)} and their source in the metadata"
            )
        try:
            source = RanksSource(**json.loads(metadata[_METADATA_KEY]))
        except (ValueError, RecursionError, TypeError) as error:
            raise ValueError(f"{path} has no readable source ({error}): evaluate the model again") from error
        return cls(table, source)
