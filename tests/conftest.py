"""Loads the Triton kernels for its interpreter, before anything else imports Triton without it.

Triton decides at its own import whether kernels are interpreted. The variable is taken back at once: a test that wants
CPU tensors to go through the kernels says so (`kernel_paths.running`).
"""

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"
    from lorasuite_kernels import (  # noqa: F401
        cka_kernels,
        heads_kernels,
        projection_kernels,
        shared_gram_kernels,
    )

    del os.environ["TRITON_INTERPRET"]
