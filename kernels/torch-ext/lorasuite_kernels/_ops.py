"""The namespace of this package's operators. A Kernel Hub build replaces this file by one with a unique namespace."""

import torch

NAMESPACE = "lorasuite_kernels"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an operator."""
    return f"{NAMESPACE}::{op_name}"
