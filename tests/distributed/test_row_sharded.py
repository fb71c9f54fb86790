"""An item table that is spread over two real processes learns and ranks as one that each of them has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_ilora import SASRecForNextItem
from tests.distributed.launched_row_sharded import CASES
from tests.synthetic import cyclic_sequences

pytestmark = pytest.mark.slow
TABLES = ("replicated", "row_sharded")
BEST_IS_THE_FIRST = ("gbce", "gru4rec", "caser")  # of the two checkpoints


@pytest.fixture(scope="module")
def folder(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for num_items in (30, 31):
        cyclic_sequences(num_users=64, num_items=num_items).save(folder / f"data-{num_items}")
    launch("multi_cpu.yaml", Path(__file__).with_name("launched_row_sharded.py"), folder)
    return folder


def of_processes(path: Path) -> list:
    return [torch.load(f"{path}-{rank}.pt", weights_only=False) for rank in range(2)]


def test_rows_and_gradients_go_between_the_process_that_asks_and_the_one_that_has_them(folder):
    first, second = of_processes(folder / "looked_up")
    table = torch.arange(10.0).view(5, 2)
    assert torch.equal(first["rows"], table[[1, 1, 3, 1]].unsqueeze(0))
    assert torch.equal(second["rows"], table[[3, 0, 2, 4]].unsqueeze(0))
    # Item 1: 1 + 10 + 1000 of the first process; item 3: 100 of the first and 2 of the second; the mean of both.
    expected = torch.tensor([0.0, 1011.0, 200.0, 102.0, 2000.0]).unsqueeze(1).expand(5, 2) / 2
    assert torch.equal(first["gradient"], expected[0::2]) and torch.equal(second["gradient"], expected[1::2])
    assert torch.equal(first["whole"], table) and second["whole"] is None


def test_ranks_count_the_items_of_all_processes(folder):
    first, second = of_processes(folder / "looked_up")
    # Scores of items 1 to 4: (2, 4, 6, 8), their negatives, (3, 5, 7, 9), and -8, -14, -20, -26.
    assert first["ranks"].tolist() == [[2, 3], [3, 4], [1, 1]]
    assert second["ranks"].tolist() == [[2, 3]]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_the_same_with_half_of_the_table_each(folder, case):
    replicated, sharded = (load_file(folder / case / name / "model.safetensors") for name in TABLES)
    assert replicated.keys() == sharded.keys()
    for name, expected in replicated.items():
        # The bias of the keys has a gradient of rounding errors, which Adam makes as large as any other.
        tolerance = 1e-3 if name.endswith("k_proj.bias") else 1e-6
        torch.testing.assert_close(sharded[name], expected, rtol=0, atol=tolerance)
    steps = [load_file(folder / case / "replicated" / f"checkpoint-{step}" / "model.safetensors") for step in (3, 6)]
    name = "model.item_embedding.weight"
    assert not torch.allclose(steps[0][name], steps[1][name])
    if case in BEST_IS_THE_FIRST:  # which the blocks of its checkpoint bring back
        assert torch.equal(replicated[name], steps[0][name])


@pytest.mark.parametrize("case", CASES)
def test_ranks_and_metrics_are_those_of_the_whole_table(folder, case):
    replicated, sharded = (of_processes(folder / case / name) for name in TABLES)
    for expected, found in zip(replicated, sharded, strict=True):
        assert torch.equal(found["ranks"], expected["ranks"])
        assert len(found["log"]) == len(expected["log"]) == 2
        for metrics, wanted in zip(found["log"], expected["log"], strict=True):
            for name, value in wanted.items():
                if not name.endswith(("runtime", "per_second")):
                    assert metrics[name] == pytest.approx(value, abs=1e-6), name
    assert replicated[0]["ranks"].unique().numel() > 5


@pytest.mark.parametrize(("case", "rows"), [("sasrec", (16, 15)), ("caser", (16, 16))])
def test_a_process_has_its_rows_and_their_moments_alone(folder, case, rows):
    found = of_processes(folder / case / "row_sharded")
    assert tuple(each["rows"] for each in found) == tuple(each["moments"] for each in found) == rows


def test_one_process_loads_the_saved_model_and_ranks_as_the_training_did(folder):
    path = folder / "sasrec" / "row_sharded"
    model, again = SASRecForNextItem.from_pretrained(path), AutoModel.from_pretrained(path, trust_remote_code=True)
    assert model.catalogue is not None and len(model.get_input_embeddings().weight) == 31
    histories = [[3, 5, 6], [9, 10, 12, 13]]
    assert torch.equal(model.recommend(histories)[0], again.recommend(histories)[0])


def test_a_resumed_run_ends_where_the_whole_run_does(folder):
    whole, resumed = (folder / "sasrec" / name / "checkpoint-6" for name in ("whole", "resumed"))
    for name, value in load_file(whole / "model.safetensors").items():
        assert "item_embedding" not in name and torch.equal(value, load_file(resumed / "model.safetensors")[name])
    for rank in range(2):
        blocks = [load_file(path / f"item_table_{rank}_of_2.safetensors") for path in (whole, resumed)]
        assert blocks[0].keys() == {"rows", "step", "exp_avg", "exp_avg_sq"}
        for name, value in blocks[0].items():
            assert torch.equal(value, blocks[1][name]), name
    start = load_file(folder / "sasrec" / "whole" / "checkpoint-3" / "item_table_0_of_2.safetensors")
    assert not torch.equal(start["rows"], blocks[0]["rows"][: len(start["rows"])])
    assert not list(whole.glob("*unfinished*")) and not list(whole.glob(".*"))


def test_checkpoints_of_the_other_table_are_refused(folder):
    for messages in of_processes(folder / "sasrec" / "refused"):
        assert (
            "has its item table in 2 files, such as item_table_0_of_2.safetensors: expected item_table" in messages[0]
        )
        assert "has no item_table_*.safetensors: expected item_table_" in messages[1]
