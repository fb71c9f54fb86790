"""Runs a program under FSDP on CPUs: accelerate shards models on accelerators alone, though torch can do it anywhere.

accelerate launch --config_file fsdp2_cpu.yaml fsdp_on_cpu.py PROGRAM [WORD ...]
"""

import runpy
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

initialise = AcceleratorState.__init__


def initialise_as_on_gpus(self, *arguments, **options):
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    initialise(self, *arguments, **options)


AcceleratorState.__init__ = initialise_as_on_gpus
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
