"""Where interactions come from, and whether their licence allows publishing them."""

from dataclasses import asdict, dataclass, replace

from datasets import Dataset


@dataclass(frozen=True)
class DataSource:
    """The origin of a data set.

    Args:
        name: name of the public data set for `load_movielens` or `load_public_dataset`; None for other data.
        license: name of the licence on the Hub, such as "cc-by-4.0"; "other" for a licence that the Hub does not know;
            None if no licence is stated.
        terms: what the licence says, in a sentence.
        homepage: address of the data set.
        restricted: whether the licence forbids publishing the data, or sets conditions.
    """

    name: str | None = None
    license: str | None = None
    terms: str | None = None
    homepage: str | None = None
    restricted: bool = False

    def to_json(self) -> dict:
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    @classmethod
    def from_json(cls, value: object) -> "DataSource":
        """Read what `to_json` returned.

        Raises:
            ValueError: the value is anything else.
        """
        types = {field: bool if field == "restricted" else str for field in cls.__dataclass_fields__}
        if not isinstance(value, dict) or any(not isinstance(value[key], types.get(key, ())) for key in value):
            raise ValueError(f"source is {value!r}: expected an object of {', '.join(types)}")
        return cls(**value)

    @classmethod
    def of(cls, interactions: Dataset, items: Dataset) -> "DataSource":
        """The source according to the `info` of both tables: a public data set if `dataset_name` is one, else `license`
        and `homepage` of the interactions, as their owner sets them."""
        for table in (interactions, items):
            if table.info.dataset_name in SOURCES:
                return SOURCES[table.info.dataset_name]
        return cls(license=interactions.info.license or None, homepage=interactions.info.homepage or None)


def with_source(name: str, *tables: Dataset) -> tuple[Dataset, ...]:
    """Mark tables as the public data set `name` in their `info`, which `map`, `filter` and `select` keep."""
    for table in tables:
        table.info.dataset_name = name
        table.info.license, table.info.homepage = SOURCES[name].license or "", SOURCES[name].homepage
    return tables


def source_to_publish(source: DataSource | None, license: str | None, allow_restricted_license: bool) -> DataSource:
    """The source that a published data set states.

    Args:
        source: origin of the data; None if it is unknown.
        license: licence of the published data set; None for that of the source.
        allow_restricted_license: publish data even if their licence restricts that.

    Raises:
        ValueError: the origin is unknown and no licence is given, or the licence of the data restricts publication and
            `allow_restricted_license` is false.
    """
    if source is None and license is None:
        raise ValueError(
            "the data set does not say where its interactions come from, because it was saved before data sets "
            "recorded that or was put together by hand: expected license='cc-by-4.0' or whichever you may publish it "
            "under; or prepare the data again"
        )
    source = source or DataSource()
    if source.restricted and not allow_restricted_license:
        raise ValueError(
            f"the data set is made of {source.name}, and {source.terms} ({source.homepage}): expected data that may be "
            "published; if you have the permission, or the repository is for you alone (private=True), pass "
            "allow_restricted_license=True"
        )
    return source if license is None else replace(source, license=license)


_MOVIELENS = "https://grouplens.org/datasets/movielens/"
_MOVIELENS_FORBIDS = "its licence says that the user may not redistribute the data without separate permission"
_MOVIELENS_BINDS = "its licence allows to redistribute the data under the same conditions only, for research"
_LASTFM = "its authors have Last.fm's permission to distribute it, for non-commercial use"


def _restricted(name: str, terms: str, homepage: str) -> DataSource:
    return DataSource(name, "other", terms, homepage, restricted=True)


SOURCES = {
    source.name: source
    for source in (
        *(_restricted(name, _MOVIELENS_FORBIDS, _MOVIELENS) for name in ("ml-100k", "ml-1m", "ml-10m")),
        *(_restricted(name, _MOVIELENS_BINDS, _MOVIELENS) for name in ("ml-20m", "ml-25m", "ml-32m")),
        _restricted("ml-latest-small", _MOVIELENS_BINDS, _MOVIELENS),
        _restricted("yelp", "its terms of use forbid to distribute the data", "https://business.yelp.com/data/"),
        _restricted("lastfm-1k", _LASTFM, "http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html"),
        _restricted("lastfm-1k-tracks", _LASTFM, "http://ocelma.net/MusicRecommendationDataset/lastfm-1K.html"),
        _restricted("lastfm-2k", _LASTFM, "https://grouplens.org/datasets/hetrec-2011/"),
        DataSource("amazon-2014", homepage="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html"),
        DataSource("amazon-2023", homepage="https://amazon-reviews-2023.github.io/"),
        DataSource("steam", homepage="https://github.com/kang205/SASRec"),
        DataSource("gowalla", homepage="https://snap.stanford.edu/data/loc-gowalla.html"),
    )
}


__all__ = ["SOURCES", "DataSource", "source_to_publish", "with_source"]
