"""Converters of public data sets to nnU-Net's raw format, with one module for each data set.

Each of the modules in `CONVERTERS` has `DESCRIPTION` (one line), `add_arguments(parser)` for its own options, and
`convert(source, dataset_id, *, name=..., processes=..., link=False, **own) -> Path`.
"""
from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

# the names in `confkd convert NAME`; a module is imported only when it is asked for
CONVERTERS = ("acdc", "brats", "la2018", "mmwhs", "mscmr", "msd", "promise12")


def main(argv: list[str]) -> None:
    """Run `confkd convert`."""
    from nnunet_confkd.arguments import Parser
    from nnunet_confkd.data.raw_format import summary
    from nnunet_confkd.processes import PROCESSES

    def converter(name: str):
        return import_module(f"nnunet_confkd.dataset_conversion.{name}")

    if argv and argv[0] == "--list":
        print("\n".join(f"{name:<11}{converter(name).DESCRIPTION}" for name in CONVERTERS))
        return
    parser = argparse.ArgumentParser(prog="confkd convert", description=(
        "Write a public data set in nnU-Net's raw format, checked, with its supervision table and a split. confkd "
        "convert NAME --help lists the options of one; confkd convert --list says what each of them reads."))
    parsers = parser.add_subparsers(dest="converter", required=True, metavar="NAME", parser_class=Parser)
    for name in CONVERTERS:
        if argv and argv[0] in CONVERTERS and argv[0] != name:
            continue  # its module need not be imported
        sub = parsers.add_parser(name, help=converter(name).DESCRIPTION, description=converter(name).__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--source", required=True, type=Path, metavar="DIR", help="the data set as published")
        sub.add_argument("--id", required=True, type=int, help="id of the data set to write")
        sub.add_argument("--name", help="its name, Dataset027_NAME")
        sub.add_argument("--processes", type=int, default=PROCESSES)
        sub.add_argument("--link", action="store_true", help="hard links instead of copies of images: they take no "
                         "space, but a program that writes to one writes to the other")
        converter(name).add_arguments(sub)
    args = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    function = converter(args.pop("converter")).convert
    print(summary(function(args.pop("source"), args.pop("id"), **args)))
