"""The compared programs give the same answers, and tokens, layers and tokenizer calls are counted."""

import cProfile

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import ilora_answers
from hf_ilora.models.ilora.gated_lora import gated_layers
from tests.synthetic import cyclic_sequences
from tests.tiny_tokenizers import byte_level_bpe

ROWS = np.arange(3)


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=40)


@pytest.fixture
def arguments(tmp_path):
    tokenizer = byte_level_bpe()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3, pad_token_id=None, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return ilora_answers.AnswerBenchmarkArguments(
        data_dir="unused",
        output_dir=str(tmp_path),
        llm=str(tmp_path / "llm"),
        rounds=2,
        batch_size=3,
        answer_layers=2,
        answer_tokens=9,
        step_layers=1,
    )


@pytest.fixture
def answers(sequences, arguments):
    answers = ilora_answers.Answers(sequences, arguments, "float32")
    with torch.no_grad():  # large enough to change the answers
        for name, layer in gated_layers(answers.model.llm).items():
            published = answers.published.get_submodule(name)
            layer.lora_B.normal_()
            for expert, part in enumerate(layer.lora_B.split(layer.rank // layer.num_experts, dim=1)):
                published.lora_B[expert].weight.copy_(part)
    return answers


def test_both_forms_generate_the_same_tokens_from_the_same_weights(answers):
    gated, published = (answers.generate(ROWS, form, 9, True) for form in (False, True))
    assert torch.equal(gated, published) and gated.shape == (3, 9)
    with torch.no_grad():
        for layer in gated_layers(answers.model.llm).values():
            layer.lora_B.zero_()
    assert not torch.equal(answers.generate(ROWS, False, 9, True), published)
    own, shared = ({p.data_ptr() for p in llm.parameters()} for llm in (answers.model.llm, answers.published))
    assert {weight.data_ptr() for weight in answers.model.llm.lm_head.parameters()} <= own & shared
    assert not gated_layers(answers.published)


def test_answers_end_after_the_length_of_their_program_or_at_the_terminator(answers):
    model = answers.model
    longest = max(len(model.title_tokens.sequence(int(item))) for item in answers.rows.target[ROWS])
    lengths = {name: program().shape[1] for name, program in answers.programs(ROWS, 9).items()}
    assert lengths == {
        "score_candidates": answers.rows.candidates.shape[1],
        "published_full": 9,
        "published_title": longest,
        "published_free": lengths["gated_free"],
        "gated_full": 9,
        "gated_title": longest,
        "gated_free": lengths["gated_free"],
    }
    row = ROWS[:1]
    model.title_tokens.terminator_id = int(answers.generate(row, True, 9, True)[0, 3])
    ended, forced = (answers.generate(row, True, 9, to_the_end) for to_the_end in (False, True))
    assert ended.shape[1] <= 4 and ended[0, -1] == model.title_tokens.terminator_id
    assert forced.shape[1] == 9 and model.title_tokens.terminator_id not in forced[0, :8]


def test_the_report_has_the_measured_values(sequences, arguments):
    results = {
        "setting": vars(arguments) | {"torch": "2"},
        "answers": {"float32": ilora_answers.measure_answers(sequences, arguments, "float32")},
        "prompts": ilora_answers.measure_prompts(sequences, arguments),
    }
    answered, prompts = results["answers"]["float32"], results["prompts"]
    assert answered["layers"] == 2 and answered["tokens_per_row"]["published_full"] == 9
    assert prompts["tokenizer_calls"] == 0 and 0 < prompts["fraction"] < 1
    answered["rows_per_second"]["published_full"] = 2.0
    answered["times_faster"]["published_full"], answered["times_faster_cpu"]["published_full"] = 4.9, 5.0
    prompts["fraction"] = 0.019
    lines = ilora_answers.report(results).splitlines()
    assert "| generating, published form of the layer, all tokens | 9.0 | 2.00 | 4.90 (5.00) |" in lines
    assert lines[-1].endswith("ms of it, 1.90 %, and calls a tokenizer 0 times.")


def test_calls_of_tokenizers_are_seen():
    tokenizer = byte_level_bpe()
    with cProfile.Profile() as profile:
        torch.zeros(2).sum()
    assert ilora_answers.tokenizer_calls(profile) == 0
    for call in (tokenizer, tokenizer.backend_tokenizer.encode):
        with cProfile.Profile() as profile:
            call("Heat")
        assert ilora_answers.tokenizer_calls(profile) > 0


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"dtypes is \['float8'\]: expected some of float32, bfloat16, float16"):
        ilora_answers.AnswerBenchmarkArguments("data", "out", dtypes=["float8"])
    with pytest.raises(ValueError, match="rounds is 0: expected at least 1"):
        ilora_answers.AnswerBenchmarkArguments("data", "out", rounds=0)
