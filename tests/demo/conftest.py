"""Title encoders of the demo's tests."""

import pytest

from tests.demo import shelf


@pytest.fixture
def encoder(tmp_path, monkeypatch) -> str:
    """The folder of a tiny title encoder; vectors are cached beside it."""
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    return shelf.save_encoder(tmp_path / "encoder")
