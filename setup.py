"""Maps the kernel project's folder to its own import package.

The folder `kernels/` has the layout of a Kernel Hub project and must never be importable as `kernels`: that name
belongs to the Hugging Face package of the same name, which transformers and peft import.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lorasuite_fast*"]), "lorasuite_kernels"],
    package_dir={
        "lorasuite_fast": "lorasuite_fast",
        "lorasuite_kernels": "kernels/torch-ext/lorasuite_kernels",
    },
)
