"""A module of one's own under any layout: `fiveply train recipes/own_module.py --layout dp=2,tp=2,pp=2`.

It is `own_module_plain.py` with a few lines changed; docs/own-module.md shows them.
"""

import torch
from torch import nn
from torch.utils.data import TensorDataset

import fiveply

torch.set_default_dtype(torch.float64)


class MyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 50)
        self.fc2 = nn.Linear(50, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def make_data(rows=500):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 20, generator=random)
    return TensorDataset(x, torch.stack((x.sum(1).sin(), x[:, 0] * x[:, 1], x[:, 2].abs()), dim=1))


def make_adam(named_parameters):
    return torch.optim.Adam([parameter for _, parameter in named_parameters], lr=3e-3)


def main():
    world = fiveply.join(seed=0)
    dataset, criterion = make_data(), nn.MSELoss()
    job = world.parallelize(
        MyModel, loss=criterion, optimizer=make_adam, tp={"fc1": "column", "fc2": "row"}, stages=["fc1", "fc2"]
    )
    loader = world.loader(dataset, global_batch=64)
    for epoch in range(10):
        for batch in loader:
            loss = job.step(batch)
        if world.rank == 0:
            print(f"epoch {epoch + 1} loss {loss:.12f}")
    state = job.state_dict()
    if world.rank == 0:
        torch.save(state, "own_module.pt")


if __name__ == "__main__":
    main()
