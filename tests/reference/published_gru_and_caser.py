"""The published GRU4Rec and Caser: the authors' parameter names, and the formulas item by item, filter by filter."""

import torch
from torch import nn

FILTERS = 3


class GRU(nn.Module):
    """Scores from the state after the last item; no dropout; an untied head with biases."""

    def __init__(self, hidden, item_num, state_size, layers=1):
        super().__init__()
        self.item_num, self.state_size = item_num, state_size
        self.item_embeddings = nn.Embedding(item_num + 1, hidden)
        self.gru = nn.GRU(hidden, hidden, layers, batch_first=True)
        self.s_fc = nn.Linear(hidden, item_num)

    def user_embedding(self, ids, lengths):
        return torch.stack([self.state_after(row[:length]) for row, length in zip(ids, lengths, strict=True)])

    def state_after(self, items):
        inputs = [self.item_embeddings.weight[item] for item in items]
        for layer in range(self.gru.num_layers):
            named = {kind: getattr(self.gru, f"{kind}_l{layer}").chunk(3) for kind in ("weight_ih", "weight_hh")}
            named |= {kind: getattr(self.gru, f"{kind}_l{layer}").chunk(3) for kind in ("bias_ih", "bias_hh")}
            state = torch.zeros(self.gru.hidden_size)
            for place, read in enumerate(inputs):
                from_input = [w @ read + b for w, b in zip(named["weight_ih"], named["bias_ih"], strict=True)]
                from_state = [w @ state + b for w, b in zip(named["weight_hh"], named["bias_hh"], strict=True)]
                reset, update = (torch.sigmoid(from_input[gate] + from_state[gate]) for gate in (0, 1))
                fresh = torch.tanh(from_input[2] + reset * from_state[2])
                state = fresh + update * (state - fresh)
                inputs[place] = state
        return inputs[-1]

    def forward(self, ids, lengths):
        return self.s_fc(self.user_embedding(ids, lengths))


class Caser(nn.Module):
    """Scores from the maxima of horizontal filters and from one vertical filter; padding is on the right."""

    def __init__(self, hidden, item_num, state_size, heights=(2, 3, 4)):
        super().__init__()
        self.item_num, self.state_size = item_num, state_size
        self.item_embeddings = nn.Embedding(item_num + 1, hidden)
        self.horizontal_cnn = nn.ModuleList([nn.Conv2d(1, FILTERS, (height, hidden)) for height in heights])
        self.vertical_cnn = nn.Conv2d(1, 1, (state_size, 1))
        self.s_fc = nn.Linear(FILTERS * len(heights) + hidden, item_num)
        self.dropout = nn.Dropout(0.1)

    def user_embedding(self, ids, lengths):
        return torch.stack([self.features_of(row[:length]) for row, length in zip(ids, lengths, strict=True)])

    def features_of(self, items):
        picture = torch.zeros(self.state_size, self.item_embeddings.embedding_dim)  # (places, hidden)
        picture[: len(items)] = self.item_embeddings.weight[items]
        features = []
        for filters in self.horizontal_cnn:
            height = filters.kernel_size[0]
            for weight, bias in zip(filters.weight[:, 0], filters.bias, strict=True):  # (height, hidden)
                places = range(self.state_size - height + 1)
                features.append(max((weight * picture[i : i + height]).sum() + bias for i in places).clamp(min=0))
        weights = self.vertical_cnn.weight.flatten()  # (places,)
        vertical = [(weights * number).sum() + self.vertical_cnn.bias[0] for number in picture.T]
        return torch.stack([*features, *(value.clamp(min=0) for value in vertical)])

    def forward(self, ids, lengths):
        return self.s_fc(self.user_embedding(ids, lengths))
