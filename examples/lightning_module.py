"""V-MCR² in a LightningModule: latched before the first epoch, and again every LATCH_EVERY epochs.

    pip install '.[sklearn]' lightning
    python examples/lightning_module.py

Lightning's sanity check validates before anything is trained, and so before there is a dictionary: `validation_step`
logs ΔR of the features, which needs none. A validation that calls the loss would raise NotLatchedError there; skip the
check with num_sanity_val_steps=0, or latch in `on_fit_start`, which comes before it.
"""

import lightning
import torch
from plain_loop import FEATURE_DIM, LATCH_EVERY, NUM_CLASSES, Featurizer
from sklearn.datasets import load_digits

import vmcr2


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Featurizer()
        # A submodule: moved to the device with the module, and saved in its checkpoints.
        self.loss = vmcr2.VMCR2Loss(NUM_CLASSES, FEATURE_DIM)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch % LATCH_EVERY == 0:
            self.loss.latch_from(self.model, self.trainer.train_dataloader)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        inputs, labels = batch
        value = self.loss(self.model(inputs), labels)
        self.log("mismatch", value)
        return value

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> None:
        inputs, labels = batch
        rates = vmcr2.rate_reduction(self.model(inputs), labels, num_classes=NUM_CLASSES)
        self.log("ΔR", rates.reduction, prog_bar=True)
        if not self.trainer.sanity_checking:
            self.log("residual", self.loss.rates(self.model(inputs), labels).residual)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def main(epochs: int = 20, **trainer: object) -> dict[str, float]:
    """Trains, and returns the last metrics logged."""
    lightning.seed_everything(0)
    x, y = load_digits(return_X_y=True)
    data = torch.utils.data.TensorDataset(torch.tensor(x / 16).float(), torch.tensor(y))
    train, test = torch.utils.data.random_split(data, [0.8, 0.2])
    fit = lightning.Trainer(max_epochs=epochs, log_every_n_steps=1, **trainer)
    fit.fit(
        Digits(),
        torch.utils.data.DataLoader(train, batch_size=360, shuffle=True),
        torch.utils.data.DataLoader(test, batch_size=360),
    )
    figures = {name: float(value) for name, value in fit.callback_metrics.items()}
    print(figures)
    return figures


if __name__ == "__main__":
    main()
