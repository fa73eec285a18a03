"""TIFF with several pages or deep colours, DICOM and NIfTI, against arrays written by their own packages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_prune.data import FolderDataModule
from lightning_prune.data.image_files import read_image
from lightning_prune.data.mask_files import read_mask
from lightning_prune.data.readers import num_slices

RNG = np.random.default_rng(0)


def folders(root):
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    return root / "images", root / "masks"


def test_pages_of_a_tiff_are_samples_of_one_stage(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="pip install lightning-prune[medical]")
    images, masks = folders(tmp_path)
    stacks = {}
    for name in "abcdef":
        stacks[name] = (
            RNG.integers(0, 65536, (3, 8, 10), dtype=np.uint16),
            RNG.integers(0, 2, (3, 8, 10), dtype=np.uint8),
        )
        tifffile.imwrite(
            images / f"{name}.tif",
            stacks[name][0],
            photometric="minisblack",
            metadata={"axes": "ZYX"},
            compression="lzw",
        )
        tifffile.imwrite(
            masks / f"{name}.tif", stacks[name][1], photometric="minisblack", metadata={"axes": "ZYX"}
        )
    data = FolderDataModule(tmp_path, 2, channels=1, val=0.2, test=0.2)
    stages = {stage: data.samples(stage) for stage in ("train", "val", "test")}
    assert [len(samples) for samples in stages.values()] == [12, 3, 3]
    for samples in stages.values():
        for index, pair in enumerate(samples.pairs):
            image, mask = samples[index]
            expected = [stack[pair.page] for stack in stacks[pair.image.stem]]
            assert np.allclose(image[0], expected[0] / 65535, atol=1e-6)
            assert np.array_equal(mask, expected[1])


def test_tiffs_that_pillow_cannot_read(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="pip install lightning-prune[medical]")
    deep = RNG.integers(0, 65536, (8, 10, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb")
    assert np.allclose(read_image(tmp_path / "deep.tif"), deep.transpose(2, 0, 1) / 65535, atol=1e-6)
    grey = deep @ np.array([0.299, 0.587, 0.114]) / 65535
    assert np.allclose(read_image(tmp_path / "deep.tif", channels=1)[0], grey, atol=1e-5)
    bands = RNG.integers(0, 256, (5, 8, 10), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "bands.tif", bands, photometric="minisblack", metadata={"axes": "CYX"})
    assert np.allclose(read_image(tmp_path / "bands.tif", channels=5), bands / 255, atol=1e-6)
    with pytest.raises(ValueError, match=r"channels=3: .*bands.tif has 5"):
        read_image(tmp_path / "bands.tif")


def test_pages_are_channels_where_there_is_one_mask(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="pip install lightning-prune[medical]")
    images, masks = folders(tmp_path)
    for i in range(4):
        tifffile.imwrite(
            images / f"{i}.tif",
            RNG.integers(0, 256, (4, 8, 10), dtype=np.uint8),
            photometric="minisblack",
            metadata={"axes": "ZYX"},
        )
        Image.fromarray(RNG.integers(0, 2, (8, 10), dtype=np.uint8)).save(masks / f"{i}.png")
    assert FolderDataModule(tmp_path, 2, channels=4).samples("train")[0][0].shape == (4, 8, 10)
    with pytest.raises(ValueError, match=r"0.tif has 4 images, but .*0.png has 1: .*channels=4"):
        FolderDataModule(tmp_path, 2, channels=1).setup()


def test_nifti_volumes_are_cut_into_axial_slices_whatever_their_orientation(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="pip install lightning-prune[medical]")
    images, masks = folders(tmp_path)
    for i in range(4):
        mask = RNG.integers(0, 3, (8, 10, 5)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(100 * mask - 50, np.eye(4)), images / f"case{i}.nii.gz")
        flipped = nibabel.Nifti1Image(mask[::-1, :, ::-1].astype(np.float64), np.diag([-1.0, 1, -1, 1]))
        nibabel.save(flipped, masks / f"case{i}_seg.nii.gz")
    data = FolderDataModule(
        tmp_path, 3, channels=1, mask_suffix="_seg", val=0.25, test=0.25, window=(-50, 150)
    )
    samples = data.samples("train")
    assert len(samples) == 10
    for image, labels in samples:
        assert image.shape == (1, 10, 8)  # front of the body on top, 8 from left to right
        assert torch.equal((2 * image[0]).round().long(), labels)
    volume = nibabel.load(images / "case0.nii.gz").get_fdata()
    shown = read_image(images / "case0.nii.gz", 1, index=3, window=(-50, 150))[0]
    assert np.allclose(shown[0], (volume[:, 9, 3] + 50) / 200)


def dicom_file(path, values, slope=1, intercept=0, photometric="MONOCHROME2", frames=0):
    pydicom = pytest.importorskip("pydicom", reason="pip install lightning-prune[medical]")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    header.Rows, header.Columns = values.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, photometric
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
    header.RescaleSlope, header.RescaleIntercept = slope, intercept
    if frames:
        header.NumberOfFrames = frames
    header.PixelData = values.astype(np.uint16).tobytes()
    header.save_as(path, enforce_file_format=True)
    return path


def test_dicom_is_read_in_hounsfield_units(tmp_path):
    stored = RNG.integers(0, 4096, (8, 10))
    file = dicom_file(tmp_path / "ct.dcm", stored, 1, -1024)
    image = read_image(file, 1, window=(-160, 240))
    assert np.allclose(image[0], np.clip((stored - 1024 + 160) / 400, 0, 1), atol=1e-6)
    low, high = np.percentile(stored, (0.5, 99.5))
    assert np.allclose(read_image(file, 3)[1], np.clip((stored - low) / (high - low), 0, 1), atol=1e-5)
    negative = dicom_file(tmp_path / "negative.dcm", stored, photometric="MONOCHROME1")
    assert np.allclose(
        read_image(negative, 1, window=(0, 4095))[0], (stored.max() - stored) / 4095, atol=1e-6
    )


def test_frames_of_a_dicom_file_are_its_slices(tmp_path):
    stored = RNG.integers(0, 2, (4, 8, 10))
    file = dicom_file(tmp_path / "labels.dcm", stored, frames=4)
    assert num_slices(file) == 4
    assert np.array_equal(read_mask(file, index=2), stored[2])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.dcm", "a.nii.gz", "a.bmp"])
@pytest.mark.parametrize("content", [b"", b"this is no image at all", None])
def test_a_damaged_file_is_named(name, content, tmp_path):
    pytest.importorskip("tifffile", reason="pip install lightning-prune[medical]")
    pytest.importorskip("pydicom")
    pytest.importorskip("nibabel")
    file = tmp_path / name
    if content is None:  # cut off in the middle
        if name.endswith((".dcm", ".nii.gz")):
            pytest.skip("the other contents suffice")
        Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)).save(file)
        content = file.read_bytes()[:1200]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as an image .*replace it or move it away"):
        read_image(file)


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    import sys

    file = tmp_path / "scan.nii.gz"
    file.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r"package nibabel: pip install 'lightning-prune\[medical\]'"):
        read_image(file)


def test_transparent_grey_and_turned_photographs_are_read(tmp_path):
    pixels = RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert np.allclose(read_image(tmp_path / "rgba.png"), pixels[..., :3].transpose(2, 0, 1) / 255)
    assert np.allclose(read_image(tmp_path / "rgba.png", channels=4), pixels.transpose(2, 0, 1) / 255)
    grey = Image.fromarray(pixels[..., 0])
    exif = grey.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    grey.save(tmp_path / "turned.png", exif=exif)
    assert np.allclose(read_image(tmp_path / "turned.png")[2], np.rot90(pixels[..., 0], -1) / 255)
