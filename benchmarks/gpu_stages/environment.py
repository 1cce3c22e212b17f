"""The machine and its peak rates: copies in GB/s and matrix products in TFLOP/s."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess

import torch

from gpu_stages.stage import begin, seconds

PACKAGES = ("triton", "bitsandbytes", "unsloth", "liger-kernel", "trl", "flash-attn")


def main() -> None:
    result = begin("environment")
    device = result.device
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    result.add(what="optional packages", versions=versions, cuda=torch.version.cuda)
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"
        asked = subprocess.run(
            ["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, check=False
        )
        result.add(what="nvidia-smi", text=asked.stdout.strip() or asked.stderr.strip())
    width = 256 if result.rehearsed else 8192
    source = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copies, products = 20, 10
    for _ in range(2):  # the first is a warm-up
        took = seconds(lambda: [target.copy_(source) for _ in range(copies)], device)
    result.add(what="copy", gigabytes_per_second=2 * source.nbytes * copies / took / 1e9)
    for _ in range(2):
        took = seconds(lambda: [torch.mm(source, source, out=target) for _ in range(products)], device)
    result.add(what="bfloat16 matrix product", width=width, teraflops=2 * width**3 * products / took / 1e12)


if __name__ == "__main__":
    main()
