"""V-MCR² in a plain PyTorch loop: latch, train, log ΔR, classify. Seconds on one CPU core.

pip install '.[sklearn]'
python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import vmcr2

NUM_CLASSES, FEATURE_DIM = 10, 64
LATCH_EVERY = 50  # epochs


class Featurizer(nn.Module):
    """Any network whose features are rows of norm 1 will do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, FEATURE_DIM, bias=False)
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.body(inputs), dim=1)


def main(epochs: int = 40) -> float:
    """Trains, and returns the accuracy on the test set."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in split)
    x_train, x_test = x_train.float(), x_test.float()
    data = torch.utils.data.TensorDataset(x_train, y_train)
    loader = torch.utils.data.DataLoader(data, batch_size=360, shuffle=True)

    model = Featurizer()
    loss = vmcr2.VMCR2Loss(NUM_CLASSES, FEATURE_DIM)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for epoch in range(epochs):
        if epoch % LATCH_EVERY == 0:
            loss.latch_from(model, loader)  # before training, and again from time to time
        model.train()
        for inputs, labels in loader:
            value = loss(model(inputs), labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            with torch.no_grad():
                rates = vmcr2.rate_reduction(model.eval()(x_train), y_train)
            print(
                f"epoch {epoch + 1}: R {rates.expansion:.1f} − R_c {rates.compression:.1f} = ΔR {rates.reduction:.1f}"
            )

    with torch.no_grad():
        train, test = model.eval()(x_train).numpy(), model(x_test).numpy()
    accuracy = vmcr2.NearestSubspaceClassifier().fit(train, y_train.numpy()).score(test, y_test.numpy())
    print(f"test accuracy {accuracy:.4f}, nearest subspace")
    return accuracy


if __name__ == "__main__":
    main()
