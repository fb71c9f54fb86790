"""The card has the measurements and the metadata that the Hub reads, and never replaces a card that a person wrote."""

import ast
import json
import re

import pyarrow as pa
import pytest
from huggingface_hub import ModelCard

from hf_ilora import Catalogue, ILoraConfig, SASRecConfig
from hf_ilora.evaluation.candidate_report import CandidateContext, CandidateReport, write_candidate_table
from hf_ilora.evaluation.statistics import Interval
from hf_ilora.models.next_item.card import model_card
from hf_ilora.publishing import check_folder, write_card
from hf_ilora_cli.shown_text import shown as shown_text
from tests.models.ilora.ilora_fixtures import recommender
from tests.publishing.published_folders import FINGERPRINT, catalogue, sasrec, write_results, write_run

NAMES = {"dataset_name": "MovieLens-100K", "license": "apache-2.0"}


def test_the_card_contains_the_measured_table_and_the_metadata_of_this_row(sasrec_run, tmp_path):
    protocol = {"name": "leave_one_out", "num_candidates": 20}
    results = write_results(tmp_path / "evaluation")
    path = write_card(sasrec_run, "user/sasrec", results=[results], row="SASRec", protocol=protocol, **NAMES)
    card = ModelCard.load(path)
    for shown in (
        "| SASRec | .1155 [.1000, .1300] | .2125 [.1900, .2400] |",
        "| popularity | .0578",
        "### MovieLens-100K, test split",
        "| protocol: name | leave_one_out |",
        "| seed | 7 |",
        FINGERPRINT,
        "Weights: apache-2.0",
    ):
        assert shown in card.text
    assert "outputs/data" not in card.content
    metadata = card.data.to_dict()
    assert (metadata["license"], metadata["library_name"]) == ("apache-2.0", "hf_ilora")
    measured = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert measured == {
        "NDCG@10, whole catalogue, seen items excluded": ("ndcg@10", 0.1155),
        "HR@10, whole catalogue, seen items excluded": ("hit_ratio@10", 0.2125),
        "MRR, whole catalogue, seen items excluded": ("mrr", 0.09),
        "NDCG@10, whole catalogue": ("ndcg@10", 0.07),
        "HR@10, whole catalogue": ("hit_ratio@10", 0.14),
        "MRR, whole catalogue": ("mrr", 0.06),
        "HR@1, among 20 candidates": ("hit_ratio@1", 0.5),
    }
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_name) == ("movielens-100k", "MovieLens-100K")
    assert (result.dataset_split, result.dataset_revision) == ("test", FINGERPRINT)


def test_measurements_are_in_words_with_protocol_seed_and_intervals(sasrec_run, tmp_path):
    results = write_results(tmp_path / "evaluation")
    protocol = {"name": "leave_one_out", "num_candidates": 20}
    path = write_card(sasrec_run, "user/sasrec", results=[results], row="SASRec", protocol=protocol, **NAMES)
    measurements = path.read_text().split("## Measurements\n\n")[1].split("### MovieLens-100K, test split")[0]
    assert "Protocol leave_one_out. What training knows of the future and of other users: training has" in measurements
    assert "One training run, with seed 7. In brackets: 95% intervals over users." in measurements
    assert "MovieLens-100K, test split, 943 users:" in measurements
    assert "the held-out item is among the first 10 for 21.2% [19.0%, 24.0%] of the users" in measurements


def test_an_evaluation_of_candidates_and_answers_is_in_words_too(sasrec_run, tmp_path):
    quality = {
        "candidates/hit_ratio@1": Interval(0.5, 0.4, 0.6),
        "answers/valid_ratio": Interval(0.9, 0.8, 1.0),
        "answers/hit_ratio@1_of_all": Interval(0.45, 0.35, 0.55),
    }
    report = CandidateReport("iLoRA", "outputs/ilora", quality, None, 100, 10, 0.1, 0.2)
    context = CandidateContext("outputs/data", FINGERPRINT, "test", 95, 30, 20, 10, 2000, 0, generate="free")
    write_candidate_table([report], context, tmp_path / "evaluation")
    card = ModelCard.load(write_card(sasrec_run, "user/ilora", results=[tmp_path / "evaluation"], **NAMES))
    assert "MovieLens-100K, test split, 95 users:" in card.text
    assert "- Among the 20 candidates of a row: the held-out item is first for 50.0% [40.0%, 60.0%]" in card.text
    assert "90.0% [80.0%, 100.0%] of the answers name exactly one candidate; 45.0% [35.0%, 55.0%] of all" in card.text
    assert [result.metric_type for result in card.data.eval_results] == [name.split("/")[1] for name in quality]


def test_a_card_without_metrics_says_that_nothing_was_measured(sasrec_run):
    card = ModelCard.load(write_card(sasrec_run, "user/sasrec", **NAMES))
    assert card.text.split("## Measurements\n\n")[1].startswith("Nothing was measured: there is no evaluation")
    assert card.data.eval_results is None and "model-index" not in card.content


def test_metadata_name_the_task_the_data_and_what_an_adapter_adapts(sasrec_run):
    path = write_card(sasrec_run, "user/sasrec", dataset_ids=["user/films"], **NAMES)
    data = ModelCard.load(path).data.to_dict()
    assert (data["pipeline_tag"], data["datasets"]) == ("sequential-recommendation", ["user/films"])
    assert {"hf_ilora", "sasrec", "sequential-recommendation"} <= set(data["tags"])
    assert "base_model" not in data and "base_model_relation" not in data
    with pytest.raises(ValueError, match="dataset_ids contain 'my films', which the Hub does not accept as a name"):
        write_card(sasrec_run, "user/sasrec", dataset_ids=["my films"], **NAMES)
    config = ILoraConfig(
        recommender_config=SASRecConfig(num_items=30), llm_name_or_path="user/llm", llm_revision="v1", num_llm_layers=4
    )
    config.architectures = ["ILoraForRecommendation"]
    card = model_card(config, None, "user/ilora")
    assert (card.data.base_model, card.data.base_model_relation) == ("user/llm", "adapter")
    assert "the language model `user/llm` (its first 4 layers) at commit `v1`" in card.text


def test_the_card_states_limits_and_cites_the_papers(sasrec_run):
    text = write_card(sasrec_run, "user/sasrec", **NAMES).read_text()
    for shown in ("**Popularity.**", "**Cold items.**", "**Language of titles.**", "The model reads ids"):
        assert shown in text
    for key in ("kang2018sasrec", "kong2024ilora", "cui2024dllm2rec"):
        assert f"@inproceedings{{{key}," in text


def test_the_card_states_the_bias_towards_popular_items_and_the_number_of_unseen_items(tmp_path):
    model = sasrec()
    table = catalogue().table
    model.catalogue = Catalogue(table.append_column("count", pa.array([0, 0, *range(1, 29)])))
    model.save_pretrained(tmp_path / "run")
    write_run(tmp_path / "run")
    results = write_results(tmp_path / "evaluation")
    content = json.loads(results.read_text())
    shares = {"decile_1@10": 0.553, "coverage@10": 0.4}
    content["models"][1]["lists"] = {name: {"mean": mean, "low": 0, "high": 1} for name, mean in shares.items()}
    groups = {"1-5": 0.02, "more": 0.2}
    content["models"][1]["by_count"] = {
        group: {"masked/ndcg@10": {"mean": mean, "low": 0, "high": 1}} for group, mean in groups.items()
    }
    results.write_text(json.dumps(content))
    text = write_card(tmp_path / "run", "user/sasrec", results=[results], row="SASRec", **NAMES).read_text()
    assert "most popular tenth of the items makes up 55.3% of the recommendations, and 40.0% of the items" in text
    assert "NDCG@10 by how often training has the held-out item: .0200 (1-5), .2000 (more often)." in text
    assert "Training has never seen 2 of the items." in text


def test_the_plot_of_the_results_is_published_with_the_card(sasrec_run, tmp_path):
    results = write_results(tmp_path / "evaluation")
    results.with_suffix(".png").write_bytes(b"a plot")
    text = write_card(sasrec_run, "user/sasrec", results=[results], row="SASRec", **NAMES).read_text()
    assert "![Plot of the results: MovieLens-100K, test split](results-1.png)" in text
    files = check_folder(sasrec_run).files
    assert files["results-1.png"].read_bytes() == b"a plot"


def test_the_card_shows_the_command_without_paths_of_the_machine_that_ran_it(sasrec_run, tmp_path):
    command = ["hf-ilora", "train-sasrec", "ml-100k/sasrec", "--seed", "1", "--data_dir", "/home/alice/my data"]
    write_run(sasrec_run, command=[*command, "--report_url=https://example.org/?signature=secret"])
    results = write_results(tmp_path / "evaluation")
    results.write_text(results.read_text().replace('"SASRec"', '"/home/alice/models/a|b<i>{{ x }}"'))
    row = "/home/alice/models/a|b<i>{{ x }}"
    text = write_card(sasrec_run, "user/sasrec", results=[results], row=row, **NAMES).read_text()
    shown = "hf-ilora train-sasrec ml-100k/sasrec --seed 1 --data_dir 'my data' --report_url=https://example.org/"
    assert f"```bash\n{shown}\n```" in text
    assert r"| a\|b&lt;i&gt;{{ x }} | .1155" in text
    assert "alice" not in text and "secret" not in text and str(tmp_path) not in text


def test_the_name_of_a_data_set_is_text_on_the_page(sasrec_run):
    text = write_card(sasrec_run, "user/sasrec", **NAMES | {"dataset_name": "<b>[x](y)\u202e|"}).read_text()
    page = text.split("---\n", 2)[2]
    assert page.count(r"&lt;b&gt;\[x\](y)\\u202e\|") == 3
    assert "<b>" not in page and "\u202e" not in page


def test_using_the_model_takes_five_lines_imports_included(sasrec_run):
    """tests/publishing/test_hub.py runs such lines."""
    text = write_card(sasrec_run, "user/sasrec", revision="v2", **NAMES).read_text()
    code = text.split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if line]
    assert len(lines) <= 5
    loading = 'model = AutoModel.from_pretrained("user/sasrec", revision="v2", trust_remote_code=True)'
    assert lines[:2] == ["from transformers import AutoModel", loading]


def test_raw_ids_of_any_text_stay_text_in_the_lines_of_use():
    raw_ids = ['"]); raise SystemExit  #', "```\n# <b>\u202e"]
    table = pa.table({"item_id": [1, 2], "raw_id": raw_ids, "title": ["a", "b"]})
    config = SASRecConfig(num_items=2)
    config.architectures = ["SASRecForNextItem"]
    text = str(model_card(config, Catalogue(table), "user/sasrec", 'a"b'))
    code = text.split("```python\n")[1].split("\n```\n")[0]
    assert "\u202e" not in code and "\n```\n" not in code
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert {*raw_ids, "user/sasrec", 'a"b'} <= set(literals)


def test_card_of_seeds_shows_their_mean_and_deviation(sasrec_run, tmp_path):
    table = tmp_path / "seeds.json"
    means = {"mean": {"masked/ndcg@10": 0.1}, "standard_deviation": {"masked/ndcg@10": 0.02}}
    table.write_text(json.dumps({"seeds": [1, 2, 3], "test": means}))
    text = write_card(sasrec_run, "user/sasrec", seeds_table=table, **NAMES).read_text()
    assert "3 seeds (1, 2, 3)" in text
    assert "| NDCG@10, whole catalogue, seen items excluded | 0.1000 ± 0.0200 |" in text
    table.write_text("{}")
    with pytest.raises(ValueError, match=r"not a table of seeds .*experiments/seeds\.py"):
        write_card(sasrec_run, "user/sasrec", seeds_table=table, **NAMES)


def test_card_for_another_folder_leaves_the_models_folder_as_it_is(sasrec_run, tmp_path):
    before = sorted(sasrec_run.iterdir())
    path = write_card(sasrec_run, "user/sasrec", output_dir=tmp_path / "out", **NAMES)
    assert path == tmp_path / "out" / "README.md" and "user/sasrec" in path.read_text()
    assert sorted(sasrec_run.iterdir()) == before
    for edited in (path, sasrec_run / "README.md"):  # one would be overwritten, the other ignored
        edited.write_text("mine")
        with pytest.raises(ValueError, match="written or edited by hand"):
            write_card(sasrec_run, "user/sasrec", output_dir=tmp_path / "out", **NAMES)
        assert edited.read_text() == "mine"
        edited.unlink()


def test_own_card_is_replaced_and_an_edited_one_is_kept(sasrec_run):
    path = write_card(sasrec_run, "user/first", **NAMES)
    write_card(sasrec_run, "user/second", **NAMES)
    assert "user/second" in path.read_text() and "user/first" not in path.read_text()
    edited = path.read_text().replace("## How to use it", "## How I use it")
    path.write_text(edited)
    with pytest.raises(ValueError, match="written or edited by hand"):
        write_card(sasrec_run, "user/third", **NAMES)
    assert path.read_text() == edited


def test_results_must_have_this_row_and_this_data(sasrec_run, tmp_path):
    results = write_results(tmp_path / "evaluation")
    for row in ("SASRek", None):
        with pytest.raises(ValueError, match=r"expected the name .* 'popularity', 'SASRec'"):
            write_card(sasrec_run, "user/sasrec", results=[results.parent], row=row, **NAMES)
    write_run(sasrec_run, data_fingerprint="f" * 64)
    with pytest.raises(ValueError, match="0123456789abcdef: expected ffffffffffffffff"):
        write_card(sasrec_run, "user/sasrec", results=[results], row="SASRec", **NAMES)
    results.write_text('{"context": {}}')
    with pytest.raises(ValueError, match="not a table of an evaluation"):
        write_card(sasrec_run, "user/sasrec", results=[results], row="SASRec", **NAMES)
    with pytest.raises(FileNotFoundError, match="no results at"):
        write_card(sasrec_run, "user/sasrec", results=[tmp_path / "none.json"], row="SASRec", **NAMES)
    assert not (sasrec_run / "README.md").exists()


@pytest.mark.parametrize(
    ("dataset_name", "expected"),
    [
        ("MovieLens-100K", "movielens-100k"),
        ("Café Musique 2", "cafe-musique-2"),
        ("豆瓣电影", "dataset-[0-9a-f]{8}"),
        ("豆瓣 2020", "2020"),
        ("«…»", "dataset-[0-9a-f]{8}"),
        ("Plays\n---\n\x1b[2J\u202e", "plays-2j"),
    ],
)
def test_data_sets_of_any_name_get_an_identifier_that_the_hub_accepts(sasrec_run, tmp_path, dataset_name, expected):
    results = write_results(tmp_path / "evaluation")
    arguments = NAMES | {"dataset_name": dataset_name, "results": [results], "row": "SASRec"}
    card = ModelCard.load(write_card(sasrec_run, "user/sasrec", output_dir=tmp_path, **arguments))
    for result in card.data.eval_results:
        assert result.dataset_name == shown_text(dataset_name)
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result.dataset_type, re.ASCII)
        assert re.fullmatch(expected, result.dataset_type)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo_id": "user/豆瓣"}, "repo_id is 'user/豆瓣'"),
        ({"repo_id": "user/"}, "repo_id is 'user/'"),
        ({"dataset_name": " "}, "dataset_name is ' '"),
        ({"license": "Apache 2.0"}, "license is 'Apache 2.0': expected its name on the Hub"),
        ({"license": ""}, "license is ''"),
    ],
)
def test_names_that_the_hub_refuses_are_refused_first(sasrec_run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_card(sasrec_run, output_dir=tmp_path / "card", **{"repo_id": "user/sasrec"} | NAMES | changes)
    assert not (tmp_path / "card").exists()


def test_tags_and_names_of_an_upload_are_checked_before_anything_is_saved(tmp_path):
    model = recommender()
    for arguments, message in (
        ({"tags": ["films", 7]}, "tags contain 7"),
        ({"tags": [" "]}, "tags contain ' '"),
        ({"repo_id": "推荐"}, "repo_id is '推荐', which is not a valid name on the Hub"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "model", push_to_hub=True, **arguments)
    assert not (tmp_path / "model").exists()
