"""Packaging of hf_vlp: all metadata; `pyproject.toml` holds only the build system and tool settings."""

from pathlib import Path

from setuptools import find_packages, setup

VIZ = ["matplotlib"]
HDF5 = ["h5py"]
FAISS = ["faiss-cpu"]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
DEMO = ["gradio>=6"]  # the first whose theme goes to `launch`
TEST = [
    *("pytest", "pytest-xdist", "hypothesis", "ruff", "peft", "playwright"),
    *(*VIZ, *HDF5, *FAISS, *ONNX, *DEMO),
]
DOCS = ["sphinx", "furo", "myst-parser"]

setup(
    name="hf-vlp",
    version="0.1.0",
    description="Vision-language pre-training as Hugging Face models: LXMERT, SOHO, ALBEF and X-VLM.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_vlp": ["py.typed"]},
    python_requires=">=3.10",
    # torchvision's own requirement picks the torch that fits it, so neither is pinned here.
    install_requires=[
        "torch",
        "torchvision",
        "transformers>=5.17,<6",
        "huggingface-hub>=1.31",
        "tokenizers",
        "datasets",
        "evaluate",
        "timm",
        "accelerate",
        "sentencepiece",
        "safetensors",
        "pillow",
        "numpy",
        "typer>=0.19",  # choices as Literal
        "rich",
        "tqdm",
    ],
    extras_require={
        "viz": VIZ,
        "hdf5": HDF5,
        "faiss": FAISS,
        "onnx": ONNX,
        "demo": DEMO,
        "test": TEST,
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["hf-vlp = hf_vlp.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
