"""What does the second decoder cost in training and in prediction, against stock nnU-Net?

    python benchmarks/step_time.py                    # on the CPU: small patches, eager and compiled
    python benchmarks/step_time.py --device cuda      # real patch sizes; nnU-Net's AMP and float32, eager and compiled

Both trainers run in one process with the same plan and the same batch in memory, and their training steps alternate
(A B A B). The table shows the median ratio of neighbouring steps and its quartiles: a machine that slows down for a
while slows down both. The bound beside it is the ratio of the networks' floating-point operations
(`torch.utils.flop_counter`, forward and backward); no implementation can be cheaper. Predictions are measured with
the student as trained and as exported. Peak memory is measured in separate processes. Each row is written into
step_time_DEVICE.json beside this file as soon as it is measured, and the table into docs/explanation/performance.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
PLAIN, RESENC = "PlainConvUNet", "ResidualEncoderUNet"
CLASSES = 3  # background and two; the label "ignore" comes on top
# "confkd" has hints and the full weight of the KL. "before the KL" has hints, while the weight of the KL is still 0.
# "kl on full" is the papers' form, without hints.
WHOLE_KL = {"kl_ramp_start": 0.0, "kl_ramp_end": 0.0}
VARIANTS = {
    "confkd": WHOLE_KL,
    "before the KL": {"kl_ramp_start": 1.0, "kl_ramp_end": 1.0},
    "kl on full": {**WHOLE_KL, "kl_images": "full"},
}


@dataclass(frozen=True)
class Case:
    network: str
    patch: tuple[int, ...]
    batch: int
    features: tuple[int, ...]
    full_share: float
    classes: int = CLASSES

    @property
    def name(self) -> str:
        return (
            f"{len(self.patch)}-D {'plain' if self.network == PLAIN else 'residual encoder'}, {self.full_share:g} full"
        )


def cases_of(device: str) -> list[Case]:
    wide = (32, 64, 128, 256, 320, 320)
    sizes = ({2: ((128, 128), 8, wide[:5]), 3: ((16, 32, 32), 8, wide[:4])} if device == "cpu" else
             {2: ((256, 256), 32, wide), 3: ((64, 128, 128), 4, wide)})
    return [Case(network, *sizes[d], share) for d in (2, 3) for network in (PLAIN, RESENC) for share in (0.5, 0.25)]


# ---- trainers without data ------------------------------------------------------------------------------------------

def build(case: Case, trainer_class, folder: Path, device: str, settings: dict | None = None):
    """An initialised trainer of a generated plan; nothing is preprocessed, and no batch is loaded."""
    import torch
    d, stages = len(case.patch), len(case.features)
    convolutions = ({"n_conv_per_stage": [2] * stages} if case.network == PLAIN
                    else {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:stages]})
    plans = {
        "continue_training": False, "dataset_name": "Dataset999_Step", "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}}, "experiment_planner_used": "ExperimentPlanner",
        "original_median_spacing_after_transp": [1.0] * 3, "original_median_shape_after_transp": [128] * 3,
        "configurations": {"c": {
            "data_identifier": "d", "preprocessor_name": "DefaultPreprocessor", "batch_size": case.batch,
            "patch_size": list(case.patch), "spacing": [1.0] * d, "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False], "batch_dice": d == 2,
            "confkd": {"full_share": case.full_share, "weight_teacher": 1.0, "weight_kl": 3.0, "weight_entropy": 0.01,
                       "hint_reach": 4, "hint_watershed": True, "complete_at": 0.0, **(settings or {})},
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.unet.{case.network}",
                "arch_kwargs": {
                    "n_stages": stages, "features_per_stage": list(case.features), "conv_op": f"torch.nn.Conv{d}d",
                    "kernel_sizes": [[3] * d] * stages, "strides": [[1] * d] + [[2] * d] * (stages - 1), **convolutions,
                    "n_conv_per_stage_decoder": [2 if case.network == PLAIN else 1] * (stages - 1), "conv_bias": True,
                    "norm_op": f"torch.nn.InstanceNorm{d}d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                    "dropout_op": None, "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}},
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}}}}
    labels = {"background": 0, **{f"class {i}": i for i in range(1, case.classes)}, "ignore": case.classes}
    dataset = {"labels": labels, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "numTraining": 1}
    preprocessed = folder / "preprocessed" / "Dataset999_Step"
    (preprocessed / "d").mkdir(parents=True, exist_ok=True)
    if not any((preprocessed / "d").iterdir()):
        (preprocessed / "d" / "case.b2nd").touch()  # nnU-Net asks for the file format
    (preprocessed / "dataset.json").write_text(json.dumps(dataset))
    torch.manual_seed(0)
    trainer = trainer_class(plans, "c", 0, dataset, torch.device(device))
    trainer.initialize()
    return trainer


def batch_of(case: Case, scales, device: str) -> dict:
    """Random images and labels; a hundredth of the voxels of the other images is annotated."""
    import torch
    generator = torch.Generator().manual_seed(0)
    num_full = round(case.batch * case.full_share)
    data = torch.randn(case.batch, 1, *case.patch, generator=generator)
    targets = []
    for scale in scales or [[1.0] * len(case.patch)]:
        size = [round(n * s) for n, s in zip(case.patch, scale)]
        target = torch.randint(0, case.classes, (case.batch, 1, *size), generator=generator, dtype=torch.int16)
        target[num_full:][torch.rand(target[num_full:].shape, generator=generator) > 0.01] = case.classes
        targets.append(target.to(device))
    shown = (torch.rand(targets[0].shape, generator=generator) < 0.01) & (targets[0].cpu() != case.classes)
    return {
        "data": data.to(device),
        "target": targets if scales else targets[0],
        "num_full": num_full,
        "hint_mask": shown.to(device),
        # what a watershed makes of the hints does not matter for the time
        "hint_spread": torch.randint(1, case.classes + 1, targets[0].shape, generator=generator,
                                     dtype=torch.int16).to(device),
    }


# ---- measures -------------------------------------------------------------------------------------------------------

def synchronise(device: str) -> None:
    if device == "cuda":
        import torch
        torch.cuda.synchronize()


def by_turns(steps: dict, device: str, repetitions: int, warm_up: int = 3,
             clock: Callable[[], float] = time.perf_counter) -> dict[str, dict]:
    """Call functions by turns (A B A B).

    Returns:
        {name: times}: median and quartiles in ms, and the quartiles of the ratio to the first function in the same
        turn.
    """
    seconds = {name: [] for name in steps}
    for turn in range(warm_up + repetitions):
        for name, step in steps.items():
            synchronise(device)
            start = clock()
            step()
            synchronise(device)
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    found, first = {}, next(iter(seconds.values()))
    for name, values in seconds.items():
        low, median, high = (round(1000 * q, 3) for q in statistics.quantiles(values, n=4))
        found[name] = {
            "median_ms": median,
            "quartiles_ms": [low, high],
            "ratios": [round(q, 4) for q in statistics.quantiles([v / f for v, f in zip(values, first)], n=4)],
        }
    return found


def flops_of(network, data, *args) -> int:
    """Of a forward and a backward pass; args: the network's for training."""
    from torch.utils.flop_counter import FlopCounterMode

    def total(outputs):
        return sum(total(o) for o in outputs) if isinstance(outputs, (list, tuple)) else outputs.sum()
    with FlopCounterMode(display=False) as counter:
        total(network(data, *args)).backward()
    network.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def parts_of(trainer, batch: dict, device: str, repetitions: int) -> dict[str, float]:
    """ms of each part of a step, medians: forward of encoder and decoders, loss terms, backward, optimiser."""
    import torch

    from nnunet_confkd.training.losses import TERMS
    from nnunet_confkd.training.network import unwrap

    network, num_full, seconds = unwrap(trainer.network), batch["num_full"], {}

    def timed(name, call):
        synchronise(device)
        start = time.perf_counter()
        value = call()
        synchronise(device)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return value

    weights = dict(trainer.loss.weights)
    for _ in range(repetitions + 1):
        trainer.optimizer.zero_grad(set_to_none=True)
        with trainer._autocast():
            skips = timed("encoder", lambda: network.encoder(batch["data"]))
            student = timed("student's decoder", lambda: network.decoder(skips))
            hints = timed("hints", lambda: trainer._hints(batch, batch["target"][0]))
            teacher = timed("teacher's decoder", lambda: network.run_teacher(skips, hints, student, num_full, True))
            with torch.no_grad():
                narrowed = network.narrowed(skips)
                timed("hints into skips (of the teacher's decoder)",
                      lambda: network.hinted(narrowed, hints))
            loss, _ = timed("loss", lambda: trainer.loss(student, teacher, batch["target"], num_full))
        timed("backward", loss.backward)
        timed(
            "clipping and optimiser",
            lambda: (torch.nn.utils.clip_grad_norm_(network.parameters(), 12), trainer.optimizer.step()),
        )
        # each term alone, with its own backward, on outputs cut from the network
        leaves = [[o.detach().requires_grad_() for o in outputs] for outputs in (student, teacher)]
        for term in (t for t in TERMS if weights[t]):
            trainer.loss.weights = {t: weights[t] if t == term else 0.0 for t in TERMS}
            with trainer._autocast():
                value = timed(f"term {term}", lambda: trainer.loss(*leaves, batch["target"], num_full)[0])
            timed(f"term {term}, backward", value.backward)
        trainer.loss.weights = weights
    return {name: round(1000 * statistics.median(values[1:]), 3) for name, values in seconds.items()}


def measure(case: Case, device: str, amp: bool, compiled: bool, repetitions: int, folder: Path) -> dict:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_confkd.training.network import unwrap
    from nnunet_confkd.training.trainer import ConfKDTrainer

    os.environ["nnUNet_compile"] = str(compiled)
    torch.compiler.reset()  # else the graphs of earlier cases count towards the number at which torch gives up
    autocast = torch.autocast
    with patch.object(nnUNetTrainer, "_do_i_compile", lambda self: compiled):
        trainers = {"stock": build(case, nnUNetTrainer, folder, device)} | {
            name: build(case, ConfKDTrainer, folder, device, settings) for name, settings in VARIANTS.items()}
    batch = batch_of(case, trainers["stock"]._get_deep_supervision_scales(), device)
    batches = {
        name: batch if name != "kl on full" else {key: value for key, value in batch.items() if key != "hint_mask"}
        for name in trainers
    }
    if not amp and device == "cuda":  # nnU-Net has no switch for it
        torch.autocast = lambda *_, **__: nullcontext()
        import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as stock_module
        stock_module.autocast = torch.autocast
    try:
        steps = by_turns(
            {name: lambda t=t, b=batches[name]: t.train_step(b) for name, t in trainers.items()}, device, repetitions
        )
        parts = None if compiled else parts_of(trainers["confkd"], batch, device, max(3, repetitions // 6))
    finally:
        torch.autocast = autocast
        if device == "cuda":
            stock_module = sys.modules["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"]
            stock_module.autocast = autocast
    flops = {name: flops_of(unwrap(t.network), batch["data"], *(
        () if name == "stock" else (batch["num_full"], None, name == "confkd"))) for name, t in trainers.items()}
    predictions = by_turns(predictions_of(trainers, device), device, max(2, repetitions // 2))
    found = {"case": case.name, "patch": list(case.patch), "batch": case.batch, "amp": amp, "compiled": compiled,
             "repetitions": repetitions, "step": steps,
             "flops": flops, "parts_ms": parts, "prediction": predictions}
    for name in VARIANTS:
        print(
            f"{_name(found)}, {name}: {steps[name]['ratios']} of a stock step; "
            f"bound {flops[name] / flops['stock']:.3f}",
            flush=True,
        )
    print(f"prediction {predictions['confkd']['ratios']}, exported {predictions['exported']['ratios']}", flush=True)
    return found


def predictions_of(trainers: dict, device: str) -> dict:
    """{network: a function} that predicts a volume of a few patches as nnUNetv2_predict does, without mirroring."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_confkd.training.network import branch_weights, unwrap

    stock, ours = trainers["stock"], trainers["confkd"]
    networks = {name: unwrap(trainers[name].network) for name in ("stock", "confkd")}
    networks["exported"] = stock.build_network_architecture(
        stock.plans_manager,
        stock.configuration_manager,
        stock.num_input_channels,
        stock.label_manager.num_segmentation_heads,
        enable_deep_supervision=False,
    ).to(device)
    networks["exported"].load_state_dict(branch_weights(networks["confkd"].state_dict(), "student"))
    size = stock.configuration_manager.patch_size
    image = torch.randn(1, *((4, *size) if len(size) == 2 else (2 * size[0], *size[1:])))
    predictions = {}
    for trainer in (stock, ours):
        trainer.set_deep_supervision_enabled(False)
    for name, network in networks.items():
        predictor = nnUNetPredictor(
            use_mirroring=False,
            perform_everything_on_device=device == "cuda",
            device=torch.device(device),
            allow_tqdm=False,
        )
        predictor.manual_initialization(
            network, ours.plans_manager, ours.configuration_manager, None, ours.dataset_json, name, None
        )
        predictions[name] = lambda p=predictor: p.predict_sliding_window_return_logits(image)
    return predictions


def peak_memory(case: Case, device: str, trainer_name: str, folder: Path) -> float:
    """MiB, after three steps: of the allocator on a GPU, of the process on a CPU."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_confkd.training.trainer import ConfKDTrainer

    trainer = build(
        case, nnUNetTrainer if trainer_name == "stock" else ConfKDTrainer, folder, device, VARIANTS.get(trainer_name)
    )
    batch = batch_of(case, trainer._get_deep_supervision_scales(), device)
    if trainer_name == "kl on full":
        del batch["hint_mask"]
    for _ in range(3):
        trainer.train_step(batch)
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    # not getrusage: its maximum is inherited from the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


# ---- tables ---------------------------------------------------------------------------------------------------------

def table_of(result: dict) -> str:
    lines = [
        "| plan | step, stock | step, ConfKD | ratio (quartiles) | bound (FLOPs) | over the bound | "
        "before the KL: ratio | bound | over | KL on full images alone: ratio | bound | over | "
        "loss terms, of the step | prediction, as trained | exported | "
        "peak memory | before the KL | without hints |",
        "|" + "---|" * 18,
    ]
    for run in result["runs"]:
        cells = [_name(run), *(f"{run['step'][name]['median_ms']:.0f} ms" for name in ("stock", "confkd"))]
        for name in VARIANTS:
            if name not in run["step"]:  # a row of an earlier version of this script
                cells += [""] * 3
                continue
            low, ratio, high = run["step"][name]["ratios"]
            bound = run["flops"][name] / run["flops"]["stock"]
            cells += [f"{ratio:.3f} ({low:.3f}-{high:.3f})", f"{bound:.3f}", f"{ratio / bound:.3f}"]
        terms = sum(ms for part, ms in (run["parts_ms"] or {}).items() if part.startswith("term "))
        cells.append(f"{100 * terms / run['step']['confkd']['median_ms']:.1f} %" if terms else "")
        cells += [f"{run['prediction'][name]['ratios'][1]:.3f}" for name in ("confkd", "exported")]
        memory = run.get("memory_mib")
        cells += [f"{memory[name] / memory['stock']:.2f}" if memory and name in memory else "" for name in VARIANTS]
        lines.append("| " + " | ".join(cells) + " |")
    measured = [run for run in result["runs"] if run["parts_ms"]]
    if measured:
        parts = [part for part in measured[0]["parts_ms"] if not part.endswith(", backward")]
        lines += [
            "",
            "Parts of a step, ms; of the terms forward and backward, each alone:",
            "",
            "| plan | " + " | ".join(parts) + " |",
            "|" + "---|" * (len(parts) + 1),
        ]
        for run in measured:
            times = (
                [run["parts_ms"][key] for key in (part, f"{part}, backward") if key in run["parts_ms"]]
                for part in parts
            )
            lines.append(f"| {_name(run)} | " + " | ".join(" + ".join(f"{ms:.1f}" for ms in of) for of in times) + " |")
    return "\n".join(lines)


def _name(run: dict) -> str:
    return f"{run['case']}{', AMP' if run['amp'] else ''}{', compiled' if run['compiled'] else ''}"


def insert(docs: Path, name: str, text: str) -> None:
    """Replace what lies between the marks `<!-- NAME -->` and `<!-- end of NAME -->`."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    content = docs.read_text(encoding="utf-8")
    if start not in content or end not in content:
        raise SystemExit(f"{docs}: lacks the lines {start} and {end}, between which the table goes")
    before, rest = content.split(start, 1)
    docs.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of the cases, from 0")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=("eager", "compiled"))
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "TRAINER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        if args.device == "cpu":
            os.environ["OMP_NUM_THREADS"] = str(args.threads)
        import torch
        torch.set_num_threads(args.threads)
        cases = cases_of(args.device)
        if args.memory:
            print("MEMORY", peak_memory(cases[int(args.memory[0])], args.device, args.memory[1], folder))
            return
        from importlib.metadata import version

        described = {
            "device": args.device,
            "versions": ", ".join(f"{p} {version(p)}" for p in ("nnunetv2", "torch")),
            "machine": (
                f"{platform.machine()} CPU, {args.threads} thread(s) of {os.cpu_count()} cores, float32"
                if args.device == "cpu"
                else torch.cuda.get_device_name()
            ),
        }
        for i, case in enumerate(cases):
            if args.only and i not in args.only:
                continue
            modes = [(True, False), (True, True), (False, False)]
            if args.device == "cpu":  # compiling takes minutes
                modes = [(False, False)] + [(False, True)] * (case.full_share == 0.5)
            for amp, compiled in modes:
                if ("compiled" if compiled else "eager") in args.modes:
                    run = measure(case, args.device, amp, compiled, args.repetitions, folder)
                    if amp == (args.device == "cuda") and not compiled:
                        run["memory_mib"] = {name: _memory_of(i, name, args) for name in ("stock", *VARIANTS)}
                    save(run, described, [case.name for case in cases], args.output)


def save(run: dict, described: dict, names: list[str], output: Path | None) -> None:
    """Put a row into the JSON file, and the table into docs/; rows of another machine or other versions are dropped."""
    file = output or ROOT / "benchmarks" / f"step_time_{described['device']}.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    runs = [run]
    if all(kept.get(key) == value for key, value in described.items()):
        runs += [other for other in kept["runs"] if _mode(other) != _mode(run) and other["case"] in names]
    result = described | {"runs": sorted(runs, key=lambda run: (names.index(run["case"]), *_mode(run)[1:]))}
    file.write_text(json.dumps(result, indent=1))
    if not output:
        insert(ROOT / "docs" / "explanation" / "performance.md", f"step time, {described['device']}",
               f"{described['machine']}; {described['versions']}.\n\n{table_of(result)}")


def _mode(run: dict) -> tuple:
    return run["case"], run["compiled"], not run["amp"]


def _memory_of(case: int, trainer: str, args) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--device", args.device, "--threads", str(args.threads),
         "--memory", str(case), trainer],
        capture_output=True,
        text=True,
        check=True,
    )
    return round(float(done.stdout.split("MEMORY")[1]), 1)


if __name__ == "__main__":
    main()
