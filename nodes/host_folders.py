"""ComfyUI's folders, the model and LoRA files it lists, and its compute device."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path

import comfy.model_management
import comfy.sd
import folder_paths

from ..trainer_core.config import DEMO_MODEL, ModelConfig
from ..trainer_core.errors import ConfigError, ModelFileError
from ..trainer_core.json_text import read_json
from ..trainer_core.qwen_image.recognise import template_files
from ..trainer_core.text import brief, shown

DEMO_CHOICE = "demo (embedded)"
NO_LORA = "none"
NO_FILE = "none found"
_SAVED_AS = {
    "diffusion_models": "QwenImageTransformer2DModel",
    "text_encoders": "Qwen2_5_VLForConditionalGeneration",
    "vae": "AutoencoderKLQwenImage",
}
_MODEL_FOLDERS = ("diffusers", *_SAVED_AS)
_OWN_FOLDER = "qwen_edit_trainer"
_ROOTS_KEY, _ROOTS_VARIABLE = "qwen_edit_datasets", "QWEN_EDIT_DATASET_ROOTS"


def output_dir() -> Path:
    """ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory())


def input_dir() -> Path:
    """ComfyUI's input folder."""
    return Path(folder_paths.get_input_directory())


def temp_dir() -> Path:
    """ComfyUI's folder of temporary files, which its page can show."""
    return Path(folder_paths.get_temp_directory())


_pictures: dict[str, tuple[int, list[str]]] = {}
_SETTLED_NS = 2 * 10**9  # a folder could change again without changing its timestamp


def input_pictures() -> list[str]:
    """Names of the pictures directly in ComfyUI's input folder.

    The answer is kept until the folder changes: menus ask often, and it may hold thousands of files.
    """
    folder = str(input_dir())
    changed = _changed_at(folder)
    then, found = _pictures.get(folder, (0, []))
    if not changed or then == changed:
        return found
    with os.scandir(folder) as listing:
        files = [entry.name for entry in listing if entry.is_file()]
    found = sorted(folder_paths.filter_files_content_types(files, ["image"]))
    if time.time_ns() - changed > _SETTLED_NS:
        _pictures[folder] = changed, found
    return found


def cache_dir() -> Path:
    """Root folder of the cache: encoded pairs, quantised weights and results of picture checks."""
    return output_dir() / _OWN_FOLDER / "cache"


def checked_dir() -> Path:
    """Folder for results of picture checks."""
    return cache_dir() / "checked"


def runs_dir() -> Path:
    """Folder that contains one folder per run."""
    return output_dir() / _OWN_FOLDER / "runs"


def output_name(path: Path) -> str:
    """`path` relative to the output folder, so that messages do not reveal where that folder is.

    A path outside the output folder gives only its file name.
    """
    try:
        return path.relative_to(output_dir()).as_posix()
    except ValueError:
        return path.name


def without_paths(text: str) -> str:
    """A message in which ComfyUI's folders have the names that people use for them, such as input/my_edit.

    It doesn't tell where on this machine they are.
    """
    models = folder_paths.models_dir
    places = {str(place): name for name, place in dataset_roots().items()} | {str(temp_dir()): "temp", models: "models"}
    for kind in _MODEL_FOLDERS:
        elsewhere = [place for place in folder_paths.get_folder_paths(kind) if not Path(place).is_relative_to(models)]
        places |= dict.fromkeys(elsewhere, f"models/{kind}")
    written: dict[str, str] = {}
    for place, name in places.items():
        for path in (_plain(place), os.path.realpath(place)):
            written |= {shown(path): name, brief(path)[1:-1]: name}  # the two ways in which messages write a path
    longest_first = sorted((path for path in written if len(path) > 1), key=len, reverse=True)
    whole = rf"(?<![\w.\\/-])({'|'.join(map(re.escape, longest_first))})(?!\w|[.-]\w)"
    return re.sub(whole, lambda found: written[found[0]], text)


def dataset_roots() -> dict[str, Path]:
    """Folders that may contain datasets, by the name that messages use for them."""
    roots = {"input": input_dir(), "output": output_dir()}
    named = folder_paths.get_folder_paths(_ROOTS_KEY) if _ROOTS_KEY in folder_paths.folder_names_and_paths else []
    for place in [*named, *os.environ.get(_ROOTS_VARIABLE, "").split(os.pathsep)]:
        if Path(place).is_absolute():
            roots.setdefault(Path(place).name or place, Path(place))
    return roots


def diffusers_models() -> dict[str, Path]:
    """The base models in diffusers layout in ComfyUI's `diffusers` folders: their folders by name."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for pattern in ("*", "*/*"):
            for config in root.glob(f"{pattern}/transformer/config.json"):
                folder = config.parent.parent
                found.setdefault(folder.relative_to(root).as_posix(), folder)
    return dict(sorted(found.items()))


def base_models() -> list[str]:
    """Names of the base models in diffusers layout in ComfyUI's `diffusers` folders, followed by the demo model."""
    return [*diffusers_models(), DEMO_CHOICE]


def base_model(name: str) -> tuple[str, str]:
    """`base` and `tokenizer` of ModelConfig for a name from `base_models`.

    Raises:
        ModelFileError: the base model is not listed.
    """
    if name == DEMO_CHOICE:
        return DEMO_MODEL, tokenizer_dir()
    if folder := diffusers_models().get(name):
        return str(folder), ""
    raise ModelFileError(
        f"There is no base model {brief(name)} in models/diffusers. Choose another: {', '.join(base_models())}. Or "
        "download all files of a repository such as Qwen/Qwen-Image-Edit-2511 from huggingface.co into a folder of its "
        "own there, then press R."
    )


def model_files(folder: str) -> list[str]:
    """Names of the models in a ComfyUI folder type (diffusion_models, text_encoders or vae).

    Lists files in formats that cannot contain code, and folders written by `save_pretrained` of diffusers or
    transformers.
    """
    suffixes = (".safetensors", ".gguf") if folder == "diffusion_models" else (".safetensors",)
    named = {name for name in folder_paths.get_filename_list(folder) if name.endswith(suffixes)}
    for root in map(Path, folder_paths.get_folder_paths(folder)):
        for name in _not_listed_by_comfyui(root):
            place = root / name
            if place.suffix == ".gguf":
                named |= {name} if ".gguf" in suffixes else set()
            elif name.count("/") in (1, 2) and _is_saved(place, _SAVED_AS[folder]):
                named.add(place.parent.relative_to(root).as_posix())
    return sorted(named) or [NO_FILE]


_walks: dict[Path, tuple[dict[str, int], list[str]]] = {}


def _not_listed_by_comfyui(root: Path) -> list[str]:
    """The .gguf files and config.json files below a folder, relative to it.

    The answer is kept until a folder's modification time changes: menus ask often, and a folder may hold many models.
    """
    changed, names = _walks.get(root, ({}, []))
    if changed and all(_changed_at(folder) == at for folder, at in changed.items()):
        return names
    changed, names = {}, []
    for folder, _, files in os.walk(root):
        changed[folder] = _changed_at(folder)
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if _is_wanted(name)]
    _walks[root] = (changed, names)
    return names


def _is_wanted(name: str) -> bool:
    return name == "config.json" or name.endswith(".gguf")


def _changed_at(folder: str) -> int:
    """Modification time in ns; 0 if the folder is gone."""
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116 - a menu with many folders asks for all of them
    except OSError:
        return 0


def _is_saved(config: Path, class_name: str) -> bool:
    """Whether the folder of `config` contains a network of this class."""
    try:
        stored = read_json(config, finite=False)
        named = {stored.get("_class_name"), *stored.get("architectures", ())}
    except (ConfigError, AttributeError, TypeError):
        return False
    return class_name in named and any(config.parent.glob("*.safetensors"))


def model_file(folder: str, name: str) -> str:
    """Path of a file or folder that `model_files` lists.

    Raises:
        ModelFileError: the name is not listed.
    """
    roots = folder_paths.get_folder_paths(folder) if name in model_files(folder) else []
    found = next((str(Path(root) / name) for root in roots if (Path(root) / name).exists()), "")
    if not found and name == NO_FILE:
        raise ModelFileError(
            f"There is no model file in models/{folder}. Put one there, such as {template_files(folder)[0]}, press R "
            "to refresh the list, and choose it."
        )
    if not found:
        raise ModelFileError(
            f"{brief(name)} is not in models/{folder}. Put it there, then press R to refresh the list."
        )
    return found


def model_here(config: ModelConfig, run_name: str) -> ModelConfig:
    """The model in a run's settings, for this machine's device, tokenizer and cache.

    Raises:
        ModelFileError: a path leads outside ComfyUI's model folders. A run folder may come from someone else.
    """
    # Not resolved: a link in a model folder may lead to another disk.
    roots = [_absolute(place) for kind in _MODEL_FOLDERS for place in folder_paths.get_folder_paths(kind)]
    named = (config.transformer_file, config.text_encoder_file, config.vae_file)
    places = [_absolute(name) for name in (config.base, *named) if name not in ("", DEMO_MODEL)]
    for place in places:
        if not any(place.is_relative_to(root) for root in roots):
            raise ModelFileError(
                f"The run {run_name!r} was trained with {brief(place.name)}, which is not in ComfyUI's model folders. "
                "Put it there and train again, or sample with Load Qwen Edit Model and Sample With Qwen Edit LoRA."
            )
    loras = [dataclasses.replace(lora, file=lora_here(lora.file, run_name)) for lora in config.frozen_loras]
    return dataclasses.replace(
        config,
        frozen_loras=tuple(loras),
        device=device_name(),
        tokenizer=tokenizer_dir() if config.tokenizer else "",
        quantised_cache_dir=str(cache_dir() / "quantised"),
    )


def lora_here(file: str, run_name: str) -> str:
    """The LoRA in a run's settings as ComfyUI lists it now. Empty if the run had none.

    Raises:
        ModelFileError: ComfyUI lists no LoRA of this name, or several. A run folder may come from someone else.
    """
    if not file:
        return ""
    same = [name for name in lora_names()[1:] if Path(name).name == Path(file).name]
    paths = [path for name in same if (path := folder_paths.get_full_path("loras", name))]
    if _plain(file) in map(_plain, paths):
        return file
    if len(paths) == 1:
        return paths[0]
    problem = f"lists {len(paths)} times. Keep one of them" if paths else "does not list. Put it into models/loras"
    raise ModelFileError(f"The run {run_name!r} used the LoRA {brief(Path(file).name)}, which ComfyUI {problem}.")


def _absolute(place: str) -> Path:
    return Path(_plain(place))


def _plain(place: str) -> str:
    return os.path.abspath(place)  # noqa: PTH100 - removes .. without following links


def tokenizer_dir() -> str:
    """Folder of the Qwen2.5 tokenizer that ships with ComfyUI."""
    return str(Path(comfy.sd.__file__).parent / "text_encoders" / "qwen25_tokenizer")


def device_name() -> str:
    """ComfyUI's compute device as a torch device string."""
    return str(comfy.model_management.get_torch_device())


def lora_dir() -> Path:
    """Folder for new LoRAs: output/loras if ComfyUI's LoRA loaders list it, otherwise the first LoRA folder."""
    places = [Path(place) for place in folder_paths.get_folder_paths("loras")]
    preferred = output_dir() / "loras"
    return preferred if preferred in places else places[0]


def lora_names() -> list[str]:
    """`NO_LORA` and the .safetensors LoRA files that ComfyUI lists. Other formats can contain code."""
    return [NO_LORA, *(name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors"))]


def lora_path(name: str) -> Path:
    """Path of a LoRA that `lora_names` lists.

    Raises:
        ConfigError: the name is not listed.
    """
    if name not in lora_names()[1:]:
        raise ConfigError(f"LoRA {brief(name)} not found. Choose a .safetensors file that ComfyUI lists.")
    return Path(folder_paths.get_full_path_or_raise("loras", name))
