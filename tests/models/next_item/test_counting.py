"""The recommenders that count, against dictionaries and loops."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
import torch

from hf_ilora import (
    Catalogue,
    PopularityConfig,
    PopularityForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)

NUM_ITEMS = 9
ROWS = [[1, 2, 3, 2], [3, 1, 2, 5, 6], [7], [4, 4, 1]]
LEFT = torch.tensor([[0, 0, 3, 1], [5, 2, 1, 3], [0, 0, 0, 8]])
RIGHT = torch.tensor([[3, 1, 0, 0], [5, 2, 1, 3], [8, 0, 0, 0]])
SETTINGS = {
    "max_gap": 3,
    "gap_decay": 0.5,
    "backward_weight": 0.25,
    "source_power": 0.5,
    "target_power": 0.3,
    "max_length": 3,
    "history_decay": 0.6,
    "popularity_weight": 0.01,
}


def fitted(rows=ROWS, targets_only=False, **settings):
    config = TransitionCountsConfig(num_items=NUM_ITEMS, **(SETTINGS | settings))
    return TransitionCountsForNextItem.fit(rows, config, targets_only=targets_only)


def naive_scores(rows, histories, max_gap, gap_decay, backward_weight, source_power, target_power, max_length, **rest):
    forward = defaultdict(float)
    for row in rows:
        for later in range(len(row)):
            for gap in range(1, max_gap + 1):
                if later - gap >= 0:
                    forward[row[later - gap], row[later]] += gap_decay ** (gap - 1)
    counts = defaultdict(float, forward)
    for (first, second), count in forward.items():
        counts[second, first] += backward_weight * count
    popularity = Counter(item for row in rows for item in row)
    totals = Counter()
    for (first, _), count in counts.items():
        totals[first] += count
    scores = np.zeros((len(histories), NUM_ITEMS + 1))
    for user, history in enumerate(histories):
        for item in range(1, NUM_ITEMS + 1):
            scores[user, item] = rest["popularity_weight"] * popularity[item] / max(popularity.values())
            for age, source in enumerate(reversed(history[-max_length:])):
                if counts[source, item]:
                    weight = counts[source, item] / totals[source] ** source_power / popularity[item] ** target_power
                    scores[user, item] += rest["history_decay"] ** age * weight
    scores[:, 0] = -np.inf
    return torch.tensor(scores, dtype=torch.float32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"backward_weight": 0.0, "source_power": 0.0, "target_power": 0.0}, {"max_gap": 1, "max_length": 1}],
)
def test_scores_equal_counting_with_loops(settings):
    expected = naive_scores(ROWS, [[3, 1], [5, 2, 1, 3], [8]], **(SETTINGS | settings))
    torch.testing.assert_close(fitted(**settings)(LEFT).logits, expected)
    # Negative control: other settings give other scores.
    assert not torch.allclose(fitted(history_decay=0.1, max_gap=2)(LEFT).logits[:, 1:], expected[:, 1:])


def test_a_transition_weighs_what_the_formula_says():
    model = fitted([[1, 2, 3]], backward_weight=0, source_power=0, target_power=0, popularity_weight=0)
    scores = model(torch.tensor([[1], [2]])).logits
    assert scores[0, 1:4].tolist() == [0, 1, 0.5]  # item 2 one step later, item 3 two steps later
    assert scores[1, 1:4].tolist() == [0, 0, 1]


def test_targets_only_counts_what_whole_rows_count_when_rows_are_all_prefixes():
    whole = [[1, 2, 3, 2], [3, 1, 2, 5, 6]]
    prefixes = [row[:end] for row in whole for end in range(2, len(row) + 1)]
    settings = {"target_power": 0.0, "popularity_weight": 0.0}
    expected = fitted(whole, **settings)(LEFT).logits
    torch.testing.assert_close(fitted(prefixes, targets_only=True, **settings)(LEFT).logits, expected)
    assert not torch.allclose(fitted(prefixes, **settings)(LEFT).logits[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("model", [fitted(), PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS))])
def test_padding_side_mask_and_batch_do_not_change_scores(model):
    expected = model(LEFT).logits
    assert expected.shape == (3, NUM_ITEMS + 1)
    assert (expected[:, 0] == -torch.inf).all()
    assert expected[:, 1:].isfinite().all()
    torch.testing.assert_close(model(RIGHT).logits, expected)
    garbage = torch.where(LEFT == 0, 6, LEFT)
    torch.testing.assert_close(model(garbage, attention_mask=(LEFT != 0).long()).logits, expected)
    torch.testing.assert_close(torch.cat([model(row[None]).logits for row in LEFT]), expected)


def test_popularity_scores_are_counts():
    model = PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS))
    assert model(LEFT).logits[0, 1:].tolist() == [3, 3, 2, 2, 1, 1, 1, 0, 0]
    counted = PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS), targets_only=True)
    assert counted(LEFT).logits[0, 1:].tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0]


def test_items_without_transitions_are_ordered_by_popularity():
    scores = fitted()(torch.tensor([[9]])).logits[0, 1:]  # item 9 never occurs
    assert scores.tolist() == pytest.approx([0.01, 0.01, 0.02 / 3, 0.02 / 3, 0.01 / 3, 0.01 / 3, 0.01 / 3, 0, 0])


@pytest.mark.parametrize("kind", ["popularity", "transition_counts"])
def test_saved_model_scores_as_before_and_another_does_not(tmp_path, kind):
    if kind == "popularity":
        fit, rows = PopularityForNextItem.fit, [ROWS, ROWS[:1]]
        model, other = (fit(some, PopularityConfig(num_items=NUM_ITEMS)) for some in rows)
    else:
        model, other = fitted(), fitted(ROWS[:1])
    ids = list(range(1, NUM_ITEMS + 1))
    model.catalogue = Catalogue(pa.table({"item_id": ids, "raw_id": ids, "title": [str(i) for i in ids]}))
    model.save_pretrained(tmp_path / "model")
    other.save_pretrained(tmp_path / "other")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(LEFT).logits, model(LEFT).logits)
    assert loaded.catalogue == model.catalogue
    assert loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    assert not torch.equal(type(model).from_pretrained(tmp_path / "other")(LEFT).logits, model(LEFT).logits)


def test_recommend_leaves_out_seen_items_unless_asked():
    model = fitted()
    item_ids, scores = model.recommend(LEFT, top_k=5)
    assert item_ids.shape == scores.shape == (3, 5)
    for row, history in zip(item_ids.tolist(), LEFT.tolist(), strict=True):
        assert not set(row) & set(history)
    assert (scores.diff(dim=1) <= 0).all()
    everything, _ = model.recommend(LEFT, top_k=NUM_ITEMS, exclude_seen=False)
    assert everything.sort(dim=1).values.tolist() == [list(range(1, NUM_ITEMS + 1))] * 3


def test_scores_of_counts_are_log_shares_and_distances_their_negatives():
    model = PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS))
    item_ids, distances = model.rank_items(LEFT, top_k=4)
    # 13 interactions: items 1 and 2 occur three times, 3 and 4 twice, 5, 6 and 7 once, 8 and 9 never
    assert item_ids[0, :2].tolist() == [2, 4]
    torch.testing.assert_close(distances[0], -torch.tensor([3, 2, 1, 1]).div(13).log())
    recommended, scores = model.recommend(LEFT, top_k=4)
    assert torch.equal(recommended, item_ids) and torch.equal(scores, -distances)
    _, every_distance = model.rank_items(LEFT, top_k=NUM_ITEMS, exclude_seen=False)
    assert torch.isfinite(every_distance).all() and (every_distance.diff(dim=1) >= 0).all()
    item_ids, distances = fitted().rank_items(LEFT, top_k=3)
    scores = naive_scores(ROWS, [[3, 1], [5, 2, 1, 3], [8]], **SETTINGS)
    shares = scores / scores[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(distances, -shares.gather(1, item_ids).log(), rtol=1e-4, atol=1e-5)


def test_recommend_reads_long_histories_whole_for_what_was_seen():
    long_history = torch.tensor([[1, 2, 3, 4, 5, 6]])  # max_length is 3
    item_ids, _ = fitted().recommend(long_history, top_k=3)
    assert sorted(item_ids[0].tolist()) == [7, 8, 9]


@pytest.mark.parametrize("ids", [[[NUM_ITEMS + 1]], [[-1]]])
@pytest.mark.parametrize("model", [fitted(), PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS))])
def test_ids_outside_the_catalogue_are_refused(model, ids):
    with pytest.raises(ValueError, match=r"expected ids 1\.\.9"):
        model(torch.tensor(ids))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no training rows"),
        ([[1], []], "row 1 is empty"),
        ([[0, 1]], "item 0"),
        ([[10]], "item 10"),
        ([3, 1], r"row 0 has shape \(\): expected the item ids of a history"),
        (7, "not rows of item ids .* expected one per history"),
        ("B07", "not rows of item ids"),
    ],
)
def test_bad_training_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        fitted(rows)
    with pytest.raises(ValueError, match=message):
        PopularityForNextItem.fit(rows, PopularityConfig(num_items=NUM_ITEMS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_gap", 0),
        ("max_length", 0),
        ("gap_decay", 0.0),
        ("history_decay", 1.5),
        ("backward_weight", -0.1),
        ("source_power", 2.0),
        ("target_power", -1.0),
        ("popularity_weight", -1.0),
        ("num_transitions", -1),
        ("num_items", 0),
    ],
)
def test_settings_out_of_range_name_the_field(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        TransitionCountsConfig(**({"num_items": NUM_ITEMS} | {name: value}))


def test_rows_of_single_items_leave_no_transitions():
    model = fitted([[1], [1], [2]])
    assert model.config.num_transitions == 0
    assert model(LEFT).logits[0, 1:3].tolist() == pytest.approx([0.01, 0.005])


def test_a_million_items_cost_only_the_pairs_that_occur():
    generator = np.random.default_rng(0)
    num_items = 1_000_000
    rows = [generator.integers(1, num_items + 1, size=10) for _ in range(2_000)]
    model = TransitionCountsForNextItem.fit(rows, TransitionCountsConfig(num_items=num_items, backward_weight=0.0))
    assert model.config.num_transitions < 2_000 * 10 * 5
    item_ids, _ = model.recommend(torch.from_numpy(rows[0][None, :-1]), top_k=1)
    assert item_ids[0, 0] == rows[0][-1]
