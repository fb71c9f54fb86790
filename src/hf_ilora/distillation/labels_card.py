"""The card of teacher labels: README.md with the teacher, the budget, the data and the fingerprints."""

import json
from pathlib import Path

from hf_ilora.data.cards import card, markdown_table
from hf_ilora.data.hub import is_hub_name
from hf_ilora.data.sources import DataSource
from hf_ilora_cli.shown_text import code_in_markdown, in_markdown


def labels_card(name: str, description: dict, license: str | None = None, dataset: str | None = None) -> str:
    """The card of labels.

    Args:
        name: "user/name" on the Hub, or the name of the folder.
        description: content of teacher_labels.json.
        license: the Hub's name of the labels' licence; None states none.
        dataset: name on the Hub of the data set that the labels are about; None if it is not there.
    """
    split, top_k = description.get("split", "train"), description["top_k"]
    configs = [{"config_name": "labels", "default": True, "data_files": [{"split": split, "path": "labels-*.parquet"}]}]
    budget, recommender = description.get("budget"), description.get("recommender_fingerprint")
    facts = {
        "teacher": named_teacher(description["teacher"]),
        "teacher fingerprint": description["teacher_fingerprint"],
        "budget": "none: every label was requested" if budget is None else f"{budget:,} labels",
        "policy that spends the budget": None if budget is None else description.get("acquire"),
        "recommender that the policy reads, fingerprint": recommender,
        "random seed of the policy": None if budget is None else description.get("seed"),
        "labelled positions": description.get("labelled_positions"),
        "seen items excluded": description.get("exclude_seen"),
        "data type of the teacher": description.get("dtype"),
        "items per label": top_k,
        "labels": f"{description['num_rows']:,}",
        "data set": dataset,
        "split": split,
        "data fingerprint": description["data_fingerprint"],
        "labels fingerprint": description["labels_fingerprint"],
        "item embeddings": "none"
        if description["embedding_size"] is None
        else f"{description['embedding_size']} numbers",
        "item embeddings fingerprint": description["embeddings_fingerprint"],
    }
    about = "" if split == "train" else f", split={json.dumps(split)}"
    if dataset is None:
        code = ["from hf_ilora import TeacherLabels"]
        data = json.dumps(description["data_fingerprint"])
    else:
        code = ["from hf_ilora import SequenceDatasets, TeacherLabels"]
        code.append(f"sequences = SequenceDatasets.load({json.dumps(dataset)})")
        data = "sequences.fingerprint"
    code.append(f"labels = TeacherLabels.load({json.dumps(name)}, {data}{about})")
    sections = [
        f"The {top_k} items that a teacher, {in_markdown(facts['teacher'])}, expects next after histories of the "
        f"{in_markdown(split)} split of a data set of sequences. A smaller recommender learns from these labels. They "
        "were made with the Python package hf_ilora.",
        "## How to use it",
        "```python\n" + "\n".join(code) + "\n```",
        f'Without hf_ilora: `load_dataset({_quoted(name)}, "labels")` of `datasets`. A row is an answer: '
        "`history_id` is the row of the split, `prefix_length` the number of items of its history and target that the "
        "teacher saw, `teacher_items` the item ids, best first, and `teacher_distances` their distances, which are "
        "smaller where the teacher is more confident.",
        "## Teacher, budget and data",
        markdown_table(("", ""), {key: value for key, value in facts.items() if value is not None}),
        "## Licence",
        f"{'No licence is stated.' if license is None else f'Labels: {code_in_markdown(license)}.'} The terms of the "
        "teacher and of the data apply as well. Labels contain row numbers and item ids, but no histories, users or "
        "titles.",
    ]
    metadata = {} if dataset is None else {"source_datasets": [dataset]}
    return card(name, sections, configs, DataSource(license=license), **metadata)


def _quoted(name: str) -> str:
    """The name in quotes, for inline code in Markdown."""
    return json.dumps(name).replace("`", "'")


def named_teacher(source: str) -> str:
    """A name of a teacher that can be published: its name on the Hub, or the last part of a path on this machine."""
    return source if is_hub_name(source) else Path(source).name or source


__all__ = ["labels_card", "named_teacher"]
