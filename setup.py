"""Longhaul's packaging: one distribution, one command, the configuration groups as package data."""

from setuptools import find_packages, setup

# Ranges; tools/constraints.txt holds the versions that the tests run with, and names the others that were tried.
REQUIREMENTS = [
    "torch>=2.11",
    "deepspeed>=0.19.8,<0.20",  # train/provenance.py says why, and refuses others at a start
    "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the last for Python 3.11
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    "gigatoken>=0.10",
    "datasets>=4.0",
    "pyarrow>=18",
    "zstandard>=0.23",
    "safetensors>=0.8",
    "hydra-core>=1.3.2,<1.4",
    "jinja2>=3.1",
    "pydantic>=2.11,<3",
    "PyYAML>=6.0",
    "numpy>=1.26",
    "wandb>=0.22",
    "tensorboard>=2.18",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "psutil>=6.0",
    "sacrebleu>=2.4,<3",
    "rouge-score>=0.1.2",
    "regex>=2024.4",
    "scikit-learn>=1.4",
    "lm-eval>=0.4.13,<0.5",
]

setup(
    packages=find_packages(include=["conf*", "train*", "data_pipeline*", "slurm*", "tools*"]),
    package_data={"conf": ["*.yaml", "*/*.yaml"], "slurm": ["*.j2"]},
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": [
            *("pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.9"),
            *("scipy>=1.11", "lm-eval[hf]", "trl>=1.16"),
        ],
    },
    entry_points={
        # lm-eval up to 0.4.13 knows no models of other packages: until it does, its command is started by us.
        "console_scripts": ["longhaul=tools.cli:main", "lm_eval=train.harness.command:main"],
        "lm_eval.models": ["longhaul=train.harness.model:LonghaulLM"],
    },
)
