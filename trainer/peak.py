"""The most that a GPU can do, by its data sheet: what a run's TFLOP/s are a share of.

peak_share(400.0, "NVIDIA H100 80GB HBM3")      # 0.404
"""

from typing import Any

import torch

DENSE_BF16_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
}
"""TFLOP/s of matrix products in bf16 (and fp16) without sparsity, by the name that torch gives the card.

From NVIDIA's data sheets of the H100, the H200 and the A100 Tensor Core GPU, which give twice as much for the first two
"with sparsity". A part of a card (MIG) has another name and is not listed."""


def peak_tflops(card: str) -> float | None:
    """The data sheet's figure for the card that torch calls `card`; None where it is not listed."""
    return DENSE_BF16_TFLOPS.get(card)


def peak_share(tflops: float, card: str) -> float | None:
    """`tflops` as a share of the card's dense bf16 peak; None where that is not known."""
    peak = peak_tflops(card)
    return None if peak is None else tflops / peak


def share_of_run(tflops: float, provider: Any) -> float | None:
    """The share of this process's GPU, for a model that computes in 16 bits; None for another and for an unknown card.

    Products in FP8 and FP4 have other peaks, and so has fp32.
    """
    if provider.params_dtype.itemsize != 2 or provider.fp8 or provider.fp4:
        return None
    return peak_share(tflops, present_card())


def present_card() -> str:
    """The name of this process's GPU; empty where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
