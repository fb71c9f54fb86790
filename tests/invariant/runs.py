"""Short trainings of SASRec, iLoRA and a distilled student, through Python and as the settings of the recipes."""

from pathlib import Path
from types import SimpleNamespace

from transformers import set_seed

from hf_ilora import (
    DistillationArguments,
    DistillationTrainer,
    ILoraConfig,
    ILoraForRecommendation,
    ILoraTrainer,
    ILoraTrainingArguments,
    NextItemTrainer,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
    SequenceDatasets,
    TeacherLabels,
)
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teachers import load_teacher
from hf_ilora.models.ilora.prompts import read_templates
from hf_ilora.training.ilora_parts import ILoraPartArguments, load_ilora_parts
from tests.tiny_ilora_parts import save_parts

STEPS, TOP_K = 8, 4
SHARED = {
    "use_cpu": True, "disable_tqdm": True, "max_steps": STEPS, "logging_strategy": "steps", "logging_steps": 1,
    "eval_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0, "save_strategy": "no",
    "seed": 1,
}  # fmt: skip
SASREC = {"hidden_size": 16, "num_hidden_layers": 1, "max_length": 8}
NEXT_ITEM = {"per_device_train_batch_size": 16, "learning_rate": 5e-3, "max_grad_norm": 1.0}
START = {
    "initial_items": "cooccurrence", "item_learning_rate_factor": 0.5, "skip_probability": 0.2, "shuffle_distance": 2.0,
}  # fmt: skip
DISTILLED = {"distilled_positions": "all", "top_k": TOP_K, "alpha": 0.5}
ILORA = {
    "max_history": 4, "rank": 4, "num_experts": 2, "router_type": "linear", "item_head": "residual",
    "item_loss_weight": 1.0, "candidate_loss_weight": 1.0, "recommender_weight": 0.5,
}  # fmt: skip
ILORA_TRAINING = {
    "num_candidates": 5, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "curriculum_steps": 4,
}  # fmt: skip


def save_inputs(folder: Path) -> SimpleNamespace:
    """A data set, a tiny language model, a SASRec that knows the data, prompts, and the SASRec's labels."""
    parts = save_parts(folder, num_users=64)
    sequences = SequenceDatasets.load(parts.data_dir)
    teacher = load_teacher(str(parts.recommender), len(sequences["train"]), sequences.num_items)
    requests = LabelRequests.of_split(sequences["train"], "all")
    settings = {
        "data_fingerprint": sequences.fingerprint, "teacher_fingerprint": teacher.fingerprint, "top_k": TOP_K,
        "num_items": sequences.num_items, "shard_rows": 256, "labelled_positions": "all",
    }  # fmt: skip
    parts.labels = folder / "labels"
    labels = LabelFolder(parts.labels, settings)
    labels.start(lambda: requests)
    asked = labels.requests(requests)
    label_shards(labels, asked, teacher, exclude_seen=False, batch_size=16, process=0, num_processes=1)
    labels.finish(asked, teacher)
    return parts


def sasrec_trainer(parts, folder: Path, **changes) -> NextItemTrainer:
    config = SASREC | {name: changes.pop(name) for name in ("hidden_dropout", "attention_dropout") if name in changes}
    sequences = SequenceDatasets.load(parts.data_dir)
    arguments = NextItemTrainingArguments(str(folder), **SHARED | NEXT_ITEM | START | changes)
    set_seed(arguments.seed)
    return NextItemTrainer(
        SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, **config)),
        arguments,
        train_dataset=sequences["train"],
        processing_class=sequences.catalogue,
    )


def ilora_trainer(parts, folder: Path, **changes) -> ILoraTrainer:
    config = ILORA | {name: changes.pop(name) for name in ("lora_dropout",) if name in changes}
    sequences = SequenceDatasets.load(parts.data_dir)
    arguments = ILoraTrainingArguments(str(folder), **SHARED | ILORA_TRAINING | changes)
    part_arguments = ILoraPartArguments(llm=str(parts.llm), recommender=str(parts.recommender))
    llm, tokenizer, source, recommender = load_ilora_parts(part_arguments, sequences.catalogue)
    config = ILoraConfig(prompt_templates=read_templates(parts.prompt_file), **config)
    config.llm_name_or_path = source.name_or_path
    set_seed(arguments.seed)
    model = ILoraForRecommendation.from_base(llm, recommender, tokenizer, sequences.catalogue, config)
    return ILoraTrainer(model, arguments, train_dataset=sequences["train"])


def distillation_trainer(parts, folder: Path, **changes) -> DistillationTrainer:
    config = SASREC | {name: changes.pop(name) for name in ("hidden_dropout", "attention_dropout") if name in changes}
    sequences = SequenceDatasets.load(parts.data_dir)
    arguments = DistillationArguments(str(folder), **SHARED | NEXT_ITEM | DISTILLED | changes)
    set_seed(arguments.seed)
    return DistillationTrainer(
        SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, **config)),
        arguments,
        train_dataset=sequences["train"],
        processing_class=sequences.catalogue,
        teacher_labels=TeacherLabels.load(parts.labels, sequences.fingerprint),
    )


TRAINERS = {"sasrec": sasrec_trainer, "ilora": ilora_trainer, "distilled": distillation_trainer}
# Recipe, paths and settings of the same runs on the command line.
RECIPES = {
    "sasrec": ("train_sasrec", ("data_dir",), SASREC | NEXT_ITEM | START),
    "ilora": ("train_ilora", ("data_dir", "llm", "recommender", "prompt_file"), ILORA | ILORA_TRAINING),
    "distilled": ("distill_sasrec", ("data_dir",), SASREC | NEXT_ITEM | DISTILLED),
}


def recipe_words(kind: str, parts, folder: Path, **changes) -> list[str]:
    """The command line of a run."""
    _, paths, settings = RECIPES[kind]
    settings = {name: getattr(parts, name) for name in paths} | SHARED | settings | changes
    if kind == "distilled":
        settings["teacher_labels"] = parts.labels
    words = ["--output_dir", str(folder)]
    for name, value in settings.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def trajectory(log_history: list[dict]) -> list[dict]:
    """Losses and gradient norms of the steps."""
    names = ("loss", "grad_norm", "base_loss", "dro_loss", "ranking_loss")
    return [{name: entry[name] for name in names if name in entry} for entry in log_history if "loss" in entry]
