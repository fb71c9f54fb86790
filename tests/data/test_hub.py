"""Data sets by folder or Hub name, without a network."""

import pytest

from hf_ilora import SequenceDatasets
from tests.data.three_users import sequences


def test_revision_of_a_folder_is_refused(tmp_path):
    sequences().save(tmp_path)
    with pytest.raises(ValueError, match=r"revision is 'v1', but .* is a folder"):
        SequenceDatasets.load(tmp_path, revision="v1")


def test_a_hub_name_is_read_from_the_hub_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="outputs/data is not a folder, the Hub cannot be reached"):
        SequenceDatasets.load("outputs/data", cache_dir=tmp_path)
    sequences().save("outputs/data")
    assert len(SequenceDatasets.load("outputs/data")["test"]) == 3
