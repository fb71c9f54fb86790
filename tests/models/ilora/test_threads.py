"""Several threads that ask one model at once get what each would get alone."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_ilora.models.ilora.gated_lora import add_gated_lora, gated_layers
from tests.models.ilora.ilora_fixtures import ALPHA, EXPERTS, RANK, recommender, tiny_model
from tests.tiny_language_models import base_llm

THREADS = 8
HISTORIES = [[[place + 1, 2 * place + 3, 20 - place]] for place in range(THREADS)]
QUESTIONS = {
    "rank_items": lambda model, history: model.rank_items(history, 30, exclude_seen=False)[1],
    "expert_gates": lambda model, history: model.expert_gates(history),
    "score_candidates": lambda model, history: model.score_candidates(history, [[1, 2, 3, 4]]),
    "generate": lambda model, history: model.generate_recommendation(history, top_k=2, num_beams=2).scores,
}


@pytest.fixture(autouse=True)
def _threads_that_alternate_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def asked_at_once(ask, arguments) -> list:
    barrier = threading.Barrier(len(arguments))

    def ask_together(argument):
        barrier.wait()
        return ask(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(ask_together, arguments))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_ilora_answers_each_thread_with_its_own_gates(question, training):
    router = "noisy" if question == "expert_gates" else "linear"  # noise in training only
    model = tiny_model(item_head="residual", lora_dropout=0.3, router_type=router).train(training)
    ask = QUESTIONS[question]
    expected = [ask(model, history) for history in HISTORIES]
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)  # the control: users differ
    answers = asked_at_once(lambda history: ask(model, history), HISTORIES)
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    assert model.training is training
    assert all(layer.training is training for layer in gated_layers(model.llm).values())
    assert not any(module.training for module in model.recommender.modules())


def test_asking_for_gates_in_training_mode_changes_no_running_statistics():
    model = tiny_model(router_type="conv").train()
    before = copy.deepcopy(model.router.state_dict())
    model.expert_gates(HISTORIES[0])
    torch.testing.assert_close(model.router.state_dict(), before, rtol=0, atol=0)


def test_a_sasrec_in_training_mode_answers_every_thread_without_dropout():
    model = recommender(hidden_dropout=0.5, attention_dropout=0.5).train()
    model.model.position_embedding.eval()  # a mode of its own, which answers restore as well
    modes = [module.training for module in model.modules()]
    expected = [copy.deepcopy(model).eval().recommend(history) for history in HISTORIES]
    for _ in range(5):
        answers = asked_at_once(model.recommend, HISTORIES)
        torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
        assert [module.training for module in model.modules()] == modes


def gradient_of_gates(llm, gates: torch.Tensor) -> torch.Tensor:
    gates = gates.clone().requires_grad_()
    output = llm(torch.arange(1, 15).view(2, 7), expert_gates=gates)
    # only the gates, whose gradient no other thread adds to
    return torch.autograd.grad(output.logits.float().square().mean(), gates)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_threads_that_train_at_once_keep_their_gates_in_the_recompute_too(checkpointing):
    llm = base_llm()
    add_gated_lora(llm, ["q_proj", "up_proj"], RANK, EXPERTS, ALPHA, 0.0)
    with torch.no_grad():
        for layer in gated_layers(llm).values():
            layer.lora_B.normal_(std=0.1)
    llm.train()
    all_gates = torch.rand(THREADS, 2, EXPERTS).softmax(-1)
    expected = [gradient_of_gates(llm, gates) for gates in all_gates]
    if checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    gradients = asked_at_once(lambda gates: gradient_of_gates(llm, gates), list(all_gates))
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)

    # A forward here and its backward, with the recompute, in another thread.
    gates = all_gates[0].clone().requires_grad_()
    loss = llm(torch.arange(1, 15).view(2, 7), expert_gates=gates).logits.float().square().mean()
    llm(torch.arange(1, 15).view(2, 7), expert_gates=all_gates[1])
    with ThreadPoolExecutor(1) as pool:
        gradient = pool.submit(torch.autograd.grad, loss, gates).result()[0]
    torch.testing.assert_close(gradient, expected[0], rtol=1e-4, atol=1e-6)


def test_a_pickled_layer_starts_without_gates():
    llm = base_llm()
    add_gated_lora(llm, ["q_proj"], RANK, EXPERTS, ALPHA, 0.0)
    layer = next(iter(gated_layers(llm).values()))
    layer.hand_gates(torch.ones(1, EXPERTS))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(ValueError, match="no expert_gates reached this layer"):
            copied(torch.ones(1, 1, layer.base_layer.in_features))
