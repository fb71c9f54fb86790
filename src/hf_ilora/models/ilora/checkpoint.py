"""Saves and loads iLoRA; a checkpoint contains the adapter and the name of its language model."""

import copy
import os

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE, Catalogue
from hf_ilora.models.next_item.handler import EndpointHandler
from hf_ilora.models.next_item.hub_upload import UploadOfSaved
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.saved_model import (
    check_download,
    check_sizes,
    read_config,
    saved_file,
    saved_shapes,
    saved_weights,
)
from hf_ilora.models.next_item.whole_saves import saved_whole

from .configuration_ilora import ILoraConfig, check_public_llm
from .gated_lora import check_tensors
from .language_models import load_language_model, load_tokenizer, without_adapter

# Arguments of `from_pretrained` that apply to the language model's repository as well as to the adapter's.
_LLM_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only")


class ILoraCheckpoint:
    """Mixin of `ILoraForRecommendation`: saves and loads everything but the language model's own weights."""

    def adapter_names(self) -> list[str]:
        """Names, in the state dict, of the tensors that a checkpoint contains."""
        names = [
            name for name in self.state_dict() if not name.startswith("llm.") or name.endswith((".lora_A", ".lora_B"))
        ]
        if self.recommender.config.tie_word_embeddings:
            names.remove("recommender.head.weight")
        return names

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Save the adapter, the frozen SASRec, the configuration, the tokenizer, the catalogue and handler.py.

        An earlier model in the folder stays whole until all files are written, see `saved_whole`.

        Args:
            save_directory: created if it does not exist.
            state_dict: state dict of the whole model, for weights that are partitioned over processes (ZeRO-3); None
                takes the model's own.
            push_to_hub: upload the saved files in one commit. The repository is `repo_id`, by default the name of the
                folder; `kwargs` may include the other arguments of `push_to_hub`.
            kwargs: as in transformers.

        Returns:
            The commit of `push_to_hub`, else None.

        Raises:
            ValueError: with `push_to_hub`, if the language model is recorded as a folder of this machine.
        """
        if push_to_hub:
            check_public_llm(self.config)
        upload = UploadOfSaved(save_directory, kwargs) if push_to_hub else None
        self.config.make_llm_path_absolute()
        # transformers records where this machine cached the language model, which means nothing on another one.
        self.config.text_config._name_or_path = self.config.llm_name_or_path or ""
        state_dict = self.state_dict() if state_dict is None else state_dict
        adapter = {name: state_dict[name] for name in self.adapter_names()}
        if kwargs.get("is_main_process", True):
            with saved_whole(save_directory, kwargs.get("variant")) as unfinished:
                super().save_pretrained(unfinished, state_dict=adapter, **kwargs)
                custom_object_save(EndpointHandler, unfinished)  # a copy of its file
                self.tokenizer.save_pretrained(unfinished)
                self.catalogue.save_pretrained(unfinished)
        else:
            super().save_pretrained(save_directory, state_dict=adapter, **kwargs)  # takes part in gathering weights
        return None if upload is None else upload.send(self)

    def save_language_model(self, save_directory: str | os.PathLike) -> None:
        """Save the language model and its tokenizer, without the adapter: the base model of `materialize_lora`.

        Others need this folder if they cannot load the language model by its name, or if this model uses only some of
        its layers (`config.num_llm_layers`). An earlier model in the folder stays whole until all files are written.

        Args:
            save_directory: created if it does not exist.

        Raises:
            ValueError: for a quantised language model.
        """
        plain = without_adapter(self.llm)
        with saved_whole(save_directory) as unfinished:
            plain.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        llm: PreTrainedModel | str | os.PathLike | None = None,
        config: ILoraConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map=None,
        quantization_config=None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **hub_arguments,
    ):
        """Load the adapter, and the language model that it was trained on.

        Args:
            pretrained_model_name_or_path: folder that `save_pretrained` wrote, or repository on the Hub.
            llm: the language model, or its folder or Hub name; None loads the one that the checkpoint names.
            config: replaces the saved configuration.
            dtype, device_map, quantization_config, attn_implementation: passed on to the language model; the adapter
                stays float32.
            trust_remote_code: run code that comes with the language model or its tokenizer.
            hub_arguments: revision, token, cache_dir, local_files_only... for the adapter's repository. token,
                cache_dir and local_files_only also apply to the language model's.

        Returns:
            The `ILoraForRecommendation`, in evaluation mode.

        Raises:
            ValueError: if a file is missing or broken, a weight is missing, unexpected or of another shape, or the
                language model is not where the checkpoint says.
        """
        path = pretrained_model_name_or_path
        if config is None:
            config = read_config(ILoraConfig, path, hub_arguments)
        config = copy.deepcopy(config)
        config.make_llm_path_absolute(path)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, **hub_arguments)
        items = _saved_file(path, CATALOGUE_FILE, hub_arguments)
        check_download(items, path)
        catalogue = Catalogue.from_parquet(items)
        shapes = saved_shapes(path, hub_arguments, compare_downloads=True)
        if shapes is None:
            raise ValueError(_missing(path, SAFE_WEIGHTS_NAME))
        _check_adapter(config, catalogue, shapes, path)
        state = {}
        for file in saved_weights(path, hub_arguments):
            state |= load_file(file)
        if not isinstance(llm, PreTrainedModel):
            if llm is None and config.llm_name_or_path is None:
                raise ValueError(f"{path} does not name the language model that it was trained on: pass it as llm=")
            is_recorded = llm is None
            if is_recorded and config.public_llm_name is None and not os.path.isdir(config.llm_name_or_path):
                raise ValueError(
                    f"{path} was trained on the language model in {config.llm_name_or_path}, which is neither an "
                    "existing folder nor a valid name on the Hub: restore it there, or pass its folder as llm="
                )
            llm, _, _ = load_language_model(
                config.llm_name_or_path if is_recorded else llm,
                revision=config.llm_revision if is_recorded else None,
                gguf_file=config.llm_gguf_file if is_recorded else None,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                **{name: hub_arguments[name] for name in _LLM_HUB_ARGUMENTS if name in hub_arguments},
            )
        recommender = SASRecForNextItem(config.recommender_config)
        model = cls(config, llm, recommender, tokenizer, catalogue)
        model.load_adapter_state(state, str(path))
        model.name_or_path = model.config.name_or_path = str(path)
        return model.eval()

    def load_adapter_state(self, state: dict[str, torch.Tensor], origin: str = "the state dict") -> None:
        """Load the tensors that `save_pretrained` saved.

        Args:
            state: a tensor for each of `adapter_names()`.
            origin: name of the state dict in errors.

        Raises:
            ValueError: if a key is missing or unexpected, or a tensor has another shape.
        """
        own = self.state_dict()
        expected = {name: tuple(own[name].shape) for name in self.adapter_names()}
        check_tensors(state, expected, origin, "this configuration and language model")
        # load_state_dict fails on quantised layers that the state dict does not contain.
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)


def _check_adapter(
    config: ILoraConfig, catalogue: Catalogue, shapes: dict[str, tuple[int, ...]], path: str | os.PathLike
) -> None:
    """Check a configuration against its catalogue and weights, before the language model is loaded."""
    if len(catalogue) != config.num_items:
        raise ValueError(
            f"in {path} the recommender knows {config.num_items} items and the catalogue has {len(catalogue)}: "
            "expected equal numbers; restore the folder that save_pretrained wrote"
        )
    prefix = "recommender."
    of_recommender = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    check_sizes(SASRecForNextItem, config.recommender_config, of_recommender, path, prefix)
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith((".lora_A", ".lora_B")):
            rank = shape[0 if name.endswith("A") else 1]
            if rank != config.rank:
                raise ValueError(
                    f"{name} of {path} has shape {shape}: expected rank {config.rank}, as config.json says; restore "
                    "the folder that save_pretrained wrote"
                )


def _saved_file(path: str | os.PathLike, name: str, hub_arguments: dict) -> str:
    found = saved_file(path, name, hub_arguments)
    if found is None:
        raise ValueError(_missing(path, name))
    return found


def _missing(path: str | os.PathLike, name: str) -> str:
    return f"{path} has no {name}: expected a folder or repository that save_pretrained wrote"


__all__ = ["ILoraCheckpoint"]
