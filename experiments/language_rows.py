"""The rows of the study on language: what is trained on a data set, and the trials that settings are chosen from.

Ids only get as many trials as a chain of language: start, ensemble and counts together. TF-IDF titles get those of
MiniLM. To add rows, such as students with an iLoRA among their teachers, add them to `language_rows` and to a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.study import Row
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER

TABLES = {
    "main": (
        "popularity", "counts", "ids", "ids_tuned", "start", "ensemble", "ensemble_counts", "tf_idf_ensemble_counts",
    ),
    "parts": (
        "ids_tuned", "ids_titles", "ids_counts", "start", "start_neighbours", "start_counts", "ensemble",
        "ensemble_counts", "ensemble_counts_mixed",
    ),
    "controls": (
        "ids_tuned", "shuffled_start", "shuffled_ensemble_counts", "tf_idf_start", "tf_idf_ensemble",
        "tf_idf_ensemble_counts", "self_distilled", "ids_by_ids", "ids_counts",
    ),
}  # fmt: skip
# The row that all are compared with.
REFERENCE = "ids_tuned"
# A student begins with another seed than its teacher, and the second of two ids-only teachers with another than both.
STUDENT_SEED, SECOND_SEED = 100, 200


@dataclass(frozen=True)
class Settings:
    """What differs between data sets.

    Args:
        config: YAML file of train_sasrec.py, ids only.
        counts: options of fit_counts.py.
        ids: trials of ids only.
        joint_start: `initial_items` of the start from titles and co-occurrence.
        start: trials of that start.
        title_weights: weights of title similarity beside a student's scores in the teacher, of one trial each.
        count_weights: the same for the logarithm of the transition counts.
        trial_seeds: number of seeds over which the metric of a trial is averaged.
        title_encoder: the encoder that is compared with TF-IDF.
    """

    config: str
    counts: Mapping[str, object]
    ids: Sequence[Mapping[str, object]]
    joint_start: str
    start: Sequence[Mapping[str, object]]
    title_weights: Sequence[float]
    count_weights: Sequence[float]
    trial_seeds: int
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
            {"item_learning_rate_factor": 2.0},
            {"num_train_epochs": 12.0},
            {"item_learning_rate_factor": 2.0, "num_train_epochs": 12.0},
            {"item_learning_rate_factor": 2.0, "initial_mixing": 0.1},
            {"item_learning_rate_factor": 2.0, "hidden_dropout": 0.2},
            {"item_learning_rate_factor": 2.0, "hidden_dropout": 0.4},
        ),
        joint_start="titles_and_cooccurrence",
        start=({}, {"item_learning_rate_factor": 2.0}),
        title_weights=(3.0, 5.0),
        count_weights=(0.5, 1.0),
        trial_seeds=1,
    ),
    "ml-100k": Settings(
        config="ml-100k/sasrec",
        counts={},
        ids=(
            {},
            {"item_learning_rate_factor": 0.3},
            {"item_learning_rate_factor": 1.0},
            {"num_train_epochs": 90.0},
            {"hidden_dropout": 0.2},
            {"hidden_dropout": 0.4},
            {"initial_mixing": 0.1},
        ),
        joint_start="titles_and_log_cooccurrence",
        start=({}, {"item_learning_rate_factor": 0.3}),
        title_weights=(1.0, 0.5),
        count_weights=(0.5, 1.0),
        trial_seeds=3,  # one validation user is a tenth of a percent here
    ),
}  # fmt: skip


def language_rows(settings: Settings) -> list[Row]:
    """The rows of the study; those that come first begin first."""
    counts = "{counts}/transition_counts"
    title_weight, count_weight = settings.title_weights[0], settings.count_weights[0]
    encoder = {"title_encoder": settings.title_encoder}
    joint = {"initial_items": settings.joint_start, **encoder}
    taught = {"distilled_positions": "all", "lam": 0.0, "kl_weight": 1.0}
    ensembles = [{"teacher_weights": [1.0, weight]} for weight in settings.title_weights]
    ensembles.append({"teacher_weights": [1.0, title_weight], "title_neighbours": 0.2})
    with_counts = [{"teacher_weights": [1.0, title_weight, weight]} for weight in settings.count_weights]

    def trained(name: str, title: str, **more) -> Row:
        return Row(name, title, "train_sasrec", settings.config, **more)

    def student(name: str, title: str, teacher: list[str], options: dict, **more) -> Row:
        options = {**taught, "teacher": teacher, **options}
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
            "+ taught by such a student and title similarity",
            ["{start}", "titles"],
            joint,
            settings_from="start",
            trials=ensembles,
            seeds=5,
            claimed=True,
            twin="tf_idf_ensemble",
        ),
        student(
            "ensemble_counts",
            "+ and by transition counts",
            ["{start}", "titles", counts],
            joint,
            settings_from="ensemble",
            trials=with_counts,
            seeds=5,
            claimed=True,
            twin="tf_idf_ensemble_counts",
        ),
    ]
    tf_idf_joint = {**joint, "title_encoder": "tf-idf"}
    tf_idf = [
        trained(
            "tf_idf_start",
            "start from titles (TF-IDF) and co-occurrence",
            options=tf_idf_joint,
            trials=settings.start,
            seeds=5,
            kind="control",
        ),
        student(
            "tf_idf_ensemble",
            "+ taught by such a student and title similarity (TF-IDF)",
            ["{tf_idf_start}", "titles"],
            tf_idf_joint,
            settings_from="tf_idf_start",
            trials=ensembles,
            seeds=3,
            kind="control",
        ),
        student(
            "tf_idf_ensemble_counts",
            "+ and by transition counts (TF-IDF)",
            ["{tf_idf_start}", "titles", counts],
            tf_idf_joint,
            settings_from="tf_idf_ensemble",
            trials=with_counts,
            seeds=5,
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
            seeds=3,
            shuffled_titles=True,
            kind="control",
        ),
        student(
            "shuffled_ensemble_counts",
            "all of it with shuffled titles",
            ["{shuffled_start}", "titles", counts],
            joint,
            settings_from="ensemble_counts",
            seeds=3,
            shuffled_titles=True,
            kind="control",
        ),
    ]
    parts = [
        student(
            "ids_titles",
            "ids-only start, taught by ids only and title similarity",
            ["{ids_tuned}", "titles"],
            {**encoder, "teacher_weights": [1.0, title_weight]},
            settings_from="ids_tuned",
            seeds=3,
        ),
        student(
            "ids_counts",
            "ids-only start, taught by ids only and transition counts",
            ["{ids_tuned}", counts],
            {"teacher_weights": [1.0, count_weight]},
            settings_from="ids_tuned",
            seeds=3,
            kind="control",
        ),
        Row(
            "start_neighbours",
            "start from titles, soft labels of title neighbours",
            "distill_sasrec",
            settings.config,
            {**joint, **taught, "kl_weight": 0.0, "title_neighbours": 0.2},
            settings_from="start",
            seeds=3,
        ),
        student(
            "start_counts",
            "start from titles, taught by such a student and transition counts",
            ["{start}", counts],
            {**joint, "teacher_weights": [1.0, count_weight]},
            settings_from="start",
            seeds=3,
        ),
        Row(
            "mixture",
            "weights of the teachers, tuned as a mixture of scores",
            "tune_ensemble",
            options={"members": ["{start}", "titles", counts], **encoder},
        ),
        Row(
            "ensemble_counts_mixed",
            "all of it, with the weights of tune_ensemble.py",
            "distill_sasrec",
            settings.config,
            {**joint, **taught, "ensemble": "{mixture}"},
            settings_from="start",
            seed_offset=STUDENT_SEED,
        ),
    ]
    controls = [
        student(
            "self_distilled",
            "start from titles, taught by such a student alone",
            ["{start}"],
            joint,
            settings_from="start",
            seeds=3,
            kind="control",
        ),
        trained(
            "ids_second",
            "ids only, tuned, another seed",
            settings_from="ids_tuned",
            seeds=3,
            seed_offset=SECOND_SEED,
            kind="ids",
        ),
        student(
            "ids_by_ids",
            "ids only, taught by two ids-only students",
            ["{ids_tuned}", "{ids_second}"],
            {},
            settings_from="ids_tuned",
            seeds=3,
            kind="control",
        ),
    ]
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
        trained("ids", "SASRec, ids only, as configured", seeds=5, kind="ids", claimed=True),
        trained("ids_tuned", "SASRec, ids only, tuned", trials=settings.ids, seeds=5, kind="ids", claimed=True),
        *minilm,
        *tf_idf,
        *shuffled,
        *parts,
        *controls,
    ]
