"""Code that comes with a model runs only where the caller says so, and nobody is asked on the terminal."""

import ast
import json
from pathlib import Path

import pytest

import hf_ilora
from hf_ilora.distillation.teachers import load_teacher
from hf_ilora.models.ilora.language_models import load_language_model, load_tokenizer
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.loading import load_recommender
from tests.models.ilora.ilora_fixtures import NUM_ITEMS, fresh_model, recommender, tokenizer
from tests.tiny_language_models import base_llm

OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(autouse=True)
def _nobody_at_the_terminal(monkeypatch):
    def asked(question=""):
        pytest.fail(f"asked on the terminal: {question}")

    monkeypatch.setattr("builtins.input", asked)


def give_own_code(folder: Path, model_type: str, marker: Path) -> None:
    """Let a saved model name code of its own, which leaves `marker` when it runs."""
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "own.OwnModel") | {"AutoConfig": "own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))


@pytest.fixture
def own_llm(tmp_path):
    folder = tmp_path / "own_llm"
    base_llm().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    give_own_code(folder, "own_llama", tmp_path / "ran")
    return folder


@pytest.mark.parametrize(
    "load",
    [
        load_recommender,
        lambda folder: load_teacher(folder, 3, NUM_ITEMS),
        load_language_model,
    ],
    ids=["load_recommender", "load_teacher", "load_language_model"],
)
def test_a_folder_with_unknown_code_is_refused_without_a_question(tmp_path, load):
    recommender().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    give_own_code(tmp_path / "model", "unknown_type", tmp_path / "ran")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_refused_without_a_question(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_ilora_on_a_language_model_with_its_own_code_loads_where_the_caller_trusts_it(own_llm, tmp_path):
    llm, *_ = load_language_model(own_llm, trust_remote_code=True)
    model = fresh_model(llm=llm, item_head="residual").eval()
    model.config.llm_name_or_path = str(own_llm)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "ran").unlink()
    for load in (load_recommender, ILoraForRecommendation.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(tmp_path / "adapter")
        assert not (tmp_path / "ran").exists()
        loaded = load(tmp_path / "adapter", trust_remote_code=True)
        assert type(loaded.llm).__name__ == "OwnModel"
        assert loaded.recommend([[3, 7]], 5)[0].tolist() == model.recommend([[3, 7]], 5)[0].tolist()
        (tmp_path / "ran").unlink(missing_ok=True)


def test_every_call_of_an_auto_class_says_whether_code_is_trusted():
    """Without the argument, transformers asks on the terminal."""
    package = Path(hf_ilora.__file__).parent
    files = [*package.rglob("*.py"), *(Path(__file__).parents[2] / "recipes").glob("*.py")]
    calls = [
        (path.name, node)
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.startswith("Auto")
    ]
    assert len(calls) > 5
    for name, call in calls:
        given = [ast.unparse(keyword) for keyword in call.keywords]
        assert any("trust_remote_code" in text or text == "**shared_arguments" for text in given), (name, call.lineno)
