"""`confkd report`."""
from __future__ import annotations

from pathlib import Path

from nnunet_confkd.arguments import Parser
from nnunet_confkd.device import OPTION_HELP, choose_device
from nnunet_confkd.inference.model_folder import require_model


def main(argv: list[str]) -> None:
    """Run `confkd report`."""
    parser = Parser(prog="confkd report", description=(
        "Write the report of a trained model: one HTML page that loads nothing from elsewhere, with its pictures as "
        "PNG files."))
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER",
                        help="the trained model: TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("--fold", nargs="+", metavar="F", help="default: all that are trained")
    parser.add_argument("--predictions", type=Path, metavar="DIR",
                        help="segmentations of the same validation cases by something else (another model, an "
                             "ensemble, postprocessing), to show beside those of the branches")
    parser.add_argument("--output", type=Path, metavar="FOLDER",
                        help="default: 'report' in the model's folder; an earlier report in it is replaced")
    parser.add_argument("-chk", default="checkpoint_final.pth", metavar="NAME", help="default: checkpoint_final.pth")
    parser.add_argument("-device", choices=("cpu", "cuda", "mps"), help=OPTION_HELP)
    args = parser.parse_args(argv)
    require_model(args.model)
    import torch

    from nnunet_confkd.inference.expected_time import prediction_text
    from nnunet_confkd.report.report import report

    device = torch.device(choose_device(args.device, lambda: prediction_text(args.model)))
    print("written:", report(args.model, args.fold, args.predictions, args.output, args.chk, device))


