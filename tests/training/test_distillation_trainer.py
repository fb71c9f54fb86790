"""The distillation Trainer against the losses by hand, and against itself with other batches."""

import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

from hf_ilora import (
    DistillationArguments,
    DistillationTrainer,
    EnsembleTeacher,
    SASRecConfig,
    SASRecForNextItem,
    cooccurrence_embeddings,
    joint_item_embeddings,
)
from hf_ilora.data.columns import training_sequences
from hf_ilora.distillation.ensemble_members import LabelScores
from hf_ilora.distillation.losses import DLLM2RecLoss, distribution_loss, propensity_scores
from hf_ilora.distillation.policies import GroundTruthErrorPolicy, KLDivergencePolicy, rank_gap_weights
from hf_ilora.titles.pca import pca_embeddings
from hf_ilora.training.label_collator import DistillationCollator, TeacherIndices, newest_only
from hf_ilora.training.windows import NextItemCollator, TrainingWindows, item_counts
from tests.synthetic import cyclic_sequences

NUM_ITEMS, TOP_K = 30, 3
SPLIT = cyclic_sequences(num_users=24)["train"]
COUNTS = item_counts(SPLIT, NUM_ITEMS)
EMBEDDINGS = torch.randn(NUM_ITEMS + 1, 12, generator=torch.Generator().manual_seed(1))


class RuleLabels:
    """Answers as `TeacherLabels.lookup`: the items after the target; only some histories were asked about."""

    num_items, folder = NUM_ITEMS, Path("labels")

    def __init__(
        self, asked=lambda history_ids, prefix_lengths: prefix_lengths > 0, positions="all", rows=24, split=SPLIT
    ):
        self.items, self.boundaries = training_sequences(split)
        self.asked, self.description = asked, {"labelled_positions": positions}
        self.table = pa.table({"history_id": np.arange(rows)})

    def lookup(self, history_ids, prefix_lengths):
        history_ids, prefix_lengths = np.asarray(history_ids), np.asarray(prefix_lengths)
        asked = self.asked(history_ids, prefix_lengths) & (history_ids >= 0)
        target = self.items[np.where(asked, self.boundaries[history_ids] + prefix_lengths, 0)]  # (...)
        items = (target[..., None] - 1 + np.arange(TOP_K)) % NUM_ITEMS + 1  # (..., top_k)
        distances = np.broadcast_to(np.arange(1, TOP_K + 1, dtype=np.float32), items.shape)
        return torch.from_numpy(items * asked[..., None]), torch.from_numpy(distances * asked[..., None])

    def item_embeddings(self):
        return EMBEDDINGS


@pytest.fixture(scope="module")
def windows():
    return TrainingWindows(SPLIT, 6, windows="last", with_origins=True)


def student(seed=0, num_items=NUM_ITEMS, **settings):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "max_length": 6, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return SASRecForNextItem(SASRecConfig(num_items=num_items, **sizes | settings))


def trainer_of(model, folder, labels=None, **settings):
    keywords = ("teacher", "policy", "train_dataset", "data_collator", "title_embeddings")
    given = {name: settings.pop(name) for name in keywords if name in settings}
    if isinstance(given.get("policy"), str):
        settings["policy"] = given.pop("policy")
    defaults = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 8, "logging_strategy": "steps", "logging_steps": 1, "use_cpu": True}
    defaults |= {"disable_tqdm": True, "eval_strategy": "no", "load_best_model_at_end": False, "windows": "last"}
    defaults |= {"early_stopping_patience": 0, "top_k": TOP_K}
    if "teacher" not in given:
        given["teacher_labels"] = labels or RuleLabels()
    return DistillationTrainer(
        model, DistillationArguments(output_dir=str(folder), **defaults | settings), **{"train_dataset": SPLIT} | given
    )


def batch_of(windows, collator, rows=range(8)):
    return collator([windows[row] for row in rows])


def plain_batch():
    """Rows as an online teacher meets them."""
    return batch_of(TrainingWindows(SPLIT, 6, windows="last"), NextItemCollator())


def test_the_newest_position_or_all_are_distilled(windows):
    batch = batch_of(windows, DistillationCollator(RuleLabels()), range(4))
    # the rule's best item is the target itself, so that a wrong place would show
    labelled = batch["labels"] != -100
    assert torch.equal(batch["teacher_items"][..., 0][labelled], batch["labels"][labelled])
    assert not batch["teacher_items"][~labelled].any()
    assert "history_ids" not in batch
    every, newest = (TeacherIndices(positions, TOP_K)(batch) for positions in ("all", "last"))
    for completed in (every, newest):
        assert torch.equal(completed["teacher_items"][:, 0], batch["labels"].flatten()[completed["teacher_indices"]])
        assert torch.equal(batch["labels"].flatten()[completed["label_indices"]], batch["labels"][labelled])
    assert torch.equal(every["teacher_indices"], every["label_indices"])
    length = batch["labels"].shape[1]
    last = length - 1 - batch["labels"].ne(-100).flip(1).int().argmax(1)
    assert newest["teacher_indices"].tolist() == (torch.arange(4) * length + last).tolist()


@pytest.mark.parametrize("positions", ["all", "last"])
def test_one_setting_says_which_positions_are_distilled(tmp_path, positions):
    """Whoever makes the batches: the default, or a collator that the caller passes."""
    found = []
    for collator in (None, DistillationCollator(RuleLabels())):
        trainer = trainer_of(student(), tmp_path, distilled_positions=positions, data_collator=collator)
        batch = next(iter(trainer.get_train_dataloader()))
        found.append(len(batch["teacher_indices"]))
        trainer.train()
        assert trainer.state.log_history[0]["ranking_loss"] > 0
    assert found == ([len(batch["label_indices"])] * 2 if positions == "all" else [8, 8])


def test_a_stream_goes_with_an_online_teacher_and_not_with_labels(tmp_path):
    stream = SPLIT.to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset is a stream with teacher_labels"):
        trainer_of(student(), tmp_path, train_dataset=stream)
    trainer = trainer_of(student(), tmp_path, train_dataset=stream, teacher=student(seed=7).eval())
    trainer.train()
    assert trainer.state.log_history[0]["ranking_loss"] > 0


def test_newest_only_keeps_the_last_of_each_row():
    rows = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]]).bool()
    assert newest_only(rows).tolist() == [[False, True, False], [False] * 3, [False, False, True]]


@pytest.mark.parametrize("form", ["corrected", "reference"])
@pytest.mark.parametrize("base_loss", ["bce", "cross_entropy", "sampled_softmax", "gbce"])
def test_the_loss_of_a_batch_is_that_of_dllm2rec(windows, tmp_path, form, base_loss):
    model = student()
    settings = {"form": form, "base_loss": base_loss, "alpha": 0.7, "beta": 1.5, "lam": 0.6}
    trainer = trainer_of(model, tmp_path, distilled_positions="all", **settings)
    batch = batch_of(windows, trainer.data_collator)
    torch.manual_seed(4)
    loss = trainer.compute_loss(model.train(), dict(batch))
    labelled = batch["labels"] != -100
    targets = batch["labels"][labelled]
    torch.manual_seed(4)
    negatives = torch.randint(1, NUM_ITEMS + 1, (len(targets), 1))
    scores = model(batch["input_ids"], labels=batch["labels"], scored_positions=labelled).logits[:, 1:]
    by_hand = DLLM2RecLoss(**settings, top_k=TOP_K, propensity=propensity_scores(COUNTS[1:]))
    expected = by_hand(
        scores, targets - 1, negatives - 1, batch["teacher_items"][labelled] - 1, batch["teacher_distances"][labelled]
    ).loss
    torch.testing.assert_close(loss, expected)


def test_the_students_own_loss_is_the_base_by_default(windows, tmp_path):
    model = student(repeat_bias=True)
    trainer = trainer_of(model, tmp_path, lam=0.0)
    batch = batch_of(windows, trainer.data_collator)
    own = model.train()(batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), own)
    with_labels = trainer_of(model, tmp_path, lam=0.5).compute_loss(model, dict(batch))
    assert with_labels > own


@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
@pytest.mark.parametrize(
    ("attribute", "settings"),
    [
        ("_may_share_scores", {"alpha": 0.5}),
        ("_looks_up_scores", {"alpha": 0.0}),
        ("_looks_up_scores", {"alpha": 0.0, "embedding_weight": 0.5, "gamma_consistency": 0.0}),
    ],
)
def test_ways_that_read_fewer_scores_change_nothing(windows, tmp_path, share, attribute, settings):
    """One pass over the catalogue for both losses where most labels were asked about; or none but the student's own."""
    some = RuleLabels(asked=lambda history_ids, prefix_lengths: (7 * history_ids + prefix_lengths) % 10 < 10 * share)
    batch = batch_of(windows, DistillationCollator(some))
    found = []
    for switched_on in (True, False):
        model = student(repeat_bias=True, head_bias=True)
        trainer = trainer_of(model, tmp_path, some, distilled_positions="all", **settings)
        assert vars(trainer)[attribute]
        setattr(trainer, attribute, switched_on)
        torch.manual_seed(4)
        loss, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
        loss.backward()
        found.append((loss, outputs.loss, *(value.grad for value in model.parameters())))
    torch.testing.assert_close(*found)


def test_a_ranking_is_distilled_without_a_matrix_of_scores(windows, tmp_path):
    batch = batch_of(windows, DistillationCollator(RuleLabels()))
    model = student(repeat_bias=True)
    trainer = trainer_of(model, tmp_path, distilled_positions="all", alpha=0.0)
    _, outputs = trainer.compute_loss(model.train(), dict(batch), return_outputs=True)
    labels = int(batch["labels"].ne(-100).sum())
    assert outputs.logits.shape == (labels, 1 + TOP_K) and outputs.best_items.shape == (labels, TOP_K)
    scores = model.eval()(batch["input_ids"], scored_positions=batch["labels"].ne(-100)).logits
    assert torch.equal(scores.topk(TOP_K).indices, outputs.best_items)


def test_rows_without_teacher_labels_have_the_students_own_loss(windows, tmp_path):
    nobody = RuleLabels(asked=lambda history_ids, prefix_lengths: prefix_lengths > 1000)
    model = student()
    trainer = trainer_of(model, tmp_path, labels=nobody)
    batch = batch_of(windows, trainer.data_collator)
    loss = trainer.compute_loss(model.train(), dict(batch))
    torch.testing.assert_close(loss, model(batch["input_ids"], labels=batch["labels"]).loss)
    loss.backward()  # every parameter has a gradient, as distributed training needs
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("base_loss", ["student", "bce"])
def test_small_batches_accumulate_to_the_big_one(tmp_path, base_loss, monkeypatch):
    # negatives are drawn per batch: fixed ones make the two comparable
    monkeypatch.setattr(torch, "randint", lambda low, high, size, device=None: torch.full(size, 5))
    some = RuleLabels(asked=lambda history_ids, prefix_lengths: (history_ids + prefix_lengths) % 3 == 0)
    settings = {"base_loss": base_loss, "distilled_positions": "all", "alpha": 0.5}
    trained = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        trainer = trainer_of(
            student(), tmp_path, labels=some, per_device_train_batch_size=batch_size, max_steps=2,
            gradient_accumulation_steps=accumulation, **settings,
        )  # fmt: skip
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "ranking_loss" in entry]
        trained.append((trainer.model.state_dict(), [entry["ranking_loss"] for entry in logs]))
    for name, value in trained[0][0].items():
        torch.testing.assert_close(value, trained[1][0][name], rtol=1e-4, atol=1e-6)
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-4)


def test_a_sample_that_holds_every_item_gives_the_whole_catalogues_loss(windows, tmp_path):
    model = student()
    settings = {"base_loss": "bce", "alpha": 0.5}
    whole, sampled = (trainer_of(model, tmp_path, num_scored_items=number, **settings) for number in (None, 5000))
    batch = batch_of(windows, whole.data_collator)
    losses = []
    for trainer in (whole, sampled):
        torch.manual_seed(4)  # the negatives are drawn first
        losses.append(trainer.compute_loss(model.train(), dict(batch)))
    torch.testing.assert_close(*losses)
    few = trainer_of(model, tmp_path, num_scored_items=2, **settings)
    few.compute_loss(model.train(), dict(batch)).backward()


def test_an_online_teacher_gives_the_loss_of_its_labels(tmp_path):
    teacher, model = student(seed=7).eval(), student()
    online = trainer_of(model, tmp_path, teacher=teacher, kl_weight=0.0)
    batch = plain_batch()
    torch.manual_seed(4)
    loss = online.compute_loss(model.train(), dict(batch))
    items, distances = teacher.rank_items(batch["input_ids"], top_k=TOP_K, exclude_seen=False)
    newest = newest_only(batch["labels"] != -100).unsqueeze(-1)
    labelled = {"teacher_items": items.unsqueeze(1) * newest, "teacher_distances": distances.unsqueeze(1) * newest}
    from_labels = trainer_of(model, tmp_path)
    torch.manual_seed(4)
    torch.testing.assert_close(from_labels.compute_loss(model, batch | labelled), loss)


def test_an_equal_online_teacher_has_no_divergence(tmp_path):
    model = student()
    batch = plain_batch()
    own = model.train()(batch["input_ids"], labels=batch["labels"]).loss
    settings = {"lam": 0.0, "kl_weight": 2.0}
    same = trainer_of(model, tmp_path, teacher=copy.deepcopy(model).eval(), **settings)
    torch.testing.assert_close(same.compute_loss(model, dict(batch)), own)
    other = trainer_of(model, tmp_path, teacher=student(seed=7).eval(), **settings)
    assert other.compute_loss(model, dict(batch)) > own + 1e-4


def test_an_online_teacher_goes_with_a_base_loss_over_every_label(tmp_path):
    """Positions about which it was not asked have no divergence, whatever the scores."""
    model, teacher = student(), student(seed=7).eval()
    batch = plain_batch()
    settings = {"lam": 0.0, "base_loss": "cross_entropy", "teacher": teacher}
    alone, taught = (
        trainer_of(model, tmp_path, kl_weight=weight, **settings).compute_loss(model.train(), dict(batch))
        for weight in (0.0, 2.0)
    )
    own = model(batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(alone, own)
    from_newest = trainer_of(model, tmp_path, lam=0.0, kl_weight=2.0, teacher=teacher)
    torch.testing.assert_close(taught, from_newest.compute_loss(model, dict(batch)))


def test_ten_lines_distil_from_the_split(tmp_path):
    sequences = cyclic_sequences(num_users=24)
    labels = RuleLabels(split=sequences["train"])
    trainer = DistillationTrainer(
        student(),
        DistillationArguments(str(tmp_path), num_train_epochs=2, top_k=TOP_K, use_cpu=True, disable_tqdm=True),
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
        teacher_labels=labels,
    )
    assert trainer.train().training_loss > 0
    assert "eval_ndcg@10" in trainer.evaluate()
    trainer.save_model()
    assert SASRecForNextItem.from_pretrained(tmp_path).catalogue == sequences.catalogue


def test_policies_leave_labels_out(windows, tmp_path):
    model = student()
    batch = batch_of(windows, DistillationCollator(RuleLabels()))
    own = model.train()(batch["input_ids"], labels=batch["labels"]).loss
    none, every = (
        trainer_of(model, tmp_path, policy=GroundTruthErrorPolicy(threshold)).compute_loss(model, dict(batch))
        for threshold in (-1e9, 1e9)
    )
    torch.testing.assert_close(none, own)
    assert every > own


def test_the_embedding_loss_pulls_users_to_the_embedding_of_the_target(tmp_path):
    model = student()
    settings = {
        "embedding_weight": 1.0,
        "lam": 0.0,
        "max_steps": 200,
        "optim": "adamw_torch",
    }
    trainer = trainer_of(model, tmp_path, learning_rate=0.01, **settings)
    trainer.train()
    logged = [entry["embedding_loss"] for entry in trainer.state.log_history if "embedding_loss" in entry]
    assert np.mean(logged[-10:]) < 0.8 * np.mean(logged[:3])


def test_rank_gaps_weigh_the_labels(windows, tmp_path):
    model = student()
    batch = batch_of(windows, DistillationCollator(RuleLabels()))
    trainer = trainer_of(model, tmp_path, rank_gap_weighting=True, distilled_positions="all")
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
def test_the_divergence_from_an_online_teacher_by_hand(tmp_path, direction):
    model, teacher = student(), student(seed=7).eval()
    batch = plain_batch()
    settings = {"kl_weight": 2.0, "kl_temperature": 1.5, "kl_direction": direction, "lam": 0.0, "teacher": teacher}
    trainer = trainer_of(model, tmp_path, **settings)
    loss = trainer.compute_loss(model.train(), dict(batch))
    newest = newest_only(batch["labels"] != -100)
    output = model(batch["input_ids"], labels=batch["labels"], scored_positions=newest)
    with torch.no_grad():
        teacher_scores = teacher(batch["input_ids"]).logits
    divergence = distribution_loss(output.logits[:, 1:], teacher_scores[:, 1:], 1.5, direction)
    share = newest.sum() / (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss, output.loss + 2.0 * share * divergence.mean())


def test_rows_without_origins_are_refused():
    collator = DistillationCollator(RuleLabels())
    plain = TrainingWindows(cyclic_sequences(num_users=24)["train"], 6, windows="last")
    with pytest.raises(ValueError, match="expected those of TrainingWindows"):
        batch_of(plain, collator)


@pytest.mark.parametrize("use", ["input", "input_and_head"])
def test_item_embeddings_of_the_labels_are_added_and_folded_at_the_end(tmp_path, use):
    model = student(teacher_embedding_size=12, teacher_embedding_use=use)
    trainer = trainer_of(model, tmp_path, max_steps=2)
    assert torch.equal(model.model.item_embedding.teacher.table[1:], EMBEDDINGS[1:])
    trainer.train()
    assert model.config.teacher_embedding_size is None and model.model.item_embedding.teacher is None
    trainer.save_model()
    assert SASRecForNextItem.from_pretrained(tmp_path).num_parameters() == model.num_parameters()


def test_a_student_starts_from_the_principal_components_of_the_teachers_items(tmp_path):
    trainer = trainer_of(student(), tmp_path, initial_items="teacher", learning_rate=0.0)
    trainer.train()
    expected = pca_embeddings(EMBEDDINGS, 8)
    torch.testing.assert_close(trainer.model.model.item_embedding.weight.detach(), expected)


def test_a_student_of_an_online_teacher_starts_from_titles_and_cooccurrence(tmp_path):
    settings = {"initial_items": "titles_and_cooccurrence", "title_embeddings": EMBEDDINGS, "learning_rate": 0.0}
    trainer = trainer_of(student(), tmp_path, teacher=student(seed=1), **settings)
    trainer.train()
    rows = np.split(*training_sequences(SPLIT))[1:-1]
    cooccurrence = cooccurrence_embeddings(rows, NUM_ITEMS, 8, take_logarithm=False)
    directions = F.normalize(joint_item_embeddings(cooccurrence, EMBEDDINGS, COUNTS, 8), dim=1)
    expected = directions * cooccurrence.norm(dim=1, keepdim=True)
    torch.testing.assert_close(trainer.model.model.item_embedding.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_a_teacher_may_be_a_folder(tmp_path):
    student(seed=7).save_pretrained(tmp_path / "teacher")
    folder, model = str(tmp_path / "teacher"), student(seed=7)
    losses = [
        trainer_of(student(), tmp_path / "student", teacher=teacher, max_steps=2).train().training_loss
        for teacher in (folder, model, student(seed=8))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_run_that_meets_no_label_ends_with_its_first_epoch(tmp_path):
    nobody = RuleLabels(asked=lambda history_ids, prefix_lengths: prefix_lengths > 1000)
    trainer = trainer_of(student(), tmp_path, labels=nobody, max_steps=-1, num_train_epochs=5)
    with pytest.raises(ValueError, match="no batch of the first epoch had a teacher label"):
        trainer.train()
    assert trainer.state.global_step == 3  # 24 rows in batches of 8
    some = RuleLabels(asked=lambda history_ids, prefix_lengths: history_ids == 5)
    trainer_of(student(), tmp_path, labels=some, max_steps=-1, num_train_epochs=2).train()


ANY = "any"  # an online teacher


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": 1.0, "base_loss": "bce"}, "expected base_loss 'student'"),
        ({"kl_weight": 1.0, "kl_temperature": 2.0}, "kl_temperature is 2.0 and kl_direction 'forward' at every"),
        ({"policy": KLDivergencePolicy(0.1)}, "expected an online teacher"),
        ({"policy": "kl_divergence", "policy_threshold": 0.1}, "expected an online teacher"),
        ({"teacher": ANY, "distilled_positions": "all"}, "distilled_positions is 'all' with an online teacher"),
        ({"teacher": ANY, "num_scored_items": 10}, "num_scored_items is 10 with an online teacher"),
        ({"teacher": ANY, "embedding_weight": 1.0}, "embedding_weight is 1.0 with an online teacher"),
        ({"teacher": ANY, "initial_items": "teacher"}, "initial_items is teacher with an online teacher"),
        ({"form": "other"}, "form is 'other': expected one of"),
        ({"base_loss": "hinge"}, "base_loss is 'hinge': expected one of"),
        ({"policy": "best"}, "policy is 'best': expected one of"),
        ({"num_scored_items": 1}, "expected at least 1 and 2"),
        ({"kl_weight": -1.0}, "expected a finite number"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(student(), tmp_path, **settings)


@pytest.mark.parametrize("name", ["alpha", "embedding_weight", "kl_weight"])
def test_title_neighbours_alone_are_no_teacher_of_other_losses(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} 0.5.* without a teacher: expected 0 for all of them"):
        trainer_of(student(), tmp_path, teacher=None, title_neighbours=1.0, **{"alpha": 0.0, name: 0.5})


def test_labels_that_the_rows_do_not_meet_are_refused(windows, tmp_path):
    of_last = RuleLabels(positions="last")
    with pytest.raises(ValueError, match="which random windows hardly ever meet: expected windows='last'"):
        trainer_of(student(), tmp_path, labels=of_last, windows="random")
    with pytest.raises(ValueError, match="the labels are about row 29 and train_dataset has 24 rows"):
        trainer_of(student(), tmp_path, labels=RuleLabels(rows=30))
    with pytest.raises(ValueError, match="the labels are about 30 items and the model has 31"):
        trainer_of(student(num_items=31), tmp_path)


def test_one_teacher_is_expected(tmp_path):
    arguments = DistillationArguments(str(tmp_path), use_cpu=True)
    for given in ({}, {"teacher_labels": RuleLabels(), "teacher": student()}):
        with pytest.raises(ValueError, match=r"expected either teacher_labels=.* or teacher=model"):
            DistillationTrainer(student(), arguments, train_dataset=SPLIT, eval_dataset=SPLIT, **given)


def test_labels_are_loaded_by_the_caller_who_knows_the_data(tmp_path):
    with pytest.raises(TypeError, match=r"teacher_labels is the path .*: expected labels, TeacherLabels.load\("):
        DistillationTrainer(student(), DistillationArguments(str(tmp_path)), teacher_labels=tmp_path)


def test_plain_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args is a TrainingArguments: expected DistillationArguments"):
        DistillationTrainer(student(), TrainingArguments(str(tmp_path)), teacher_labels=RuleLabels())


def test_batches_without_labels_are_refused(tmp_path):
    model = student()
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(ValueError, match="the batch has no teacher_items"):
        trainer.compute_loss(model.train(), plain_batch())


SHARED = {"loss_type": "sampled_softmax", "num_negatives": 16, "head_bias": True}


@pytest.mark.parametrize("settings", [{}, SHARED, SHARED | {"repeat_bias": True}])
def test_an_online_teacher_is_distilled_at_every_position(tmp_path, settings):
    """A student that nothing but its teacher teaches comes to score as the teacher does."""
    teacher, model = student(seed=7), student(seed=1, **settings)
    torch.nn.init.normal_(teacher.model.item_embedding.weight)  # far from any untrained student
    trainer = trainer_of(
        model, tmp_path, teacher=teacher, distilled_positions="all", kl_weight=50.0, lam=0.0, max_steps=150,
        optim="adamw_torch", learning_rate=0.02,
    )  # fmt: skip
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "kl_loss" in entry]
    assert history[-1]["kl_loss"] < 0.3 * history[0]["kl_loss"]
    first, last = history[0], history[-1]
    assert last["loss"] == pytest.approx(last["base_loss"] + 50 * last["kl_loss"], rel=1e-4)
    assert first["base_loss"] > 0 and "ranking_loss" not in first
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_the_divergence_at_every_position_is_that_of_whole_distributions(tmp_path):
    teacher, model = student(seed=7), student(seed=1)
    trainer = trainer_of(
        model, tmp_path, teacher=EnsembleTeacher([teacher], [1.0]), distilled_positions="all", kl_weight=2.0,
        lam=0.0,
    )  # fmt: skip
    batch = plain_batch()
    labelled = batch["labels"].ne(-100)
    own = model.train()(batch["input_ids"], labels=batch["labels"], scored_positions=labelled)
    wanted = teacher.eval()(batch["input_ids"], scored_positions=labelled).logits[:, 1:]
    divergence = distribution_loss(own.logits[:, 1:], wanted).mean()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), own.loss + 2 * divergence)


def test_stored_labels_are_distilled_as_distributions_where_there_are_any(windows, tmp_path):
    asked_about = RuleLabels(asked=lambda history_ids, prefix_lengths: prefix_lengths % 2 == 0)
    losses = []
    for labels in (asked_about, RuleLabels(asked=lambda history_ids, prefix_lengths: prefix_lengths < 0)):
        model = student(seed=1)
        trainer = trainer_of(model, tmp_path, labels=labels, distilled_positions="all", kl_weight=2.0, lam=0.0)
        batch = batch_of(windows, trainer.data_collator)
        losses.append(trainer.compute_loss(model.train(), dict(batch)).item())
    own = model(batch["input_ids"], labels=batch["labels"]).loss.item()
    assert losses[1] == pytest.approx(own) and losses[0] > own + 0.1
    trainer = trainer_of(student(seed=1), tmp_path, distilled_positions="all", kl_weight=2.0, lam=0.5)
    trainer.train()  # rankings and distributions of the same labels
    assert {"ranking_loss", "kl_loss", "base_loss"} <= trainer.state.log_history[0].keys()


def test_members_that_are_asked_and_labels_teach_together(tmp_path):
    teacher = EnsembleTeacher([student(seed=7), LabelScores(RuleLabels())], [1.0, 0.5])
    trainer = trainer_of(student(seed=1), tmp_path, teacher=teacher, distilled_positions="all", kl_weight=1.0, lam=0.0)
    trainer.train()
    assert trainer.state.log_history[0]["kl_loss"] > 0
    with pytest.raises(ValueError, match="an ensemble of online teachers and labels: expected 'all'"):
        trainer_of(student(seed=1), tmp_path, teacher=teacher, kl_weight=1.0, lam=0.0)
    short = student(seed=7, max_length=4)
    with pytest.raises(ValueError, match=r"reads 4 items .* and the student 6: expected at least as many"):
        trainer_of(student(seed=1), tmp_path, teacher=short, distilled_positions="all", kl_weight=1.0, lam=0.0)
    with pytest.raises(ValueError, match="ensemble is about 31 items and the student about 30"):
        trainer_of(
            student(seed=1), tmp_path, teacher=EnsembleTeacher([student(num_items=31)], [1.0]),
            distilled_positions="all", kl_weight=1.0, lam=0.0,
        )  # fmt: skip
