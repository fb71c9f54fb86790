"""Ensembles of teachers against the scores that their members give one history at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    EnsembleTeacher,
    GRU4RecConfig,
    GRU4RecForNextItem,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    TitleSimilarity,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.distillation.ensemble_members import LabelScores, LogCounts, Positions, RecommenderScores
from hf_ilora.models.next_item.next_item_losses import Columns

NUM_ITEMS = 9
ROWS = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6], [5, 3, 5, 0, 0]])  # padding on either side
ITEMS = torch.tensor([4, 1, 4, 8, 6, 2])


def prefixes():
    """Index in the flattened batch, and the history up to there, of every real position."""
    for index, item in enumerate(ROWS.flatten().tolist()):
        if item:
            row = ROWS[index // ROWS.shape[1], : index % ROWS.shape[1] + 1]
            yield index, row[row > 0]


def sasrec(**settings):
    torch.manual_seed(3)
    # Counted from the oldest item, a place is the same in a row and in its prefix.
    settings |= {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": 5, "position_alignment": "oldest"}
    model = SASRecForNextItem(SASRecConfig(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def counts():
    config = TransitionCountsConfig(num_items=NUM_ITEMS, max_length=3, history_decay=0.5, popularity_weight=0.01)
    return TransitionCountsForNextItem.fit([[1, 2, 3, 4], [4, 5, 1, 9, 3], [3, 1, 5, 6]], config)


def popularity():
    return PopularityForNextItem.fit([[1, 2, 3], [1, 4, 1]], PopularityConfig(num_items=NUM_ITEMS))


def titles():
    return torch.randn(NUM_ITEMS + 1, 4, generator=torch.Generator().manual_seed(5))


def title_scores(history):
    table = F.normalize(titles(), dim=1)
    weights = 0.6 ** torch.arange(len(history) - 1, -1, -1).float()
    user = F.normalize((weights.unsqueeze(1) * table[history]).sum(0), dim=0)
    return table @ user


MEMBERS = {
    "sasrec": (lambda: RecommenderScores(sasrec()), lambda history: sasrec()(history[None]).logits[0]),
    "cosine": (
        lambda: RecommenderScores(
            sasrec(score_temperature=0.1, head_bias=True, repeat_bias=True, loss_type="sampled_softmax")
        ),
        lambda history: sasrec(
            score_temperature=0.1, head_bias=True, repeat_bias=True, loss_type="sampled_softmax"
        )(history[None]).logits[0],
    ),
    "counts": (lambda: LogCounts(counts()), lambda history: (counts()(history[None]).logits[0] + 0.01).log()),
    "popularity": (
        lambda: LogCounts(popularity(), floor=1.0), lambda history: (popularity()(history[None]).logits[0] + 1).log()
    ),
    "titles": (lambda: TitleSimilarity(titles()), title_scores),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_says_at_every_position_what_it_says_about_its_prefix(name):
    build, expected = MEMBERS[name]
    places, histories = zip(*prefixes(), strict=True)
    with torch.no_grad():
        opinion = build().at(Positions.of_batch(ROWS, torch.tensor(places)))
        wanted = torch.stack([expected(history) for history in histories])
        scores = opinion.about(ITEMS, Columns(ITEMS, NUM_ITEMS))
        torch.testing.assert_close(scores(slice(0, 4)), wanted[:4, ITEMS], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores(slice(4, None)), wanted[4:, ITEMS], rtol=1e-4, atol=1e-5)
        targets = torch.arange(len(places)) % NUM_ITEMS + 1
        found = opinion.of_targets(targets)
    torch.testing.assert_close(found, wanted.gather(1, targets.unsqueeze(1)).squeeze(1), rtol=1e-4, atol=1e-5)


def test_gru4rec_is_a_member_too():
    model = GRU4RecForNextItem(GRU4RecConfig(num_items=NUM_ITEMS, hidden_size=8, max_length=5)).eval()
    teacher = EnsembleTeacher([model], [1.0])
    torch.testing.assert_close(teacher.next_item_scores(ROWS)[:, 1:], model(ROWS).logits[:, 1:].detach())


def test_an_ensemble_is_the_weighted_sum_of_its_members():
    teacher = EnsembleTeacher([sasrec(), TitleSimilarity(titles()), counts()], [1.0, 3.0, 0.5], temperature=2.0)
    scores = teacher.next_item_scores(ROWS)
    for row, history in zip(scores, [ROWS[0], ROWS[1, 2:], ROWS[2, :3]], strict=True):
        wanted = sasrec()(history[None]).logits[0] + 3 * title_scores(history)
        wanted = (wanted + 0.5 * (counts()(history[None]).logits[0] + 0.01).log()) / 2
        torch.testing.assert_close(row[1:], wanted[1:].detach(), rtol=1e-4, atol=1e-5)
    assert scores[:, 0].isneginf().all()
    items, distances = teacher.rank_items(ROWS, top_k=3)
    assert not (items.unsqueeze(2) == ROWS.unsqueeze(1)).any(), "seen items are left out"
    torch.testing.assert_close(-distances, scores.log_softmax(1).gather(1, items))


def test_its_soft_target_has_the_scores_of_what_competes():
    teacher = EnsembleTeacher([sasrec(), counts()], [1.0, 0.5])
    places, histories = zip(*prefixes(), strict=True)
    targets = torch.arange(len(places)) % NUM_ITEMS + 1
    positions = Positions.of_batch(ROWS, torch.tensor(places))
    wanted = torch.stack([teacher.next_item_scores(history[None])[0] for history in histories])
    of_items, of_targets = teacher.soft_target(positions, targets, ITEMS, 1.0).scores(slice(0, None))
    torch.testing.assert_close(of_items, wanted[:, ITEMS], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_targets, wanted.gather(1, targets.unsqueeze(1)), rtol=1e-4, atol=1e-5)
    of_all, none = teacher.soft_target(positions, targets, None, 1.0).scores(slice(2, 5))
    torch.testing.assert_close(of_all, wanted[2:5, 1:], rtol=1e-4, atol=1e-5)
    assert none is None


def test_stored_labels_spread_the_rest_of_the_mass():
    items = torch.tensor([[4, 7], [0, 0]])
    distances = -torch.tensor([[0.5, 0.3], [1.0, 1.0]]).log()
    member = LabelScores.__new__(LabelScores)
    torch.nn.Module.__init__(member)
    member.num_items = NUM_ITEMS
    opinion = member.at(Positions(ROWS, ROWS.ne(0).sum(1), torch.tensor([4, 9]), (items, distances)))
    found = opinion.about(torch.arange(1, 10), Columns(torch.arange(1, 10), NUM_ITEMS))(slice(0, 2))
    torch.testing.assert_close(found[0].exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(found[0, [3, 6, 0]].exp(), torch.tensor([0.5, 0.3, 0.2 / 7]))
    assert not found[1].any(), "without a label there is no opinion"
    torch.testing.assert_close(opinion.of_targets(torch.tensor([7, 3])), torch.tensor([math.log(0.3), 0.0]))


def test_wrong_ensembles_are_refused():
    with pytest.raises(ValueError, match="2 members and 1 weights"):
        EnsembleTeacher([sasrec(), counts()], [1.0])
    with pytest.raises(ValueError, match=r"a weight is -1\.0: expected finite numbers, at least 0"):
        EnsembleTeacher([sasrec(), counts()], [1.0, -1.0])
    with pytest.raises(ValueError, match="all weights are 0"):
        EnsembleTeacher([counts()], [0.0])
    with pytest.raises(ValueError, match="catalogues of 9 and 12 items: expected the same"):
        EnsembleTeacher([counts(), TitleSimilarity(torch.randn(13, 4))], [1.0, 1.0])
    with pytest.raises(ValueError, match="temperature is 0"):
        EnsembleTeacher([counts()], [1.0], temperature=0)
    with pytest.raises(ValueError, match="member of the ensemble is a CaserForNextItem"):
        EnsembleTeacher([CaserForNextItem(CaserConfig(num_items=NUM_ITEMS))], [1.0])
    with pytest.raises(ValueError, match="item 4 contains NaN"):
        TitleSimilarity(titles().index_fill(0, torch.tensor([4]), math.nan))
    with pytest.raises(ValueError, match="all title embeddings are zero"):
        TitleSimilarity(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        TitleSimilarity(titles(), decay=1.5)
    with pytest.raises(ValueError, match="input_ids have 7 columns: expected at most 5"):
        EnsembleTeacher([sasrec()], [1.0]).next_item_scores(torch.ones(2, 7, dtype=torch.int64))
