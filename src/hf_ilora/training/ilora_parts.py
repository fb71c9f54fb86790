"""The frozen parts of an iLoRA model: a language model and a trained SASRec."""

import logging
from dataclasses import dataclass, field

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM
from hf_ilora.models.ilora.language_models import LanguageModelSource, load_language_model
from hf_ilora.models.ilora.modeling_ilora import check_recommender
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "8bit", "4bit")


@dataclass
class ILoraPartArguments:
    """The frozen language model and the frozen SASRec."""

    recommender: str | None = field(
        default=None, metadata={"help": "folder or Hub name of the trained SASRec that gates the experts"}
    )
    untrained_recommender: bool = field(
        default=False, metadata={"help": "use an untrained SASRec: its gates are random, for tests of speed only"}
    )
    llm: str = field(default=EMBEDDED_LLM, metadata={"help": "folder or Hub name of the language model"})
    llm_revision: str | None = field(default=None, metadata={"help": "commit, branch or tag of the language model"})
    llm_gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the language model's repository"})
    llm_dtype: str = field(
        default="float32",
        metadata={"choices": DTYPES, "help": "dtype of the frozen weights: float32, bfloat16 or float16"},
    )
    llm_quantization: str = field(
        default="none",
        metadata={
            "choices": QUANTIZATIONS,
            "help": "quantisation of the frozen weights: none, 8bit or 4bit (needs bitsandbytes and a GPU)",
        },
    )
    llm_device_map: str | None = field(
        default=None, metadata={"help": "where its layers go, such as auto; by default all to the process's device"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the language model"})

    def __post_init__(self):
        if self.recommender is None and not self.untrained_recommender:
            raise ValueError(
                "recommender is missing: expected the folder or Hub name of a SASRec that was trained on this data "
                "(`hf-ilora train-sasrec`), or --untrained_recommender true for random gates"
            )
        if self.recommender is not None and self.untrained_recommender:
            raise ValueError("recommender and untrained_recommender are both given: expected one of them")
        for name, choices in (("llm_dtype", DTYPES), ("llm_quantization", QUANTIZATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")


def load_ilora_parts(
    arguments: ILoraPartArguments, catalogue: Catalogue
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LanguageModelSource, SASRecForNextItem]:
    """Load the language model, its tokenizer and its source, and the recommender.

    Raises:
        ValueError: for a recommender of another catalogue, before the language model is loaded, which may take minutes.
    """
    quantization_config = None
    if arguments.llm_quantization != "none":
        quantization_config = BitsAndBytesConfig(
            load_in_8bit=arguments.llm_quantization == "8bit",
            load_in_4bit=arguments.llm_quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if arguments.untrained_recommender:
        logger.warning("the recommender is untrained: its gates are noise")
        recommender = SASRecForNextItem(SASRecConfig(num_items=len(catalogue)))
    else:
        recommender = SASRecForNextItem.from_pretrained(arguments.recommender)
    check_recommender(recommender, catalogue)
    llm, tokenizer, source = load_language_model(
        arguments.llm,
        revision=arguments.llm_revision,
        gguf_file=arguments.llm_gguf_file,
        dtype=arguments.llm_dtype,
        device_map=arguments.llm_device_map,
        quantization_config=quantization_config,
        attn_implementation=arguments.attn_implementation,
        trust_remote_code=arguments.trust_remote_code,
    )
    return llm, tokenizer, source, recommender


__all__ = ["ILoraPartArguments", "load_ilora_parts"]
