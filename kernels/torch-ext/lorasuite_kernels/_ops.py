"""The namespace of this package's operators. A Kernel Hub build replaces this file by one with a unique namespace."""

import torch

ops = torch.ops.lorasuite_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an operator."""
    return f"lorasuite_kernels::{op_name}"
