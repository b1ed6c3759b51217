"""What does a training step cost with many classes, in time and memory, against stock nnU-Net?

    python benchmarks/many_classes.py
    python benchmarks/many_classes.py --classes 4 25      # these rows are measured anew, and the others stay

Both trainers run in one process on the same plan and the same batch, and everything is measured by turns (A B A B), as
in step_time.py. In the rows with hidden classes each image lists a random half of the classes.

*Memory* is the peak of what a step allocates: activations, what the losses need, and gradients. Weights, momentum and
the batch are not counted (PyTorch's profiler; on a GPU its allocator, with weights, momentum and batch). *Extra terms*
are what our losses and hints cost beyond stock's loss, forward and backward, as a share of our step. `L_s` is the
teacher's own supervised loss. Times on the CPU are processor times, because another process that takes the processor
then does no harm. The table goes into docs/explanation/performance.md, and the figures into many_classes.json beside
this file.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

from step_time import PLAIN, ROOT, WHOLE_KL, Case, batch_of, build, by_turns, insert

CLASSES = (4, 25, 117)  # without the background
HIDDEN = "hidden classes"


def cases_of(device: str, classes: Sequence[int] = CLASSES) -> list[Case]:
    """Plans of nnU-Net's widths, whose patches are small on the CPU."""
    wide = (32, 64, 128, 256, 320, 320)
    sizes = ({2: ((96, 96), 4, wide[:4]), 3: ((16, 32, 32), 4, wide[:3])} if device == "cpu" else
             {2: ((256, 256), 32, wide), 3: ((64, 128, 128), 2, wide)})
    return [Case(PLAIN, *sizes[d], 0.5, number + 1) for d in (2, 3) for number in classes]


def with_lists(batch: dict, classes: int) -> dict:
    """The same batch, in which each image is annotated for a random half of the classes."""
    import torch
    listed = torch.rand(len(batch["data"]), classes, generator=torch.Generator().manual_seed(1)) < 0.5
    listed[:, 0] = True
    batch = {name: values for name, values in batch.items() if name != "hint_spread"}  # a watershed needs whole labels
    return {**batch, "listed": listed, "hint_listed": listed}


def peak_of(step, trainer, device: str) -> float:
    """The peak of what a step allocates, MiB."""
    import torch
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    before = sum(p.grad.nbytes for p in trainer.network.parameters() if p.grad is not None)  # the step frees them first
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    highest = now = before
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest / 2 ** 20


@contextmanager
def terms_alone(loss, *terms: str):
    """Let all other terms have weight 0."""
    weights = dict(loss.weights)
    loss.weights = {term: weight if term in terms else 0.0 for term, weight in weights.items()}
    try:
        yield
    finally:
        loss.weights = weights


def losses_of(trainers: dict, batches: dict) -> dict:
    """{name: a function} that computes a loss and its gradient, on outputs that are cut from the networks."""
    import torch

    from nnunet_confkd.training.network import unwrap

    ours, batch = trainers["confkd"], batches["confkd"]
    student, teacher = ours.network(batch["data"], batch["num_full"], None, True)
    student, teacher = ([output.detach().requires_grad_() for output in outputs] for outputs in (student, teacher))

    def stock():
        trainers["stock"].loss(student, batch["target"]).backward()

    def terms(name: str, *chosen: str):
        options = {"listed": batches[name].get("listed")}
        with terms_alone(trainers[name].loss, *chosen):
            trainers[name].loss(student, teacher, batch["target"], batch["num_full"], **options)[0].backward()

    network = unwrap(ours.network)
    features = [skip.detach() for skip in network.narrowed(network.encoder(batch["data"]))]
    arriving = [torch.ones_like(skip) for skip in features]

    def hints():
        hinted = network.hinted(features, ours._hints(batch, batch["target"][0]))
        torch.autograd.backward(hinted, arriving)

    everything = "teacher", "student", "kl", "entropy"
    calls = {"stock": stock, "L_w": lambda: terms("confkd", "student"),
             "L_w and L_s": lambda: terms("confkd", "student", "teacher"), "hints": hints}
    return calls | {name: lambda name=name: terms(name, *everything) for name in batches if name != "stock"}


def measure(case: Case, device: str, repetitions: int, folder: Path) -> dict:
    """Time and memory of a step of each trainer, and the time of the losses alone."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_confkd.training.trainer import ConfKDTrainer

    trainers = {"stock": build(case, nnUNetTrainer, folder, device),
                "confkd": build(case, ConfKDTrainer, folder, device, WHOLE_KL)}
    trainers[HIDDEN] = trainers["confkd"]
    batch = batch_of(case, trainers["stock"]._get_deep_supervision_scales(), device)
    batches = {"stock": batch, "confkd": batch, HIDDEN: with_lists(batch, case.classes)}
    clock = time.perf_counter if device == "cuda" else time.process_time
    steps = {name: lambda t=t, b=batches[name]: t.train_step(b) for name, t in trainers.items()}
    found = {"case": f"{len(case.patch)}-D", "classes": case.classes - 1, "patch": case.patch, "batch": case.batch,
             "repetitions": repetitions, "step": by_turns(steps, device, repetitions, warm_up=1, clock=clock),
             "peak_mib": {name: round(peak_of(step, trainers[name], device), 1) for name, step in steps.items()},
             "loss": by_turns(losses_of(trainers, batches), device, repetitions, warm_up=1, clock=clock)}
    print(json.dumps(found), flush=True)
    return found


def table_of(runs: list[dict]) -> str:
    lines = ["| plan | classes | step, stock | ratio | with hidden classes | extra terms | of these `L_s` | "
             "with hidden classes | memory, stock | ratio | with hidden classes |", "|" + "---|" * 11]
    for run in runs:
        step, peak = run["step"], run["peak_mib"]
        loss = {name: times["median_ms"] for name, times in run["loss"].items()}
        shares = [(loss["confkd"] + loss["hints"] - loss["stock"]) / step["confkd"]["median_ms"],
                  (loss["L_w and L_s"] - loss["L_w"]) / step["confkd"]["median_ms"],
                  (loss[HIDDEN] + loss["hints"] - loss["stock"]) / step[HIDDEN]["median_ms"]]
        cells = [f"{run['case']}, {run['batch']} x {'x'.join(map(str, run['patch']))}", str(run["classes"]),
                 f"{step['stock']['median_ms']:.0f} ms",
                 *("{1:.2f} ({0:.2f}-{2:.2f})".format(*step[name]["ratios"]) for name in ("confkd", HIDDEN)),
                 *(f"{100 * share:.1f} %" for share in shares), f"{peak['stock']:.0f} MiB",
                 *(f"{peak[name] / peak['stock']:.2f}" for name in ("confkd", HIDDEN))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def renewed(runs: list[dict], file: Path) -> list[dict]:
    """The rows of the file, of which those that were measured again are replaced."""
    new = {_row(run) for run in runs}
    old = json.loads(file.read_text())["runs"] if file.is_file() else []
    return sorted([*runs, *(run for run in old if _row(run) not in new)], key=_row)


def _row(run: dict) -> tuple:
    return run["case"], run["classes"], run["machine"].split(",")[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, metavar="N", help="of these rows")
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["nnUNet_compile"] = "false"
    import torch
    torch.set_num_threads(args.threads)
    file = args.output or ROOT / "benchmarks" / "many_classes.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        runs = [measure(case, args.device, args.repetitions, folder) for case in cases_of(args.device, args.classes)]
    machine = (torch.cuda.get_device_name() if args.device == "cuda" else
               f"{platform.machine()} CPU, {args.threads} thread(s) of {os.cpu_count()} cores, float32; the machine's "
               f"load at the end was {os.getloadavg()[0]:.1f}")
    runs = renewed([run | {"machine": machine} for run in runs], file)
    file.write_text(json.dumps({"runs": runs}, indent=1))
    if not args.output:
        machines = "; ".join(dict.fromkeys(run["machine"] for run in runs))
        insert(ROOT / "docs" / "explanation" / "performance.md", "many classes", f"{machines}.\n\n{table_of(runs)}")
    print(table_of(runs))


if __name__ == "__main__":
    main()
