"""The published network with weights, and its classes under the authors' names."""

import sys
import types

import pytest
import torch
from torch import nn

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
    model = SASRec(HIDDEN, NUM_ITEMS, LENGTH).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


@pytest.fixture
def authors_modules(monkeypatch):
    """The classes of the network under the authors' module names, so that they are pickled as in their files."""
    for module, classes in (
        ("recommender", ()),
        ("recommender.A_SASRec_final_bce_llm", (SASRec,)),
        ("SASRecModules_ori", (MultiHeadAttention, PositionwiseFeedForward)),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{c.__name__: c for c in classes}))
        for authors_class in classes:
            monkeypatch.setattr(authors_class, "__module__", module)
