import re
from pathlib import Path

from setuptools import find_packages, setup


def read_version() -> str:
    """From the package's text: importing it takes torch, which a build does not have."""
    found = re.search(r'^__version__ = "(.+)"$', Path("megatron_gil/__init__.py").read_text(encoding="utf-8"), re.M)
    assert found is not None
    return found[1]


setup(
    name="megatron_gil",
    version=read_version(),
    description="Group-invariant learning for RLHF on megatron-core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_gil", "megatron_gil.*"]),
    package_data={
        "megatron_gil": ["py.typed"],
        "megatron_gil.evaluation.web": ["pages/*.html", "static/*"],
        "megatron_gil.demo": ["recipes/*.yaml"],
        "megatron_gil.planning": ["paper_7b/*.yaml"],  # through a link: examples/paper_7b, which `plan` reads
    },
    python_requires=">=3.11,<3.14",  # megatron-core has wheels for no other
    install_requires=[
        "torch>=2.11",  # tested with 2.11 and 2.13
        "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,<0.20",  # 0.19 needs Python 3.12; untested between
        "triton; python_version >= '3.12' and sys_platform == 'linux'",  # 0.19 imports it, on the CPU too
        "transformers>=4.56",  # chat templates, and the models that `verify` compares with; not needed by the engine
        "datasets>=4.3",  # from_generator takes a fingerprint
        "tokenizers",
        "sentencepiece",
        "safetensors>=0.6.1",  # has offset_keys
        "tensorboard",
        "omegaconf>=2.4",
        "rich",
        "matplotlib",
        "psutil",
        "numpy",
        "scipy",
        "jaxtyping",
    ],
    extras_require={
        "judge": ["openai>=1.40", "starlette", "uvicorn", "jinja2"],  # openai: tested with 1.40 and 3.52
        # As megatron-core 0.16.1 asks, and as the images of 0.19 have it; for CUDA 13, as PyPI's torch is. Apex comes
        # from NVIDIA's source: `apex` on PyPI is another project.
        "gpu": [
            "transformer-engine[core_cu13,pytorch]>=2.9,<2.12; python_version < '3.12'",
            "transformer-engine[core_cu13,pytorch]>=2.17,<2.18; python_version >= '3.12'",
        ],
        "peer": ["trl==1.12.0"],  # tests/peer compares with its private functions too: no other version will do
        "test": [
            "transformers>=5",
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "pyright",
            "httpx2",
            "playwright",
            "wandb>=0.31",
        ],
        "wandb": ["wandb>=0.31"],  # log.wandb; tested with 0.31
    },
    entry_points={"console_scripts": ["megatron-gil = megatron_gil.cli:main"]},
)
