"""Which device a run computes on, on machines with other devices than this one."""

import pytest
import torch
import transformers.training_args
import yaml

from hf_ilora import DistillationTrainer, ILoraTrainer, NextItemTrainer
from hf_ilora.devices import launched_on_cpu, uses_accelerator, uses_cuda
from hf_ilora.distillation.losses import propensity_scores
from hf_ilora.evaluation.expert_usage import expert_usage
from hf_ilora.evaluation.rank_metrics import hit_at, ndcg_at, reciprocal_rank
from hf_ilora.evaluation.ranking import RankingMetrics
from hf_ilora.titles.pca import pca_embeddings
from hf_ilora.training.recommender_trainer import RecommenderTrainer
from tests.paths import PROJECT

TRAINERS = (NextItemTrainer, DistillationTrainer, ILoraTrainer)
EVALUATES_NOT = {"eval_strategy": "no", "early_stopping_patience": 0, "load_best_model_at_end": False}


@pytest.fixture
def four_gpus(monkeypatch):
    """A machine with four GPUs, as far as torch tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


def arguments(trainer, folder, **settings):
    return trainer.arguments_class(str(folder), **EVALUATES_NOT | settings)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_launch_on_the_cpu_computes_on_the_cpu_of_a_machine_with_gpus(four_gpus, monkeypatch, tmp_path, trainer):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    made = arguments(trainer, tmp_path)
    assert made.use_cpu and made.device == torch.device("cpu") and made.n_gpu == 0
    assert not made.bf16 and not made.dataloader_pin_memory
    assert launched_on_cpu() and not uses_accelerator() and not uses_cuda()


def test_without_such_a_launch_the_gpu_is_used(four_gpus, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert uses_accelerator() and uses_cuda() and not launched_on_cpu()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_refuses_several_gpus_in_one_process(monkeypatch, tmp_path, trainer):
    monkeypatch.setattr(transformers.training_args.TrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match="this process sees 4 GPUs: expected one per process"):
        RecommenderTrainer.__init__(trainer.__new__(trainer), None, arguments(trainer, tmp_path, use_cpu=True))


def test_launch_files_show_a_single_process_one_gpu_or_none():
    found = {}
    for name in ("cpu", "single_gpu"):
        settings = yaml.safe_load((PROJECT / "accelerate_configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        found[name] = settings["gpu_ids"]
    assert found == {"cpu": "-1", "single_gpu": "0"}


class OnMps(torch.Tensor):
    """Says that it lies on an accelerator; refuses float64 until it was copied to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "cpu":
            return args[0].as_subclass(torch.Tensor)
        if name == "double":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def test_float64_is_computed_on_the_cpu():
    ranks = torch.tensor([[1, 4], [3, 12], [20, 1]])
    for metric in (lambda r: ndcg_at(r, 10), lambda r: hit_at(r, 10), reciprocal_rank):
        torch.testing.assert_close(metric(ranks.as_subclass(OnMps)), metric(ranks))
    found, expected = (
        RankingMetrics(10)(type("Prediction", (), {"predictions": values}))
        for values in (ranks.as_subclass(OnMps), ranks)
    )
    assert found == expected
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pca_embeddings(table.as_subclass(OnMps), 2), pca_embeddings(table, 2))
    gates = table.softmax(1)
    assert expert_usage(gates.as_subclass(OnMps)) == expert_usage(gates)
    counts = torch.arange(5.0)
    torch.testing.assert_close(propensity_scores(counts.as_subclass(OnMps)), propensity_scores(counts))
