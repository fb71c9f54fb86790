"""recipes/train_ilora.py under `accelerate launch` with two real processes, against one."""

import json
import re
import shutil

import pytest
import torch

from hf_ilora import ILoraForRecommendation, SequenceDatasets
from hf_ilora.models.ilora.candidate_order import PreferredOrder
from hf_ilora.training.candidate_rows import CandidateRows
from hf_ilora.training.prompt_collator import PromptCollator
from tests.paths import RECIPES
from tests.recipe_runs import RecipeRun, recipe_words
from tests.tiny_ilora_parts import save_parts

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
# 3 steps per epoch of 8 x 2 accumulated rows, and one of 10, in whose second batch the second process has no row left.
ROWS, BATCH = 58, 8
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
        return launch(config, RECIPES / "train_ilora.py", *recipe_words(**settings)).stdout

    return run


@pytest.fixture(scope="module")
def run_of(train, tmp_path_factory):
    """The run of a launch configuration and losses, and what it printed; each runs once."""
    runs = {}

    def run(config, losses="titles and items") -> tuple[RecipeRun, str]:
        if (config, losses) not in runs:
            output_dir = tmp_path_factory.mktemp("runs") / "run"
            changes = {"per_device_train_batch_size": BATCH if config == "cpu.yaml" else BATCH // 2, **LOSSES[losses]}
            runs[config, losses] = RecipeRun(output_dir), train(config, output_dir, **changes)
        return runs[config, losses]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "losses"),
    [
        ("multi_cpu.yaml", "titles and items"),
        ("zero2_cpu.yaml", "titles and items"),
        ("zero3_cpu.yaml", "titles and items"),
        ("fsdp2_cpu.yaml", "titles and items"),
        ("multi_cpu.yaml", "pooled candidates"),
        ("zero3_cpu.yaml", "pooled candidates"),
        ("fsdp2_cpu.yaml", "pooled candidates"),
    ],
)
def test_two_processes_learn_what_one_learns(run_of, parts, config, losses):
    (one, _), (two, console) = run_of("cpu.yaml", losses), run_of(config, losses)
    assert (one.record["world_size"], two.record["world_size"]) == (1, 2)

    losses = one.logged("loss")
    assert len(losses) == 12 and losses[-1] < 0.9 * losses[0]
    assert two.logged("loss") == pytest.approx(losses, rel=1e-4)
    assert two.logged("eval_loss") == pytest.approx(one.logged("eval_loss"), rel=1e-4)
    assert two.logged("grad_norm") == pytest.approx(one.logged("grad_norm"), rel=1e-3)
    # Users differ in their gates, so losses are equal only when either process used the gates of its own users.
    assert min(one.logged("expert_deviation")) > 0.02
    torch.testing.assert_close(two.weights, one.weights, rtol=1e-3, atol=1e-4)

    logs = [(run.output_dir / "run.log").read_text() for run in (one, two)]
    counts = [re.search(r"[\d,]+ parameters, of which [\d,]+ are trained", log)[0] for log in logs]
    assert counts[0] == counts[1]
    assert "Warning" not in console


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero3_cpu.yaml", "fsdp2_cpu.yaml"])
def test_checkpoint_of_two_processes_holds_the_adapter_alone_and_loads_anywhere(run_of, parts, config):
    (one, _), (two, _) = run_of("cpu.yaml"), run_of(config)
    size = (one.output_dir / "model.safetensors").stat().st_size
    assert size < (parts.llm / "model.safetensors").stat().st_size
    for folder in (two.output_dir, two.output_dir / "checkpoint-12"):
        assert (folder / "model.safetensors").stat().st_size == size
        names = RecipeRun(folder).weights
        assert not [name for name in names if "base_layer" in name or "embed_tokens" in name]
    for method in (
        lambda model: model.score_candidates(HISTORIES, CANDIDATES),
        lambda model: model.item_scores(HISTORIES),
    ):
        scores, expected_scores = (method(ILoraForRecommendation.from_pretrained(run.output_dir)) for run in (two, one))
        torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero3_cpu.yaml", "fsdp2_cpu.yaml"])
def test_run_of_two_processes_that_was_killed_goes_on_to_the_same_result(run_of, train, config, tmp_path):
    """What a kill in the second epoch leaves is put together, and the same command given again."""
    whole, _ = run_of(config)
    killed = RecipeRun(tmp_path / "killed")
    shutil.copytree(whole.output_dir / "checkpoint-4", killed.output_dir / "checkpoint-4")
    (killed.output_dir / "run.json").write_text(json.dumps(whole.record | {"status": "running"}))
    console = train(config, killed.output_dir, per_device_train_batch_size=BATCH // 2)
    assert "resuming from" in console
    assert killed.logged("loss") == pytest.approx(whole.logged("loss"), rel=1e-6)
    torch.testing.assert_close(killed.weights, whole.weights, rtol=0, atol=1e-7)


@pytest.mark.slow
def test_conv_router_trains_although_each_process_has_its_own_batch_statistics(train, parts, tmp_path):
    run = RecipeRun(tmp_path / "conv")
    train("multi_cpu.yaml", run.output_dir, router_type="conv", per_device_train_batch_size=BATCH // 2)
    assert run.logged("loss")[-1] < 0.9 * run.logged("loss")[0]
    model = ILoraForRecommendation.from_pretrained(run.output_dir)
    assert model.router.norm.running_mean.any()
    # What was evaluated is what was saved: the statistics of both processes are near each other.
    read = max(SETTINGS["max_history"], model.recommender.config.max_length)  # items: by the prompt or the recommender
    rows = CandidateRows(SequenceDatasets.load(parts.data_dir)["validation"], 30, read)
    collator = PromptCollator(model.prompts, 0.5, PreferredOrder(model.recommender))
    prompts = [rows[index] | {"uniforms": uniforms} for uniforms in ((0.0, 0.0), (0.0, 0.9)) for index in range(ROWS)]
    with torch.no_grad():
        loss = model(**collator(prompts)).loss.item()
    assert loss == pytest.approx(min(run.logged("eval_loss")), rel=0.005)
