"""Computes the gradients of a gated LoRA in DistributedDataParallel; each process has rows and gates of its own."""

import os
import sys
from pathlib import Path

from accelerate import PartialState
from gated_gradients import WithRouter, rows_of  # beside this file
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from hf_ilora.runs import leave_launch

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
state = PartialState(cpu=True)
assert state.num_processes == 2
model = WithRouter(uses_context=rank == 1).train()
model.gated.activation_checkpointing_enable()
parallel = DistributedDataParallel(model)
input_ids, users = rows_of(rank)
parallel(input_ids, users).backward()
gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
save_file(gradients, folder / f"gradients-{rank}.safetensors")
leave_launch()
