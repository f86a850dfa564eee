"""V-MCR² on several processes: a plain loop under DistributedDataParallel. Seconds on two CPU cores.

pip install '.[sklearn]'
torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import vmcr2

NUM_CLASSES, FEATURE_DIM = 10, 64


class Featurizer(nn.Module):
    """Any network whose features are rows of norm 1 will do; BatchNorm would have to be SyncBatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, FEATURE_DIM))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.normalize(self.body(inputs), dim=1)


def main(epochs: int = 25) -> None:
    dist.init_process_group()  # gloo on CPUs, NCCL on GPUs; torchrun assigns the ranks
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16, y, test_size=0.2, stratify=y, random_state=0)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in split)
    x_train, x_test = x_train.float(), x_test.float()
    # 360 samples per batch, 36 of each class, split over the ranks.
    sampler = vmcr2.ClassBalancedBatchSampler(y_train, 36)
    loader = DataLoader(TensorDataset(x_train, y_train), batch_sampler=sampler)

    model = DistributedDataParallel(Featurizer())
    # With many classes: structure="block", sharded=True. Each rank then holds only its own classes' atoms and codes.
    loss = vmcr2.VMCR2Loss(NUM_CLASSES, FEATURE_DIM)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss.latch_from(model, loader)  # each rank's share; merged at the end
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, labels in loader:
            value = loss(model(inputs), labels)  # for the batch of all ranks, the same on each
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    if dist.get_rank() == 0:
        with torch.no_grad():
            train, test = model.module(x_train).numpy(), model.module(x_test).numpy()
        accuracy = vmcr2.NearestSubspaceClassifier().fit(train, y_train.numpy()).score(test, y_test.numpy())
        print(f"loss {value.item():.4f}, test accuracy {accuracy:.4f} on {dist.get_world_size()} processes")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
