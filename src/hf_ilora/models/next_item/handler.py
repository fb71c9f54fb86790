"""Answers the requests of a Hugging Face Inference Endpoint; a stand-alone file in the folder of a saved model."""

import importlib
import json
from pathlib import Path

from transformers import pipeline

PARAMETERS = ("top_k", "exclude_seen", "allowed_items", "excluded_items", "candidates", "fuzzy")
EXAMPLE = '{"inputs": ["first title", "second title"], "parameters": {"top_k": 5}}'


class EndpointHandler:
    """Loads the model in a folder and answers requests with its recommendations.

    A next-item model needs torch, transformers and pyarrow, and runs the code in its folder. An iLoRA needs the package
    hf_ilora.

    Args:
        path: folder of the model.

    Raises:
        ModuleNotFoundError: for an iLoRA, without hf_ilora.
        ValueError, OSError: when the folder has no whole model.
    """

    def __init__(self, path: str = "."):
        config = json.loads(Path(path, "config.json").read_text(encoding="utf-8"))
        is_ilora = config.get("model_type") == "ilora"
        if is_ilora:
            try:
                importlib.import_module("hf_ilora")  # registers the model and the task
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"{path} contains an iLoRA, which needs the package hf_ilora ({error}): install it, or name it in "
                    "requirements.txt of the repository"
                ) from error
        self.pipeline = pipeline(
            "sequential-recommendation",
            model=str(path),
            trust_remote_code=not is_ilora,
            batch_size=8 if is_ilora else 256,
        )

    def __call__(self, data: dict) -> list:
        """Answer a request.

        Args:
            data: `inputs`, one user or a list of users as in the pipeline, and optionally `parameters`, a dictionary of
                `top_k`, `exclude_seen`, `allowed_items`, `excluded_items`, `candidates` and `fuzzy`.

        Returns:
            A list of recommended items, or one list per user, in JSON types only.

        Raises:
            ValueError: for an invalid request; an endpoint answers with the message and status 400.
        """
        if not isinstance(data, dict) or "inputs" not in data or data.keys() - {"inputs", "parameters"}:
            found = f"the keys {', '.join(map(str, data)) or 'none'}" if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"the request has {found}: expected inputs and optionally parameters, such as {EXAMPLE}")
        inputs, parameters = data["inputs"], data.get("parameters") or {}
        if not isinstance(inputs, list | dict):
            raise ValueError(f"inputs are {inputs!r}: expected a list, such as in {EXAMPLE}")
        if not isinstance(parameters, dict) or parameters.keys() - set(PARAMETERS):
            raise ValueError(f"parameters are {parameters!r}: expected a dictionary of {', '.join(PARAMETERS)}")
        answers = self.pipeline(inputs, **parameters)
        # Dates become text, and NaN and infinity, which JSON lacks, become null.
        return json.loads(json.dumps(answers, default=str), parse_constant=lambda number: None)
