"""V-MCR² in Hugging Face's Trainer: the loss is part of the model, a callback latches it.

    pip install '.[sklearn]' transformers accelerate
    python examples/huggingface_trainer.py

Its batches are dicts, and `latch_from` needs pairs: a generator converts them.
"""

import tempfile

import torch
import transformers
from plain_loop import FEATURE_DIM, LATCH_EVERY, NUM_CLASSES, Featurizer
from sklearn.datasets import load_digits

import vmcr2


class WithLoss(torch.nn.Module):
    """What the Trainer expects of a model: a loss in its output whenever there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.featurizer = Featurizer()
        self.loss = vmcr2.VMCR2Loss(NUM_CLASSES, FEATURE_DIM)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        features = self.featurizer(pixel_values)
        return {"features": features} if labels is None else {"loss": self.loss(features, labels), "features": features}


class Latcher(transformers.TrainerCallback):
    """Latches before the first epoch, and again every LATCH_EVERY epochs."""

    def on_epoch_begin(self, args, state, control, **given) -> None:  # noqa: ANN001, ANN003
        if round(state.epoch or 0) % LATCH_EVERY == 0:
            model: WithLoss = given["model"]
            pairs = ((batch["pixel_values"], batch["labels"]) for batch in given["train_dataloader"])
            model.loss.latch_from(model.featurizer, pairs)


def main(epochs: int = 20) -> dict[str, float]:
    """Trains, and returns the metrics of the evaluation afterwards."""
    x, y = load_digits(return_X_y=True)
    samples = [
        {"pixel_values": torch.tensor(image).float(), "labels": int(label)}
        for image, label in zip(x / 16, y, strict=True)
    ]

    def rates(prediction: transformers.EvalPrediction) -> dict[str, float]:
        features, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        return {"reduction": float(vmcr2.rate_reduction(features, labels).reduction)}

    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=WithLoss(),
            args=transformers.TrainingArguments(
                folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=360,
                per_device_eval_batch_size=360,
                learning_rate=0.5,
                optim="sgd",
                optim_args="momentum=0.9",
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                report_to="none",
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
                seed=0,
            ),
            train_dataset=samples[:1440],
            eval_dataset=samples[1440:],
            compute_metrics=rates,
            callbacks=[Latcher()],
        )
        trainer.train()
        figures = trainer.evaluate()
    print(figures)
    return figures


if __name__ == "__main__":
    main()
