"""The published networks with random weights, and their classes under the authors' module names."""

import sys
import types

import pytest
import torch
from torch import nn

from tests.reference.published_gru_and_caser import GRU, Caser
from tests.reference.published_sasrec import (
    HIDDEN,
    LENGTH,
    NUM_ITEMS,
    MultiHeadAttention,
    PositionwiseFeedForward,
    SASRec,
)


@pytest.fixture
def reference():
    """The published network with weights far from their initial values, layer normalisations included."""
    torch.manual_seed(0)
    return with_random_weights(SASRec(HIDDEN, NUM_ITEMS, LENGTH))


@pytest.fixture(params=["gru4rec", "gru4rec of two layers", "caser", "caser of other heights"])
def other_reference(request):
    """The other published networks with weights far from their initial values."""
    torch.manual_seed(0)
    builders = {
        "gru4rec": lambda: GRU(HIDDEN, NUM_ITEMS, LENGTH),
        "gru4rec of two layers": lambda: GRU(HIDDEN, NUM_ITEMS, LENGTH, layers=2),
        "caser": lambda: Caser(HIDDEN, NUM_ITEMS, LENGTH),
        "caser of other heights": lambda: Caser(HIDDEN, NUM_ITEMS, LENGTH, heights=(5, 1)),
    }
    return with_random_weights(builders[request.param]())


def with_random_weights(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model.eval()


@pytest.fixture
def authors_modules(monkeypatch):
    """The classes of the network under the authors' module names, so that they are pickled as in their files."""
    for module, classes in (
        ("recommender", ()),
        ("recommender.A_SASRec_final_bce_llm", (SASRec, GRU, Caser)),
        ("SASRecModules_ori", (MultiHeadAttention, PositionwiseFeedForward)),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{c.__name__: c for c in classes}))
        for authors_class in classes:
            monkeypatch.setattr(authors_class, "__module__", module)
