"""Several processes read every row of an epoch once, in the steps in which one process reads them."""

from itertools import chain

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler

from hf_ilora.training.even_batches import RowsWithFiller, WithoutFillers, fill_last_step, take_row_counts


def prepared(num_rows, batch_size, num_processes, process, split_batches=False, drop_last=False):
    """The batches of a process: tensors of row numbers."""
    rows = RowsWithFiller(list(range(num_rows)))
    loader = prepare_data_loader(
        DataLoader(
            rows,
            batch_size,
            sampler=RandomSampler(range(num_rows)),
            collate_fn=WithoutFillers(lambda rows: {"rows": torch.tensor(rows)}),
            drop_last=drop_last,
        ),
        num_processes=num_processes,
        process_index=process,
        split_batches=split_batches,
        put_on_device=False,
        use_seedable_sampler=True,
        data_seed=5,
    )
    fill_last_step(loader)
    return loader


def rows_of(batch) -> list[int]:
    counts = take_row_counts(batch)
    return [] if counts is not None and not counts[0] else batch["rows"].tolist()


def joined(parts) -> list[int]:
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 6, 7, 12, 13, 17])
def test_each_step_reads_the_rows_that_it_reads_in_one_process(num_rows, num_processes, split_batches):
    size = 6  # rows of a step
    one = prepared(num_rows, size, 1, 0)
    of_each = size if split_batches else size // num_processes
    several = [prepared(num_rows, of_each, num_processes, index, split_batches) for index in range(num_processes)]
    for epoch in (0, 1):
        for loader in (one, *several):
            loader.set_epoch(epoch)
        steps = [rows_of(batch) for batch in one]
        assert sorted(joined(steps)) == list(range(num_rows))
        found = [[rows_of(batch) for batch in loader] for loader in several]
        assert {len(batches) for batches in found} == {len(steps)} == {len(loader) for loader in several}
        assert [joined(parts) for parts in zip(*found, strict=True)] == steps
    assert steps != [rows_of(batch) for batch in prepared(num_rows, size, 1, 0)] or num_rows == 1  # of epoch 0


def test_a_resumed_epoch_continues_in_its_own_order():
    whole, resumed = prepared(17, 3, 2, 1), prepared(17, 3, 2, 1)
    whole.set_epoch(4)
    resumed = skip_first_batches(resumed, 2)
    resumed.set_epoch(4)
    assert [rows_of(batch) for batch in resumed] == [rows_of(batch) for batch in whole][2:]


def test_dropped_last_rows_stay_dropped():
    batches = [list(prepared(17, 3, 2, process, drop_last=True)) for process in (0, 1)]
    assert [[len(batch["rows"]) for batch in of_process] for of_process in batches] == [[3, 3], [3, 3]]
