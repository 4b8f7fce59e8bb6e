"""Files of other programs: MATLAB, NIfTI and DICOM scans, and sound."""

import wave
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from sigma_vae.config import DataConfig
from sigma_vae.data.arrays import CLIPS, arranged, split_keys
from sigma_vae.data.cache import file_record
from sigma_vae.data.files import (
    FILE_OPTIONS,
    FileKind,
    Shape,
    check_size,
    damaged,
    examples,
    files_of_splits,
    folder_of,
    key_of_array,
    needed,
)
from sigma_vae.data.levels import Array
from sigma_vae.data.splits import Raw, SplitName
from sigma_vae.data.stores import UnreadableError
from sigma_vae.registry import register

__all__ = ["read_dicom", "read_matlab", "read_nifti", "read_sound"]

_NIFTI = (".nii", ".nii.gz")
_DICOM = (".dcm", ".dicom")
_SOUND = (".wav", ".flac", ".ogg")
_HDF5 = b"\x89HDF\r\n\x1a\n"
"""First bytes at 512 of MATLAB 7.3 files, which are HDF5."""
_NUMBERS = {kind: kind for kind in "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()}
_NUMBERS |= {"double": "float64", "single": "float32", "logical": "bool"}


@register.source("matlab", options=FILE_OPTIONS | {"layout", "columns"}, endings=(".mat",), reads=folder_of(".mat"), rank=2)
def read_matlab(config: DataConfig) -> Raw:
    """Read the arrays of a MATLAB file, chosen as in .npz files; or a folder of such files, one example each.

    An array ``(rows, columns[, colours], examples)``, as MATLAB stacks images, is recognised by its square images.

    Raises:
        ValueError: the file cannot be read, or its arrays do not match.
    """
    path = config.path
    if path.is_dir():
        unread = partial(_unread_of_matlab, columns=config.columns)
        return files_of_splits(config, (".mat",), read_matlab) or examples(
            config,
            FileKind((".mat",), partial(_example_of_matlab, columns=config.columns), layout=config.layout, unread=unread),
        )
    try:
        found = _matlab_arrays(path)
    except UnreadableError as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    chosen = _chosen(found, config.columns, path)
    try:
        arrays: dict[SplitName, Array] = {split: _matlab_array(path, key) for split, key in chosen.items()}
    except UnreadableError as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    last = [split for split, array in arrays.items() if _has_examples_last(array.shape)]
    ordered, used = arranged(
        {s: np.moveaxis(a, -1, 0) if s in last else a for s, a in arrays.items()}, config.layout, str(path)
    )
    ignored = ", ".join(key for key in found if key not in chosen.values())
    words = [
        f"axes read as {used}",
        *(["examples along the last axis, as MATLAB stacks images"] if last else []),
        *([f"ignored the arrays {ignored}"] if ignored else []),
    ]
    return Raw(str(path), ordered, [file_record(path)], words, clips=used in CLIPS)


def _has_examples_last(shape: tuple[int, ...]) -> bool:
    """Whether an array is a stack of square images along its last axis.

    >>> _has_examples_last((32, 32, 3, 500)), _has_examples_last((28, 28, 90)), _has_examples_last((90, 28, 28))
    (True, True, False)
    """
    square = len(shape) in (3, 4) and shape[0] == shape[1] != shape[-1]
    return square and (len(shape) == 3 or shape[2] in (1, 3, 4)) and shape[-1] not in (1, 3, 4)


def _example_of_matlab(path: Path, columns: tuple[str, ...]) -> Array:
    with damaged():
        array = _matlab_array(path, _chosen(_matlab_arrays(path), columns, path)["train"])
    return array.reshape(1, -1) if 1 in array.shape and array.ndim == 2 else array[np.newaxis]


def _unread_of_matlab(path: Path, columns: tuple[str, ...]) -> list[str]:
    found = _matlab_arrays(path)
    return [key for key in found if key not in _chosen(found, columns, path).values()]


def _chosen(found: Mapping[str, Shape], columns: tuple[str, ...], path: Path) -> dict[SplitName, str]:
    keys = [key for key, (shape, _) in found.items() if max(shape, default=1) > 1]  # MATLAB's numbers are arrays, too
    return {"train": key_of_array(keys, columns, path)} if columns else split_keys(keys, str(path))


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        return _HDF5 in file.read(1024)


def _matlab_arrays(path: Path) -> dict[str, Shape]:
    """Shape and dtype of a file's arrays of numbers."""
    with damaged():
        if _is_hdf5(path):
            import h5py

            with h5py.File(path) as file:
                sets = {key: each for key, each in file.items() if isinstance(each, h5py.Dataset) and each.dtype.kind in "biuf"}
                return {key: (each.shape[::-1], each.dtype.name) for key, each in sets.items()}
        from scipy.io import whosmat

        return {key: (shape, _NUMBERS[kind]) for key, shape, kind in whosmat(path) if kind in _NUMBERS}


def _matlab_array(path: Path, key: str) -> Array:
    shape, dtype = _matlab_arrays(path)[key]
    check_size(shape, np.dtype(dtype), path)
    with damaged():
        if _is_hdf5(path):
            import h5py

            with h5py.File(path) as file:
                return np.asarray(file[key][()]).T  # HDF5 lists MATLAB's axes from the last one
        from scipy.io import loadmat

        return np.asarray(loadmat(path, variable_names=[key], mat_dtype=True)[key], dtype)


@register.source("nifti", options=FILE_OPTIONS, endings=_NIFTI, reads=folder_of(*_NIFTI), rank=2)
def read_nifti(config: DataConfig) -> Raw:
    """Read NIfTI scans, a file or a folder of them: each slice along the third axis is an example.

    Raises:
        ValueError: nibabel is not installed, a file is damaged, or slices differ in shape.
    """
    nibabel = needed("nibabel", config.path)
    words = ("each slice of a scan along its third axis is an example, as no network here reads volumes",)
    return examples(config, FileKind(_NIFTI, partial(_slices, nibabel), layout="n-h-w", words=words))


def _slices(nibabel: Any, path: Path) -> Array:
    with damaged():
        image = nibabel.load(path)
        check_size(image.shape, image.get_data_dtype(), path)
        scan = np.asanyarray(image.dataobj)
        while scan.ndim < 3:
            scan = scan[..., np.newaxis]
        return np.ascontiguousarray(scan.reshape(*scan.shape[:2], -1).transpose(2, 1, 0))


@register.source("dicom", options=FILE_OPTIONS, endings=_DICOM, reads=folder_of(*_DICOM), rank=2)
def read_dicom(config: DataConfig) -> Raw:
    """Read DICOM images, a file or a folder of them, as their stored values; each frame of a file is an example.

    Raises:
        ValueError: pydicom is not installed, a file is damaged, or images differ in shape.
    """
    pydicom = needed("pydicom", config.path, ", or make pictures of them: magick mogrify -format png *.dcm")
    words = ("stored values, without rescaling by slope and intercept",)
    return examples(config, FileKind(_DICOM, partial(_frames, pydicom), layout="n-h-w-c", words=words))


def _frames(pydicom: Any, path: Path) -> Array:
    with damaged():
        image = pydicom.dcmread(path)
        several, colours = int(image.get("NumberOfFrames", 1)), int(image.get("SamplesPerPixel", 1))
        return np.asarray(image.pixel_array).reshape(several, image.Rows, image.Columns, colours)


@register.source("sound", options=FILE_OPTIONS, endings=_SOUND, reads=folder_of(*_SOUND), rank=2)
def read_sound(config: DataConfig) -> Raw:
    """Read sound files of one length, an example each, as series with a channel for each microphone.

    Samples of 8 and 16 bits are levels, with silence in the middle; others are real values in [−1, 1].

    Raises:
        ValueError: a file is damaged, or needs soundfile; or lengths differ.
    """
    return examples(config, FileKind(_SOUND, _sound, layout="n-c-t", words=("samples of 16 bits as levels, silence at 32768",)))


def _sound(path: Path) -> Array:
    with damaged(), path.open("rb") as file:
        try:
            content = wave.open(file)
        except (wave.Error, EOFError) as error:
            if path.suffix.lower() == ".wav" and "unknown format" not in str(error):
                raise
        else:
            return _samples(content)
    convert = f", or convert it: ffmpeg -i {quote(path.name)} -c:a pcm_s16le {quote(path.stem + '-16.wav')}"
    soundfile = needed("soundfile", path, convert)
    with damaged():
        deep = "int16" if soundfile.info(path).subtype == "PCM_16" else "float32"
        samples, _ = soundfile.read(path, dtype=deep, always_2d=True)
        return np.asarray(_levels(samples) if deep == "int16" else samples).T[np.newaxis]


def _samples(content: wave.Wave_read) -> Array:
    channels, width, count = content.getnchannels(), content.getsampwidth(), content.getnframes()
    read = content.readframes(count)
    if len(read) != channels * width * count:
        raise UnreadableError(f"it is cut off: it has {len(read)} of {channels * width * count} bytes")
    return _pcm(read, width).reshape(1, -1, channels).transpose(0, 2, 1)


def _pcm(content: bytes, width: int) -> Array:
    """Samples of 1 to 4 bytes each, as levels where they are at most 16 bits."""
    if width == 1:
        return np.frombuffer(content, np.uint8)
    if width == 2:
        return _levels(np.frombuffer(content, "<i2"))
    whole = np.zeros((len(content) // width, 4), np.uint8)
    whole[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return whole.view("<i4")[:, 0] / (2.0**31)


def _levels(samples: Array) -> Array:
    return (samples.astype(np.int32) + 2**15).astype(np.uint16)
