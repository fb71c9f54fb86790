"""recipes/evaluate_ilora.py from saved folders to the table, with a tiny language model."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_ilora import ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, SequenceDatasets
from tests.paths import RECIPES
from tests.synthetic import cyclic_sequences
from tests.tiny_tokenizers import byte_level_bpe

RECIPE = RECIPES / "evaluate_ilora.py"

pytestmark = pytest.mark.slow


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


def evaluate(folder, *options):
    command = [sys.executable, str(RECIPE), "--data_dir", folder / "data", *options]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def test_saved_models_become_one_table(folder, tmp_path):
    options = ["--models", folder / "lora", folder / "ilora", "--names", "plain LoRA", "iLoRA", "--split", "test"]
    options += ["--zero_shot", "true", "--generate", "free", "--max_new_tokens", "4", "--limit_rows", "10"]
    result = evaluate(folder, *options, "--num_resamples", "100", "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    names = ["zero-shot LLM", "plain LoRA", "iLoRA", "SASRec", "iLoRA, item head"]
    assert [row["name"] for row in content["models"]] == names
    assert content["context"]["num_users"] == 10 and content["context"]["split"] == "test"
    zero_shot, lora = content["models"][:2]
    assert zero_shot["num_trained"] == 0 < lora["num_trained"]
    # the adapter is not in the zero-shot row: other likelihoods, other ranks
    assert zero_shot["quality"]["candidates/ndcg@10"] != lora["quality"]["candidates/ndcg@10"]
    text = (tmp_path / "results.md").read_text()
    assert "ValidRatio" in text and "Expert usage" in text
    for file in ("results.csv", "results.png", "experts.png", "candidate_ranks.parquet"):
        assert (tmp_path / file).is_file()
    assert len(list((tmp_path / "ranks").iterdir())) == 2 and len(list((tmp_path / "answers").iterdir())) == 3
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "finished" and record["data_fingerprint"] == content["context"]["data_fingerprint"]


def test_rows_of_the_train_split_are_evaluated_beside_further_recommenders(folder, tmp_path):
    options = ["--models", folder / "lora", "--names", "plain LoRA", "--recommenders", folder / "other_sasrec"]
    options += ["--split", "train", "--train_fraction", "0.5", "1", "--limit_rows", "8", "--num_resamples", "100"]
    result = evaluate(folder, *options, "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in content["models"]] == ["plain LoRA", str(folder / "other_sasrec"), "SASRec"]
    assert content["context"]["num_users"] == 8
    users = [name.split(",")[0] for name in pq.read_table(tmp_path / "candidate_ranks.parquet")["user_id"].to_pylist()]
    train_users = SequenceDatasets.load(folder / "data")["train"]["user_id"]
    assert set(users) <= {str(user) for user in train_users[len(train_users) // 2 :]}


def test_two_processes_give_the_table_of_one(folder, tmp_path, launch):
    options = ["--data_dir", folder / "data", "--models", folder / "ilora", "--names", "iLoRA", "--generate", "free"]
    options += ["--max_new_tokens", "4", "--limit_rows", "13", "--batch_size", "4", "--num_resamples", "100"]
    result = evaluate(folder, *options[2:], "--output_dir", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    launch("multi_cpu.yaml", RECIPE, *options, "--output_dir", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert [row["quality"] for row in one["models"]] == [row["quality"] for row in two["models"]]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "{folder}/ilora", "--names", "a", "b"], "for 1 models: expected one name for each"),
        (["--models", "{folder}/ilora", "--split", "all"], "expected one of validation, test, train"),
        (["--models", "{folder}/ilora", "--train_fraction", "0.5", "1"], "expected --split train"),
        (["--models", "{folder}/ilora", "--generate", "all"], "expected one of none, free, constrained"),
        (["--models", "{folder}/nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(folder, tmp_path, options, message):
    result = evaluate(folder, *(option.format(folder=folder) for option in options), "--output_dir", tmp_path / "out")
    assert result.returncode != 0 and message in result.stderr
    assert not (tmp_path / "out").exists()
