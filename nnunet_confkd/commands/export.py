"""`confkd export`."""
from __future__ import annotations

import argparse


def main(argv: list[str]) -> None:
    """Run `confkd export`."""
    parser = argparse.ArgumentParser(prog="confkd export", description=(
        "Write one branch of a trained ConfKD model as a model of stock nnU-Net, which needs no plugin."))
    parser.add_argument("--model", required=True, metavar="FOLDER",
                        help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", metavar="FOLDER", help="the folder to write; it must not exist")
    where.add_argument("--install", action="store_true",
                       help="place it under nnUNet_results, as nnUNetTrainer__PLANS__CONFIGURATION with a new plans "
                            "name")
    parser.add_argument("--branch", choices=("student", "teacher"), default="student")
    args = parser.parse_args(argv)
    from nnunet_confkd.inference.export import export

    print("written:", export(args.model, args.output, args.branch, args.install))
