"""Writers of the published files of each data set, in miniature: each independent of the readers."""

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np

COUNTS = {
    "mnist": {"train": 60, "test": 10},
    "fashion-mnist": {"train": 60, "test": 10},
    "cifar10": {"train": 20, "test": 4},
    "svhn": {"train": 30, "test": 6},
    "celeba": {"train": 12, "validation": 4, "test": 5},
    "frey-faces": {"train": 40},
}
SHAPES = {
    "mnist": (28, 28),
    "fashion-mnist": (28, 28),
    "cifar10": (32, 32, 3),
    "svhn": (32, 32, 3),
    "celeba": (218, 178, 3),
    "frey-faces": (28, 20),
}
HUB = {
    "mnist": ("ylecun/mnist", "mnist", "image", ["label"]),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "fashion_mnist", "image", ["label"]),
    "cifar10": ("uoft-cs/cifar10", "plain_text", "img", ["label"]),
    "svhn": ("ufldl-stanford/svhn", "cropped_digits", "image", ["label"]),
    "celeba": ("flwrlabs/celeba", "img_align+identity+attr", "image", ["celeb_id", "Bald", "Smiling"]),
}
"""Repository, config, column of pictures, other columns."""


def images_of(name, seed=0):
    """Random pictures ``(N, H, W[, 3])``."""
    state = np.random.RandomState(seed)
    return {split: state.randint(0, 256, (count, *SHAPES[name])).astype(np.uint8) for split, count in COUNTS[name].items()}


def encoded(image, kind="PNG"):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind)
    return buffer.getvalue()


def idx(images, magic=0x803):
    return struct.pack(">IIII", magic, *images.shape) + images.tobytes()


def write_idx(folder, images, zipped=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, stem in (("train", "train-images-idx3-ubyte"), ("test", "t10k-images-idx3-ubyte")):
        content = idx(images[name])
        (folder / (stem + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)


def old_pickle(rows, label=b"training batch 1 of 5"):
    """A CIFAR batch as Python 2 pickled it, opcode by opcode: protocol 2, all strings of eight bits."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    content = np.ascontiguousarray(rows).tobytes()
    shape = number(len(rows)) + number(rows.shape[1]) + b"\x86"
    kind = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    kind += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + shape + kind + b"\x89" + b"T" + struct.pack("<i", len(content)) + content + b"tb"
    labels = b"](" + b"".join(number(i % 10) for i in range(len(rows))) + b"e"
    return b"\x80\x02}(" + text(b"batch_label") + text(label) + text(b"labels") + labels + text(b"data") + array + b"u."


def cifar_batches(images, binary=False):
    """File name to content."""
    flat = {split: part.transpose(0, 3, 1, 2).reshape(len(part), -1) for split, part in images.items()}
    parts = {f"data_batch_{i}": rows for i, rows in enumerate(np.split(flat["train"], 5), 1)} | {"test_batch": flat["test"]}
    if not binary:
        return {name: old_pickle(rows) for name, rows in parts.items()}
    return {f"{name}.bin": np.insert(rows, 0, 7, axis=1).tobytes() for name, rows in parts.items()}


def write_cifar10(folder, images, binary=False, packed=False):
    kind, inner = ("binary", "cifar-10-batches-bin") if binary else ("python", "cifar-10-batches-py")
    files = {f"{inner}/{name}": content for name, content in cifar_batches(images, binary).items()}
    if not packed:
        (folder / inner).mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"cifar-10-{kind}.tar.gz", "w:gz") as archive:
        for name, content in {f"{inner}/batches.meta": b"?", **files}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_svhn(folder, images):
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    for split, part in images.items():
        labels = np.full((len(part), 1), 10, np.uint8)
        savemat(folder / f"{split}_32x32.mat", {"X": part.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)


def write_frey_faces(folder, images):
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "frey_rawface.mat", {"ff": images["train"].reshape(-1, 560).T})


def write_celeba(folder, images, zipped=False, csv=False, nested=False):
    """Pictures numbered through; the splits lie mixed in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = [label for label, part in enumerate(images.values()) for _ in part]
    waiting = {label: iter(part) for label, part in enumerate(images.values())}
    files, lines = {}, ["image_id,partition"] if csv else []
    for number, label in enumerate(np.random.RandomState(1).permutation(labels), 1):
        files[f"{number:06}.jpg"] = encoded(next(waiting[label]), "JPEG")
        lines.append(f"{number:06}.jpg{',' if csv else ' '}{label}")
    (folder / f"list_eval_partition.{'csv' if csv else 'txt'}").write_text("\n".join([*lines, ""]))
    if zipped:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"img_align_celeba/{name}", content)
        return
    inner = folder / "img_align_celeba" / ("img_align_celeba" if nested else ".")
    inner.mkdir(parents=True)
    for name, content in files.items():
        (inner / name).write_bytes(content)


WRITERS = {
    "mnist": write_idx,
    "fashion-mnist": write_idx,
    "cifar10": write_cifar10,
    "svhn": write_svhn,
    "celeba": write_celeba,
    "frey-faces": write_frey_faces,
}


def write_repository(folder, config, column, splits, others=("label",), shards=2):
    """A data set in the hub's own layout: Parquet files with one encoded picture a row, and a card that names them.

    ``splits``: name to encoded pictures.
    """
    (folder / config).mkdir(parents=True)
    card = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, pictures in splits.items():
        card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
        for shard, part in enumerate(np.array_split(np.arange(len(pictures)), shards)):
            path = folder / config / f"{split}-{shard:05}-of-{shards:05}.parquet"
            write_parquet(path, column, [pictures[i] for i in part], others)
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


def write_parquet(path, column, pictures, others):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {column: pa.array([{"bytes": picture, "path": None} for picture in pictures], kind)}
    columns |= {name: pa.array([0] * len(pictures), pa.int64()) for name in others}
    features = {column: {"_type": "Image"}} | {name: {"dtype": "int64", "_type": "Value"} for name in others}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


def write_hub(folder: Path, name, images):
    """The hub's copy of an official data set below ``folder``, under its own name there."""
    repository, config, column, others = HUB[name]
    names = {"validation": "valid"} if name == "celeba" else {}
    splits = {names.get(split, split): [encoded(image) for image in part] for split, part in images.items()}
    extra = {"extra": splits["test"]} if name == "svhn" else {}
    return write_repository(folder / repository, config, column, splits | extra, others)
