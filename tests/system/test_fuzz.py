"""Broken and hostile input leads to a result or to an InputError with a text, never to another error, a hang or a file
that is written elsewhere.

Each test tries a few examples by default, and ten times as many where it is slow. The examples are always the same,
unless CONFKD_FUZZ=50 asks for fifty times as many and for new ones in each run.
"""
from __future__ import annotations

import contextlib
import gzip
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import tarfile
from copy import deepcopy
from html.parser import HTMLParser
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError

MORE = int(os.environ.get("CONFKD_FUZZ", "1"))
SECONDS = 30  # An example that takes longer counts as a hang, on a busy machine, too.
TRIED: dict[str, int] = {}  # the number of examples of each test


def fuzz(examples: int, **strategies):
    """Call a test with a tenth of so many examples by default, and with all of them where it is slow.

    The test's other parameters are fixtures.
    """
    def decorate(test):
        fixtures = [name for name in inspect.signature(test).parameters if name not in strategies]

        def run_examples(number, **values):
            def example(**drawn):
                TRIED[test.__name__] = TRIED.get(test.__name__, 0) + 1
                test(**values, **drawn)
            example.__qualname__ = test.__qualname__  # hypothesis derives the examples from it
            settings(max_examples=MORE * number, deadline=None, derandomize=MORE == 1, database=None,
                     suppress_health_check=list(HealthCheck))(given(**strategies)(example))()

        run_examples.__signature__ = inspect.Signature([
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("number", *fixtures)])
        return pytest.mark.parametrize("number", [
            pytest.param(max(5, examples // 10), id="short"),
            pytest.param(examples, id="long", marks=pytest.mark.slow)])(run_examples)
    return decorate


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    if "CONFKD_FUZZ" in os.environ:
        print(f"\n{sum(TRIED.values())} examples: {TRIED}")


@contextlib.contextmanager
def no_hang():
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return

    def stop(*_):
        raise AssertionError(f"did not end within {SECONDS} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(function, *args, **kwargs):
    """Call a function; return its result, or the InputError that it raises, which must have a text."""
    with no_hang(), contextlib.redirect_stdout(utf8()), contextlib.redirect_stderr(utf8()):
        try:
            return function(*args, **kwargs)
        except InputError as error:
            assert str(error).strip()
            return error


def utf8() -> io.TextIOWrapper:
    """A stream that refuses halves of characters, as a terminal's does."""
    return io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict", write_through=True)


def run(*argv, foreseen: bool = True) -> tuple[int, str, str]:
    """Run a command in this process; return its exit status, its output and its errors.

    An error must be a text of ours. Only files that programs write (plans, checkpoints, records) may be broken in ways
    that were not foreseen.
    """
    out, err = utf8(), io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    with no_hang(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as error:  # argparse
            code = error.code
    out, err = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err))
    assert code in (0, 1, 2)
    assert not foreseen or "an unexpected" not in err, err
    if code == 1 and argv[0] != "check":
        assert re.search(rf"confkd {argv[0]}: .*\S", err)
    return code, out, err


# ---- what is tried -------------------------------------------------------------------------------------------------

ODD_TEXTS = st.sampled_from([
    "", " ", "..", ".", "../x", "../../outside/secret", "/etc/passwd", "/tmp/x", "a/../../b", "$HOME", "~", "%s", "{0}",
    "-d", "--help", "a\nb", "a\tb", "a\rb", "\x00", "\x1b[2J", "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "'\";--", "a b", "é", "漢字", "\U0001f9e0", "\ud800", "x" * 300, "CON", "nul",
    "ignore", "background", "full", "nan", "1e999", "0", "-1", "[0]", "null", "(a+)+$", "(", "torch.hub.load",
    "subprocess.Popen", ".nii.gz", ".tif", ".png", "__", "a__b", "*", "?", "[a-z]*", "_seg", "a_0000"])
TEXTS = ODD_TEXTS | st.text(max_size=12)
NUMBERS = (st.integers(-3, 12) | st.integers() | st.floats()
           | st.sampled_from([10 ** 30, -10 ** 30, 10 ** 400, 2 ** 31, 2 ** 63, 2 ** 64, 65535, 65536, 255, 256])
           | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e308, 5e-324]))
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=8)


def nested(depth: int):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def places(content, found=None) -> list[tuple]:
    """All (container, key) of a JSON value, the outermost first."""
    found = [] if found is None else found
    for key in list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        found.append((content, key))
        places(content[key], found)
    return found


@st.composite
def mutated(draw, original):
    """A JSON value with one to three entries replaced, removed, renamed, doubled or added."""
    content = deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        found = places(content)
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add", "wrap"]))
        if what == "replace":
            container[key] = draw(VALUES)
        elif what == "wrap":
            wrap = draw(st.sampled_from([lambda v: [v], lambda v: {"0": v}, lambda v: str(v), lambda v: [v, v]]))
            container[key] = wrap(container[key])
        elif what == "remove":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, draw(VALUES))
        elif what == "rename":
            container[draw(TEXTS)] = container.pop(key)
        else:
            container[draw(TEXTS)] = draw(VALUES)
    return content


def anything(original):
    """Mutations of it, and now and then something else altogether."""
    return mutated(original) | mutated(original) | mutated(original) | VALUES


FILE_NAMES = (st.text(min_size=1, max_size=20) | st.sampled_from([
    "a b", "a'b\"c", "<script>alert(1)<", "<img src=x onerror=alert(1)>", "..", "...", "a\nb", "-d", "--help", "é",
    "漢字", "x" * 200, "\U0001f9e0", "a\\b", "$HOME", "%00", "=1+1", "a;rm -rf b", "`id`", "$(id)", "a&b", "a|b",
    "\udcff", " a", "a ", ".a", "CON", "*", "[a]", "a_0000", "a_seg", "a.nii", "0", "a,b", "\x1b[31m", "a:b", "~"])
    ).filter(lambda name: not {"/", "\0"} & set(name) and name not in (".", "..") and _encodable(name))


def _encodable(name: str) -> bool:
    try:
        return 0 < len(os.fsencode(name)) <= 220
    except UnicodeEncodeError:
        return False


# ---- settings ------------------------------------------------------------------------------------------------------

from nnunet_confkd.training.settings import Settings  # noqa: E402

BLOCK = st.dictionaries(st.sampled_from(list(Settings().as_dict())), SCALARS | VALUES, max_size=4)


@fuzz(300, blocks=st.lists(BLOCK | mutated(Settings().as_dict()) | VALUES, max_size=3), progress=st.floats(0, 1))
def test_a_block_of_settings_is_taken_or_refused(blocks, progress):
    found = outcome(Settings.from_blocks, *blocks)
    if isinstance(found, Settings):
        assert found == Settings.from_blocks(found.as_dict())
        assert 0 <= found.kl_ramp(progress) <= 1
        assert all(math.isfinite(v) for v in found.as_dict().values() if isinstance(v, (int, float)))


@pytest.mark.parametrize("value", [nested(10 ** 4), 10 ** 5000, "x" * 10 ** 6, {"a" * 1000: nested(2000)}],
                         ids=["deep", "huge", "long", "deep in a key"])
def test_settings_too_deep_or_too_long_to_show_are_refused(value):
    assert isinstance(outcome(Settings.from_blocks, {"epochs": value}), InputError)
    assert isinstance(outcome(Settings.from_blocks, value), InputError)


# ---- a small data set and model ------------------------------------------------------------------------------------

NAME = "Dataset007_Toy"
KINDS = {"a": "full", "b": "full", "c": "full", "d": "partial", "e": "unlabelled"}
DESCRIBED = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1, "tumour": 2, "ignore": 3},
             "numTraining": 5, "file_ending": ".nii.gz", "supervision": KINDS, "patient_pattern": "(.*)"}
FULLY = DESCRIBED | {"labels": {"background": 0, "organ": 1, "tumour": 2}, "supervision": dict.fromkeys(KINDS, "full")}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "tumour": [2], "ignore": 3}, "regions_class_order": [1, 2]}
LISTED = {"dataset": {case: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"}
                      for case in KINDS}}
MSD = {"labels": {"0": "background", "1": "organ", "2": "tumour"}, "modality": {"0": "MR"}, "name": "Toy",
       "licence": "none", "reference": "nobody",
       "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in KINDS]}
SPLITS = [{"train": ["a", "d", "e"], "val": ["b", "c"]}, {"train": ["b", "c", "d", "e"], "val": ["a"]}]
RESAMPLING = {
    f"resampling_fn_{what}{kind}": value for what in ("data", "seg", "probabilities") for kind, value in (
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": what == "seg", "order": 1, "order_z": 0, "force_separate_z": None}))}
NETWORK = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [4, 4], "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3], [3, 3]], "strides": [[1, 1], [2, 2]], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True}},
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}
PLANS = {
    "dataset_name": NAME, "plans_name": "nnUNetPlans", "original_median_spacing_after_transp": [1, 1, 1],
    "original_median_shape_after_transp": [4, 8, 8], "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {
        "max": 3.0, "mean": 0.0, "median": 0.0, "min": -3.0, "percentile_00_5": -3.0, "percentile_99_5": 3.0,
        "std": 1.0}},
    "configurations": {"2d": {
        "data_identifier": "nnUNetPlans_2d", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [8, 8], "median_image_size_in_voxels": [8.0, 8.0], "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False], **RESAMPLING,
        "architecture": NETWORK, "batch_dice": True, "confkd": {"epochs": 1}}}}
RECORD = {"trainer": "ConfKDTrainer", "nnunet_confkd": "0.1.0", "settings": Settings().as_dict(),
          "supervision": {case: KINDS[case] for case in "ade"}, "pseudo_dice_on": ["b", "c"]}


def write(file, array, spacing=(1.0, 1.0, 1.0)):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[:image.GetDimension()])
    sitk.WriteImage(image, str(file))


def put(file, content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


class World:
    """A folder with nnU-Net's three folders, a partially annotated data set (7), a fully annotated one (8), a model,
    and files that nothing may touch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.raw, self.preprocessed, self.results = (
            folder / "nnunet" / name for name in ("raw", "preprocessed", "results"))
        self.data, self.full = self.raw / NAME, self.raw / "Dataset008_Full"
        self.prepared = self.preprocessed / NAME
        self.model = self.results / NAME / "ConfKDTrainer__nnUNetPlans__2d"
        self.output = folder / "output"
        rng = np.random.default_rng(0)
        for case, kind in KINDS.items():
            label = np.zeros((4, 8, 8), np.uint8)
            label[1:3, 2:6, 2:6], label[2, 3:5, 3:5] = 1, 2
            image = rng.normal(size=label.shape).astype(np.float32)
            for folder_ in (self.data, self.full):
                write(folder_ / "imagesTr" / f"{case}_0000.nii.gz", image)
            write(self.full / "labelsTr" / f"{case}.nii.gz", label)
            label[:, :{"full": 0, "partial": 4, "unlabelled": 8}[kind]] = 3
            write(self.data / "labelsTr" / f"{case}.nii.gz", label)
        write(folder / "outside" / "secret.nii.gz", label)
        (folder / "outside" / "secret").write_text("secret")
        put(self.model / "fold_0" / "confkd.json", RECORD)
        self.model_files()
        self.prepare()
        self.restore()

    def model_files(self):
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        from nnunet_confkd.training.trainer import ConfKDTrainer
        manager = PlansManager(deepcopy(PLANS))
        torch.manual_seed(0)
        network = ConfKDTrainer.build_network_architecture(manager, manager.get_configuration("2d"), 1, 3, False)
        curves = {key: [0.5] for key in ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs", "loss_kl")}
        self.checkpoint = {
            "network_weights": network.state_dict(), "optimizer_state": None, "grad_scaler_state": None,
            "_best_ema": None, "current_epoch": 1,
            "logging": {**curves, "epoch_start_timestamps": [1.0], "epoch_end_timestamps": [2.0]},
            "init_args": {"configuration": "2d"}, "trainer_name": "ConfKDTrainer",
            "inference_allowed_mirroring_axes": [0, 1]}
        torch.save(self.checkpoint, self.model / "fold_0" / "checkpoint_final.pth")

    def prepare(self):
        """Preprocess the data set as nnU-Net does."""
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
        manager = PlansManager(deepcopy(PLANS))
        configuration = manager.get_configuration("2d")
        (self.prepared / "nnUNetPlans_2d").mkdir(parents=True)
        shutil.copytree(self.data / "labelsTr", self.prepared / "gt_segmentations")
        for case in KINDS:
            DefaultPreprocessor(verbose=False).run_case_save(
                str(self.prepared / "nnUNetPlans_2d" / case), [str(self.data / "imagesTr" / f"{case}_0000.nii.gz")],
                str(self.data / "labelsTr" / f"{case}.nii.gz"), manager, configuration, DESCRIBED)

    def restore(self):
        """Write the files anew that tests break, and remove what commands have written where they may."""
        for folder in (self.raw, self.preprocessed, self.results):
            for left in folder.glob("*") if folder.is_dir() else ():
                if left.is_dir() and left.name not in (NAME, "Dataset008_Full"):
                    shutil.rmtree(left)
                elif not left.is_dir():
                    left.unlink()
        shutil.rmtree(self.output, ignore_errors=True)
        put(self.data / "dataset.json", DESCRIBED)
        put(self.full / "dataset.json", FULLY)
        put(self.prepared / "splits_final.json", SPLITS)
        put(self.prepared / "dataset.json", DESCRIBED)
        put(self.model / "dataset.json", DESCRIBED)
        put(self.model / "plans.json", PLANS)
        put(self.model / "fold_0" / "confkd.json", RECORD)

    def files(self) -> dict:
        """All files, with the time of their last change."""
        return {str(file): file.lstat().st_mtime_ns for file in self.folder.rglob("*") if not file.is_dir()}

    @contextlib.contextmanager
    def nothing_written(self, *but: Path):
        before = self.files()
        yield
        after = {file: time for file, time in self.files().items() if before.get(file) != time}
        assert set(before) <= set(self.files())
        elsewhere = [file for file in after if not any(Path(file).is_relative_to(folder) for folder in but)]
        assert not elsewhere


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)  # a dozen processes take a second, every time
        patch.setattr("tempfile.tempdir", str(world.folder / "output.tmp"))
        (world.folder / "output.tmp").mkdir()
        yield world


@pytest.fixture(autouse=True)
def as_it_was(request, monkeypatch):
    """Set nnU-Net's folders to those of `world`; conftest.py sets them to the shared ones after each test."""
    if "world" in request.fixturenames:
        world = request.getfixturevalue("world")
        for name in ("raw", "preprocessed", "results"):
            monkeypatch.setenv(f"nnUNet_{name}", str(getattr(world, name)))
    yield
    if "world" in request.fixturenames:
        world.restore()


# ---- dataset.json --------------------------------------------------------------------------------------------------

DATASET_JSON = anything(DESCRIBED) | mutated(DESCRIBED | REGIONS) | mutated(DESCRIBED | LISTED)
FULL_REGIONS = {"labels": {"background": 0, "whole": [1, 2], "tumour": 2}, "regions_class_order": [1, 2]}
FULL_JSON = anything(FULLY) | mutated(FULLY | FULL_REGIONS) | mutated(FULLY | LISTED)


@fuzz(200, described=DATASET_JSON, table=anything(KINDS))
def test_labels_and_kinds_are_taken_or_refused(described, table):
    from nnunet_confkd.data.supervision import check_labels, decide_kinds
    outcome(check_labels, described)
    labels = SimpleNamespace(ignore_label=3, has_ignore_label=True)
    counts = {"a": {0: 5, 3: 0}, "d": {0: 5, 3: 5}, "e": {0: 0, 3: 5}}
    found = outcome(decide_kinds, counts, labels, table)
    assert isinstance(found, InputError) or set(found) == set(counts)


@fuzz(60, described=DATASET_JSON, splits=st.just(SPLITS) | anything(SPLITS), as_json=st.booleans())
def test_check_tells_what_is_wrong(world, described, splits, as_json):
    put(world.data / "dataset.json", described)
    put(world.prepared / "splits_final.json", splits)
    with world.nothing_written():
        code, out, _ = run("check", "-d", 7, "--processes", 1, *["--json"] * as_json)
    if as_json and out:
        json.loads(out)


@fuzz(40, described=FULL_JSON, splits=st.none() | anything(SPLITS), style=st.sampled_from(["points", "slices", "none"]),
      link=st.booleans())
def test_weaken_writes_a_data_set_or_nothing(world, described, splits, style, link):
    world.restore()
    put(world.full / "dataset.json", described)
    if splits is not None:
        put(world.preprocessed / "Dataset008_Full" / "splits_final.json", splits)
    new = "Dataset009_Full_" + style
    with world.nothing_written(world.raw / new, world.preprocessed / new):
        code, *_ = run("weaken", "--source", 8, "--id", 9, "--full", 1, "--style", style, "--processes", 1,
                       *["--link"] * link)
    assert (world.raw / new).exists() == (code == 0)
    shutil.rmtree(world.preprocessed / "Dataset008_Full", ignore_errors=True)


@fuzz(40, described=FULL_JSON | mutated(FULLY | MSD), options=st.sampled_from([
    ["--ignore-value", 3], ["--labels", "background", "organ", "tumour", "--ignore-value", 3]]))
def test_mix_writes_a_data_set_or_nothing(world, described, options):
    world.restore()
    put(world.full / "dataset.json", described)
    with world.nothing_written(world.raw / "Dataset009_Mixed", world.preprocessed / "Dataset009_Mixed"):
        code, *_ = run("mix", "--full", world.full, "--partial", world.data, "--id", 9, "--processes", 1, *options)
    assert (world.raw / "Dataset009_Mixed").exists() == (code == 0)


@fuzz(40, described=FULL_JSON | mutated(FULLY | MSD))
def test_a_task_of_the_decathlon_is_converted_or_refused(world, described):
    world.restore()
    put(world.full / "dataset.json", described)
    with world.nothing_written(world.raw / "Dataset009_Toy", world.preprocessed / "Dataset009_Toy"):
        code, *_ = run("convert", "msd", "--source", world.full, "--id", 9, "--name", "Toy", "--processes", 1)
    assert (world.raw / "Dataset009_Toy").exists() == (code == 0)


@fuzz(60, described=DATASET_JSON)
def test_what_plan_reads_first_is_taken_or_refused(world, described):
    from nnunet_confkd.data import planning
    put(world.data / "dataset.json", described)
    with world.nothing_written():
        found = outcome(planning._dataset_json, NAME)
        if not isinstance(found, InputError) and "ignore" in found["labels"]:
            outcome(planning.read_raw_labels, NAME, found)


@fuzz(30, described=DATASET_JSON,
      labels=st.none() | st.lists(TEXTS | st.sampled_from(["1", "2", "1,2"]), min_size=1, max_size=3))
def test_evaluate_takes_the_labels_or_refuses(world, described, labels):
    put(world.data / "dataset.json", described)
    more = [] if labels is None else ["--labels", *labels]
    with world.nothing_written(world.output):
        run("evaluate", "--truth", world.full / "labelsTr", "--prediction", world.full / "labelsTr", "-d", 7,
            "--processes", 1, "--output", world.output, *more)


# ---- plans and models ----------------------------------------------------------------------------------------------

MODEL = {"plans": PLANS, "dataset": DESCRIBED, "record": RECORD, "checkpoint": {
    "optimizer_state": None, "grad_scaler_state": None, "_best_ema": None,
    "logging": {"train_losses": [0.5], "mean_fg_dice": [0.5], "loss_kl": [0.1], "epoch_end_timestamps": [2.0]},
    "current_epoch": 1, "init_args": {"configuration": "2d"}, "trainer_name": "ConfKDTrainer",
    "inference_allowed_mirroring_axes": [0, 1]}}


@st.composite
def model_folders(draw):
    """Which file of a model folder is broken, and its content."""
    which = draw(st.sampled_from(["plans", "plans", *MODEL]))
    return which, draw(anything(MODEL[which]))


def put_model(world, which, content):
    world.restore()
    if which == "checkpoint":
        if isinstance(content, dict):
            content = {"network_weights": world.checkpoint["network_weights"], **content}
        torch.save(content, world.model / "fold_0" / "checkpoint_final.pth")
    else:
        names = {"plans": "plans.json", "dataset": "dataset.json", "record": "fold_0/confkd.json"}
        put(world.model / names[which], content)


@fuzz(60, model=model_folders(), data=st.booleans())
def test_report_shows_a_model_or_refuses(world, model, data, monkeypatch):
    put_model(world, *model)
    # The test is about what the report reads from the model. Pictures and predictions would take their time.
    from nnunet_confkd.report import report as module
    monkeypatch.setattr(module, "Findings", lambda *_: None)
    with world.nothing_written(world.output):
        run("report", "--model", world.model, "--output", world.output, "-device", "cpu", foreseen=False)


@fuzz(60, model=model_folders(), install=st.booleans(), branch=st.sampled_from(["student", "teacher"]))
def test_export_writes_a_model_or_nothing(world, model, install, branch):
    put_model(world, *model)
    with world.nothing_written(world.output, world.results / NAME, world.prepared):
        target = ["--install"] if install else ["--output", world.output]
        run("export", "--model", world.model, "--branch", branch, *target, foreseen=False)


@fuzz(40, model=model_folders() | DATASET_JSON.map(lambda described: ("source", described)))
def test_complete_writes_a_data_set_or_nothing(world, model):
    if model[0] == "source":
        put_model(world, "dataset", DESCRIBED)
        put(world.data / "dataset.json", model[1])
    else:
        put_model(world, *model)
    with world.nothing_written(world.raw / "Dataset009_Toy_completed", world.preprocessed / "Dataset009_Toy_completed"):
        code, *_ = run("complete", "-d", 7, "--model", world.model, "--id", 9, "--processes", 1, "-device", "cpu",
                       foreseen=False)
    assert (world.raw / "Dataset009_Toy_completed").exists() == (code == 0)


@fuzz(40, model=model_folders())
def test_compare_reads_a_model_or_refuses(world, model):
    put_model(world, *model)
    for branch in ("", "_teacher"):
        shutil.copytree(world.full / "labelsTr", world.model / "fold_0" / f"validation{branch}", dirs_exist_ok=True)
    with world.nothing_written(world.output):
        run("compare", world.model, "--processes", 1, "--output", world.output, foreseen=False)


@fuzz(60, block=BLOCK | anything(Settings().as_dict()), described=st.just(DESCRIBED) | DATASET_JSON,
      splits=st.just(SPLITS) | anything(SPLITS), fold=st.sampled_from([0, 1, 5, "all"]))
def test_the_trainer_starts_or_refuses(world, block, described, splits, fold):
    """What a user writes may be broken; the rest of the plans is nnU-Net's."""
    from nnunet_confkd.training.trainer import ConfKDTrainer
    put(world.prepared / "dataset.json", described)
    put(world.prepared / "splits_final.json", splits)
    plans = deepcopy(PLANS) | {"continue_training": False}  # as nnU-Net's command gives it
    plans["configurations"]["2d"]["confkd"] = block
    with world.nothing_written(world.results, world.prepared):
        trainer = outcome(ConfKDTrainer, plans, "2d", fold, described, torch.device("cpu"))
        if not isinstance(trainer, InputError):
            outcome(trainer.get_tr_and_val_datasets)


# ---- volumes -------------------------------------------------------------------------------------------------------

KINDS_OF_NUMBERS = ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64",
                    "complex64"]


@st.composite
def volumes(draw):
    """Small arrays of any shape and type, with values that are no labels among them."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))) if draw(st.booleans()) else (4, 8, 8)
    dtype = np.dtype(draw(st.sampled_from(KINDS_OF_NUMBERS)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    array = rng.integers(0, draw(st.sampled_from([1, 2, 3, 4, 100])), shape).astype(dtype)
    odd = draw(st.sampled_from([None, None, math.nan, math.inf, -1, 0.5, 1e30, 70000]))
    if odd is not None and (dtype.kind in "fc" or dtype.kind in "iu" and odd in (-1, 70000)):
        with np.errstate(all="ignore"):
            array.flat[0] = np.array(odd).astype(dtype)
    return array


GEOMETRIES = st.sampled_from([
    np.eye(4), np.diag([2, 3, 4, 1]), np.diag([0, 1, 1, 1]), np.diag([math.nan, 1, 1, 1]), np.diag([1e30, 1, 1, 1]),
    np.zeros((4, 4)), np.diag([-1, -1, 1, 1]), np.array([[1, .5, 0, 9], [0, 1, 0, 9], [0, 0, 1, 9], [0, 0, 0, 1.]])])


def nifti(file, array, affine) -> None:
    import nibabel
    image = nibabel.Nifti1Image(np.atleast_3d(array) if array.ndim < 2 else array, None, dtype=array.dtype)
    image.header.set_sform(affine, 1)
    image.header.set_qform(None, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(image.to_bytes(), 1) if file.suffix == ".gz" else image.to_bytes())


@fuzz(60, image=volumes(), label=volumes(), affine=GEOMETRIES, of_label=GEOMETRIES)
def test_any_volume_is_examined_weakened_and_measured_or_refused(world, image, label, affine, of_label):
    world.restore()
    odd = world.raw / "Dataset010_Odd"
    for case in "ab":
        nifti(odd / "imagesTr" / f"{case}_0000.nii.gz", image, affine)
        nifti(odd / "labelsTr" / f"{case}.nii.gz", label, of_label)
        nifti(odd / "other" / f"{case}.nii.gz", label, affine)
    put(odd / "dataset.json", FULLY | {"numTraining": 2, "supervision": {}})
    weak = [folder / "Dataset011_Odd_points" for folder in (world.raw, world.preprocessed)]
    with world.nothing_written(odd, *weak, world.output):
        run("check", "-d", 10, "--processes", 1)
        run("weaken", "--source", 10, "--id", 11, "--full", 1, "--style", "points", "--processes", 1)
        run("evaluate", "--truth", odd / "labelsTr", "--prediction", odd / "other", "--output", world.output,
            "--processes", 1)


@fuzz(200, label=volumes(), style=st.sampled_from(["erosion", "points", "scribbles", "slices", "box", "none", "?"]),
      ignore=st.integers(-2, 300), options=st.fixed_dictionaries({}, optional={
          "fraction": st.floats() | st.just(0.5), "dimension": st.sampled_from(["2d", "3d", "4d"]),
          "slice_axis": st.integers(-1, 3), "spacing": st.lists(st.floats() | st.just(1.0), max_size=4),
          "background": st.booleans(), "radius": st.integers(-1, 9)}))
def test_any_label_is_weakened_or_refused(label, style, ignore, options):
    from nnunet_confkd.data.weak_labels import case_rng, weaken
    weak = outcome(weaken, label, style, ignore, case_rng("a", style, 0), **options)
    if not isinstance(weak, InputError):
        assert weak.shape == label.shape and ((weak == label) | (weak == ignore)).all() | (style == "box")


ENDINGS = [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ".gipl", ".tif", ".tiff", ".png", ".bmp", ".txt", ""]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a proper file of each format."""
    folder, found = tmp_path_factory.mktemp("formats"), {}
    for ending in (".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".tif", ".png", ".bmp"):
        array = np.arange(24, dtype=np.uint8).reshape((4, 6) if ending in (".png", ".bmp") else (2, 3, 4))
        sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"a{ending}"))
        found[ending] = (folder / f"a{ending}").read_bytes()
    return found


@fuzz(300, of=st.sampled_from([".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".tif", ".png", ".bmp"]),
      ending=st.none() | st.sampled_from(ENDINGS), name=FILE_NAMES,
      changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
      cut=st.none() | st.integers(0, 400), text=st.none() | TEXTS)
def test_any_bytes_are_an_image_or_refused(written, tmp_path_factory, of, ending, name, changes, cut, text):
    from nnunet_confkd.data.images import Picture, parts, read
    content = bytearray(written[of])
    for place, value in changes:
        if place < len(content):
            content[place] = value
    content = bytes(content[:cut])
    if text is not None and of in (".nrrd", ".mha"):  # the header names another file for the voxels
        elsewhere = text.encode("utf-8", "replace")
        content = re.sub(rb"(ElementDataFile = ).*", lambda m: m[1] + elsewhere, content, flags=re.S)
        content = re.sub(rb"\n\n.*", lambda m: b"\ndata file: " + elsewhere + m[0], content, flags=re.S)
    folder = tmp_path_factory.mktemp("bytes")
    file = folder / (name + (of if ending is None else ending))
    try:
        file.write_bytes(content)
    except OSError:
        return
    found = outcome(read, file)
    assert isinstance(found, (Picture, InputError))
    outcome(parts, file)
    assert list(folder.iterdir()) == [file]
    shutil.rmtree(folder)


# ---- names ---------------------------------------------------------------------------------------------------------

@fuzz(40, names=st.lists(FILE_NAMES, min_size=2, max_size=3, unique_by=str.lower))
def test_files_of_any_name_are_checked_mixed_and_evaluated(world, names):
    import csv
    world.restore()
    odd = world.raw / "Dataset010_Odd"
    for name in names:
        (odd / "imagesTr").mkdir(parents=True, exist_ok=True)
        (odd / "labelsTr").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(world.full / "imagesTr" / "a_0000.nii.gz", odd / "imagesTr" / f"{name}_0000.nii.gz")
        shutil.copyfile(world.full / "labelsTr" / "a.nii.gz", odd / "labelsTr" / f"{name}.nii.gz")
    put(odd / "dataset.json", FULLY | {"numTraining": len(names), "supervision": dict.fromkeys(names, "full")})
    new = [folder / f"Dataset011_{name}" for folder in (world.raw, world.preprocessed)
           for name in ("Mixed", "Odd_points")]
    with world.nothing_written(*new, world.output):
        run("check", "-d", 10, "--processes", 1)
        code, *_ = run("mix", "--full", odd, "--id", 11, "--processes", 1)
        written = {file.name for file in new[0].rglob("*.nii.gz")}
        assert (code == 0) == bool(written)
        shutil.rmtree(new[0], ignore_errors=True)
        shutil.rmtree(new[2], ignore_errors=True)
        run("weaken", "--source", 10, "--id", 11, "--full", 1, "--style", "points", "--processes", 1)
        code, *_ = run("evaluate", "--truth", odd / "labelsTr", "--prediction", odd / "labelsTr", "--output",
                       world.output, "--processes", 1)
    if code == 0:
        with open(world.output / "metrics.csv", newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))
        assert all(len(row) == len(rows[0]) for row in rows)
        not_hidden = [name for name in names if not name.startswith(".")]
        assert len({row[0] for row in rows[1:]}) == len(not_hidden)
        json.loads((world.output / "metrics.json").read_text())


class Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += data


MARKUP = st.text(alphabet="<>&'\"=/ -!ascript", max_size=20)


@fuzz(100, texts=st.lists((TEXTS | FILE_NAMES | MARKUP).filter(str.strip), min_size=6, max_size=6))
def test_no_text_becomes_html(texts):
    from nnunet_confkd.report import page

    def built(a, b, c, d, e, f):
        section = (page.table([a, b], [[c, (d, e)], [f, a]], b) + page.names([c, d]) + page.folded(e, page.title(f))
                   + page.class_legend([a], {a}, True) + page.branch_key("student", b))
        return page.page(a, page.paragraph(b), [(a, b, c)], [("id", a, section)], page.paragraph(c))

    plain, odd = Tags(built(*"abcdef")), Tags(built(*texts))
    assert odd.found == plain.found


# ---- archives and links --------------------------------------------------------------------------------------------

@st.composite
def archives(draw):
    """The members of a tar file, each a (name, type, target of a link), and where the file is cut off, if it is."""
    name = TEXTS | st.sampled_from([
        "Task99/a", "Task99/sub/b", "Task99", "../evil", "/tmp/confkd_evil", "Task99/../../evil", "Task99/l",
        "Task99/l/evil", "l", "l/evil", "", ".", "..", "Task99/\udcff", "a" * 300, "Task99/" + "d/" * 50])
    target = st.sampled_from(["..", "../..", "/etc/passwd", "../outside", "a", "../../mine", "Task99/a", "nowhere", "l",
                              ".", "", "../../../outside/secret"])
    kind = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
                            tarfile.CHRTYPE, tarfile.FIFOTYPE])
    return draw(st.lists(st.tuples(name, kind, target), max_size=6)), draw(st.none() | st.integers(0, 3000))


@fuzz(150, archive=archives())
def test_an_archive_is_unpacked_into_its_folder_or_not_at_all(tmp_path_factory, monkeypatch, archive):
    import pooch

    from nnunet_confkd.data.download import Source, download
    members, cut = archive
    root = tmp_path_factory.mktemp("archive")
    target, mine = root / "target", root / "target" / "mine"
    mine.mkdir(parents=True)
    for folder in (mine, root / "outside"):
        folder.mkdir(exist_ok=True)
        (folder / "secret").write_text("secret")
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*") if file.is_file()}

    def retrieve(url, known_hash, fname, path, **_):
        with tarfile.open(Path(path) / fname, "w") as tar:
            for name, kind, link in [("Task99/first", tarfile.REGTYPE, ""), *members]:
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = kind, link, 4 * (kind == tarfile.REGTYPE)
                with contextlib.suppress(ValueError, UnicodeError):
                    tar.addfile(member, io.BytesIO(b"evil"))
        content = (Path(path) / fname).read_bytes()
        (Path(path) / fname).write_bytes(content[:cut])
        return str(Path(path) / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    found = outcome(download, "toy", target, Source("http://nowhere/toy.tar", "0" * 32, "Task99", "none"))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    if isinstance(found, InputError):
        assert {file for file in root.rglob("*") if file.is_file()} == set(before)
    else:
        known = {*before, *(file.parent for file in before), target}
        assert all(file.is_relative_to(found) for file in root.rglob("*") if file not in known)
        assert not found.is_symlink()
        assert all(file.resolve().is_relative_to(found.resolve()) for file in found.rglob("*"))
    shutil.rmtree(root)
