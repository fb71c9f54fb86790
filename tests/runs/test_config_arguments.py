"""A configuration's fields as options of a recipe."""

import dataclasses

import pytest

from hf_ilora import SASRecConfig
from hf_ilora.models.next_item.configuration_next_item import NextItemConfig
from hf_ilora.runs import config_arguments, parse_arguments

Arguments = config_arguments(SASRecConfig, exclude=("num_items", "pad_token_id"))


def test_every_field_of_the_configuration_has_its_default_and_help():
    fields = {field.name: field for field in dataclasses.fields(Arguments)}
    declared = set(NextItemConfig.__annotations__) | set(SASRecConfig.__annotations__)
    assert {"hidden_size", "num_hidden_layers"} <= set(fields)  # of the shared class and of SASRec's own
    assert set(fields) == declared - {"num_items", "pad_token_id", "model_type"}
    config = SASRecConfig(num_items=5)
    for name, field in fields.items():
        assert field.default == vars(config)[name], name
        assert len(field.metadata["help"]) > 10, f"{name} has no text in the docstring's Args"


def test_parsed_arguments_build_the_configuration():
    (arguments,) = parse_arguments([Arguments], ["--hidden_dropout", "0", "--intermediate_size", "48"])
    config = SASRecConfig(num_items=5, **dataclasses.asdict(arguments))
    assert config.hidden_dropout == 0 and config.intermediate_size == 48 and config.score_temperature is None


def test_wrong_value_is_refused_by_the_configuration():
    (arguments,) = parse_arguments([Arguments], ["--hidden_dropout", "2"])
    with pytest.raises(ValueError, match="hidden_dropout is 2"):
        SASRecConfig(num_items=5, **dataclasses.asdict(arguments))
