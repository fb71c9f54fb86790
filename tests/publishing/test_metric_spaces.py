"""A metric's folder goes to the Hub as a Space, from which `evaluate` loads it by name."""

from hf_ilora import metric_folder
from tests.publishing.hub_programs import last_line

PUSH_AND_LOAD = """
import sys
import evaluate
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("user/ndcg", repo_type="space", space_sdk="gradio")
api.upload_folder(folder_path=sys.argv[1], repo_id="user/ndcg", repo_type="space")
print(evaluate.load("user/ndcg", k=2).compute(predictions=[1, 3]))
"""


def test_a_metric_is_pushed_as_a_space_and_loaded_by_its_name(client, tmp_path):
    printed = client.succeed(PUSH_AND_LOAD, metric_folder("ndcg", tmp_path))
    assert last_line(printed) == "{'ndcg@2': 0.5}"
