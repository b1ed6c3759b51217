"""`confkd export`."""
from __future__ import annotations

from nnunet_confkd.arguments import Parser
from nnunet_confkd.inference.model_folder import require_model
from nnunet_confkd.training.names import CHECKPOINT


def main(argv: list[str]) -> None:
    """Run `confkd export`."""
    parser = Parser(prog="confkd export", description=(
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
    require_model(args.model)
    from nnunet_confkd.inference.export import export

    written = export(args.model, args.output, args.branch, args.install)
    print("written:", written)
    found = sorted(fold.name.removeprefix("fold_") for fold in written.glob("fold_*"))
    trained = [fold for fold in found if (written / f"fold_{fold}" / CHECKPOINT).is_file()]
    if unfinished := [fold for fold in found if fold not in trained]:
        print(f"the training of fold {', '.join(unfinished)} has not ended: it is in the model, and not in the command "
              f"below")
    folds = " ".join([fold for fold in trained if fold != "all"] or trained)
    if args.install:
        trainer, plans, configuration = written.name.split("__")
        print(f"next: nnUNetv2_predict -d {int(written.parent.name[7:10])} -i IMAGES -o PREDICTIONS -tr {trainer} "
              f"-p {plans} -c {configuration} -f {folds}   (without a GPU: -device cpu)")
    else:
        print(f"next: nnUNetv2_predict_from_modelfolder -m {written} -i IMAGES -o PREDICTIONS -f {folds}   "
              f"(without a GPU: -device cpu)")
