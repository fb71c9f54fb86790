"""The share of examples with item embeddings, step by step in the stock Trainer."""

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ilora.training.curriculum import CurriculumCallback
from tests.models.ilora.ilora_fixtures import ROWS, batch_of, tiny_model


class Shares(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.item_embedding_probability)


def shares_of(folder, num_steps: int, max_steps: int, resume=None) -> list[float]:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=3,
        max_steps=max_steps,
        save_steps=2,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,
        disable_tqdm=True,
    )
    model, shares = tiny_model(), Shares()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS * 4,
        data_collator=lambda rows: batch_of(model, rows),
        callbacks=[CurriculumCallback(num_steps), shares],
    )
    trainer.train(resume_from_checkpoint=resume)
    return shares.seen


def test_share_grows_from_nothing_to_all_and_continues_after_a_resume(tmp_path):
    assert shares_of(tmp_path, num_steps=4, max_steps=6) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares_of(tmp_path / "resumed", 4, 6, resume=str(tmp_path / "checkpoint-2")) == [0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("num_steps", [0, -1])
def test_fewer_than_one_step_is_refused(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}: expected at least 1"):
        CurriculumCallback(num_steps)
