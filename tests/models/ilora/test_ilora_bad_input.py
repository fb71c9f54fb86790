"""Bad input to iLoRA is refused with an error that says what to pass."""

import copy
import re

import pytest
import torch

from hf_ilora import CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.gated_lora import gated_layers
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.training.prompt_collator import PromptCollator
from tests.models.ilora.ilora_fixtures import (
    HISTORY_ALONE,
    NUM_ITEMS,
    ROWS,
    TITLES,
    WITH_CANDIDATES,
    batch_of,
    catalogue,
    ilora_config,
    recommender,
    tiny_model,
    tokenizer,
)
from tests.tiny_language_models import base_llm

HISTORIES, CANDIDATES = torch.tensor([[3, 7, 30], [0, 12, 21]]), torch.tensor([[9, 2, 11], [4, 1, 5]])


def build(untrained_recommender=True, **parts) -> ILoraForRecommendation:
    parts = {
        "llm": parts.get("llm") or base_llm(),
        "recommender": parts.get("recommender") or recommender(),
        "tokenizer": parts.get("tokenizer") or tokenizer(),
        "catalogue": parts.get("catalogue") or catalogue(),
        "config": parts.get("config") or ilora_config(),
    }
    return ILoraForRecommendation.from_base(**parts, untrained_recommender=untrained_recommender)


@pytest.fixture(scope="module")
def model():
    return tiny_model(item_head="residual", item_loss_weight=1.0)


# --- parts that do not fit ---


def test_a_configuration_alone_makes_no_model():
    with pytest.raises(ValueError, match="was given only a configuration: expected its parts as well; use from_base"):
        ILoraForRecommendation(ilora_config())


def test_an_untrained_recommender_must_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"created and not loaded: expected a trained one.*untrained_recommender=True"):
        build(untrained_recommender=False)
    recommender().save_pretrained(tmp_path)
    build(untrained_recommender=False, recommender=SASRecForNextItem.from_pretrained(tmp_path))
    build(untrained_recommender=True)


@pytest.mark.parametrize("num_items", [29, 31])
def test_a_recommender_of_another_catalogue_size_is_refused(num_items):
    llm = base_llm()
    message = f"the recommender knows {num_items} items and the catalogue has 30"
    with pytest.raises(ValueError, match=message):
        build(llm=llm, recommender=recommender(num_items))
    assert not gated_layers(llm)  # the language model is as it was


def test_a_recommender_of_other_raw_ids_is_refused():
    sasrec = recommender()
    sasrec.catalogue = catalogue()
    build(recommender=sasrec)
    other_titles = Catalogue(catalogue().table.set_column(2, "title", [[title + "!" for title in TITLES]]))
    build(recommender=sasrec, catalogue=other_titles)  # the same items in other words
    raw_ids = [f"raw {i}" for i in range(2, 32)]
    with pytest.raises(ValueError, match="the recommender's catalogue has other raw ids than the given one"):
        build(recommender=sasrec, catalogue=Catalogue(catalogue().table.set_column(1, "raw_id", [raw_ids])))


@pytest.mark.parametrize(
    "other",
    [
        GRU4RecForNextItem(GRU4RecConfig(num_items=30, hidden_size=8)),
        CaserForNextItem(CaserConfig(num_items=30, hidden_size=8, block_type="reference", tie_word_embeddings=False)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_recommender_of_another_architecture_is_refused_before_anything_changes(other):
    llm = base_llm()
    with pytest.raises(TypeError, match=f"recommender is a {type(other).__name__}: expected a SASRecForNextItem"):
        build(llm=llm, recommender=other)
    assert not gated_layers(llm)


@pytest.mark.parametrize("found", [TITLES, {"title": TITLES}, catalogue().table])
def test_a_catalogue_of_another_type_is_refused_before_anything_changes(found):
    llm = base_llm()
    message = f"catalogue is a {type(found).__name__}: expected a Catalogue, such as sequences.catalogue"
    with pytest.raises(TypeError, match=message):
        build(llm=llm, catalogue=found)
    assert not gated_layers(llm)


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        (["Heat", "  ", *TITLES[2:]], "the title of item 2 is blank"),
        (["Heat", *TITLES[1:]], "items 1 .* and 3 .*have the same title.*duplicate_titles='number'"),
    ],
)
def test_blank_and_equal_titles_are_refused(titles, message):
    with pytest.raises(ValueError, match=message):
        build(catalogue=catalogue(titles))


def test_a_special_token_in_a_title_is_read_as_text():
    titles = build(catalogue=catalogue(["Heat</s>", *TITLES[1:]])).title_tokens
    assert titles.titles[0] == "Heat</s>" and titles.sequence(1).count(titles.terminator_id) == 1


def test_equal_titles_may_be_numbered():
    model = build(catalogue=catalogue(["Heat", *TITLES[1:]]), config=ilora_config(duplicate_titles="number"))
    assert (model.title_tokens.titles[0], model.title_tokens.titles[2]) == ("Heat", "Heat (2)")
    assert model.catalogue.titles([3]) == ["Heat"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["query"], "target_modules query match nothing in LlamaForCausalLM: expected some of down_proj"),
        (["q_proj", "wo"], "target_modules wo match nothing"),
        (["mlp"], "mlp is a LlamaMLP: expected a linear layer"),
    ],
)
def test_target_modules_that_match_nothing_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        build(config=ilora_config(target_modules=targets))


def test_a_language_model_that_has_an_adapter_is_refused():
    llm = base_llm()
    build(llm=llm)
    with pytest.raises(ValueError, match="has gated LoRA layers already"):
        build(llm=llm)


@pytest.mark.parametrize("layers", [3, 100])
def test_more_layers_than_there_are_is_refused(layers):
    with pytest.raises(ValueError, match=f"cannot keep {layers} layers of LlamaForCausalLM, which has 2"):
        build(config=ilora_config(num_llm_layers=layers))


def test_a_tokenizer_without_pad_token_is_fine():
    bare = copy.deepcopy(tokenizer())
    bare.pad_token = None
    model = build(tokenizer=bare)
    assert model.score_candidates(HISTORIES, CANDIDATES).isfinite().all()


def test_a_tokenizer_without_eos_and_sep_is_refused():
    bare = copy.deepcopy(tokenizer())
    bare.eos_token = None
    with pytest.raises(ValueError, match="neither an eos nor a sep token"):
        build(tokenizer=bare)


@pytest.mark.parametrize("templates", [["no field"], ["{history} {history}"], ["{history} {other}"], []])
def test_invalid_templates_are_refused(templates):
    with pytest.raises(ValueError, match="template"):
        build(config=ilora_config(prompt_templates=templates))


def test_a_configuration_given_to_a_model_stays_as_it_was():
    config = ilora_config()
    before = config.to_dict()
    build(config=config)
    assert config.to_dict() == before


# --- questions that do not fit ---


@pytest.mark.parametrize(
    "method",
    [
        lambda model, histories: model.item_scores(histories),
        lambda model, histories: model.recommend(histories, 3),
        lambda model, histories: model.rank_items(histories, 3),
        lambda model, histories: model.score_candidates(histories, CANDIDATES),
        lambda model, histories: model.generate_recommendation(histories, CANDIDATES),
        lambda model, histories: model.materialize_lora(histories[1]),
        lambda model, histories: model.expert_gates(histories),
        lambda model, histories: model.build_prompts(histories),
    ],
    ids=[
        "item_scores",
        "recommend",
        "rank_items",
        "score_candidates",
        "generate_recommendation",
        "materialize_lora",
        "expert_gates",
        "build_prompts",
    ],
)
@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[3, 7], [0, 0]], r"history \d is empty: expected at least one item"),
        ([[3, 7], [2, 31]], r"history \d contains item 31: expected .*ids 1"),
        ([[3, 7], [-1, 2]], r"history \d contains item -1: expected .*ids 1"),
        ([[3.0, 7.0], [1.0, 2.0]], "torch.float32: expected item ids"),
    ],
)
def test_invalid_histories_are_refused(model, method, histories, message):
    with pytest.raises(ValueError, match=message):
        method(model, torch.tensor(histories))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.encode_titles("Heat"), r"titles is the string 'Heat': expected a list .*\['Heat'\]"),
        (lambda model: model.encode_titles(7), "titles is 7: expected a list of titles"),
        (lambda model: model.encode_titles(["Heat", " "]), "title 2 of 2 is ' ': expected text"),
        (lambda model: model.encode_titles(["Heat"], batch_size=0), "batch_size is 0: expected at least 1"),
        (lambda model: model.encode_items(batch_size=-2), "batch_size is -2: expected at least 1"),
        (lambda model: model.recommend("B07"), "histories are the string 'B07': expected a row of item ids"),
        (lambda model: model.recommend(7), "histories are of type int: expected a row of item ids"),
        (lambda model: model.score_candidates([[1]], "B07"), "candidates are not a table of item ids"),
        (lambda model: model.score_candidates([[1]], 7), r"candidates have shape \(\)"),
        (lambda model: model.materialize_lora("B07"), "history is not a row of item ids"),
        (lambda model: model.materialize_lora(7), r"history has shape \(\): expected one"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_an_example(model, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(model)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([[9, 2], [4, 31]], "candidates contain item 31: expected ids 1 to 30"),
        ([[9, 2], [4, -1]], "candidates contain item -1: expected ids 1 to 30"),
        ([[9, 2], [0, 0]], "row 1 has no candidates"),
        ([[9, 2]], re.escape("candidates have shape (1, 2)")),
        ([9, 2], re.escape("candidates have shape (2,)")),
        ([[9.0, 2.0], [1.0, 2.0]], "type torch.float32: expected item ids"),
        ([[], []], "type torch.float32"),
    ],
)
def test_invalid_candidates_are_refused(candidates, message, shown):
    """Even if no template shows candidates, so that no prompt is built from them."""
    model = tiny_model(prompt_templates=[WITH_CANDIDATES, HISTORY_ALONE] if shown else [HISTORY_ALONE])
    for ask in (model.score_candidates, model.generate_recommendation):
        with pytest.raises(ValueError, match=message):
            ask(HISTORIES, torch.tensor(candidates))


def test_rows_of_candidates_of_different_lengths_are_refused(model):
    with pytest.raises(ValueError, match=r"candidates are not a table of item ids .*: expected rows of equal length"):
        model.score_candidates(HISTORIES, [[9, 2], [4]])


def test_prompts_longer_than_the_context_are_refused():
    model = tiny_model(llm=base_llm(max_position_embeddings=40))
    with pytest.raises(ValueError, match=r"the prompt of row 0 has \d\d tokens: expected at most 40 .*max_history"):
        model.score_candidates(HISTORIES, CANDIDATES)
    with pytest.raises(ValueError, match="expected at most 40"):
        batch_of(model)


def test_prompts_that_leave_no_room_for_the_answer_are_refused():
    longest = tiny_model().build_prompts(HISTORIES, CANDIDATES).input_ids.shape[1]
    model = tiny_model(llm=base_llm(max_position_embeddings=longest + 5))
    for constrained in (True, False):
        with pytest.raises(ValueError, match=rf"have \d+ tokens: expected at most {longest + 5}, the context"):
            model.generate_recommendation(HISTORIES, CANDIDATES, constrained=constrained)
    model.generate_recommendation(HISTORIES, CANDIDATES, constrained=False, max_new_tokens=5)


def test_more_answers_than_items_or_beams_are_refused(model):
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=f"top_k is {top_k}: expected 1 to 3"):
            model.generate_recommendation(HISTORIES, CANDIDATES, top_k=top_k)
    with pytest.raises(ValueError, match="top_k is 31: expected 1 to 30"):
        model.generate_recommendation(HISTORIES, top_k=31)
    for settings in (
        {"num_beams": 1},
        {"num_beams": 2, "top_k": 3},
        {"num_beams": 2, "top_k": 3, "constrained": False},
    ):
        expected = max(settings.get("top_k", 1), 2)
        with pytest.raises(ValueError, match=f"num_beams is {settings['num_beams']}: expected at least {expected}"):
            model.generate_recommendation(HISTORIES, CANDIDATES, **settings)
    with pytest.raises(ValueError, match="top_k is 31"):
        model.rank_items(HISTORIES, 31)


def test_a_model_without_item_head_ranks_nothing():
    for ask in (tiny_model().item_scores, tiny_model().recommend, tiny_model().rank_items):
        with pytest.raises(ValueError, match="this model has no item head, which ranks the catalogue: train one"):
            ask(HISTORIES)


# --- batches that do not fit ---


def test_forward_needs_histories_or_gates(model):
    batch = batch_of(model)
    batch.pop("histories")
    with pytest.raises(ValueError, match="neither histories nor expert_gates were given"):
        model(**batch)


def test_placeholder_items_need_input_ids(model):
    batch = batch_of(model)
    batch.pop("input_ids")
    with pytest.raises(ValueError, match="placeholder_items were given without input_ids"):
        model(**batch)


def test_the_item_loss_needs_histories(model):
    batch = batch_of(model)
    gates = model.expert_gates(batch.pop("histories"))
    with pytest.raises(ValueError, match="this loss reads the recommender: expected histories"):
        model(**batch, expert_gates=gates)


def test_labels_need_title_labels(model):
    batch = batch_of(model)
    batch.pop("title_labels")
    with pytest.raises(ValueError, match="labels were given without title_labels"):
        model(**batch)


@pytest.mark.parametrize(("candidates", "times"), [([9, 3, 11], 0), ([2, 9, 2], 2)])
def test_candidates_that_lack_or_repeat_the_target_are_refused(candidates, times):
    """Otherwise the loss would silently teach the first candidate."""
    model = tiny_model(candidate_loss_weight=1.0)
    batch = PromptCollator(model.prompts, 0.5, scores_candidates=True)(ROWS)
    batch["candidates"][0] = torch.tensor(candidates)
    with pytest.raises(ValueError, match=f"candidates of row 0 contain its target 2 {times} times: expected it exact"):
        model(**batch)


def test_gates_of_another_batch_are_refused(model):
    batch = batch_of(model)
    batch.pop("labels")
    with pytest.raises(ValueError, match=re.escape("expert_gates have shape (2, 4): expected (3, 4)")):
        model(**batch, expert_gates=torch.full((2, 4), 0.25))


def test_more_or_fewer_items_than_placeholders_are_refused(model):
    batch = batch_of(model)
    found = int((batch["input_ids"][1] < 0).sum())
    fewer, more = batch["placeholder_items"].clone(), batch["placeholder_items"].clone()
    fewer[1, found - 1] = 0
    more[1, found] = 5
    for items, count in ((fewer, found - 1), (more, found + 1)):
        with pytest.raises(
            ValueError, match=f"row 1 has {found} placeholders for {count} items: expected equal numbers"
        ):
            model(**batch | {"placeholder_items": items})


def test_histories_outside_the_catalogue_are_refused_in_training(model):
    batch = batch_of(model)
    with pytest.raises(ValueError, match=f"contain item 31: expected ids 1..{NUM_ITEMS}"):
        model(**batch | {"histories": torch.full((3, 2), 31)})


def test_default_configuration_works_for_any_items():
    model = ILoraForRecommendation.from_base(
        base_llm(max_position_embeddings=2048),
        recommender(max_length=50),
        tokenizer(),
        catalogue(),
        untrained_recommender=True,
    )
    assert model.config.to_dict().items() >= {"rank": 8, "num_experts": 4, "router_type": "conv"}.items()
    assert isinstance(model.config, ILoraConfig)
    assert model.score_candidates(HISTORIES, CANDIDATES).isfinite().all()
