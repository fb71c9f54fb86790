"""Distils teachers into a SASRec, GRU4Rec or Caser, which is then served without them, and evaluates it.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/distill_sasrec.py ml-100k/sasrec \
        --teacher_labels outputs/ml-100k/labels --distilled_positions all --output_dir outputs/ml-100k/distilled

The recipe can also ask a teacher in every step: a saved recommender, or a weighted ensemble of several. The word
`titles` names a member that compares the titles of the catalogue with those of the history:

    python recipes/distill_sasrec.py beauty/sasrec --teacher outputs/beauty/sasrec titles \
        outputs/beauty/counts/transition_counts --teacher_weights 1 3 0.5 --kl_weight 1 --lam 0 \
        --distilled_positions all --output_dir outputs/beauty/distilled

`--ensemble outputs/beauty/ensemble` takes members and weights that tune_ensemble.py found, and `--title_neighbours 0.2`
alone needs no teacher.

The recipe writes the model (weights, configuration, catalogue), run.json and run.log to the output folder. To resume a
killed run from its last complete checkpoint, run the same command again.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import dataclasses

from transformers import set_seed

from hf_ilora import DistillationArguments, DistillationTrainer, SASRecConfig, SequenceDatasets
from hf_ilora.models.next_item.configuration_next_item import TEACHER_FIELDS
from hf_ilora.runs import (
    RunRecord,
    check_same_inputs,
    config_arguments,
    evaluate_splits,
    log_to_run,
    parse_arguments,
    resumable_checkpoint,
    run_main,
    set_up_logging,
    sole_writer,
)
from hf_ilora.training.new_items import NewItemArguments, fill_after_training
from hf_ilora.training.students import StudentArguments, build_student
from hf_ilora.training.teacher_arguments import TeacherArguments, check_has_teacher, load_teachers

SASRecArguments = config_arguments(SASRecConfig, exclude=("num_items", "pad_token_id", *TEACHER_FIELDS))
ARGUMENTS = (TeacherArguments, StudentArguments, SASRecArguments, NewItemArguments, DistillationArguments)


def main() -> None:
    arguments = parse_arguments(ARGUMENTS)
    teacher, *_, training = arguments
    check_has_teacher(teacher, training)
    with sole_writer(training.output_dir):
        distill(arguments)


def distill(arguments: tuple) -> None:
    """Train, save and evaluate the student in its output folder."""
    teacher, student, sasrec_arguments, new_items, training = arguments
    set_up_logging(training.output_dir)
    sequences = SequenceDatasets.load(teacher.data_dir)
    fingerprint = sequences.fingerprint
    checkpoint = resumable_checkpoint(training.output_dir, arguments, fingerprint)
    teachers = load_teachers(teacher, training, sequences)
    check_same_inputs(checkpoint, teachers.inputs)
    set_seed(training.seed)
    trainer = DistillationTrainer(
        build_student(student, dataclasses.asdict(sasrec_arguments), sequences.num_items, teachers.labels),
        training,
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
        **teachers.trainer_arguments,
    )
    log_to_run(trainer)
    with RunRecord(training.output_dir, arguments, seed=training.seed) as record:
        record.add_data(fingerprint)
        for name, origin in teachers.inputs.items():
            record.add_metrics(name, origin)
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        fill_after_training(trainer, sequences["train"], new_items)
        trainer.save_model()
        trainer.save_state()  # the log of the whole run, for learning curves: kept checkpoints may end earlier
        evaluate_splits(trainer, sequences, record)


if __name__ == "__main__":
    run_main(main)
