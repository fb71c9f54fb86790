"""The distillation Trainer against the losses by hand, and against itself with other batches."""

import copy

import numpy as np
import pytest
import torch

from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.distillation.losses import DLLM2RecLoss, distribution_loss, propensity_scores
from hf_ilora.distillation.policies import GroundTruthErrorPolicy, KLDivergencePolicy, rank_gap_weights
from hf_ilora.training.distillation_trainer import DistillationArguments, DistillationTrainer
from hf_ilora.training.label_collator import DistillationCollator, newest_only
from hf_ilora.training.windows import NextItemCollator, TrainingWindows
from tests.synthetic import cyclic_sequences

NUM_ITEMS, TOP_K = 30, 3


class RuleLabels:
    """Answers as `TeacherLabels.lookup`: the items after the target; only some histories were asked about."""

    def __init__(self, items, boundaries, asked=lambda history_ids, positions: positions > 0):
        self.items, self.boundaries, self.asked = items, boundaries, asked

    def lookup(self, history_ids, positions):
        history_ids, positions = np.asarray(history_ids), np.asarray(positions)
        asked = self.asked(history_ids, positions) & (history_ids >= 0)
        target = self.items[np.where(asked, self.boundaries[history_ids] + positions, 0)]  # (...)
        items = (target[..., None] - 1 + np.arange(TOP_K)) % NUM_ITEMS + 1  # (..., top_k)
        distances = np.broadcast_to(np.arange(1, TOP_K + 1, dtype=np.float32), items.shape)
        return torch.from_numpy(items * asked[..., None]), torch.from_numpy(distances * asked[..., None])


@pytest.fixture(scope="module")
def windows():
    return TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last", with_origins=True)


def labels_of(windows, **settings):
    boundaries = np.append(windows._first_starts, len(windows.items))
    return RuleLabels(windows.items, boundaries, **settings)


def student(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "max_length": 6, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, **sizes, **settings))


def trainer_of(model, windows, folder, labels=None, collator=None, **settings):
    keywords = ("teacher", "item_counts", "policy", "teacher_embeddings")
    given = {name: settings.pop(name) for name in keywords if name in settings}
    defaults = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 8, "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    defaults |= {"remove_unused_columns": False, "label_names": ["labels"], "lr_scheduler_type": "constant"}
    arguments = DistillationArguments(output_dir=str(folder), top_k=TOP_K, **defaults | settings)
    if collator is None:
        collator = DistillationCollator(labels or labels_of(windows), arguments.distilled_positions)
    return DistillationTrainer(model, arguments, train_dataset=windows, data_collator=collator, **given)


def batch_of(windows, collator, rows=range(8)):
    return collator([windows[row] for row in rows])


def test_the_collator_labels_the_newest_position_or_all(windows):
    rows = range(4)
    every = batch_of(windows, DistillationCollator(labels_of(windows), "all"), rows)
    newest = batch_of(windows, DistillationCollator(labels_of(windows), "last"), rows)
    # the rule's best item is the target itself, so that a wrong place would show
    labelled = every["labels"] != -100
    assert torch.equal(every["teacher_items"][..., 0][labelled], every["labels"][labelled])
    assert not every["teacher_items"][~labelled].any()
    assert newest["teacher_items"].ne(0).any(-1).sum(1).tolist() == [1] * 4
    last = newest["labels"].shape[1] - 1 - newest["labels"].ne(-100).flip(1).int().argmax(1)
    assert (
        newest["teacher_items"][torch.arange(4), last, 0].tolist() == newest["labels"][torch.arange(4), last].tolist()
    )
    assert "history_ids" not in every


def test_newest_only_keeps_the_last_of_each_row():
    rows = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    assert newest_only(rows).tolist() == [[False, True, False], [False] * 3, [False, False, True]]


@pytest.mark.parametrize("form", ["corrected", "reference"])
@pytest.mark.parametrize("base_loss", ["bce", "cross_entropy", "sampled_softmax", "gbce"])
def test_the_loss_of_a_batch_is_that_of_dllm2rec(windows, tmp_path, form, base_loss, monkeypatch):
    model, counts = student(), torch.arange(NUM_ITEMS + 1)
    settings = {"form": form, "base_loss": base_loss, "alpha": 0.7, "beta": 1.5, "lam": 0.6}
    trainer = trainer_of(model, windows, tmp_path, distilled_positions="all", item_counts=counts, **settings)
    batch = batch_of(windows, trainer.data_collator)
    torch.manual_seed(4)
    loss = trainer.compute_loss(model.train(), dict(batch))
    labelled = batch["labels"] != -100
    targets = batch["labels"][labelled]
    torch.manual_seed(4)
    negatives = torch.randint(1, NUM_ITEMS + 1, (len(targets), 1))
    scores = model(batch["input_ids"], labels=batch["labels"], scored_positions=labelled).logits[:, 1:]
    by_hand = DLLM2RecLoss(**settings, top_k=TOP_K, propensity=propensity_scores(counts[1:]))
    expected = by_hand(
        scores, targets - 1, negatives - 1, batch["teacher_items"][labelled] - 1, batch["teacher_distances"][labelled]
    ).loss
    torch.testing.assert_close(loss, expected)


def test_the_students_own_loss_is_the_base_by_default(windows, tmp_path):
    model = student(repeat_bias=True)
    trainer = trainer_of(model, windows, tmp_path, lam=0.0)
    batch = batch_of(windows, trainer.data_collator)
    own = model.train()(batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), own)
    with_labels = trainer_of(model, windows, tmp_path, lam=0.5).compute_loss(model, dict(batch))
    assert with_labels > own


@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
def test_scores_shared_with_the_students_own_loss_change_nothing(windows, tmp_path, share):
    """One pass over the catalogue serves both losses where most labels were asked about."""
    some = labels_of(windows, asked=lambda history_ids, positions: (7 * history_ids + positions) % 10 < 10 * share)
    batch = batch_of(windows, DistillationCollator(some, "all"))
    found = []
    for shares in (True, False):
        model = student(repeat_bias=True)
        trainer = trainer_of(model, windows, tmp_path, distilled_positions="all")
        assert trainer._may_share_scores
        trainer._may_share_scores = shares
        torch.manual_seed(4)
        loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
        loss.backward()
        found.append((loss, outputs.loss, model.model.item_embedding.weight.grad))
    torch.testing.assert_close(*found)


def test_rows_without_teacher_labels_have_the_students_own_loss(windows, tmp_path):
    nobody = labels_of(windows, asked=lambda history_ids, positions: positions > 1000)
    model = student()
    trainer = trainer_of(model, windows, tmp_path, labels=nobody)
    batch = batch_of(windows, trainer.data_collator)
    loss = trainer.compute_loss(model.train(), dict(batch))
    torch.testing.assert_close(loss, model(batch["input_ids"], labels=batch["labels"]).loss)
    loss.backward()  # every parameter has a gradient, as distributed training needs
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("base_loss", ["student", "bce"])
def test_small_batches_accumulate_to_the_big_one(windows, tmp_path, base_loss, monkeypatch):
    # negatives are drawn per batch: fixed ones make the two comparable
    monkeypatch.setattr(torch, "randint", lambda low, high, size, device=None: torch.full(size, 5))
    some = labels_of(windows, asked=lambda history_ids, positions: (history_ids + positions) % 3 == 0)
    settings = {"base_loss": base_loss, "distilled_positions": "all", "alpha": 0.5}
    trained = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        trainer = trainer_of(
            student(), windows, tmp_path, labels=some, per_device_train_batch_size=batch_size, max_steps=2,
            gradient_accumulation_steps=accumulation, item_counts=torch.arange(NUM_ITEMS + 1), **settings,
        )  # fmt: skip
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "ranking_loss" in entry]
        trained.append((trainer.model.state_dict(), [entry["ranking_loss"] for entry in logs]))
    for name, value in trained[0][0].items():
        torch.testing.assert_close(value, trained[1][0][name], rtol=1e-4, atol=1e-6)
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-4)


def test_a_sample_that_holds_every_item_gives_the_whole_catalogues_loss(windows, tmp_path):
    model, counts = student(), torch.arange(NUM_ITEMS + 1)
    settings = {"base_loss": "bce", "alpha": 0.5, "item_counts": counts}
    whole, sampled = (
        trainer_of(model, windows, tmp_path, num_scored_items=number, **settings) for number in (None, 5000)
    )
    batch = batch_of(windows, whole.data_collator)
    losses = []
    for trainer in (whole, sampled):
        torch.manual_seed(4)  # the negatives are drawn first
        losses.append(trainer.compute_loss(model.train(), dict(batch)))
    torch.testing.assert_close(*losses)
    few = trainer_of(model, windows, tmp_path, num_scored_items=2, **settings)
    few.compute_loss(model.train(), dict(batch)).backward()


def test_an_online_teacher_gives_the_loss_of_its_labels(windows, tmp_path):
    teacher, model = student(seed=7).eval(), student()
    online = trainer_of(model, windows, tmp_path, teacher=teacher, collator=NextItemCollator(), kl_weight=0.0)
    plain = TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last")
    batch = batch_of(plain, NextItemCollator())
    torch.manual_seed(4)
    loss = online.compute_loss(model.train(), dict(batch))
    items, distances = teacher.rank_items(batch["input_ids"], top_k=TOP_K, exclude_seen=False)
    newest = newest_only(batch["labels"] != -100).unsqueeze(-1)
    labelled = {"teacher_items": items.unsqueeze(1) * newest, "teacher_distances": distances.unsqueeze(1) * newest}
    from_labels = trainer_of(model, windows, tmp_path)
    torch.manual_seed(4)
    torch.testing.assert_close(from_labels.compute_loss(model, batch | labelled), loss)


def test_an_equal_online_teacher_has_no_divergence(windows, tmp_path):
    model = student()
    batch = batch_of(TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last"), NextItemCollator())
    own = model.train()(batch["input_ids"], labels=batch["labels"]).loss
    settings = {"collator": NextItemCollator(), "lam": 0.0, "kl_weight": 2.0}
    same = trainer_of(model, windows, tmp_path, teacher=copy.deepcopy(model).eval(), **settings)
    torch.testing.assert_close(same.compute_loss(model, dict(batch)), own)
    other = trainer_of(model, windows, tmp_path, teacher=student(seed=7).eval(), **settings)
    assert other.compute_loss(model, dict(batch)) > own + 1e-4


def test_an_online_teacher_goes_with_a_base_loss_over_every_label(windows, tmp_path):
    """Positions about which it was not asked have no divergence, whatever the scores."""
    model, teacher = student(), student(seed=7).eval()
    batch = batch_of(TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last"), NextItemCollator())
    settings = {"collator": NextItemCollator(), "lam": 0.0, "base_loss": "cross_entropy", "teacher": teacher}
    alone, taught = (
        trainer_of(model, windows, tmp_path, kl_weight=weight, **settings).compute_loss(model.train(), dict(batch))
        for weight in (0.0, 2.0)
    )
    own = model(batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(alone, own)
    from_newest = trainer_of(
        model, windows, tmp_path, collator=NextItemCollator(), lam=0.0, kl_weight=2.0, teacher=teacher
    )
    torch.testing.assert_close(taught, from_newest.compute_loss(model, dict(batch)))


def test_defaults_keep_what_the_collator_reads(windows, tmp_path):
    arguments = DistillationArguments(
        str(tmp_path), max_steps=1, use_cpu=True, top_k=TOP_K, save_strategy="no", disable_tqdm=True
    )
    collator = DistillationCollator(labels_of(windows), "all")
    trainer = DistillationTrainer(student(), arguments, train_dataset=windows, data_collator=collator)
    assert trainer.train().training_loss > 0


def test_policies_leave_labels_out(windows, tmp_path):
    model = student()
    batch = batch_of(windows, DistillationCollator(labels_of(windows)))
    own = model.train()(batch["input_ids"], labels=batch["labels"]).loss
    none, every = (
        trainer_of(model, windows, tmp_path, policy=GroundTruthErrorPolicy(threshold)).compute_loss(model, dict(batch))
        for threshold in (-1e9, 1e9)
    )
    torch.testing.assert_close(none, own)
    assert every > own


def test_the_embedding_loss_pulls_users_to_the_embedding_of_the_target(windows, tmp_path):
    table = torch.randn(NUM_ITEMS + 1, 8, generator=torch.Generator().manual_seed(1))
    model = student()
    settings = {
        "embedding_weight": 1.0,
        "lam": 0.0,
        "teacher_embeddings": table,
        "max_steps": 60,
        "optim": "adamw_torch",
    }
    trainer = trainer_of(model, windows, tmp_path, learning_rate=0.01, **settings)
    trainer.train()
    logged = [entry["embedding_loss"] for entry in trainer.state.log_history if "embedding_loss" in entry]
    assert np.mean(logged[-10:]) < 0.8 * np.mean(logged[:3])


def test_rank_gaps_weigh_the_labels(windows, tmp_path):
    model = student()
    batch = batch_of(windows, DistillationCollator(labels_of(windows)))
    trainer = trainer_of(model, windows, tmp_path, rank_gap_weighting=True)
    torch.manual_seed(4)
    loss = trainer.compute_loss(model.train(), dict(batch))
    asked = batch["teacher_items"][..., 0] != 0
    targets, items = batch["labels"][asked], batch["teacher_items"][asked]
    torch.manual_seed(4)
    negatives = torch.randint(1, NUM_ITEMS + 1, (len(targets), 1))
    output = model(batch["input_ids"], labels=batch["labels"], scored_positions=asked)
    ranks = (output.logits >= output.logits.gather(1, targets.unsqueeze(1))).sum(1)
    # the rule's best item is the target itself, so that the teacher ranks it first
    weights = rank_gap_weights(ranks, torch.ones_like(ranks))
    assert weights.unique().numel() > 2
    by_hand = DLLM2RecLoss(alpha=0, top_k=TOP_K, base_loss="student")
    arguments = (targets - 1, negatives - 1, items - 1, batch["teacher_distances"][asked], weights)
    ranking = by_hand(output.logits[:, 1:], *arguments).loss
    share = len(targets) / (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss, output.loss + share * ranking)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_divergence_from_an_online_teacher_by_hand(windows, tmp_path, direction):
    model, teacher = student(), student(seed=7).eval()
    batch = batch_of(TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last"), NextItemCollator())
    settings = {"kl_weight": 2.0, "kl_temperature": 1.5, "kl_direction": direction, "lam": 0.0, "teacher": teacher}
    trainer = trainer_of(model, windows, tmp_path, collator=NextItemCollator(), **settings)
    loss = trainer.compute_loss(model.train(), dict(batch))
    newest = newest_only(batch["labels"] != -100)
    output = model(batch["input_ids"], labels=batch["labels"], scored_positions=newest)
    with torch.no_grad():
        teacher_scores = teacher(batch["input_ids"]).logits
    divergence = distribution_loss(output.logits[:, 1:], teacher_scores[:, 1:], 1.5, direction)
    share = newest.sum() / (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss, output.loss + 2.0 * share * divergence.mean())


def test_rows_without_origins_are_refused(windows):
    collator = DistillationCollator(labels_of(windows))
    plain = TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last")
    with pytest.raises(ValueError, match="expected those of TrainingWindows"):
        batch_of(plain, collator)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": 1.0}, "without an online teacher"),
        ({"embedding_weight": 1.0}, "without teacher_embeddings"),
        ({"alpha": 1.0}, "without item_counts"),
        ({"policy": KLDivergencePolicy(0.1)}, "KLDivergencePolicy without an online teacher"),
        ({"teacher": "any", "distilled_positions": "all"}, "distilled_positions is all with an online teacher"),
        ({"teacher": "any", "num_scored_items": 10}, "num_scored_items is 10 with an online teacher"),
        ({"form": "other"}, "form is 'other': expected one of"),
        ({"base_loss": "hinge"}, "base_loss is 'hinge': expected one of"),
        ({"num_scored_items": 1}, "expected at least 1 and 2"),
        ({"kl_weight": -1.0}, "expected a finite number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(windows, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(student(), windows, tmp_path, **settings)


def test_batches_without_labels_are_refused(windows, tmp_path):
    model = student()
    trainer = trainer_of(model, windows, tmp_path)
    batch = batch_of(TrainingWindows(cyclic_sequences(num_users=24)["train"], 6), NextItemCollator())
    with pytest.raises(ValueError, match="the batch has no teacher_items"):
        trainer.compute_loss(model.train(), batch)
