"""Saving and loading iLoRA: small files, equal scores after loading, and training that resumes where it stopped."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.ao.quantization import quantize_dynamic
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

import hf_ilora
from hf_ilora.models.ilora import checkpoint
from hf_ilora.models.ilora.language_models import load_language_model, truncate_layers
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from tests.models.ilora.ilora_fixtures import (
    ROWS,
    batch_of,
    catalogue,
    fresh_model,
    ilora_config,
    recommender,
    tiny_model,
    tokenizer,
)
from tests.tiny_language_models import CONFIGS, base_llm

HISTORIES, CANDIDATES = torch.tensor([[3, 7, 30], [0, 12, 21]]), torch.tensor([[9, 2, 11], [4, 1, 5]])
EVERYTHING = {"item_head": "residual", "item_loss_weight": 0.5}


def answers(model) -> torch.Tensor:
    return torch.cat([model.score_candidates(HISTORIES, CANDIDATES), model.item_scores(HISTORIES)[:, 1:]], dim=1)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    base_llm().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model(**EVERYTHING)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A checkpoint that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copied")


def change_weights(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# --- what is saved ---


def test_a_checkpoint_contains_the_adapter_and_the_recommender_only(model, saved):
    state = load_file(saved / "model.safetensors")
    llm_keys = {name for name in state if name.startswith("llm.")}
    assert len(llm_keys) == 28 and all(name.endswith((".lora_A", ".lora_B")) for name in llm_keys)
    parts = {name.partition(".")[0] for name in state}
    assert parts == {"llm", "recommender", "router", "prompt_embedding", "item_head"}
    for name, value in state.items():
        assert torch.equal(value, model.state_dict()[name])
    own_weights = sum(parameter.numel() for name, parameter in base_llm().named_parameters())
    assert own_weights > 20_000
    saved_numbers = sum(value.numel() for value in state.values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert saved_numbers == trained + recommender().num_parameters()
    names = {path.name for path in saved.iterdir()}
    assert names >= {"config.json", "model.safetensors", "items.parquet", "tokenizer.json", "tokenizer_config.json"}
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in saved.iterdir())


def test_a_given_state_dict_is_saved(model, tmp_path):
    """As in ZeRO-3, where the model's own tensors are empty."""
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["router.projection.weight"] += 7
    model.save_pretrained(tmp_path, state_dict=state)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(model.adapter_names())
    assert (found["router.projection.weight"] == 7).all()
    assert not any(value.any() for name, value in found.items() if name != "router.projection.weight")


def test_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not {path.name for path in tmp_path.iterdir()} & {"model.safetensors", "items.parquet", "tokenizer.json"}


# --- what comes back ---


def test_scores_come_back_with_the_language_model_as_object_folder_or_name(model, saved, llm_folder, tmp_path):
    expected = answers(model)
    assert torch.equal(answers(ILoraForRecommendation.from_pretrained(saved, llm=base_llm())), expected)
    assert torch.equal(answers(ILoraForRecommendation.from_pretrained(str(saved), llm=llm_folder)), expected)

    named = tiny_model(llm_name_or_path=str(llm_folder), **EVERYTHING)
    named.save_pretrained(tmp_path)
    loaded = ILoraForRecommendation.from_pretrained(tmp_path)
    assert torch.equal(answers(loaded), expected)
    assert not loaded.training and loaded.name_or_path == str(tmp_path)
    # the control: a base of other weights
    assert (
        answers(ILoraForRecommendation.from_pretrained(tmp_path, llm=base_llm(seed=1))) - expected
    ).abs().min() > 1e-4
    fresh = fresh_model(**EVERYTHING).eval()
    assert (answers(fresh) - expected).abs().max() > 0.01


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_comes_back(architecture, tmp_path):
    """Some tie their head to their embeddings, some do not."""
    changes = {"sliding_window": 512} if architecture in ("gemma3", "mistral") else {}
    for tied in (True, False):
        llms = [base_llm(architecture, tie_word_embeddings=tied, **changes) for _ in range(2)]
        model = tiny_model(architecture, llm=llms[0], **EVERYTHING)
        model.save_pretrained(tmp_path / str(tied))
        assert "llm.lm_head.weight" not in load_file(tmp_path / str(tied) / "model.safetensors")
        loaded = ILoraForRecommendation.from_pretrained(tmp_path / str(tied), llm=llms[1])
        assert torch.equal(answers(loaded), answers(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("router_type", ["conv", "mlp", "top_k", "noisy"])
def test_routers_and_recommenders_of_every_kind_come_back(router_type, tied, tmp_path):
    sasrec = recommender(tie_word_embeddings=tied, head_bias=True, repeat_bias=True, attention_decay=True)
    model = tiny_model(sasrec=sasrec, router_type=router_type, **EVERYTHING)
    if router_type == "conv":  # statistics are no parameters
        model.train()
        model.expert_gates(torch.tensor([[1, 2], [3, 4], [5, 6]]))
        model.eval()
    model.save_pretrained(tmp_path)
    loaded = ILoraForRecommendation.from_pretrained(tmp_path, llm=base_llm())
    assert torch.equal(answers(loaded), answers(model))
    assert torch.equal(loaded.expert_gates(HISTORIES), model.expert_gates(HISTORIES))
    _, scores = loaded.recommender.recommend(HISTORIES, 5)
    assert torch.equal(scores, sasrec.recommend(HISTORIES, 5)[1])
    tables = (loaded.recommender.head.weight, loaded.recommender.model.item_embedding.weight)
    assert (tables[0] is tables[1]) == tied


def test_catalogue_tokenizer_and_configuration_come_back(model, saved):
    loaded = ILoraForRecommendation.from_pretrained(saved, llm=base_llm())
    assert loaded.catalogue == catalogue()
    assert loaded.title_tokens.token_ids.tolist() == model.title_tokens.token_ids.tolist()
    assert loaded.config.num_items == 30 and loaded.config.recommender_config.hidden_size == 8
    ours, theirs = (m.config.to_dict() for m in (model, loaded))
    for changing in ("_name_or_path", "architectures", "dtype"):
        ours.pop(changing, None), theirs.pop(changing, None)
    assert ours == theirs
    batch = batch_of(model)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


def test_auto_classes_load_it(model, saved):
    assert hf_ilora.ILoraForRecommendation is ILoraForRecommendation
    assert type(AutoConfig.from_pretrained(saved)) is hf_ilora.ILoraConfig
    loaded = AutoModel.from_pretrained(saved, llm=base_llm())
    assert type(loaded) is ILoraForRecommendation
    assert torch.equal(answers(loaded), answers(model))


def test_auto_model_finds_the_recorded_language_model(llm_folder, tmp_path):
    model = tiny_model(llm_name_or_path=str(llm_folder), **EVERYTHING)
    model.save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModel.from_pretrained(tmp_path)), answers(model))


def test_a_loaded_model_is_saved_again_alike(saved, tmp_path):
    ILoraForRecommendation.from_pretrained(saved, llm=base_llm()).save_pretrained(tmp_path)
    first, second = load_file(saved / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert Catalogue.from_parquet(tmp_path / "items.parquet") == catalogue()


def test_recommender_from_a_folder(tmp_path):
    sasrec = recommender()
    sasrec.catalogue = catalogue()
    sasrec.save_pretrained(tmp_path / "sasrec")
    loaded = SASRecForNextItem.from_pretrained(tmp_path / "sasrec")
    model = ILoraForRecommendation.from_base(base_llm(), loaded, tokenizer(), catalogue(), ilora_config())
    assert torch.equal(model.recommender.recommend(HISTORIES, 5)[1], recommender().recommend(HISTORIES, 5)[1])
    assert not any(parameter.requires_grad for parameter in model.recommender.parameters())


def test_hub_arguments_of_the_adapter_apply_to_the_language_model(llm_folder, tmp_path, monkeypatch):
    tiny_model(llm_name_or_path=str(llm_folder)).save_pretrained(tmp_path)
    given = {}

    def record(name, **arguments):
        given.update(arguments)
        return load_language_model(name)

    monkeypatch.setattr(checkpoint, "load_language_model", record)
    settings = {"token": "secret", "local_files_only": True, "cache_dir": "elsewhere", "trust_remote_code": True}
    ILoraForRecommendation.from_pretrained(tmp_path, revision="main", **settings)
    assert {name: given[name] for name in settings} == settings
    assert given["revision"] is None  # that of the adapter is not the language model's


def test_a_language_model_with_a_map_of_devices_is_left_where_it_is(tmp_path):
    llm = base_llm()
    llm.hf_device_map = {"model": 0, "lm_head": 1}  # as accelerate notes it
    model = tiny_model(llm=llm)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True))
    assert trainer.is_model_parallel
    assert not hasattr(tiny_model(), "hf_device_map")


def test_float32_adapter_survives_a_bfloat16_language_model(llm_folder, tmp_path):
    llm, _, _ = load_language_model(llm_folder, dtype=torch.bfloat16)
    model = tiny_model(llm=llm, llm_name_or_path=str(llm_folder), **EVERYTHING)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    loaded = ILoraForRecommendation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.llm.lm_head.weight.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        if name in state:
            assert value.dtype == torch.float32 and torch.equal(value, state[name]), name
    assert torch.equal(answers(loaded), answers(model))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_number_of_layers_is_recorded_and_applied(architecture, tmp_path):
    base_llm(architecture).save_pretrained(tmp_path / "llm")
    tokenizer().save_pretrained(tmp_path / "llm")
    settings = {"llm_name_or_path": str(tmp_path / "llm"), "num_llm_layers": 1, "item_head": "residual"}
    model = tiny_model(architecture, **settings)
    assert len(model.llm.get_decoder().layers) == model.config.text_config.num_hidden_layers == 1
    model.save_pretrained(tmp_path / "saved")
    loaded = ILoraForRecommendation.from_pretrained(tmp_path / "saved")
    assert len(loaded.llm.get_decoder().layers) == 1
    assert torch.equal(loaded.item_scores(HISTORIES), model.item_scores(HISTORIES))
    whole = tiny_model(architecture, item_head="residual")
    assert not torch.equal(whole.item_scores(HISTORIES), model.item_scores(HISTORIES))
    # one that was truncated by its owner fits as well
    llm = base_llm(architecture)
    truncate_layers(llm, 1)
    again = ILoraForRecommendation.from_pretrained(tmp_path / "saved", llm=llm)
    assert torch.equal(again.item_scores(HISTORIES), model.item_scores(HISTORIES))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantised_language_model_answers_and_its_adapter_comes_back(tmp_path):
    """Its state dict contains objects that are not tensors, and torch's own loading fails where they are missing."""
    llms = [quantize_dynamic(base_llm(), {nn.Linear}, dtype=torch.qint8) for _ in range(2)]
    model = tiny_model(llm=llms[0], **EVERYTHING)
    assert type(model.llm.model.layers[0].mlp.up_proj.base_layer) is not nn.Linear
    expected, unquantised = answers(model), answers(tiny_model(**EVERYTHING))
    assert not torch.equal(expected, unquantised)
    torch.testing.assert_close(expected, unquantised, rtol=0.05, atol=0.5)
    batch = batch_of(model)
    torch.testing.assert_close(model(**batch).loss, tiny_model(**EVERYTHING)(**batch).loss, rtol=0.02, atol=0.0)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model(**EVERYTHING).adapter_names())
    loaded = ILoraForRecommendation.from_pretrained(tmp_path, llm=llms[1])
    assert torch.equal(answers(loaded), expected)


# --- what is refused ---


def load(folder, **arguments):
    return ILoraForRecommendation.from_pretrained(folder, **{"llm": base_llm()} | arguments)


@pytest.mark.parametrize(
    "key",
    ["router.projection.weight", "llm.model.layers.1.mlp.up_proj.lora_B", "recommender.model.final_norm.bias"],
)
def test_a_missing_weight_is_an_error(copied, key):
    change_weights(copied, lambda state: state.pop(key))
    message = rf"lacks 1 tensors \(\['{key}'\]\) and has 0 unexpected ones \(none\)"
    if key.startswith("recommender."):  # found before the language model is loaded
        message = f"have 1 missing keys, such as {key}: expected those of a SASRecForNextItem"
    with pytest.raises(ValueError, match=message):
        load(copied)


@pytest.mark.parametrize("key", ["router.bias", "llm.lm_head.weight", "llm.model.layers.2.mlp.up_proj.lora_B"])
def test_a_foreign_weight_is_an_error(copied, key):
    change_weights(copied, lambda state: state.update({key: torch.zeros(3)}))
    with pytest.raises(ValueError, match=rf"lacks 0 tensors \(none\) and has 1 unexpected ones \(\['{key}'\]\)"):
        load(copied)


def test_a_weight_of_another_shape_is_an_error(copied):
    change_weights(copied, lambda state: state.update({"router.projection.weight": torch.zeros(4, 1)}))
    message = r"router.projection.weight of .* has shape \(4, 1\): expected \(4, 8\)"
    with pytest.raises(ValueError, match=message):
        load(copied)


def test_a_language_model_of_another_shape_is_an_error(copied):
    with pytest.raises(ValueError, match=r"of .* has shape \(8, 32\): expected \(8, 16\)"):
        load(copied, llm=base_llm(hidden_size=16, head_dim=8))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors \(\['llm.model.layers.2"):
        load(copied, llm=base_llm(num_hidden_layers=3))


def test_another_configuration_is_an_error(copied):
    config = json.loads((copied / "config.json").read_text())
    config["router_type"] = "mlp"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 3 tensors \(\['router.hidden.bias', 'router.hidden.weight'"):
        load(copied)


def test_broken_weights_are_an_error(copied):
    whole = (copied / "model.safetensors").read_bytes()
    for broken in (b"", b"not safetensors at all", whole[:100], whole[:-10]):
        (copied / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"model.safetensors of .*copied is broken .*restore the folder"):
            load(copied)


def test_shards_come_back_and_a_missing_one_is_an_error(model, llm_folder, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(answers(load(tmp_path, llm=llm_folder)), answers(model))
    shards[-1].unlink()
    with pytest.raises(
        ValueError, match=f"has no {shards[-1].name}, which model.safetensors.index.json names: restore"
    ):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match=r"model.safetensors.index.json of .* is broken"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "items.parquet"])
def test_a_missing_file_is_an_error(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"copied has no {name}: expected a folder or repository that save_pretrained"):
        load(copied)


def test_a_missing_tokenizer_is_an_error(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load(copied)


def test_a_catalogue_of_another_size_is_an_error(copied):
    catalogue([f"Item {i}" for i in range(29)]).to_parquet(copied / "items.parquet")
    with pytest.raises(ValueError, match="the recommender knows 30 items and the catalogue has 29"):
        load(copied)


def test_a_checkpoint_that_names_no_language_model_needs_one(saved):
    with pytest.raises(ValueError, match="does not name the language model that it was trained on: pass it as llm="):
        ILoraForRecommendation.from_pretrained(saved)


def test_a_language_model_that_moved_is_an_error(tmp_path):
    tiny_model(llm_name_or_path=str(tmp_path / "gone")).save_pretrained(tmp_path / "saved")
    message = "gone, which is neither an existing folder nor a valid name on the Hub: .*pass its folder as llm="
    with pytest.raises(ValueError, match=message):
        ILoraForRecommendation.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("set_later", [False, True])
def test_a_relative_folder_is_found_from_any_working_directory(llm_folder, tmp_path, monkeypatch, set_later):
    shutil.copytree(llm_folder, tmp_path / "models" / "llm")  # "models/llm" might be a repository on the Hub, too
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = tiny_model(llm_name_or_path=None if set_later else "models/llm", **EVERYTHING)
    if set_later:
        model.config.llm_name_or_path = "models/llm"
    else:
        monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = ILoraForRecommendation.from_pretrained(tmp_path / "saved")
    assert torch.equal(answers(loaded), answers(model))
    assert loaded.config.llm_name_or_path == str(tmp_path / "models" / "llm")


def test_a_relative_folder_in_a_checkpoint_counts_from_the_checkpoint(llm_folder, tmp_path, monkeypatch):
    """So that a checkpoint and its language model can be moved together."""
    model = tiny_model(**EVERYTHING)
    model.save_pretrained(tmp_path / "before" / "saved")
    shutil.copytree(llm_folder, tmp_path / "before" / "llm")
    path = tmp_path / "before" / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"llm_name_or_path": "../llm"}))
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    loaded = ILoraForRecommendation.from_pretrained("after/saved")
    assert torch.equal(answers(loaded), answers(model))
    assert loaded.config.llm_name_or_path == str(tmp_path / "after" / "llm")


# --- the stock Trainer ---


def trainer_of(model, folder, **arguments) -> Trainer:
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 3,
        "seed": 5,
    }
    arguments = TrainingArguments(
        output_dir=folder,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        use_cpu=True,
        disable_tqdm=True,
        **settings | arguments,
    )
    rows = [row | {"uniforms": (0.0, index / 12)} for index, row in enumerate(ROWS * 4)]
    return Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=ROWS,
        data_collator=lambda rows: batch_of(model, rows),
    )


@pytest.fixture
def transformers_log(caplog):
    """What transformers warns of; its messages do not reach the root logger."""
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    yield caplog
    transformers.removeHandler(caplog.handler)


def losses_of(trainer) -> dict[int, float]:
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def tied_llm():
    return base_llm(tie_word_embeddings=True)


@pytest.mark.parametrize("llm_of", [base_llm, tied_llm], ids=["untied", "tied"])
def test_a_resumed_training_gives_the_same_losses(llm_of, tmp_path, transformers_log):
    settings = {"router_type": "conv", "lora_dropout": 0.1, **EVERYTHING}
    whole = trainer_of(tiny_model(llm=llm_of(), **settings), tmp_path)
    whole.train()
    expected = losses_of(whole)
    assert len(set(expected.values())) == 4
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "items.parquet").exists() and (checkpoint / "tokenizer.json").exists()
    assert not any(name.endswith("base_layer.weight") for name in load_file(checkpoint / "model.safetensors"))

    resumed = trainer_of(tiny_model(llm=llm_of(), **settings), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in transformers_log.text and "unexpected keys" not in transformers_log.text
    assert losses_of(resumed)[3] == pytest.approx(expected[3], rel=1e-6)
    assert losses_of(resumed)[4] == pytest.approx(expected[4], rel=1e-6)
    for (name, value), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}")
    if llm_of is tied_llm:
        assert resumed.model.llm.lm_head.weight is resumed.model.llm.model.embed_tokens.weight


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, transformers_log):
    """With a learning rate this high the later steps are the worse ones."""
    trainer = trainer_of(
        tiny_model(**EVERYTHING),
        tmp_path,
        learning_rate=1.0,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert "missing keys" not in transformers_log.text and "unexpected keys" not in transformers_log.text
    evaluations = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations[-1] > min(evaluations)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluations), rel=1e-6)


def test_the_trainers_model_comes_back(tmp_path):
    trainer = trainer_of(tiny_model(**EVERYTHING), tmp_path, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.model.eval()
    expected = answers(trainer.model)
    assert torch.equal(answers(load(tmp_path)), expected)
    assert not torch.equal(answers(tiny_model(**EVERYTHING)), expected)


def test_a_model_remembers_where_its_language_model_was_loaded_from(llm_folder):
    llm, _, _ = load_language_model(llm_folder)
    assert tiny_model(llm=llm).config.llm_name_or_path == str(llm_folder)
    assert tiny_model().config.llm_name_or_path is None  # created in memory, so there is no name to load it by
