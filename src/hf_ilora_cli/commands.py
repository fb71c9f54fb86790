"""The commands of `hf-ilora`, and the recipe that each starts."""

from dataclasses import dataclass

PROGRAM = "hf-ilora"
# The environment variable that names the program in a recipe's messages; by default they use the recipe's file name.
PROGRAM_VARIABLE = "HF_ILORA_PROGRAM"


@dataclass(frozen=True)
class Command:
    """A command of `hf-ilora`.

    Args:
        name: the word after `hf-ilora`.
        recipe: name of the shipped recipe, without suffix.
        summary: its line in the list of commands.
        example: a command line to copy.
        launched: whether accelerate's launcher always starts the recipe, possibly in several processes.
        may_be_launched: whether the launcher starts it if `--launch` or `--num_processes` is given.
    """

    name: str
    recipe: str
    summary: str
    example: str
    launched: bool = False
    may_be_launched: bool = False

    @property
    def program(self) -> str:
        """The name of the program in messages of the recipe."""
        return f"{PROGRAM} {self.name}"


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "pipeline",
            "run_pipeline",
            "Run all stages, from the data to the table of results.",
            "hf-ilora pipeline quickstart",
        ),
        Command(
            "prepare",
            "prepare_data",
            "Turn MovieLens, another public data set or your own table into a data set of sequences.",
            "hf-ilora prepare ml-100k/data",
        ),
        Command(
            "fit-counts",
            "fit_counts",
            "Fit the counting baselines: popularity and transition counts.",
            "hf-ilora fit-counts --data_dir outputs/ml-100k/data --output_dir outputs/ml-100k/counts",
        ),
        Command(
            "train-sasrec",
            "train_sasrec",
            "Train SASRec.",
            "hf-ilora train-sasrec ml-100k/sasrec --seed 1 --output_dir outputs/ml-100k/sasrec",
            launched=True,
        ),
        Command(
            "train-ilora",
            "train_ilora",
            "Train iLoRA on a frozen language model and a frozen SASRec.",
            "hf-ilora train-ilora ml-100k/ilora --recommender outputs/ml-100k/sasrec --prompt_file movies",
            launched=True,
        ),
        Command(
            "label",
            "label_with_teacher",
            "Ask a teacher for the next items and save its answers as labels.",
            "hf-ilora label --data_dir outputs/ml-100k/data --teacher outputs/ml-100k/ilora "
            "--output_dir outputs/ml-100k/labels",
            launched=True,
        ),
        Command(
            "tune-ensemble",
            "tune_ensemble",
            "Find the weights of an ensemble of teachers on validation.",
            "hf-ilora tune-ensemble --data_dir outputs/ml-100k/data --members outputs/ml-100k/sasrec titles "
            "outputs/ml-100k/counts/transition_counts --output_dir outputs/ml-100k/ensemble",
        ),
        Command(
            "distill",
            "distill_sasrec",
            "Train a SASRec that also learns from teachers.",
            "hf-ilora distill ml-100k/sasrec --teacher_labels outputs/ml-100k/labels --output_dir "
            "outputs/ml-100k/distilled",
            launched=True,
        ),
        Command(
            "evaluate",
            "evaluate_models",
            "Compare saved models: quality, latency and size.",
            "hf-ilora evaluate --data_dir outputs/ml-100k/data --models outputs/ml-100k/sasrec outputs/ml-100k/ilora "
            "--output_dir outputs/ml-100k/evaluation",
        ),
        Command(
            "evaluate-ilora",
            "evaluate_ilora",
            "Compare iLoRA models on 20 candidates and by the answers they write.",
            "hf-ilora evaluate-ilora --data_dir outputs/ml-100k/data --models outputs/ml-100k/ilora "
            "--output_dir outputs/ml-100k/ilora_evaluation",
        ),
        Command(
            "plot",
            "plot_results",
            "Draw an evaluation, or the learning curves of training runs.",
            "hf-ilora plot --results outputs/ml-100k/evaluation --output outputs/ml-100k/evaluation.png",
        ),
        Command(
            "recommend",
            "recommend",
            "Recommend items to one user, a table of users or all of a data set.",
            "hf-ilora recommend --model outputs/ml-100k/sasrec --data_dir outputs/ml-100k/data --user 1",
            may_be_launched=True,
        ),
        Command(
            "demo",
            "serve_demo",
            "Show models side by side in the browser, or write the page as a Space.",
            "hf-ilora demo outputs/quickstart/sasrec outputs/quickstart/distilled outputs/quickstart/ilora",
        ),
        Command(
            "export",
            "export",
            "Export a trained model to ONNX, to be served without torch.",
            "hf-ilora export --model outputs/ml-100k/sasrec --output_dir outputs/ml-100k/onnx --top_k 10",
        ),
        Command(
            "push",
            "push_to_hub",
            "Publish a trained model on the Hub.",
            "hf-ilora push --model outputs/ml-100k/sasrec --repo_id user/sasrec-ml-100k --private true "
            "--dataset_name MovieLens-100K --license apache-2.0",
        ),
        Command(
            "push-data",
            "push_data_to_hub",
            "Publish a data set of sequences or a teacher's labels on the Hub.",
            "hf-ilora push-data --folder outputs/songs/data --repo_id user/songs --license cc-by-4.0",
        ),
        Command(
            "convert",
            "convert_reference_sasrec",
            "Convert the authors' SASRec, GRU4Rec or Caser weights to this format.",
            "hf-ilora convert --weights sasrec.pt --output_dir outputs/sasrec_movielens --items items.parquet",
        ),
        Command(
            "prepare-reference",
            "prepare_reference_data",
            "Convert the authors' published data sets to this format.",
            "hf-ilora prepare-reference reference-movielens/data --source data/llara_movielens",
        ),
    )
}
