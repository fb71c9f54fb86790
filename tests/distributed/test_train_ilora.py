"""recipes/train_ilora.py under `accelerate launch` with two real processes, against one."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hf_ilora import ILoraForRecommendation, SequenceDatasets
from hf_ilora.models.ilora.candidate_order import PreferredOrder
from hf_ilora.training.candidate_rows import CandidateRows
from hf_ilora.training.prompt_collator import PromptCollator
from tests.paths import RECIPES
from tests.tiny_ilora_parts import save_parts

RECIPE = RECIPES / "train_ilora.py"
# Without dropout and with a router that looks at each user alone, two processes with half the batch must compute what
# one computes with the whole. Gradients are clipped at 1 in all of these runs, so that clipping is compared too.
SETTINGS = {
    "max_history": 4,
    "num_candidates": 5,
    "rank": 4,
    "num_experts": 2,
    "router_type": "linear",
    "router_learning_rate_factor": 3.0,  # unlike the others', and large enough to be seen
    "weight_decay": 0.1,
    "lora_dropout": 0.0,
    "item_head": "residual",
    "item_loss_weight": 1.0,
    "candidate_order": "recommender",
    "activation_checkpointing": True,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5.0e-3,
    "optim": "adamw_torch",
    "num_train_epochs": 3,
    "logging_steps": 1,
    "save_total_limit": 3,
    "disable_tqdm": True,
}
LOSSES = {
    "titles and items": {},
    "pooled candidates": {"candidate_loss_weight": 1.0, "language_loss_weight": 0.1, "recommender_weight": 0.5},
}
ROWS, BATCH = 64, 8  # 64 rows / (8 x 2 accumulated) = 4 steps per epoch
HISTORIES = torch.tensor([[1, 2, 3, 4], [0, 0, 20, 22]])
CANDIDATES = torch.tensor([[5, 6, 20], [24, 3, 9]])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"), num_users=ROWS)


@pytest.fixture(scope="module")
def train(launch, parts):
    """Runs the recipe; returns what it printed."""

    def run(config, output_dir, **changes) -> str:
        settings = {**vars(parts), "output_dir": output_dir, **SETTINGS, **changes}
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        return launch(config, RECIPE, *words).stdout

    return run


@pytest.fixture(scope="module")
def run_of(train, tmp_path_factory):
    """The output folder of a finished run and what it printed, by launch configuration and losses; each runs once."""
    runs = {}

    def run(config, losses="titles and items"):
        if (config, losses) not in runs:
            output_dir = tmp_path_factory.mktemp("runs") / "run"
            changes = {"per_device_train_batch_size": BATCH if config == "cpu.yaml" else BATCH // 2, **LOSSES[losses]}
            runs[config, losses] = output_dir, train(config, output_dir, **changes)
        return runs[config, losses]

    return run


def logged(output_dir, name) -> list[float]:
    state = json.loads((output_dir / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def own_log(output_dir) -> str:
    return (output_dir / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "losses"),
    [
        ("multi_cpu.yaml", "titles and items"),
        ("zero2_cpu.yaml", "titles and items"),
        ("zero3_cpu.yaml", "titles and items"),
        ("multi_cpu.yaml", "pooled candidates"),
        ("zero3_cpu.yaml", "pooled candidates"),
    ],
)
def test_two_processes_learn_what_one_learns(run_of, parts, config, losses):
    (one, _), (two, console) = run_of("cpu.yaml", losses), run_of(config, losses)
    assert [json.loads((folder / "run.json").read_text())["world_size"] for folder in (one, two)] == [1, 2]

    assert len(logged(one, "loss")) == 12 and logged(one, "loss")[-1] < 0.9 * logged(one, "loss")[0]
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)
    assert logged(two, "eval_loss") == pytest.approx(logged(one, "eval_loss"), rel=1e-4)
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-3)
    # Users differ in their gates, so losses are equal only when either process used the gates of its own users.
    assert min(logged(one, "expert_deviation")) > 0.02
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (two, one))
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)

    counts = [re.search(r"[\d,]+ parameters, of which [\d,]+ are trained", own_log(folder))[0] for folder in (one, two)]
    assert counts[0] == counts[1]
    assert "Warning" not in console


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero3_cpu.yaml"])
def test_checkpoint_of_two_processes_holds_the_adapter_alone_and_loads_anywhere(run_of, parts, config):
    (one, _), (two, _) = run_of("cpu.yaml"), run_of(config)
    llm_size = (parts.llm / "model.safetensors").stat().st_size
    for folder in (two, two / "checkpoint-12"):
        assert (folder / "model.safetensors").stat().st_size == (one / "model.safetensors").stat().st_size < llm_size
        assert not [
            name for name in load_file(folder / "model.safetensors") if "base_layer" in name or "embed_tokens" in name
        ]
    for method in (
        lambda model: model.score_candidates(HISTORIES, CANDIDATES),
        lambda model: model.item_scores(HISTORIES),
    ):
        scores, expected_scores = (method(ILoraForRecommendation.from_pretrained(folder)) for folder in (two, one))
        torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero3_cpu.yaml"])
def test_run_of_two_processes_that_was_killed_goes_on_to_the_same_result(run_of, train, config, tmp_path):
    """What a kill in the second epoch leaves is put together, and the same command given again."""
    whole, _ = run_of(config)
    killed = tmp_path / "killed"
    shutil.copytree(whole / "checkpoint-4", killed / "checkpoint-4")
    record = json.loads((whole / "run.json").read_text())
    (killed / "run.json").write_text(json.dumps(record | {"status": "running"}))
    console = train(config, killed, per_device_train_batch_size=BATCH // 2)
    assert "resuming from" in console
    assert logged(killed, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-6)
    weights, expected_weights = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_conv_router_trains_although_each_process_has_its_own_batch_statistics(train, parts, tmp_path):
    output_dir = tmp_path / "conv"
    train("multi_cpu.yaml", output_dir, router_type="conv", per_device_train_batch_size=BATCH // 2)
    assert logged(output_dir, "loss")[-1] < 0.9 * logged(output_dir, "loss")[0]
    model = ILoraForRecommendation.from_pretrained(output_dir)
    assert model.router.norm.running_mean.any()
    # What was evaluated is what was saved: the statistics of both processes are near each other.
    rows = CandidateRows(SequenceDatasets.load(parts.data_dir)["validation"], 30, SETTINGS["max_history"])
    collator = PromptCollator(model.prompts, 0.5, PreferredOrder(model.recommender))
    prompts = [rows[index] | {"draws": draws} for draws in ((0.0, 0.0), (0.0, 0.9)) for index in range(ROWS)]
    with torch.no_grad():
        loss = model(**collator(prompts)).loss.item()
    assert loss == pytest.approx(min(logged(output_dir, "eval_loss")), rel=0.005)
