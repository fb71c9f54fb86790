"""Recommends to all users of a data set; the second process looks for the parts of the first rarely."""

import os
import sys

from hf_ilora import SASRecForNextItem, SequenceDatasets, recommend_all
from hf_ilora.runs import leave_launch
from hf_ilora.serving import recommend_all as module

model, sequences, output = sys.argv[1:]
if os.environ["RANK"] == "1":
    module._SECONDS_BETWEEN_LOOKS = 3
recommend_all(
    SASRecForNextItem.from_pretrained(model), SequenceDatasets.load(sequences), output, top_k=2, shard_users=8
)
leave_launch()
