"""Origins and licences of data sets, and what may be published."""

import json

import pytest
from datasets import Dataset

from hf_ilora import SequenceDatasets, build_sequences
from hf_ilora.data.movielens import MOVIELENS
from hf_ilora.data.public_datasets import PUBLIC_DATASETS
from hf_ilora.data.sources import SOURCES, DataSource, source_to_publish, with_source
from tests.data.three_users import sequences, tables


def test_every_public_data_set_has_a_source_and_every_movielens_is_restricted():
    assert set(SOURCES) == {*MOVIELENS, *PUBLIC_DATASETS}
    assert all(SOURCES[name].restricted for name in MOVIELENS)


def test_source_of_public_data_reaches_the_saved_folder_through_changes_of_the_table(tmp_path):
    interactions, items = with_source("ml-100k", *tables())
    for changed in (interactions.filter(lambda row: row["user_id"] < 3), interactions.select(range(7))):
        build_sequences(changed, items, num_candidates=0).save(tmp_path)
        assert SequenceDatasets.load(tmp_path).source == SOURCES["ml-100k"]
    plain = Dataset.from_dict(interactions.to_dict())  # the table of items still names its source
    assert build_sequences(plain, items, num_candidates=0).source == SOURCES["ml-100k"]


def test_licence_of_own_data_is_that_of_their_info():
    interactions, items = tables()
    interactions.info.license, interactions.info.homepage = "cc-by-4.0", "https://example.org"
    assert build_sequences(interactions, items, num_candidates=0).source == DataSource(
        license="cc-by-4.0", homepage="https://example.org"
    )


def test_restricted_data_are_published_only_with_explicit_permission():
    built = build_sequences(*with_source("ml-100k", *tables()), num_candidates=0)
    for license in (None, "mit"):
        with pytest.raises(ValueError, match=r"made of ml-100k, and its licence says .* allow_restricted_license=True"):
            built.push_to_hub("user/name", license=license)
    assert source_to_publish(built.source, None, True) == SOURCES["ml-100k"]
    assert source_to_publish(None, "mit", False) == DataSource(license="mit")


@pytest.mark.parametrize("source", [[], {"name": 3}, {"other": "x"}, {"restricted": "no"}])
def test_damaged_source_is_named(tmp_path, source):
    sequences().save(tmp_path)
    description = json.loads((tmp_path / "sequences.json").read_text())
    (tmp_path / "sequences.json").write_text(json.dumps(description | {"source": source}))
    with pytest.raises(ValueError, match=r"sequences\.json: source is .*: expected an object of name, license"):
        SequenceDatasets.load(tmp_path)
