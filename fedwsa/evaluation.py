"""Loss and accuracy of a classifier, the same on the server and on a client."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 1000  # bounds memory; the result does not depend on it beyond rounding


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats a sample, and accuracy in [0, 1].

    images: [N, C, H, W] float32; labels: [N] int64; N ≥ 1; on the model's device or on the CPU. The model is put into
    evaluation mode.
    """
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), labels.device)
    loss, hits = 0.0, 0
    for x, y in zip(torch.split(images, BATCH), torch.split(labels, BATCH), strict=True):
        logits, truth = model(x.to(device)), y.to(device)
        loss += float(F.cross_entropy(logits, truth, reduction="sum"))
        hits += int((logits.argmax(1) == truth).sum())
    return loss / len(labels), hits / len(labels)
