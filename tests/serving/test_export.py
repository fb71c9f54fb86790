"""Exported models give the scores of the original models in onnxruntime, even if torch cannot be imported."""

import json
import re

import numpy as np
import onnx
import pytest
import torch

from hf_ilora import export
from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.serving import export as export_module
from hf_ilora.serving.export import onnx_session
from tests.hidden_package import run_without
from tests.paths import PROJECT
from tests.serving.next_item_models import MAX_LENGTH, next_item_model
from tests.synthetic import cyclic_sequences

LARGE = {"num_items": 6000, "hidden_size": 128, "intermediate_size": 128}


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=60, num_items=40)


@pytest.fixture(scope="module")
def protos():
    """Cache of torch's exports by model and settings, because each takes seconds."""
    return {}


@pytest.fixture
def export_of(protos, sequences, tmp_path, monkeypatch):
    """Exports a model of a kind to tmp_path / "exported"; torch exports each kind only once."""
    exported_by_torch = export_module.onnx_model

    def run(kind, sizes=None, seed=0, **settings):
        torch.manual_seed(seed)
        model = next_item_model(kind, **sizes or {})
        if sizes is None:
            model.catalogue = sequences.catalogue

        def cached(graph):
            key = (kind, graph.num_items, graph.top_k, graph.exclude_seen)
            if key not in protos:
                protos[key] = exported_by_torch(graph).SerializeToString()
            return onnx.ModelProto.FromString(protos[key])

        monkeypatch.setattr(export_module, "onnx_model", cached)
        return model, export(model, tmp_path / "exported", **settings)

    return run


def answers(folder, histories):
    return onnx_session(folder / "model.onnx", threads=1).run(None, {"histories": histories.numpy()})


def histories_of(batch, length, num_items=40):
    """Padded on the right, on the left and not at all, as far as there are rows."""
    histories = torch.randint(1, num_items + 1, (batch, length), generator=torch.Generator().manual_seed(length))
    histories[1:2, length // 2 :] = 0
    histories[2:3, : length // 2] = 0
    return histories


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sasrec_with_everything", "gru4rec", "caser"])
def test_onnxruntime_recommends_what_the_model_does_for_batches_of_any_size(kind, export_of, tmp_path):
    model, exported = export_of(kind, top_k=5)
    assert exported.max_difference < 1e-4
    for shape in ((1, 1), (1, 2), (3, MAX_LENGTH), (6, MAX_LENGTH + 15)):
        histories = histories_of(*shape)
        item_ids, scores = answers(tmp_path / "exported", histories)
        expected_ids, expected_scores = model.recommend(histories, 5)
        np.testing.assert_array_equal(item_ids, expected_ids)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


@pytest.mark.slow
def test_equal_scores_come_in_the_order_of_ids_and_unknown_ids_are_padding(tmp_path):
    model = next_item_model("caser")
    with torch.no_grad():  # the scores are those of the bias: 2, 1 and 0
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(41) % 3)
    export(model, tmp_path / "exported", top_k=20)
    known = torch.tensor([[2, 8, 5], [40, 0, 0]])
    item_ids, scores = answers(tmp_path / "exported", known)
    expected_ids, expected_scores = model.recommend(known, 20)
    assert item_ids[0, :12].tolist() == [11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 1, 4]
    np.testing.assert_array_equal(item_ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    for wrong in (-1, 41, 10**9):
        found = answers(tmp_path / "exported", torch.tensor([[2, wrong, 8, 5], [wrong, 40, wrong, 0]]))
        np.testing.assert_array_equal(found[0], item_ids)
        np.testing.assert_allclose(found[1], scores, atol=1e-5)
    readme = (tmp_path / "exported" / "README.md").read_text()
    assert "Item ids are 1 to 40; other numbers are read as padding" in readme and "the lower id comes first" in readme


@pytest.mark.slow
def test_a_folder_serves_titles_by_the_programs_of_docs_and_readme_without_torch(export_of, tmp_path):
    model, exported = export_of("sasrec_with_everything", top_k=5)
    folder = tmp_path / "outputs" / "songs" / "onnx"
    folder.parent.mkdir(parents=True)
    (tmp_path / "exported").rename(folder)
    docs = (PROJECT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    (of_docs,) = [block for block in blocks if "import onnxruntime" in block]
    of_folder = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    program = f"{of_docs}\nimport os\nos.chdir('outputs/songs/onnx')\n{of_folder}"
    printed = run_without(["torch", "transformers", "hf_ilora"], program, home=tmp_path).splitlines()
    expected = [model.recommend([history], 5)[0][0] for history in ([5, 12, 7], [1, 40])]
    assert printed == [str(model.catalogue.titles(item_ids.tolist())) for item_ids in expected]

    described = json.loads((folder / "export.json").read_text())
    assert described["top_k"] == 5 and described["exclude_seen"] and described["quantize"] is None
    assert described["num_bytes"] == (folder / "model.onnx").stat().st_size == exported.num_bytes
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sasrec"


@pytest.mark.slow
def test_int8_weights_take_less_than_a_third_and_score_nearly_the_same(export_of, tmp_path):
    _, plain = export_of("sasrec", LARGE, exclude_seen=False)
    scores = [answers(tmp_path / "exported", histories_of(3, 8, 6000))[0]]
    assert "8-bit" not in (tmp_path / "exported" / "README.md").read_text()
    _, small = export_of("sasrec", LARGE, exclude_seen=False, quantize="int8")
    scores.append(answers(tmp_path / "exported", histories_of(3, 8, 6000))[0])
    assert small.num_bytes < 0.3 * plain.num_bytes
    assert scores[0].shape == (3, 6001) and np.isneginf(scores[0][:, 0]).all()
    difference = np.abs(scores[1][:, 1:] - scores[0][:, 1:])
    assert 0 < difference.max() < 0.1 * scores[0][:, 1:].std()
    assert small.max_difference > plain.max_difference


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_quality_of_the_file_is_measured_beside_the_models(quantize, export_of, sequences):
    split = sequences["validation"]
    model, exported = export_of("sasrec_with_everything", top_k=5, quantize=quantize, split=split)
    quality = exported.ndcg_at_10
    expected = ndcg_at(torch.from_numpy(rank_split(model, split).masked), 10).mean().item()
    assert quality.model == pytest.approx(expected) and quality.num_users == len(split)
    assert quality.exported == pytest.approx(expected, abs=1e-3 if quantize is None else 0.1)
    assert quality.difference == pytest.approx(quality.exported - quality.model)
    assert quality.low <= quality.difference <= quality.high


@pytest.mark.slow
def test_a_file_with_other_scores_is_refused_and_the_earlier_export_stays(export_of, tmp_path):
    export_of("sasrec_with_everything", top_k=5)
    before = (tmp_path / "exported" / "model.onnx").read_bytes()
    with pytest.raises(ValueError, match=r"differ from the model's by .* expected at most 0\.0001"):
        export_of("sasrec_with_everything", seed=1, top_k=5)  # other weights than torch exported
    assert (tmp_path / "exported" / "model.onnx").read_bytes() == before


@pytest.mark.slow
def test_large_weights_get_a_file_of_their_own(export_of, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 0)
    model, exported = export_of("sasrec_with_everything", top_k=5)
    folder = tmp_path / "exported"
    sizes = [(folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data")]
    assert sum(sizes) == exported.num_bytes
    histories = histories_of(3, 4)
    np.testing.assert_array_equal(answers(folder, histories)[0], model.recommend(histories, 5)[0])


@pytest.mark.slow
def test_the_command_exports_a_saved_model_and_prints_its_quality(run_recipe, sequences, export_of, tmp_path):
    model, _ = export_of("sasrec_with_everything", top_k=5, quantize="int8")
    model.save_pretrained(tmp_path / "model")
    sequences.save(tmp_path / "data")
    settings = {"top_k": 5, "quantize": "int8", "data_dir": tmp_path / "data"}
    run_recipe("export", model=tmp_path / "model", output_dir=tmp_path / "out", **settings)
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert described["quantize"] == "int8" and described["ndcg_at_10"]["num_users"] == len(sequences["validation"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "tflite"}, "format is 'tflite': expected 'onnx'"),
        ({"quantize": "int4"}, "quantize is 'int4': expected None or 'int8'"),
        ({"top_k": 41}, "top_k is 41: expected 1 to 40"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(next_item_model("sasrec"), tmp_path / "exported", **settings)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"contains model.safetensors: expected a new folder"):
        export(next_item_model("sasrec"), tmp_path / "exported")


def test_without_the_packages_of_the_extra_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r'needs onnxscript: pip install "hf_ilora\[onnx\]"'):
        export(next_item_model("sasrec"), tmp_path / "exported")


def test_a_model_that_torch_cannot_export_is_refused_with_the_reason(tmp_path, monkeypatch):
    def fails(*arguments, **settings):
        raise torch.onnx.OnnxExporterError("no translation of aten::new")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ValueError, match=r"cannot export this SASRecModel to ONNX \(no translation of aten::new\): "):
        export(next_item_model("sasrec"), tmp_path / "exported")
    assert not any(tmp_path.iterdir())
