"""The edit models, text encoders and VAEs that are installed, as the short path lists and finds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..trainer_core.config import FlavourName
from ..trainer_core.errors import ModelFileError
from ..trainer_core.qwen_image.flavours import FLAVOURS, flavour_of_release
from ..trainer_core.qwen_image.installed import Installed, installed_at, is_text_encoder
from ..trainer_core.qwen_image.recognise import doubts_by_name, how_to_get, template_files
from ..trainer_core.text import brief, some_of
from . import host_folders

_TRANSFORMERS, _TEXT_ENCODERS, _VAES = "diffusion_models", "text_encoders", "vae"
_TO_LIST = "Then press R to refresh the list."
_DEMO_FLAVOUR: FlavourName = "edit-v2"  # takes up to three references


@dataclass(frozen=True, slots=True)
class EditModel:
    """An installed edit model: the path of its transformer, and of the folder in diffusers' layout if it is in one."""

    name: str
    transformer: Path
    folder: Path | None
    found: Installed


def edit_models() -> list[str]:
    """Names of the installed edit models: files of ComfyUI's edit templates, other files, folders, the demo model."""
    return [*(model.name for model in _installed()), host_folders.DEMO_CHOICE]


def edit_model(name: str) -> EditModel:
    """The installed edit model with this name. A file is also found in a subfolder.

    Raises:
        ModelFileError: it is not installed, or not an edit model; says where to get it.
    """
    installed = _installed()
    same = [model for model in installed if model.name == name]
    same += [model for model in installed if not model.folder and Path(model.name).name == name]
    if same:
        return same[0]
    if name in host_folders.model_files(_TRANSFORMERS):
        from ..trainer_core.qwen_image.base_model import transformer_settings

        transformer_settings(Path(host_folders.model_file(_TRANSFORMERS, name)))  # raises with what the file is
        raise ModelFileError(f"{brief(name)} is not a Qwen-Image-Edit model. Choose another model.")
    raise ModelFileError(_not_installed(name, [model.name for model in installed]))


def _installed() -> list[EditModel]:
    files: dict[str, EditModel] = {}
    folders: dict[str, EditModel] = {}
    roots = folder_paths.get_folder_paths(_TRANSFORMERS)
    for name in host_folders.model_files(_TRANSFORMERS):
        for path in (os.path.join(root, name) for root in roots):  # noqa: PTH118 - pathlib is slow for hundreds of files
            if found := installed_at(path):
                kind = files if name.endswith((".safetensors", ".gguf")) else folders
                kind.setdefault(name, EditModel(name, Path(path), None, found))
    for name, folder in host_folders.diffusers_models().items():
        if found := installed_at(folder / "transformer"):
            folders[name] = EditModel(name, folder / "transformer", folder, found)
    return [*sorted(files.values(), key=_place_in_list), *sorted(folders.values(), key=lambda model: model.name)]


def _place_in_list(model: EditModel) -> tuple[int, bool, str]:
    """Files of ComfyUI's templates, then others, then those that shouldn't be trained on by their name."""
    name, wanted = Path(model.name).name, template_files(_TRANSFORMERS)
    return wanted.index(name) if name in wanted else len(wanted), bool(doubts_by_name(name)), model.name


def _not_installed(name: str, installed: list[str]) -> str:
    choose = f"Choose one that is installed: {some_of(installed)}."
    if get := how_to_get(name):
        get = f"{choose} Or {get[0].lower()}{get[1:]}" if installed else get
        return f"The model {name} is not installed. {get} {_TO_LIST}"
    if installed:
        return f"The model {brief(name)} is not installed. {choose}"
    get = how_to_get(template_files(_TRANSFORMERS)[0])
    return f"The model {brief(name)} is not installed, and no other edit model is. {get} {_TO_LIST}"


def flavour_of(model: EditModel, release: str) -> FlavourName:
    """The flavour of a model, from the chosen `release` or, if that is none, as recognised.

    Raises:
        ModelFileError: only its user knows which release it is.
    """
    chosen = flavour_of_release(release) or model.found.flavour
    if chosen is None:
        named = ", ".join(row.release for row in FLAVOURS.values())
        doubts = doubts_by_name(model.name)
        raise ModelFileError(
            f"Neither the content nor the name of {model.name} says which release of Qwen-Image-Edit it is. Choose it "
            f"in release: {named}." + (f" {doubts}" if doubts else "")
        )
    return chosen


def demo_flavour(release: str) -> FlavourName:
    """The flavour that the demo model is used as."""
    return flavour_of_release(release) or _DEMO_FLAVOUR


def text_encoder_file() -> str:
    """Path of the text encoder to use: that of ComfyUI's templates, or another Qwen2.5-VL-7B.

    Raises:
        ModelFileError: none is installed; says where to get it.
    """
    return _best(_TEXT_ENCODERS, "Qwen2.5-VL-7B text encoder", is_text_encoder)


def vae_file() -> str:
    """Path of the VAE to use: that of ComfyUI's templates, or another one with Qwen-Image in its name.

    Raises:
        ModelFileError: none is installed; says where to get it.
    """
    return _best(_VAES, "Qwen-Image VAE", _is_vae)


def _is_vae(path: Path) -> bool:
    name = path.name.lower()
    return "qwen" in name and "image" in name and "layered" not in name


def _best(folder: str, what: str, fits: Callable[[Path], bool]) -> str:
    names = [name for name in host_folders.model_files(folder) if name != host_folders.NO_FILE]
    wanted = template_files(folder)
    named = [name for each in wanted for name in names if Path(name).name == each]
    for name in [*named, *(name for name in names if name not in named)]:
        path = Path(host_folders.model_file(folder, name))
        if name in named or fits(path):
            return str(path)
    raise ModelFileError(f"No {what} is installed. {how_to_get(wanted[0])} {_TO_LIST}")
