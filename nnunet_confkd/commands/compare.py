"""`confkd compare`."""
from __future__ import annotations

from nnunet_confkd.arguments import Parser
from nnunet_confkd.evaluation.evaluate import PATTERN_HELP, TOLERANCE_HELP
from nnunet_confkd.evaluation.metrics import TOLERANCE_MM
from nnunet_confkd.inference.model_folder import require_model
from nnunet_confkd.processes import PROCESSES


def main(argv: list[str]) -> None:
    """Run `confkd compare`."""
    parser = Parser(prog="confkd compare", description=(
        "Compare trained models, or seeds of one, in one table and one plot. The student and, if there is one, the "
        "teacher are measured on the validation cases of all folds, as far as all models have them. Differences to the "
        "first model are paired by case."))
    parser.add_argument("models", nargs="+", metavar="MODEL", help="TRAINER__PLANS__CONFIGURATION under nnUNet_results")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE_MM, metavar="MM", help=TOLERANCE_HELP)
    parser.add_argument("--patient-pattern", metavar="REGEX", help=PATTERN_HELP.format("the models"))
    parser.add_argument("--output", metavar="FOLDER", help="write comparison.json, .txt and .png there")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args(argv)
    for model in args.models:
        require_model(model)
    from nnunet_confkd.evaluation.compare import compare_models, comparison_text, write

    found = compare_models(args.models, args.tolerance, args.patient_pattern, args.processes)
    print(comparison_text(found))
    if args.output:
        print("\nwritten: " + ", ".join(map(str, write(found, args.output))))
