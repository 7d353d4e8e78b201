"""What a classifier gives: logits, auxiliary logits, their losses, and its accuracy."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from small_training import Net, assert_same, batches, fit, state_of
from torch import Tensor, nn

from pfs_fast.errors import ConfigError, LoaderError, ModelError, NonFiniteLossError
from pfs_fast.training.batches import split_outputs
from pfs_fast.training.evaluation import Accuracy
from pfs_fast.training.train import evaluate

# Outputs

Google = namedtuple("Google", ["logits", "aux_logits2", "aux_logits1"])
Inception = namedtuple("Inception", ["logits", "aux_logits"])
LOGITS, FIRST, SECOND = (torch.full((4, 2), float(value)) for value in range(3))


@pytest.mark.parametrize(
    ("outputs", "auxiliary"),
    [
        (LOGITS, []),
        ((LOGITS, FIRST), []),
        ([LOGITS], []),
        ({"aux": FIRST, "out": LOGITS}, []),
        ({"hidden": FIRST, "logits": LOGITS}, []),
        ({"scores": LOGITS}, []),
        (Google(LOGITS, FIRST, SECOND), [FIRST, SECOND]),
        (Google(LOGITS, None, None), []),
        (Inception(LOGITS, FIRST), [FIRST]),
    ],
)
def test_logits_are_found(outputs, auxiliary):
    logits, others = split_outputs(outputs, 4, "train")
    assert logits is LOGITS and [id(x) for x in others] == [id(x) for x in auxiliary]


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        (torch.zeros(4, 2, 1, 1), r"\[4, 2, 1, 1\]"),
        (torch.zeros(3, 2), r"\[3, 2\]"),
        ((), "NoneType"),
        ({}, "NoneType"),
        ("text", "str"),
        ({"logits": None}, "NoneType"),
    ],
)
def test_outputs_without_logits_are_refused(outputs, got: str):
    with pytest.raises(ModelError, match=f"must return logits of shape .* got {got}"):
        split_outputs(outputs, 4, "train")


@pytest.mark.parametrize(("kind", "weights"), [(Inception, (0.4,)), (Google, (0.3, 0.3))])
def test_auxiliary_losses_join_in_training_only(kind, weights):
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(1 + len(weights)))

        def forward(self, x: Tensor):
            outputs = [head(x.flatten(1)) for head in self.heads]
            return kind(*outputs) if self.training else outputs[0]

    net = Auxiliary()
    data = batches(1)
    with torch.no_grad():
        losses = [F.cross_entropy(output, data[0][1]).item() for output in net(data[0][0])]
    result = fit(net, data, data, epochs=1, lr=0.0, weight_decay=0.0)
    expected = losses[0] + sum(w * loss for w, loss in zip(weights, losses[1:], strict=True))
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.history[0]["val_loss"] == pytest.approx(losses[0], rel=1e-5)


# Evaluation


def test_evaluate_counts_images_and_keeps_the_mode():
    net = Net().train()
    before = state_of(net)
    data = batches(2) + batches(1, size=3)
    accuracy = evaluate(net, data)
    assert net.training and accuracy.n == 19
    assert_same(before, state_of(net))
    net.eval()
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    logits = net(images)
    assert accuracy.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert accuracy.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert str(Accuracy(0.5, 1.0, 4)) == "top-1 50.00 %, loss 1.0000 on 4 images"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evaluate_refuses_a_loss_that_is_not_finite(value: float):
    """The largest of NaN logits is the first: with label 0 each image would count as right."""
    net = Net().train()
    with torch.no_grad():
        net.fc.bias[1] = value
    loader = [(images, 0 * labels) for images, labels in batches()]
    with pytest.raises(NonFiniteLossError, match="evaluate: loss of the evaluation must be finite"):
        evaluate(net, loader)
    assert net.training


def test_evaluate_refuses_bad_input():
    with pytest.raises(LoaderError, match="evaluate: loader must yield at least one batch"):
        evaluate(Net(), [])
    with pytest.raises(ConfigError, match="evaluate: amp must be one of"):
        evaluate(Net(), batches(), amp="int8")
    with pytest.raises(LoaderError, match="evaluate: labels must be in"):
        evaluate(Net(), batches(classes=3, size=64))
