"""A DICOM series as a scanner writes it, for the tests."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE, SPACING, ORIGIN = (6, 8, 10), (0.5, 1.5, 3.0), (-20.0, 7.0, 100.0)  # (z, y, x), and x, y, z
SIDE = (0, 0, 1, 1, 0, 0, 0, 1, 0)  # sagittal: rows of cosines, whose columns are the axes of the voxels
VOXELS = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)


def write_series(folder: Path, voxels=VOXELS, left_out=(), spacing=SPACING) -> list[pydicom.Dataset]:
    """Write a CT series, slice by slice, whose slices are sagittal.

    Args:
        folder: Where to write.
        voxels: (Z, Y, X), in Hounsfield units.
        left_out: The numbers of the slices that are not written.
        spacing: In mm, in the order x, y, z.

    Returns:
        All slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.reshape(SIDE, (3, 3))
    series, frame, study, slices = generate_uid(), generate_uid(), generate_uid(), []
    for number in range(len(voxels)):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID, dataset.file_meta.MediaStorageSOPClassUID = (ExplicitVRLittleEndian,
                                                                                         CTImageStorage)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
        dataset.SOPClassUID, dataset.Modality, dataset.SeriesDescription = CTImageStorage, "CT", "portal venous"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.PatientID = dataset.PatientName = dataset.StudyID = dataset.AccessionNumber = "p^"
        dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyDate = dataset.StudyTime = ""
        dataset.ReferringPhysicianName = dataset.Manufacturer = dataset.PositionReferenceIndicator = ""
        dataset.SeriesNumber, dataset.InstanceNumber = 1, number + 1
        dataset.ImagePositionPatient = list(np.add(ORIGIN, axes @ [0, 0, number * spacing[2]]))
        dataset.ImageOrientationPatient = [*axes[:, 0].tolist(), *axes[:, 1].tolist()]
        dataset.PixelSpacing, dataset.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        dataset.Rows, dataset.Columns = voxels.shape[1:]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.PixelData = (voxels[number].astype(np.int32) + 1024).astype(np.uint16).tobytes()
        if number not in left_out:
            dataset.save_as(folder / f"{number * 7 % 101}.dcm", enforce_file_format=True)  # the names have no order
        slices.append(dataset)
    return slices
