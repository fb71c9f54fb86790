"""recipes/evaluate_ilora.py from saved folders to the table, with a tiny language model."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ilora import ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, SequenceDatasets
from tests.paths import RECIPES
from tests.recipe_runs import RecipeRun, recipe_words
from tests.synthetic import cyclic_sequences
from tests.tiny_tokenizers import byte_level_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, a language model and two iLoRA models trained on nothing, one of them without experts."""
    folder = tmp_path_factory.mktemp("evaluate_ilora")
    sequences = cyclic_sequences(num_users=40)
    sequences.save(folder / "data")
    tokenizer = byte_level_bpe()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3, pad_token_id=None, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    recommender = SASRecForNextItem(SASRecConfig(num_items=30, hidden_size=8, initializer_range=0.5))
    recommender.catalogue = sequences.catalogue
    recommender.save_pretrained(folder / "other_sasrec")
    for name, settings in (("ilora", {"num_experts": 2, "item_head": "residual"}), ("lora", {"num_experts": 1})):
        model = ILoraForRecommendation.from_base(
            AutoModelForCausalLM.from_pretrained(folder / "llm"),
            recommender,
            tokenizer,
            sequences.catalogue,
            ILoraConfig(
                rank=4, router_type="linear", num_llm_layers=1, llm_name_or_path=str(folder / "llm"), **settings
            ),
            untrained_recommender=True,
        )
        for parameter_name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def evaluate(run_recipe, folder, tmp_path):
    """Runs the recipe in this process."""

    def run(**changes) -> RecipeRun:
        settings = {"data_dir": folder / "data", "output_dir": tmp_path / "out", "num_resamples": 100}
        return run_recipe("evaluate_ilora", **settings | changes)

    return run


def test_saved_models_become_one_table(evaluate, folder):
    settings = {"zero_shot": True, "generate": "free", "max_new_tokens": 4, "limit_rows": 10, "split": "test"}
    settings |= {"first_line_only": True}
    run = evaluate(models=[folder / "lora", folder / "ilora"], names=["plain LoRA", "iLoRA"], **settings)
    output = run.output_dir
    content = json.loads((output / "results.json").read_text())
    names = ["zero-shot LLM", "plain LoRA", "iLoRA", "SASRec", "iLoRA, item head"]
    assert [row["name"] for row in content["models"]] == names
    assert content["context"]["num_users"] == 10 and content["context"]["split"] == "test"
    zero_shot, lora = content["models"][:2]
    assert zero_shot["num_trained"] == 0 < lora["num_trained"]
    # the adapter is not in the zero-shot row: other likelihoods, other ranks
    assert zero_shot["quality"]["candidates/ndcg@10"] != lora["quality"]["candidates/ndcg@10"]
    text = (output / "results.md").read_text()
    assert "ValidRatio" in text and "Expert usage" in text and "Only the first line of an answer counts." in text
    for file in ("results.csv", "results.png", "experts.png", "candidate_ranks.parquet"):
        assert (output / file).is_file()
    assert len(list((output / "ranks").iterdir())) == 2 and len(list((output / "answers").iterdir())) == 3
    assert run.record["status"] == "finished"
    assert run.record["data_fingerprint"] == content["context"]["data_fingerprint"]


def test_rows_of_the_train_split_are_evaluated_beside_further_recommenders(evaluate, folder):
    settings = {"split": "train", "train_fraction": [0.5, 1], "limit_rows": 8}
    other = folder / "other_sasrec"
    output = evaluate(models=folder / "lora", names="plain LoRA", recommenders=other, **settings).output_dir
    content = json.loads((output / "results.json").read_text())
    assert [row["name"] for row in content["models"]] == ["plain LoRA", str(other), "SASRec"]
    assert content["context"]["num_users"] == 8
    users = [name.split(",")[0] for name in pq.read_table(output / "candidate_ranks.parquet")["user_id"].to_pylist()]
    train_users = SequenceDatasets.load(folder / "data")["train"]["user_id"]
    assert set(users) <= {str(user) for user in train_users[len(train_users) // 2 :]}


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(evaluate, folder, tmp_path, launch):
    settings = {"data_dir": folder / "data", "models": folder / "ilora", "names": "iLoRA", "generate": "free"}
    settings |= {"max_new_tokens": 4, "limit_rows": 13, "batch_size": 4, "num_resamples": 100}
    one, two = evaluate(**settings), RecipeRun(tmp_path / "two")
    launch("multi_cpu.yaml", RECIPES / "evaluate_ilora.py", *recipe_words(output_dir=two.output_dir, **settings))
    quality = [
        [row["quality"] for row in json.loads((run.output_dir / "results.json").read_text())["models"]]
        for run in (one, two)
    ]
    assert quality[0] == quality[1]
    assert two.record["world_size"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["a", "b"]}, "for 1 models: expected one name for each"),
        ({"names": "zero-shot LLM"}, "is the row of the plain language model; choose another name"),
        ({"split": "all"}, "invalid choice: 'all'"),
        ({"train_fraction": [0.5, 1]}, "expected --split train"),
        ({"generate": "all"}, "invalid choice: 'all'"),
        ({"first_line_only": True}, "first_line_only is true with generate 'none': expected --generate free"),
        ({"models": "{folder}/nowhere"}, "nowhere"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(evaluate, folder, tmp_path, settings, message):
    models = settings.get("models", "{folder}/ilora").format(folder=folder)
    with pytest.raises((ValueError, OSError)) as raised:
        evaluate(**settings | {"models": models})
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()
