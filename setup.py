"""The package map; all other metadata is in pyproject.toml."""
from setuptools import setup

ROOMS = ["data", "demo", "evaluation", "inference", "report", "training"]

if __name__ == "__main__":
    setup(
        package_data={"nnunet_confkd": ["py.typed"]},
        packages=[
            "nnunet_confkd",
            *(f"nnunet_confkd.{room}" for room in ROOMS),
            "nnunet_confkd.trainers",
            "nnunet_confkd.dataset_conversion",
        ],
        package_dir={
            "nnunet_confkd": "nnunet_confkd",
            "nnunet_confkd.trainers": "trainers",
            "nnunet_confkd.dataset_conversion": "dataset_conversion",
        },
    )
