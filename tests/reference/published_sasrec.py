"""The published network as plain modules, right-padded with id N, written from the formula; and its files."""

import math

import numpy as np
import torch
from torch import nn

NUM_ITEMS, HIDDEN, LENGTH = 11, 8, 5


class MultiHeadAttention(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.num_heads = 1
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, q, x, real):
        length = q.shape[1]
        scores = self.linear_q(q) @ self.linear_k(x).transpose(1, 2) / math.sqrt(q.shape[2])  # (batch, length, length)
        visible = torch.ones(length, length).tril().bool() & real[:, None, :]
        return self.softmax(scores.masked_fill(~visible, -1e9)) @ self.linear_v(x) + q


class PositionwiseFeedForward(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.w_1, self.w_2 = nn.Conv1d(hidden, hidden, 1), nn.Conv1d(hidden, hidden, 1)
        self.layer_norm, self.relu = nn.LayerNorm(hidden), nn.ReLU()

    def forward(self, z):
        return self.layer_norm(self.w_2(self.relu(self.w_1(z.transpose(1, 2)))).transpose(1, 2) + z)


class SASRec(nn.Module):
    def __init__(self, hidden, item_num, state_size):
        super().__init__()
        self.item_num = np.int64(item_num)  # as read from a data frame
        self.device = torch.device("cpu")
        self.item_embeddings = nn.Embedding(item_num + 1, hidden)
        self.positional_embeddings = nn.Embedding(state_size, hidden)
        self.emb_dropout = nn.Dropout(0.1)
        self.ln_1, self.ln_2, self.ln_3 = (nn.LayerNorm(hidden) for _ in range(3))
        self.mh_attn, self.feed_forward = MultiHeadAttention(hidden), PositionwiseFeedForward(hidden)
        self.s_fc = nn.Linear(hidden, item_num)

    def user_embedding(self, ids, lengths):
        real = ids != int(self.item_num)
        x = (self.item_embeddings(ids) + self.positional_embeddings.weight) * real.unsqueeze(-1)
        f = self.feed_forward(self.ln_2(self.mh_attn(self.ln_1(x), x, real)))
        return self.ln_3(f * real.unsqueeze(-1))[torch.arange(len(ids)), lengths - 1]  # (batch, hidden)

    def forward(self, ids, lengths):
        return self.s_fc(self.user_embedding(ids, lengths))


def save(value, path, zip_format):
    torch.save(value, path, _use_new_zipfile_serialization=zip_format)


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
