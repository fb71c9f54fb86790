"""Small next-item models of every architecture, with random weights."""

from hf_ilora import CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem, SASRecConfig, SASRecForNextItem

NUM_ITEMS, MAX_LENGTH = 40, 10
MODELS = {
    "sasrec": (SASRecForNextItem, SASRecConfig, {}),
    "sasrec_with_everything": (
        SASRecForNextItem,
        SASRecConfig,
        {"attention_decay": True, "repeat_bias": True, "head_bias": True, "score_temperature": 0.1},
    ),
    "sasrec_reference": (SASRecForNextItem, SASRecConfig, {"block_type": "reference", "position_alignment": "oldest"}),
    "sasrec_untied": (SASRecForNextItem, SASRecConfig, {"tie_word_embeddings": False}),
    "gru4rec": (GRU4RecForNextItem, GRU4RecConfig, {"num_hidden_layers": 2}),
    "caser": (CaserForNextItem, CaserConfig, {"head_bias": True}),
    "caser_reference": (CaserForNextItem, CaserConfig, {"block_type": "reference", "tie_word_embeddings": False}),
}


def next_item_model(kind: str, **changes):
    """A model of a kind; its weights are large enough for scores to differ."""
    model_class, config_class, settings = MODELS[kind]
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": MAX_LENGTH}
    model = model_class(config_class(**sizes | settings | changes)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5)
    return model
