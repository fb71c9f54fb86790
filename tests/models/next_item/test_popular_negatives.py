"""Negatives are drawn by the probabilities that the logQ correction uses, from counts as they are now."""

import copy

import pytest
import torch

from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.models.next_item import encoder_for_next_item, popular_negatives
from hf_ilora.models.next_item.popular_negatives import RESOLUTION, draw_items, ends_of_shares, log_probabilities

COUNTS = torch.tensor([9.0, 0, 30, 1, 7, 0, 2, 12, 0])  # the one of padding must not count
NUM_ITEMS = len(COUNTS) - 1
POWERS = [0.5, 1.0, 2.0]


def naive_probabilities(counts: torch.Tensor, power: float) -> torch.Tensor:
    weights = [count**power if count > 0 else 0.0 for count in counts.tolist()]
    return torch.tensor([weight / sum(weights) for weight in weights], dtype=torch.float64)


def without_padding(counts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1), counts[1:]])


def small_model(**settings) -> SASRecForNextItem:
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 8, "num_hidden_layers": 1, "max_length": 4}
    settings = {"loss_type": "sampled_softmax", "popularity_power": 1.0, "num_negatives": 4000} | settings
    return SASRecForNextItem(SASRecConfig(**sizes, **settings))


def drawn_by(model: SASRecForNextItem) -> torch.Tensor:
    """The ids that a model draws as negatives, (negatives,)."""
    return model._draw_negatives(torch.tensor([1, 2]))[0].flatten()


@pytest.mark.parametrize("power", POWERS)
def test_shares_and_their_logarithms_are_the_naive_probabilities(power):
    ends = ends_of_shares(without_padding(COUNTS), power)
    expected = naive_probabilities(without_padding(COUNTS), power)
    assert ends[0] == 0 and ends[-1] == RESOLUTION
    torch.testing.assert_close(ends.diff().double() / RESOLUTION, expected[1:], rtol=1e-12, atol=0)
    items = torch.arange(1, NUM_ITEMS + 1).view(2, -1)
    torch.testing.assert_close(log_probabilities(ends, items), expected[items].log().float(), rtol=1e-6, atol=0)


def test_shares_of_a_large_skewed_catalogue_are_the_naive_probabilities():
    """The counts differ by a factor of a million; sums in float32 would lose the rare items."""
    counts = (1e6 / torch.arange(1, 100_001)).ceil()
    counts = torch.cat([torch.zeros(1), counts[torch.randperm(100_000, generator=torch.Generator().manual_seed(0))]])
    expected = naive_probabilities(counts, 1.0)
    found = log_probabilities(ends_of_shares(counts, 1.0), torch.arange(1, 100_001))
    torch.testing.assert_close(found, expected[1:].log().float(), rtol=1e-6, atol=0)


def chi_square(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic of draws against probabilities, over the items that can be drawn."""
    possible = probabilities > 0
    observed = drawn.bincount(minlength=len(probabilities))[possible]
    expected = len(drawn) * probabilities[possible]
    return ((observed - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("power", POWERS)
def test_draws_follow_the_probabilities(power):
    torch.manual_seed(0)
    drawn = draw_items(ends_of_shares(without_padding(COUNTS), power), (200, 1000)).flatten()
    assert set(drawn.tolist()) == {2, 3, 4, 6, 7}  # neither padding nor items without counts
    # Five items: 4 degrees of freedom, whose statistic exceeds 23.5 once in ten thousand times.
    assert chi_square(drawn, naive_probabilities(without_padding(COUNTS), power)) < 23.5
    assert chi_square(drawn, naive_probabilities(without_padding(COUNTS), power * 1.1)) > 100


def test_draws_of_a_million_items_follow_the_probabilities():
    """In a hundred groups of neighbouring items, since most single items are drawn less than once."""
    torch.manual_seed(0)
    counts = torch.cat([torch.zeros(1), torch.randint(0, 50, (10**6,)).float()])
    weights = counts.double() ** 0.5
    of_groups = weights[1:].view(100, -1).sum(1) / weights.sum()
    drawn = draw_items(ends_of_shares(counts, 0.5), (10**6,))
    assert counts[drawn].min() > 0
    # 99 degrees of freedom, whose statistic exceeds 161 once in ten thousand times.
    assert chi_square((drawn - 1) // 10**4, of_groups) < 161


@pytest.mark.parametrize("sharing", ["batch", "position"])
def test_neighbouring_integers_belong_to_neighbouring_items_at_the_ends(monkeypatch, sharing):
    """The smallest and the largest integer are items with counts, also where the last ids have none."""
    model = small_model(negative_sharing=sharing, num_negatives=4)
    model.set_item_counts(COUNTS)
    ends = ends_of_shares(without_padding(COUNTS), 1.0)
    integers = torch.tensor([0, int(ends[2]) - 1, int(ends[2]), RESOLUTION - 1])
    shape = (2, 4) if sharing == "position" else (4,)
    drawn = integers.expand(shape).contiguous()
    monkeypatch.setattr(popular_negatives.torch, "randint", lambda high, size, device: drawn)
    negatives, log_q = model._draw_negatives(torch.tensor([1, 2]))
    assert negatives.tolist() == torch.tensor([2, 2, 3, 7]).expand(shape).tolist()
    expected = naive_probabilities(without_padding(COUNTS), 1.0)[negatives]
    torch.testing.assert_close(log_q, expected.log().float())


@pytest.fixture
def computations(monkeypatch):
    """How often shares were computed, as the length of a list."""
    found = []

    def counted(*arguments):
        found.append(arguments)
        return ends_of_shares(*arguments)

    monkeypatch.setattr(encoder_for_next_item, "ends_of_shares", counted)
    return found


def only(item: int) -> torch.Tensor:
    counts = torch.zeros(NUM_ITEMS + 1)
    counts[item] = 3
    return counts


def test_shares_are_kept_while_the_counts_stay(computations):
    model = small_model()
    model.set_item_counts(only(3))
    for _ in range(3):
        assert drawn_by(model).unique().tolist() == [3]
    assert len(computations) == 1


def test_every_change_of_the_counts_changes_what_is_drawn(tmp_path):
    model = small_model()
    for change, item in (
        (lambda: model.set_item_counts(only(4)), 4),
        (lambda: model.load_state_dict(model.state_dict() | {"item_counts": only(5)}), 5),
        (lambda: model.load_state_dict(model.state_dict() | {"item_counts": only(6)}, assign=True), 6),
        (lambda: model.item_counts.copy_(only(7)), 7),
        (lambda: setattr(model, "item_counts", only(8)), 8),
        (lambda: model.double(), 8),
        (lambda: model.to(torch.bfloat16), 8),
    ):
        change()
        assert drawn_by(model).unique().tolist() == [item]
    model.float().save_pretrained(tmp_path)
    assert drawn_by(SASRecForNextItem.from_pretrained(tmp_path)).unique().tolist() == [8]
    twin = copy.deepcopy(model)
    twin.set_item_counts(only(2))
    assert drawn_by(twin).unique().tolist() == [2] and drawn_by(model).unique().tolist() == [8]


def test_tensors_of_inference_mode_give_draws_too():
    with torch.inference_mode():
        model = small_model()
        model.set_item_counts(only(4))
        assert drawn_by(model).unique().tolist() == [4]
        model.item_counts.copy_(only(5))
        assert drawn_by(model).unique().tolist() == [5]


def test_a_model_that_goes_to_the_meta_device_and_back_draws_by_the_counts_that_it_loads():
    """As FSDP2 does where only the first process reads the weights."""
    model = small_model()
    model.set_item_counts(only(4))
    state = model.state_dict() | {"item_counts": only(5)}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert drawn_by(model).unique().tolist() == [5]


@pytest.mark.slow
def test_a_graph_draws_by_the_counts_too(computations):
    """Set, moved without a change, copied, and loaded; kept shares are used as long as the counts stay."""
    model = small_model(num_negatives=64)

    def drawn_in_graph(drawing):
        torch.compiler.reset()
        return torch.compile(drawn_by, fullgraph=True, backend="aot_eager")(drawing).unique().tolist()

    model.set_item_counts(only(4))
    assert drawn_in_graph(model) == [4]
    assert drawn_in_graph(model.to("cpu")) == [4] and drawn_in_graph(model.bfloat16()) == [4]
    assert drawn_in_graph(copy.deepcopy(model)) == [4] and len(computations) == 1
    model.load_state_dict(model.state_dict() | {"item_counts": only(5)})
    assert drawn_in_graph(model) == [5]


@pytest.mark.parametrize(
    ("counts", "error"),
    [
        (torch.zeros(NUM_ITEMS + 1), "popularity_power needs item counts"),
        (torch.full((NUM_ITEMS + 1,), torch.inf), "item_counts have numbers that are not finite in torch.float32"),
    ],
)
def test_counts_that_say_nothing_are_refused(counts, error):
    with pytest.raises(ValueError, match=error):
        small_model().set_item_counts(counts)


def test_counts_are_not_broadcast_in_every_step():
    assert small_model()._ddp_params_and_buffers_to_ignore == ["item_counts"]
    assert small_model(popularity_power=0.0)._ddp_params_and_buffers_to_ignore == []
