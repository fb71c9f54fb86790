"""Ranks candidates and generates answers in every process of a launch: <split.parquet> <output folder>."""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from ranking_model import ChoosingModel

from hf_ilora.evaluation.candidate_ranking import generate_answers, rank_candidates
from hf_ilora.runs import leave_launch

state = PartialState(cpu=True)
split = Dataset.from_parquet(sys.argv[1])
found = {
    "num_processes": state.num_processes,
    "ranks": rank_candidates(ChoosingModel(), split, batch_size=8).tolist(),  # 7 batches: one process repeats one
    "texts": generate_answers(ChoosingModel(), split, batch_size=8).texts,
}
Path(sys.argv[2], f"found_{state.process_index}.json").write_text(json.dumps(found))
leave_launch()
