"""The package map; all other metadata is in pyproject.toml."""
from setuptools import find_packages, setup

if __name__ == "__main__":
    setup(
        package_data={"nnunet_confkd": ["py.typed"]},
        packages=[
            *find_packages(include=["nnunet_confkd", "nnunet_confkd.*"]),
            "nnunet_confkd.trainers",
            "nnunet_confkd.dataset_conversion",
        ],
        package_dir={
            "nnunet_confkd": "nnunet_confkd",
            "nnunet_confkd.trainers": "trainers",
            "nnunet_confkd.dataset_conversion": "dataset_conversion",
        },
    )
