"""`confkd complete`."""
from __future__ import annotations

import json
from pathlib import Path

from nnunet_confkd.arguments import Parser
from nnunet_confkd.device import OPTION_HELP
from nnunet_confkd.inference.model_folder import require_model
from nnunet_confkd.processes import PROCESSES
from nnunet_confkd.training.names import BRANCHES


def main(argv: list[str]) -> None:
    """Run `confkd complete`."""
    parser = Parser(prog="confkd complete", description=(
        "The labels of partly labelled training cases, completed by a trained model or by a watershed, as a data set "
        "of its own."))
    parser.add_argument("-d", required=True, metavar="ID",
                        help="the data set whose labels are to be completed, id or name")
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--model", type=Path, metavar="FOLDER",
                    help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results, or a stock one of the "
                         "same labels")
    by.add_argument("--watershed", action="store_true",
                    help="no model: a watershed spreads the annotations up to the edges of the image. The background "
                         "must be annotated, too")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", help="its name; default: that of the source and _completed, or _watershed")
    parser.add_argument("--branch", choices=BRANCHES,
                        help="default: student. The teacher is shown the annotations, where it was trained with hints "
                             "(the default of ConfKDTrainer)")
    parser.add_argument("--confidence", type=float, metavar="P",
                        help="label only voxels whose winning probability is above P; the others stay ignored. "
                             "Default: all")
    parser.add_argument("--fold", "--folds", nargs="+", metavar="F",
                        help="folds whose mean predicts; default: all that are trained")
    parser.add_argument("-chk", "--checkpoint", metavar="NAME",
                        help="default: checkpoint_final.pth; with --branch teacher checkpoint_teacher.pth, if there is "
                             "one")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), help=OPTION_HELP)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true",
                        help="hard links instead of copies of images: no space, but what writes to one writes to the "
                             "other")
    args = parser.parse_args(argv)
    if args.watershed:
        return _spread(args, parser)
    require_model(args.model)
    from nnunet_confkd.data.raw_format import summary
    from nnunet_confkd.inference.completed_dataset import KEY
    from nnunet_confkd.inference.completion import TrainedModel, complete

    model = TrainedModel(args.model, args.branch or "student", args.fold, args.checkpoint, args.device)
    folder = complete(args.d, model, args.id, confidence=args.confidence, name=args.name, processes=args.processes,
                      link=args.link)
    described = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    about = described[KEY][-1]
    cases = about["cases"]
    filled, left = (sum(case[key] for case in cases.values()) for key in ("filled_voxels", "ignored_voxels"))
    print(f"{len(cases)} labels completed: {filled} voxels labelled by the model, {left} still ignored\n"
          f"review first: {folder / 'review_first.csv'}\n{summary(folder)}")
    if about["branch"] == "student":
        print("note: the student has labelled these cases from the images alone. A teacher with hints also sees the "
              "annotations of a case, and completed labels better on ACDC: add --branch teacher, and another --id")


def _spread(args, parser: Parser) -> None:
    """Complete the labels by a watershed."""
    of_model = [f"--{name}" for name in ("branch", "confidence", "fold", "checkpoint", "device")
                if getattr(args, name) is not None]
    if of_model:
        parser.error(f"{', '.join(of_model)}: only with --model")
    from nnunet_confkd.data.raw_format import summary
    from nnunet_confkd.inference.completed_dataset import KEY
    from nnunet_confkd.inference.watershed_completion import complete_by_watershed

    folder = complete_by_watershed(args.d, args.id, name=args.name, processes=args.processes, link=args.link)
    cases = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))[KEY][-1]["cases"]
    filled, left = (sum(case[key] for case in cases.values()) for key in ("filled_voxels", "ignored_voxels"))
    print(f"{len(cases)} labels completed: {filled} voxels labelled by the watershed, {left} still ignored\n"
          f"{summary(folder)}")
