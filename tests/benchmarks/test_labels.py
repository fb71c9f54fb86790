"""The benchmark of labelling reads the same prompts both ways."""

import json

import pytest

from benchmarks import labels, measuring
from hf_ilora import ILoraConfig, ILoraForRecommendation, SASRecForNextItem
from hf_ilora.models.ilora.language_models import load_language_model
from tests.tiny_ilora_parts import save_parts


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(measuring, "set_up_logging", lambda output_dir: None)  # for a process of its own

    def run_labels(**settings):
        words = [str(word) for name, value in settings.items() if value for word in (f"--{name}", value)]
        monkeypatch.setattr("sys.argv", ["labels.py", *words])
        labels.main()

    return run_labels


def test_labels_are_compared_with_the_plain_decoder_on_the_same_tokens(run, tmp_path):
    parts = save_parts(tmp_path, num_users=20)
    llm, tokenizer, _ = load_language_model(str(parts.llm))
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    config = ILoraConfig(
        rank=4, num_experts=2, router_type="linear", item_head="residual", llm_name_or_path=str(parts.llm)
    )
    model = ILoraForRecommendation.from_base(llm, recommender, tokenizer, recommender.catalogue, config)
    model.save_pretrained(tmp_path / "ilora")

    settings = {"data_dir": parts.data_dir, "output_dir": tmp_path / "benchmark", "rounds": 2, "rows": 6}
    settings |= {"batch_size": 4, "top_k": 3, "dtype": "bfloat16"}
    run(teacher=tmp_path / "ilora", **settings)
    found = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())["labels"]

    teacher = labels.load_teacher(str(tmp_path / "ilora"), 20, 30)
    requests = labels.benchmark_requests(labels.SequenceDatasets.load(parts.data_dir)["train"], teacher, 6)
    assert len(requests) == 6 and len(set(requests.history_ids.tolist())) == 6
    assert found["tokens"] == requests.costs(teacher).sum()
    assert 0 < found["labels_over_forward"] < 2 and min(found["tokens_per_second"].values()) > 0
    ratio = f"| labels over the decoder | {found['labels_over_forward']:.3f} (in CPU time "
    assert ratio in (tmp_path / "benchmark" / "benchmark.md").read_text()

    with pytest.raises(ValueError, match="is no iLoRA: expected one"):
        run(teacher=parts.recommender, **{**settings, "dtype": None})
