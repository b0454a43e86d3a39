"""reference_latents on_the_fly: encode references at every turn, with the same result as cached latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..data.images import open_checked_picture
from ..device import pick_device
from ..errors import ConfigError
from ..events import SILENT, Observer
from ..qwen_image.base_model import BaseModel
from .encoded import EncodedDataset, EncodeReference
from .encoders import EncodePictures, own_pictures
from .encoding_plan import latents_key
from .pictures import View, render
from .types import ReferenceFile


@contextmanager
def reference_encoder(
    encoded: EncodedDataset, base: BaseModel, observer: Observer = SILENT
) -> Iterator[EncodeReference | None]:
    """Load the VAE for the duration of the context and yield a reference encoder; None if all latents are cached.

    Raises:
        ConfigError: the dataset was encoded with another VAE or mixed_precision.
        ModelFileError: the VAE can't be loaded.
    """
    first = next((entry for entry in encoded.pairs if entry.reference_files), None)
    if first is None:
        yield None
        return
    vae = own_pictures(base, pick_device(base.config.device))
    if latents_key(vae.digest, *first.reference_files[0][1:]) != first.references[0]:
        raise ConfigError(
            "The dataset's references are encoded on the fly, but the dataset was encoded with another VAE or "
            "mixed_precision than this model has. Encode it again with this model."
        )
    with vae.loaded(observer) as encode:
        yield lambda file: _latents(file, encode)


def _latents(file: ReferenceFile, encode: EncodePictures) -> Tensor:
    picture = open_checked_picture(Path(file.path), file.content)
    return next(encode([render(picture, View.from_json(file.view))])).cpu()
