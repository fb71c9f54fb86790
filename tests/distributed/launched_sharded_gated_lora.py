"""Trains one step of a gated LoRA whose parameters are divided among the processes, and saves the adapter."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from gated_gradients import WithRouter, rows_of  # beside this file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from hf_ilora.runs import leave_launch

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
model = WithRouter().train()
model.gated.activation_checkpointing_enable()
input_ids, users = rows_of(rank)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.SGD(trained, lr=1.0)
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    assert TrainingArguments(folder, ddp_backend="gloo").world_size == 2
    accelerator = Accelerator()
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings |= {"train_micro_batch_size_per_gpu": len(input_ids), "gradient_clipping": 0.0}
    settings |= {"zero_allow_untested_optimizer": True}
    engine, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(engine(input_ids, users))  # and the step
    state = accelerator.get_state_dict(engine)
else:  # FSDP2
    assert PartialState(cpu=True).num_processes == 2
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.gated.base_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0)
    model(input_ids, users).backward()
    optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    of_adapter = {name.removeprefix("gated."): value for name, value in state.items() if name.startswith("gated.")}
    model.gated.save_pretrained(folder / "adapter", state_dict=of_adapter)
    torch.save({name: value for name, value in state.items() if name.startswith("router.")}, folder / "router.pt")
leave_launch()
