"""A module of one's own in ordinary PyTorch: one process."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
    torch.manual_seed(0)
    dataset, criterion = make_data(), nn.MSELoss()
    model = MyModel()
    optimizer = make_adam(model.named_parameters())
    loader = DataLoader(dataset, batch_size=64)
    for epoch in range(10):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1} loss {loss.item():.12f}")
    torch.save(model.state_dict(), "own_module.pt")


if __name__ == "__main__":
    main()
