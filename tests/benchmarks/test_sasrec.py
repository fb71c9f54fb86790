"""The benchmark of SASRec compares programs that compute the same model, and bounds the memory of a large catalogue."""

import pytest
import torch

from benchmarks import sasrec
from benchmarks.measuring import in_own_process
from hf_ilora import SASRecConfig, SASRecForNextItem
from tests.synthetic import cyclic_sequences


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=40)


@pytest.fixture
def arguments(tmp_path):
    settings = {"threads": 1, "rounds": 2, "epochs": 2, "batch_size": 16, "max_length": 8, "million_items": 0}
    return sasrec.SASRecBenchmarkArguments("unused", str(tmp_path), **settings)


def test_the_model_by_hand_is_the_one_of_the_package(sequences):
    config = SASRecConfig(num_items=sequences.num_items, max_length=8, initializer_range=0.5)
    ours, by_hand = SASRecForNextItem(config).eval(), sasrec.PlainSASRec(config).eval()
    windows = sasrec.TrainingWindows(sequences["train"], 8)
    batch = sasrec.NextItemCollator()([windows[row] for row in range(5)])
    batch["input_ids"][0, 5:], batch["labels"][0, 5:] = 0, -100  # a shorter history
    before = by_hand.loss(**batch).item()
    with torch.no_grad():
        for parameter, other in zip(by_hand.parameters(), ours.parameters(), strict=True):
            parameter.copy_(other)
    assert by_hand.loss(**batch).item() == pytest.approx(ours(**batch).loss.item(), rel=1e-5)
    assert before != pytest.approx(ours(**batch).loss.item(), rel=1e-3)


def test_the_model_by_hand_has_the_decay_of_the_package(sequences):
    config = SASRecConfig(num_items=sequences.num_items, max_length=8, initializer_range=0.5, attention_decay=True)
    ours, by_hand = SASRecForNextItem(config).eval(), sasrec.PlainSASRec(config).eval()
    decays = [layer.attention.log_decay for layer in ours.model.layers]
    others = [parameter for parameter in ours.parameters() if all(parameter is not decay for decay in decays)]
    with torch.no_grad():
        own_decays = list(by_hand.decays)
        own = [parameter for parameter in by_hand.parameters() if all(parameter is not each for each in own_decays)]
        for parameter, other in zip(own + own_decays, others + decays, strict=True):
            parameter.copy_(other.view_as(parameter))
        input_ids = torch.tensor([[3, 1, 4, 1, 5]])
        expected = ours(input_ids).logits[:, 1:]
        torch.testing.assert_close((by_hand(input_ids)[:, -1] @ by_hand.items.weight.t())[:, 1:], expected)
        own_decays[0].add_(1)
        assert not torch.allclose((by_hand(input_ids)[:, -1] @ by_hand.items.weight.t())[:, 1:], expected)


def test_ranks_by_hand_are_those_of_the_package(sequences):
    config = SASRecConfig(num_items=sequences.num_items, max_length=8, initializer_range=0.5)
    ours, by_hand = SASRecForNextItem(config).eval(), sasrec.PlainSASRec(config).eval()
    with torch.no_grad():
        for parameter, other in zip(by_hand.parameters(), ours.parameters(), strict=True):
            parameter.copy_(other)
        found = sasrec.ranks_by_hand(by_hand, sasrec.EvaluationRows(sequences["test"], config.num_items), batch_size=16)
    expected = sasrec.rank_split(ours, sequences["test"]).masked
    assert found.tolist() == expected.tolist() and len(set(found.tolist())) > 1


def test_every_program_is_measured_and_reported(sequences, arguments):
    results = {"setting": vars(arguments) | {"torch": "2"}, **sasrec.measure(sequences, arguments)}
    speeds = results["training"]["positions_per_second"]
    assert set(speeds) - {"rectools"} == {"trainer", "plain_model", "plain_loop"} and min(speeds.values()) > 0
    assert results["evaluation"]["users"] == 40 and "memory" not in results
    speeds = {"trainer": 9000.0, "plain_model": 10000.0, "plain_loop": 12000.0}
    over = {"plain_model": 0.88, "plain_loop": 0.8}
    results["training"] = {"positions_per_second": speeds, "trainer_over": over}
    results["evaluation"] = {"users": 40, "seconds": {"rank_split": 0.5, "plain": 0.4}, "rank_split_over_plain": 1.3}
    results["latency"] = {"p50_milliseconds": {"recommend": 0.6, "plain": 0.5}, "recommend_over_plain": 1.2}
    results["memory"] = {"items": 1_000_000, "overhead_gib": 0.7, "table_and_optimizer_gib": 0.72}
    lines = sasrec.report(results).splitlines()
    assert next(line for line in lines if "loop by hand over" in line).endswith("| 9,000 | 12,000 | 0.80 |")
    assert not any("RecTools" in line for line in lines)
    assert "| top ten of one user, defaults, milliseconds | 0.60 | 0.50 | 1.20 |" in lines
    assert "| ranking of 40 users, seconds | 0.50 | 0.40 | 1.30 |" in lines
    assert lines[-1].endswith("(0.72 GiB) | 0.70 | | |")
    speeds["rectools"], over["rectools"] = 5000.0, 1.8
    assert "| the same, against RecTools | 9,000 | 5,000 | 1.80 |" in sasrec.report(results).splitlines()


def test_trainer_sees_as_many_labels_as_the_plain_loops(sequences, arguments, tmp_path):
    config = SASRecConfig(num_items=sequences.num_items, max_length=8)
    trainer = sasrec.build_trainer(config, sequences, arguments, str(tmp_path))
    counted = []
    forward = trainer.model.forward
    trainer.model.forward = lambda *args, labels, **keywords: (
        counted.append(int((labels != -100).sum())),
        forward(*args, labels=labels, **keywords),
    )[1]
    trainer.train()
    assert sum(counted) == arguments.epochs * sasrec.TrainingWindows(sequences["train"], 8).num_targets


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="epochs is 0: expected at least 1"):
        sasrec.SASRecBenchmarkArguments("data", "out", epochs=0)


@pytest.mark.slow
def test_million_items_train_in_two_gigabytes_besides_table_and_optimizer():
    measured = in_own_process(sasrec.train_with_items, 1_000_000, 2)
    assert measured["table_and_optimizer_gib"] == pytest.approx(3 * 1_000_001 * 64 * 4 / 2**30)
    assert 0 < measured["overhead_gib"] < 2
