"""What two processes hold of a frozen language model under ZeRO-3: half each, also while it is loaded."""

import json
from pathlib import Path

import pytest

from tests.paths import PROJECT
from tests.recipe_runs import recipe_words
from tests.tiny_ilora_parts import save_parts
from tests.tiny_language_models import base_llm

PROGRAM = Path(__file__).with_name("launched_memory.py")
SETTINGS = {
    "max_history": 4, "num_candidates": 5, "rank": 4, "num_experts": 2, "router_type": "linear", "max_steps": 3,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "validation_users": 2, "eval_strategy": "no",
    "save_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0, "disable_tqdm": True,
}  # fmt: skip
# A step may gather less than a layer, and keeps nothing for later.
LIMITS = {
    "stage": 3,
    "stage3_max_live_parameters": 10**6,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 10_000,
    "stage3_gather_16bit_weights_on_model_save": True,
}
AUTOMATIC = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model of 100 MB in float32, saved in bfloat16: its weights are converted, not mapped from the file."""
    parts = save_parts(tmp_path_factory.mktemp("parts"), num_users=64)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
    base_llm(**sizes).bfloat16().save_pretrained(parts.llm)
    return parts


@pytest.fixture(scope="module")
def limited_zero3(tmp_path_factory) -> Path:
    """zero3_cpu.yaml with `LIMITS`."""
    folder = tmp_path_factory.mktemp("zero3")
    content = {"zero_optimization": LIMITS, "zero_allow_untested_optimizer": True, **dict.fromkeys(AUTOMATIC, "auto")}
    (folder / "limits.json").write_text(json.dumps(content))
    launch, _, _ = (PROJECT / "accelerate_configs" / "zero3_cpu.yaml").read_text().partition("mixed_precision:")
    of_deepspeed = f"deepspeed_config:\n  deepspeed_config_file: {folder / 'limits.json'}\n  zero3_init_flag: true\n"
    (folder / "zero3_limited.yaml").write_text(launch + of_deepspeed)
    return folder / "zero3_limited.yaml"


@pytest.fixture(scope="module")
def reports_of(launch, parts, tmp_path_factory):
    """What both processes of a launch report, as fractions of the language model; a configuration runs once."""
    found = {}

    def run(config) -> list[dict[str, float]]:
        if config not in found:
            folder = tmp_path_factory.mktemp("memory")
            words = recipe_words(**vars(parts), output_dir=folder / "run", **SETTINGS)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed tensors go back to the system at once
                launch(str(config), PROGRAM, folder, *words)
            reports = [json.loads((folder / f"report_{rank}.json").read_text()) for rank in (0, 1)]
            assert all(report["whole"] > 100e6 for report in reports)
            found[config] = [{name: value / report["whole"] for name, value in report.items()} for report in reports]
        return found[config]

    return run


@pytest.mark.slow
def test_a_process_of_zero3_owns_half_of_the_language_model_and_never_loads_all_of_it(reports_of):
    for report in reports_of("zero3_cpu.yaml"):
        assert report["owned"] == pytest.approx(0.5, abs=0.01)
        assert 0 < report["gathered at once in loading"] < 0.1
        assert report["rise in loading"] < 0.75


@pytest.mark.slow
def test_a_step_of_zero3_gathers_no_more_than_deepspeed_is_told(reports_of, limited_zero3):
    """By default DeepSpeed keeps up to a billion numbers in a step, which is all of a small language model."""
    for default, limited in zip(reports_of("zero3_cpu.yaml"), reports_of(limited_zero3), strict=True):
        assert default["gathered in step"] > 0.9 and limited["gathered in step"] < 0.1
        assert limited["owned"] == default["owned"] and limited["rise in loading"] < 0.75
        assert limited["rise in step"] < default["rise in step"] - 0.75


@pytest.mark.slow
def test_the_same_measures_find_the_whole_language_model_in_every_process_without_zero3(reports_of):
    for report in reports_of("multi_cpu.yaml"):
        assert report["owned"] == 1 and report["gathered at once in loading"] == 0
        assert report["rise in loading"] > 0.9
