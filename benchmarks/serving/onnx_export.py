"""The bundled model, or another encoder, as ONNX: token ids and a mask in, unit vectors of mean pooling out."""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

OPSET = 17


class MeanPooled(nn.Module):
    """transformers' model in float32, and what sentence-transformers does after it."""

    def __init__(self, model_folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager").eval()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(N, T) int64 each -> (N, dimensions)"""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def export(model_folder: Path, file: Path, packages: Path) -> None:
    """Write it. `packages`: a folder with the package onnx, which vecmill's own environment has no use for."""
    sys.path.append(str(packages))
    example, axes = torch.ones(2, 16, dtype=torch.int64), {0: "texts", 1: "tokens"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            MeanPooled(model_folder),
            (example, example),
            str(file),
            input_names=["ids", "mask"],
            output_names=["vectors"],
            dynamic_axes={"ids": axes, "mask": axes},
            opset_version=OPSET,
            dynamo=False,
        )
