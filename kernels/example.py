# /// script
# dependencies = ["kernels", "torch", "triton; platform_system == 'Linux'"]
# ///
"""Compares the layers of two models by CKA, and projects two adapters through matched heads.

python build_variants.py && python example.py
"""

from pathlib import Path

import torch

from kernels import get_local_kernel

kernel = get_local_kernel(Path(__file__).parent)

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# Hidden states of 64 examples: 6 old layers of width 96, 8 new layers of width 128 that see the same features.
features = torch.randn(64, 32, device=device)
x = torch.stack([features @ torch.randn(32, 96, device=device) for _ in range(6)])
y = torch.stack([features @ torch.randn(32, 128, device=device) for _ in range(8)])
stream = kernel.StreamingCKA(n_x=6, n_y=8)
for part_x, part_y in zip(x.split(32, 1), y.split(32, 1), strict=True):
    stream.update(part_x, part_y)
print("CKA", tuple(stream.compute().shape), f"mean {stream.compute().mean():.3f}")

# Two adapters of rank 4, side by side, from 4 old heads of size 24 to 4 new heads of size 32 that share 2 groups.
left, right = torch.randn(4 * 24, 128, device=device), torch.randn(2 * 32, 128, device=device)
adapters = torch.randn(4 * 24, 2 * 4, device=device)
match, weight = torch.tensor([2, 0, 3, -1]), torch.tensor([0.5, 0.5, 1.0, 0.0])
projected = kernel.project_heads(left, right, adapters, match, weight, blocks=(4, 2))
print("projected factors", tuple(projected.shape))
