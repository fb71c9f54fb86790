"""The optimizer of iLoRA: who learns how fast, and when."""

import math

import pytest

from hf_ilora import ILoraTrainer, ILoraTrainingArguments
from tests.models.ilora.ilora_fixtures import fresh_model


def test_learning_rate_warms_up_and_falls_along_a_cosine_to_its_floor(tmp_path):
    model = fresh_model(item_head="residual", item_loss_weight=1.0)
    settings = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    arguments = ILoraTrainingArguments(str(tmp_path), use_cpu=True, early_stopping_patience=0, **settings)
    trainer = ILoraTrainer(model, arguments)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    names = {parameter: name for name, parameter in model.named_parameters()}
    lora, others, router = (
        {names[parameter] for parameter in group["params"]} for group in trainer.optimizer.param_groups
    )
    assert all(name.startswith("llm.") and ".lora_" in name for name in lora)
    assert {name.split(".")[0] for name in others} == {"prompt_embedding", "item_head"}
    assert router == {"router.projection.weight"}
    assert lora | others | router == {name for name, value in model.named_parameters() if value.requires_grad}

    rates = []
    for _ in range(101):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    peak = 8.0e-4
    middle = 0.01 + 0.99 * (1 + math.cos(math.pi * (50 - 5) / 95)) / 2  # 5 of 100 steps warm up
    for step, fraction in {0: 0.0, 1: 0.2, 5: 1.0, 50: middle, 100: 0.01}.items():
        assert rates[step] == pytest.approx([peak * fraction, peak * fraction, 0.3 * peak * fraction]), step
    assert max(rate for rate, _, _ in rates) == pytest.approx(peak)
