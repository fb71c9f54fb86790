"""The expert usage that the callback logs in a real Trainer."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_ilora.training.expert_usage_callback import ExpertUsageCallback
from tests.evaluation.ranking_model import ChoosingModel


class TrainedModel(ChoosingModel):
    def forward(self, row):
        return {"loss": (self.table[row] ** 2).sum()}


def test_the_trainer_logs_the_usage_at_each_evaluation(tmp_path):
    model = TrainedModel()
    rows = [{"row": row} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="no",
        prediction_loss_only=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(ExpertUsageCallback(trainer, torch.tensor([[4], [8], [1], [2]])))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "expert_0_gate" in entry]
    assert [entry["epoch"] for entry in logged] == [1, 2]
    assert [logged[0][f"expert_{number}_gate"] for number in range(4)] == [0.5, 0.25, 0.25, 0]
    assert logged[0]["expert_mean_entropy"] == pytest.approx(0)
    assert logged[0]["expert_entropy_of_mean"] == pytest.approx(1.5 * math.log(2) / math.log(4))
    assert logged[0]["expert_deviation"] == pytest.approx(0.5)
    json.dumps(logged)
