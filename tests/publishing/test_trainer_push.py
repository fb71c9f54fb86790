"""Trainers push to a Hub, during training and at its end, with the real clients."""

import pytest
import torch

from hf_ilora import SASRecForNextItem
from tests.paths import PROJECT
from tests.publishing.hub_programs import USE_CARD, last_line

TRAIN = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from transformers import set_seed
from hf_ilora import NextItemTrainer, NextItemTrainingArguments, SASRecConfig, SASRecForNextItem
from tests.synthetic import cyclic_sequences
sequences = cyclic_sequences(num_users=64)
set_seed(1)
model = SASRecForNextItem(SASRecConfig(num_items=30, hidden_size=8, num_hidden_layers=1, max_length=6))
settings = {{"max_steps": 8, "per_device_train_batch_size": 16, "use_cpu": True, "disable_tqdm": True}}
arguments = NextItemTrainingArguments(sys.argv[1], **settings | eval(sys.argv[2]))
trainer = NextItemTrainer(
    model, arguments, train_dataset=sequences["train"], eval_dataset=sequences["validation"],
    processing_class=sequences.catalogue,
)
trainer.train()
print(trainer.push_to_hub(commit_message="Done", license="mit").oid)
"""
USE = """
import sys
from transformers import AutoModel
import hf_ilora
model = AutoModel.from_pretrained(sys.argv[1])
print(model.catalogue.titles(model.recommend([[1, 2, 3]], top_k=3)[0][0]))
"""
PUSH_MEASURED = f"""
{TRAIN.rpartition("print")[0]}
from pathlib import Path
from huggingface_hub import HfApi
from hf_ilora.publishing import write_card
from tests.publishing.published_folders import write_results, write_run
folder = Path(sys.argv[1])
trainer.save_model()
write_run(folder, command=["hf-ilora", "--data_dir", str(folder / "data")])
results = [write_results(folder.parent / "evaluation")]
write_card(folder, "user/cycle", dataset_name="Data", license="mit", results=results, row="SASRec")
trainer.push_to_hub(commit_message="measured", tags="loops")
trainer.args.max_steps = 12
trainer.train()
trainer.push_to_hub(commit_message="trained further")
api = HfApi()
card = Path(api.hf_hub_download("user/cycle", "README.md")).read_text()
api.upload_file(path_or_fileobj=(card + "Mine.").encode(), path_in_repo="README.md", repo_id="user/cycle")
trainer.push_to_hub(commit_message="edited on the Hub")
"""
MODEL_FILES = {"README.md", "config.json", "items.parquet", "model.safetensors", "modeling_sasrec.py"}


def files_of(commit) -> set[str]:
    return set(commit.files)


def test_a_finished_model_arrives_with_catalogue_code_and_card_and_nothing_else(client, tmp_path):
    folder = tmp_path / "cycle"
    printed = client.succeed(TRAIN, folder, {"hub_model_id": "user/cycle"})
    newest = client.hub.repositories["user/cycle"].history()[0]
    assert last_line(printed) == newest.oid
    assert files_of(newest) >= MODEL_FILES
    assert not [name for name in files_of(newest) if name.startswith("checkpoint") or name.endswith((".bin", ".pt"))]
    card = newest.files["README.md"].decode()
    assert "license: mit" in card and "Validation split, 64 users:" in card
    model = SASRecForNextItem.from_pretrained(folder)
    shown = model.catalogue.titles(model.recommend([[1, 2]], top_k=10)[0][0])
    assert last_line(client.succeed(USE_CARD, "user/cycle", token=None)) == str(shown)
    titles = last_line(client.succeed(USE, "user/cycle", token=None))
    assert titles == str(model.catalogue.titles(model.recommend(torch.tensor([[1, 2, 3]]), top_k=3)[0][0]))


def test_a_card_with_measurements_is_kept_only_for_the_measured_weights(client, tmp_path):
    """A Trainer's push must neither lose an evaluation nor show one of other weights."""
    printed = client.succeed(PUSH_MEASURED, tmp_path / "cycle", {"hub_model_id": "user/cycle"})
    commits = {commit.title: commit.files for commit in client.hub.repositories["user/cycle"].history()}
    cards = {title: files["README.md"].decode() for title, files in commits.items() if "README.md" in files}
    assert "95% intervals" in cards["measured"] and "value: 0.1155" in cards["measured"]
    assert "- loops\n" in cards["measured"]
    assert "95% intervals" not in cards["trained further"] and ".1155" not in cards["trained further"]
    assert "Validation split, 64 users:" in cards["trained further"] and "license: mit" in cards["trained further"]
    assert printed.count("README.md has the results of other weights, and is replaced: `hf-ilora evaluate`") == 1
    edited = client.hub.repositories["user/cycle"].commit("main").files["README.md"].decode()
    assert edited == cards["trained further"] + "Mine."  # a card that was edited on the Hub wins
    for files in commits.values():
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert b'"data"' in commits["measured"]["run.json"]


@pytest.mark.slow
def test_every_save_of_a_training_arrives_as_a_whole_model(client, tmp_path):
    settings = {"push_to_hub": True, "hub_model_id": "user/cycle", "hub_always_push": True}
    client.succeed(TRAIN, tmp_path / "cycle", settings)
    messages = [commit.title for commit in client.hub.repositories["user/cycle"].history()]
    assert messages[0] == "Done" and "Training in progress, epoch 1" in messages
    for commit in client.hub.repositories["user/cycle"].history()[:-1]:
        assert files_of(commit) >= MODEL_FILES, commit.title
        assert not [name for name in files_of(commit) if name.endswith((".bin", ".pt", ".pth"))], commit.title


@pytest.mark.slow
def test_checkpoints_are_pushed_on_request(client, tmp_path):
    settings = {"push_to_hub": True, "hub_model_id": "user/cycle", "hub_strategy": "all_checkpoints"}
    client.succeed(TRAIN, tmp_path / "cycle", settings | {"hub_always_push": True})
    newest = client.hub.repositories["user/cycle"].history()[0]
    assert {"checkpoint-4/trainer_state.json", "checkpoint-4/model.safetensors"} <= files_of(newest)
    assert b'"best_model_checkpoint": "checkpoint-' in newest.files["checkpoint-8/trainer_state.json"]
    assert not [name for name, content in newest.files.items() if str(tmp_path).encode() in content]


def test_a_push_without_permission_fails(client, tmp_path):
    refused = client.fail(TRAIN, tmp_path / "cycle", {"hub_model_id": "user/cycle"}, token="wrong")
    assert "PermissionError" in refused or "401" in refused
