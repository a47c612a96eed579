"""Pictures for the check of a model that reads them, made into numbers by the processor that comes with the model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.datasets import SPLITS, Rows, Selection, is_hub_id, open_dataset, open_parquet
from formats.errors import InputError

if TYPE_CHECKING:
    from convert.recipe import Validation

#: What of a folder is a picture.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def load_processor(folder: Path, *, trust_remote_code: bool) -> Any:
    """The image processor of a model's folder. Raises :class:`InputError` where there is none."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"the model comes with no image processor that transformers can load, so pictures cannot be given to it ({said})"
        ) from None


def take_pictures(validation: Validation, processor: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """``validation.pictures`` of ``validation.images``, float32 (pictures, channels, height, width), and a record of what they are.

    Of a folder they are spread evenly over its files in the order of their names, so that a folder of folders is seen everywhere; of a
    .parquet file or a dataset on the Hub they are the first rows. Raises :class:`InputError` where there are too few, where one is no
    picture, or where the processor does not make them of one size.
    """
    assert validation.images is not None
    name, record, pictures = _open(validation)
    made: list[np.ndarray] = []
    for where, raw in islice(pictures, validation.pictures):
        values = np.asarray(processor(images=[_decode(raw, where)], return_tensors="np")["pixel_values"], np.float32)
        if made and values.shape != made[0].shape:
            sizes = f"{list(values.shape[1:])}, the first is {list(made[0].shape[1:])}"
            raise InputError(f"validation images {name}: the processor makes {where} {sizes}; give pictures that are alike in shape")
        made.append(values)
    if len(made) < validation.pictures:
        raise InputError(
            f"validation images {name}: {len(made)} pictures, {validation.pictures} are wanted; give more or set validation.pictures"
        )
    found = np.concatenate(made)
    digest = hashlib.sha256(found.tobytes()).hexdigest()
    return found, {"text": name, **record, "tokens": len(found), "unit": "pictures", "length": 1, "tokens_sha256": digest}


def _open(validation: Validation) -> tuple[str, dict[str, Any], Iterator[tuple[str, Any]]]:
    """What the pictures are called, of what they are, and each with its place, not yet decoded."""
    images = str(validation.images)
    selection = Selection(validation.config, validation.split, validation.column)
    if Path(images).suffix == ".parquet":
        rows = open_parquet(Path(images), column=validation.column or "image", seed=None)
    elif is_hub_id(images):
        rows = open_dataset(images, selection, split=SPLITS["validation"][0], column="image", seed=None)
    else:
        return _open_folder(Path(images), validation.pictures)
    return rows.name, rows.record, _of_rows(rows)


def _open_folder(folder: Path, count: int) -> tuple[str, dict[str, Any], Iterator[tuple[str, Any]]]:
    if not folder.is_dir():
        raise InputError(f"validation images {folder}: no such folder, and no .parquet file or dataset on the Hub")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    spread = [files[i * len(files) // count] for i in range(count)] if len(files) >= count else files
    return folder.name, {}, ((path.relative_to(folder).as_posix(), path.read_bytes()) for path in spread)


def _of_rows(rows: Rows) -> Iterator[tuple[str, Any]]:
    """As datasets keeps an Image: a record with ``bytes``, or the bytes themselves."""
    for i, value in enumerate(rows.values):
        raw = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(raw, bytes):
            raise InputError(
                f"validation images {rows.name}: row {i + 1} of {rows.record['column']} holds no bytes of a picture; say another column"
            )
        yield f"row {i + 1}", raw


def _decode(raw: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(raw)).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"validation images: {where} is no picture that can be read ({error})") from None
