"""Sorts candidates by a recommender's scores, so that the prompt shows the recommender's preference."""

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem


@torch.no_grad()
def preferred_order(recommender: SASRecForNextItem, histories: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Sort candidates by the recommender's scores, best first.

    Args:
        recommender: in evaluation mode.
        histories: (batch, length) item ids, 0 for padding on either side.
        candidates: (batch, candidates) item ids, 0 for padding.

    Returns:
        (batch, candidates): the same ids, reordered, padding last.
    """
    scores = recommender.next_item_scores(recommender.newest_items(histories))  # (batch, num_items + 1)
    order = scores.gather(1, candidates).argsort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order)


class PreferredOrder:
    """Calls `preferred_order` with a copy of the recommender on the CPU, for the workers that collate batches.

    Args:
        recommender: the recommender to copy. Under ZeRO-3 its weights are partitioned over the processes, and every
            process must create its copy at the same time.
    """

    def __init__(self, recommender: SASRecForNextItem):
        parameters = list(recommender.parameters())
        if is_deepspeed_zero3_enabled():
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameters):
                state = {name: value.detach().cpu().clone() for name, value in recommender.state_dict().items()}
        else:
            state = recommender.state_dict()
        self.recommender = SASRecForNextItem(recommender.config)
        self.recommender.load_state_dict(state)
        self.recommender.eval()

    def __call__(self, histories: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Call `preferred_order` with the copy; arguments and result are on the CPU."""
        return preferred_order(self.recommender, histories, candidates)


__all__ = ["PreferredOrder", "preferred_order"]
