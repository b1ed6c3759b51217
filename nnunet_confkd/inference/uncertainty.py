"""Where a prediction is uncertain: maps of the entropy beside each segmentation.

:mod:`nnunet_confkd.inference.prediction` says how the entropy is measured, and :mod:`nnunet_confkd.inference.review` in
which order to review the cases.
"""
from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import ending_of
from nnunet_confkd.errors import some
from nnunet_confkd.files import write_json, written_whole
from nnunet_confkd.inference.prediction import ExportingPredictor, export_and_measure, normalised_entropy
from nnunet_confkd.inference.review import IN_DOUBT, REVIEW, case_score, map_ending, write_review_list
from nnunet_confkd.training.network import unwrap

FOLDER, NATS, NORMALISED, SCORES = "uncertainty", "entropy_nats", "entropy_normalised", "scores"


# ---- writing --------------------------------------------------------------------------------------------------------

class _Floats(np.ndarray):
    """An array that ignores `astype`, by which nnU-Net's writers of segmentations turn values into integers."""

    def astype(self, *_, **__):
        return self


def write_map(file: str | Path, voxels: np.ndarray, properties: dict, reader_writer) -> None:
    """Write a float32 map with nnU-Net's writer of segmentations, so that both lie in the same place.

    Args:
        file: The file to write. Its folder is made if it is missing.
        voxels: The map, on the grid of the segmentation.
        properties: nnU-Net's properties of the image.
        reader_writer: An instance of nnU-Net's reader and writer for the format.

    Raises:
        OSError: The file does not hold what was to be written. Some libraries do not report a full disk.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.ascontiguousarray(voxels, np.float32)
    file.unlink(missing_ok=True)
    if not file.name.lower().endswith(".nii.gz"):
        _write_checked(file, voxels, properties, reader_writer)
        return
    plain = file.with_name(f".{file.name[:-3]}")
    try:
        _write_checked(plain, voxels, properties, reader_writer)
        with written_whole(file) as aside:
            _compress(plain, aside)
    finally:
        plain.unlink(missing_ok=True)


def _write_checked(file: Path, voxels: np.ndarray, properties: dict, reader_writer) -> None:
    reader_writer.write_seg(voxels.view(_Floats), str(file), properties)
    # mostly the file ends with the voxels as they are, and need not be read as an image
    if not _ends_with(file, voxels) and not np.array_equal(reader_writer.read_seg(str(file))[0][0], voxels):
        raise OSError(f"{file}: was not written correctly; is the disk full?")


def _ends_with(file: Path, voxels: np.ndarray) -> bool:
    start = file.stat().st_size - voxels.nbytes
    return start > 0 and np.array_equal(np.memmap(file, voxels.dtype, "r", start, voxels.shape), voxels)


def _compress(file: Path, target: Path) -> None:
    """Compress a file with gzip, quickly: ITK's level would take several times as long and gain nothing.

    The last bits of most floating point numbers are noise. Only runs of equal bytes are worth a search.
    """
    stream = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_RLE)
    with open(file, "rb") as plain, open(target, "wb") as compressed:
        while piece := plain.read(2 ** 20):
            compressed.write(stream.compress(piece))
        compressed.write(stream.flush())


# ---- predicting -----------------------------------------------------------------------------------------------------

class EntropyPredictor(ExportingPredictor):
    """nnU-Net's predictor that also writes the folder `uncertainty` into its output folder."""

    def exporter(self) -> Callable:
        return partial(_export_with_entropy, branch=getattr(unwrap(self.network), "branch", None))

    def _manage_input_and_output_lists(self, sources, output, previous=None, overwrite=True, part_id=0, num_parts=1,
                                       save_probabilities=False):
        """Also predict the cases that have a segmentation but no entropy, which nnU-Net skips with overwrite=False."""
        lists = super()._manage_input_and_output_lists(sources, output, previous, True, part_id, num_parts,
                                                       save_probabilities)
        if overwrite:
            return lists
        endings = [self.dataset_json["file_ending"]] + [".npz"] * save_probabilities
        # A segmentation that is newer than its score stays: somebody may have corrected it.
        missing = [i for i, file in enumerate(lists[1])
                   if not all(Path(file + ending).is_file() for ending in endings) or not _score_file(file).is_file()]
        print(f"{len(lists[1]) - len(missing)} of these cases have a prediction and its entropy already; "
              f"{len(missing)} are predicted")
        return tuple([items[i] for i in missing] for items in lists)


def _is_of(score: Path, segmentation: Path) -> bool:
    """Whether a score is that of a segmentation. Its prediction has written it afterwards."""
    return score.is_file() and score.stat().st_mtime >= segmentation.stat().st_mtime


def _score_file(output: str) -> Path:
    """Return the file of a case's score; `output` is the file of its segmentation without the ending."""
    file = Path(output)
    return file.parent / FOLDER / SCORES / f"{file.name}.json"


def _export_with_entropy(logits, properties, configuration_manager, plans_manager, dataset_json, output, *args,
                         branch=None, **kwargs) -> None:
    """Write the segmentation, both maps of the entropy, and then the score, which marks the case as complete."""
    score_file = _score_file(output)
    score_file.unlink(missing_ok=True)
    segmentation, maps = export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json,
                                            output, *args, **kwargs)
    del logits, maps["confidence"]
    labels, reader_writer = plans_manager.get_label_manager(dataset_json), plans_manager.image_reader_writer_class()
    name = f"{Path(output).name}{map_ending(dataset_json['file_ending'])}"
    write_map(score_file.parent.parent / NATS / name, maps["entropy"], properties, reader_writer)
    normalised = normalised_entropy(maps.pop("entropy"), labels.num_segmentation_heads, labels.has_regions)
    write_map(score_file.parent.parent / NORMALISED / name, normalised, properties, reader_writer)
    score_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(score_file, {"case": Path(output).name, "branch": branch, **case_score(normalised, segmentation)})


def outdated(output: Path) -> list[Path]:
    """Find the scores of segmentations that a later prediction without the entropy has replaced.

    Args:
        output: The folder of the predictions.
    """
    files = {file.name[:-len(ending)]: file for file in output.iterdir() if (ending := ending_of(file))}
    return [score for score in sorted((output / FOLDER / SCORES).glob("*.json"))
            if (file := files.get(score.stem)) and not _is_of(score, file)]


def list_cases(output: Path) -> Path:
    """Write the review list of all cases in an output folder, also of earlier runs and of other parts.

    Args:
        output: The folder of the predictions.

    Returns:
        The file `uncertainty/review_first.csv`.

    Examples:
        >>> list_cases(Path("predictions"))  # doctest: +SKIP
        PosixPath('predictions/uncertainty/review_first.csv')
    """
    folder, earlier = output / FOLDER, outdated(output)
    if earlier:
        print(f"left out of the review list, because their segmentations were corrected or predicted anew since: "
              f"{some([file.stem for file in earlier])}")
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / SCORES).glob("*.json"))
            if not file.name.startswith(".") and file not in earlier]  # another part may be writing one
    folder.mkdir(exist_ok=True)
    write_review_list(folder, rows, {"about": "The cases to review first. score: mean normalised entropy of the voxels "
                                              f"predicted as foreground or of a normalised entropy of {IN_DOUBT} or "
                                              "more"})
    return folder / f"{REVIEW}.csv"
