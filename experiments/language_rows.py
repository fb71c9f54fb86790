"""The rows of the study on language: the runs on a data set, and the trials that their settings are chosen from.

The ids-only row gets as many trials as a whole chain with titles, start and teachers together. Rows with TF-IDF titles
get the same trials as those with MiniLM. To add rows, add them to `language_rows` and to a table.

The table llm asks whether a fine-tuned language model adds to title vectors: as one more member of a mixture of scores,
as the encoder of the titles that a student starts from, and as both. The control of each is the same language model
without fine-tuning: only an item head is trained on the same prompts. The member has a second control, the SASRec that
gates iLoRA, since an untrained iLoRA gives the scores of that SASRec.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.study import Row
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER

TABLES = {
    "main": ("popularity", "counts", "ids_tuned", "start", "ensemble_counts", "tf_idf_ensemble_counts"),
    "parts": (
        "ids_tuned", "ids_titles", "ids_counts", "start", "start_neighbours", "start_counts", "ensemble",
        "ensemble_counts", "ensemble_counts_mixed",
    ),
    "controls": (
        "ids_tuned", "shuffled_start", "shuffled_ensemble_counts", "tf_idf_start", "tf_idf_ensemble",
        "tf_idf_ensemble_counts", "self_distilled", "ids_by_ids", "ids_counts",
    ),
    "llm": (
        "start", "plain_llm_start", "ilora_start", "mixture_sample", "mixture_gate", "mixture_plain_llm",
        "mixture_ilora", "mixture_both_plain_llm", "mixture_both_ilora",
    ),
}  # fmt: skip
# The row that all are compared with.
REFERENCE = "ids_tuned"
# Mixtures with a language model are compared with this one, on the users whom language models are asked about.
MIXTURE_REFERENCE = "mixture_sample"
# Offsets of seeds, so that a student, a second ids-only teacher and the SASRec of a gate differ from their teachers.
STUDENT_SEED, SECOND_SEED, GATE_SEED = 100, 200, 300
# Items that a language model names for a user; the others share the remaining probability.
ITEMS_OF_ANSWER = 100
# Language models learn from users whom their SASRec has not seen: it ranks its own training rows several times better
# than others, and the language models would learn to rely on it.
USERS_OF_GATE, USERS_OF_LLM = (0.0, 0.8), (0.8, 1.0)


@dataclass(frozen=True)
class Settings:
    """The settings of the study on a data set.

    Args:
        config: YAML file of train_sasrec.py, ids only.
        counts: options of fit_counts.py.
        ids: trials of ids only.
        joint_start: options of the start from titles and co-occurrence.
        start: trials of that start.
        title_weight: weight of title similarity beside a student's scores in the teacher.
        count_weight: the same for the logarithm of the transition counts.
        taught: trials of the student that learns from all three.
        trial_seeds: number of seeds over which the metric of a trial is averaged.
        ilora: YAML file of train_ilora.py, with the language model and its training.
        llm_users: number of validation users whom language models are asked about.
        title_encoder: the encoder that is compared with TF-IDF.
    """

    config: str
    counts: Mapping[str, object]
    ids: Sequence[Mapping[str, object]]
    joint_start: Mapping[str, object]
    start: Sequence[Mapping[str, object]]
    title_weight: float
    count_weight: float
    taught: Sequence[Mapping[str, object]]
    trial_seeds: int
    ilora: str
    llm_users: int
    title_encoder: str = EMBEDDED_ENCODER


SETTINGS = {
    "beauty": Settings(
        config="beauty/sasrec",
        # The result of a search over 57 combinations on validation.
        counts={
            "max_gap": 20, "gap_decay": 0.85, "backward_weight": 0.3, "source_power": 0.5, "target_power": 0.0,
            "max_length": 20, "history_decay": 0.5,
        },
        ids=(
            {},
            {"initial_mixing": 0.06},
            {"initial_mixing": 0.06, "item_learning_rate_factor": 1.0},
            {"initial_mixing": 0.06, "num_train_epochs": 12.0},
            {"initial_mixing": 0.06, "hidden_dropout": 0.2},
        ),
        joint_start={"initial_items": "titles_and_cooccurrence", "item_learning_rate_factor": 1.0},
        start=({}, {"initial_mixing": 0.06}),
        title_weight=3.0,
        count_weight=0.5,
        taught=(
            {"teacher_weights": [1.0, 3.0, 0.5], "kl_weight": 1.0},
            {"teacher_weights": [1.0, 5.0, 0.5], "kl_weight": 1.0},
            {"teacher_weights": [1.0, 3.0, 0.5], "kl_weight": 2.0},
        ),
        trial_seeds=1,
        ilora="beauty/ilora",
        llm_users=2000,
    ),
    "ml-100k": Settings(
        config="ml-100k/sasrec",
        counts={},
        ids=(
            {},
            {"item_learning_rate_factor": 0.3},
            {"item_learning_rate_factor": 0.1},
            {"item_learning_rate_factor": 0.1, "hidden_dropout": 0.2},
        ),
        joint_start={"initial_items": "titles_and_log_cooccurrence"},
        start=({"title_prior": 3.0}, {"title_prior": 3.0, "item_learning_rate_factor": 0.1}),
        title_weight=1.0,
        count_weight=0.5,
        taught=(
            {"teacher_weights": [1.0, 1.0, 0.5], "kl_weight": 1.0},
            {"teacher_weights": [1.0, 0.5, 1.0], "kl_weight": 1.0},
        ),
        trial_seeds=3,  # one validation user is a tenth of a percent here
        ilora="ml-100k/ilora",
        llm_users=943,
    ),
}  # fmt: skip


def language_rows(settings: Settings) -> list[Row]:
    """The rows of the study; those that come first begin first."""
    counts = "{counts}/transition_counts"
    title_weight, count_weight = settings.title_weight, settings.count_weight
    encoder = {"title_encoder": settings.title_encoder}
    joint = {**settings.joint_start, **encoder}
    everywhere = {"distilled_positions": "all", "lam": 0.0}

    def trained(name: str, title: str, **more) -> Row:
        return Row(name, title, "train_sasrec", settings.config, **more)

    def student(name: str, title: str, teacher: list[str], options: dict, **more) -> Row:
        options = {**everywhere, "teacher": teacher, **options}
        return Row(name, title, "distill_sasrec", settings.config, options, seed_offset=STUDENT_SEED, **more)

    minilm = [
        trained(
            "start",
            "start from titles and co-occurrence",
            options=joint,
            trials=settings.start,
            seeds=5,
            claimed=True,
            twin="tf_idf_start",
        ),
        student(
            "ensemble",
            "start from titles, taught by such a student and title similarity",
            ["{start}", "titles"],
            {**joint, "teacher_weights": [1.0, title_weight], "kl_weight": 1.0},
            settings_from="start",
            twin="tf_idf_ensemble",
        ),
        student(
            "ensemble_counts",
            "start from titles, taught by an ensemble",
            ["{start}", "titles", counts],
            joint,
            settings_from="start",
            trials=settings.taught,
            seeds=5,
            claimed=True,
            twin="tf_idf_ensemble_counts",
        ),
    ]
    tf_idf_joint = {**joint, "title_encoder": "tf-idf"}
    tf_idf = [
        trained(
            "tf_idf_start",
            "start from TF-IDF titles and co-occurrence",
            options=tf_idf_joint,
            trials=settings.start,
            seeds=3,
            kind="control",
        ),
        student(
            "tf_idf_ensemble",
            "start from TF-IDF titles, taught by such a student and title similarity",
            ["{tf_idf_start}", "titles"],
            {**tf_idf_joint, "teacher_weights": [1.0, title_weight], "kl_weight": 1.0},
            settings_from="tf_idf_start",
            kind="control",
        ),
        student(
            "tf_idf_ensemble_counts",
            "start from TF-IDF titles, taught by an ensemble",
            ["{tf_idf_start}", "titles", counts],
            tf_idf_joint,
            settings_from="tf_idf_start",
            trials=settings.taught,
            seeds=3,
            kind="control",
            claimed=True,
        ),
    ]
    shuffled = [
        trained(
            "shuffled_start",
            "start from shuffled titles and co-occurrence",
            options=joint,
            settings_from="start",
            shuffled_titles=True,
            kind="control",
        ),
        student(
            "shuffled_ensemble_counts",
            "start from shuffled titles, taught by an ensemble",
            ["{shuffled_start}", "titles", counts],
            joint,
            settings_from="ensemble_counts",
            shuffled_titles=True,
            kind="control",
        ),
    ]
    parts = [
        student(
            "ids_titles",
            "ids-only start, taught by ids only and title similarity",
            ["{ids_tuned}", "titles"],
            {**encoder, "teacher_weights": [1.0, title_weight], "kl_weight": 1.0},
            settings_from="ids_tuned",
        ),
        student(
            "ids_counts",
            "ids-only start, taught by ids only and transition counts",
            ["{ids_tuned}", counts],
            {"teacher_weights": [1.0, count_weight], "kl_weight": 1.0},
            settings_from="ids_tuned",
            kind="control",
        ),
        Row(
            "start_neighbours",
            "start from titles, soft labels of title neighbours",
            "distill_sasrec",
            settings.config,
            {**joint, **everywhere, "kl_weight": 0.0, "title_neighbours": 0.2},
            settings_from="start",
        ),
        student(
            "start_counts",
            "start from titles, taught by such a student and transition counts",
            ["{start}", counts],
            {**joint, "teacher_weights": [1.0, count_weight], "kl_weight": 1.0},
            settings_from="start",
        ),
        Row(
            "mixture",
            "weights of the teachers, tuned as a mixture of scores",
            "tune_ensemble",
            options={"members": ["{start}", "titles", counts], **encoder},
        ),
        Row(
            "ensemble_counts_mixed",
            "start from titles, taught by an ensemble with the weights of tune_ensemble.py",
            "distill_sasrec",
            settings.config,
            {**joint, **everywhere, "kl_weight": 1.0, "ensemble": "{mixture}"},
            settings_from="start",
            seed_offset=STUDENT_SEED,
        ),
    ]
    controls = [
        student(
            "self_distilled",
            "start from titles, taught by such a student alone",
            ["{start}"],
            {**joint, "kl_weight": 1.0},
            settings_from="start",
            kind="control",
        ),
        trained(
            "ids_second",
            "ids only, tuned, another seed",
            settings_from="ids_tuned",
            seed_offset=SECOND_SEED,
            kind="ids",
        ),
        student(
            "ids_by_ids",
            "ids only, taught by two ids-only students",
            ["{ids_tuned}", "{ids_second}"],
            {"kl_weight": 1.0},
            settings_from="ids_tuned",
            kind="control",
        ),
    ]
    return [
        *_counting(settings),
        trained("ids_tuned", "SASRec, ids only", trials=settings.ids, seeds=5, kind="ids", claimed=True),
        *minilm,
        *tf_idf,
        *shuffled,
        *parts,
        *controls,
        *_with_language_models(settings),
    ]


def _counting(settings: Settings) -> list[Row]:
    return [
        Row(
            "counts",
            "transition counts, tuned",
            "fit_counts",
            options=settings.counts,
            model="transition_counts",
            kind="baseline",
            claimed=True,
        ),
        Row("popularity", "popularity", None, model="{counts}/popularity", kind="baseline", claimed=True),
    ]


def _with_language_models(settings: Settings) -> list[Row]:
    """Rows with iLoRA, and the same with the language model as it is."""
    encoder = {"title_encoder": settings.title_encoder}
    joint = settings.joint_start
    reads = {"recommender": "{ilora_gate}", "train_fraction": USERS_OF_LLM, "language_loss_weight": 0.0}
    # The language model without fine-tuning: the head reads its plain hidden states of prompts with titles alone.
    plain = {"lora_learning_rate_factor": 0.0, "num_experts": 1, "item_placeholders": False}

    def asked(name: str, teacher: str) -> Row:
        options = {"teacher": f"{{{teacher}}}", "split": "validation", "budget": settings.llm_users}
        options["top_k"] = ITEMS_OF_ANSWER
        return Row(name, f"answers of {teacher} about validation users", "label_with_teacher", options=options)

    def start(name: str, title: str, llm: str, **more) -> Row:
        options = {**joint, "title_encoder": f"{{{llm}}}"}
        return Row(name, title, "train_sasrec", settings.config, options, settings_from="start", **more)

    def mixture(name: str, title: str, *more_members: str, start: str = "start", **more) -> Row:
        members = [f"{{{start}}}", "titles", "{counts}/transition_counts", *(f"{{{each}}}" for each in more_members)]
        options = {"members": members, "validation_users": settings.llm_users, **encoder}
        return Row(name, title, "tune_ensemble", options=options, **more)

    return [
        Row(
            "ilora_gate",
            "start from titles and co-occurrence, on the first users: the SASRec that language models read",
            "train_sasrec",
            settings.config,
            {**joint, **encoder, "train_fraction": USERS_OF_GATE},
            seed_offset=GATE_SEED,
        ),
        Row("ilora", "iLoRA", "train_ilora", settings.ilora, reads, kind="language model"),
        Row("plain_llm", "its language model as it is", "train_ilora", settings.ilora, {**reads, **plain}),
        asked("ilora_labels", "ilora"),
        asked("plain_llm_labels", "plain_llm"),
        mixture(MIXTURE_REFERENCE, "student, titles, counts"),
        mixture("mixture_gate", "+ the SASRec that iLoRA reads", "ilora_gate"),
        mixture("mixture_plain_llm", "+ the language model as it is", "plain_llm_labels"),
        mixture("mixture_ilora", "+ iLoRA", "ilora_labels", twin="mixture_plain_llm"),
        start("plain_llm_start", "start from titles (language model as it is)", "plain_llm", kind="control"),
        start("ilora_start", "start from titles (iLoRA)", "ilora", twin="plain_llm_start"),
        mixture(
            "mixture_both_plain_llm",
            "student from the language model as it is, titles, counts + that language model",
            "plain_llm_labels",
            start="plain_llm_start",
        ),
        mixture(
            "mixture_both_ilora",
            "student from iLoRA, titles, counts + iLoRA",
            "ilora_labels",
            start="ilora_start",
            twin="mixture_both_plain_llm",
        ),
    ]
