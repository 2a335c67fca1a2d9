"""Models by any name: each becomes a folder of safetensors with a checked table of tensors.

    llava-7b, llava-13b         aliases of published checkpoints
    demo, demo-576              a model of our own
    ./my-llava                  a folder
    org/name                    a checkpoint on the Hugging Face hub

The only module that downloads, and only safetensors, JSON, templates and tokenizers: never pickles
or code. No weight is read before ``load``, and then it is mapped.
"""

from __future__ import annotations

import logging
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...graphs.commands import install
from ...graphs.config import ModelConfig
from ...graphs.dtypes import BY_SAFETENSORS
from ...graphs.errors import MissingDependencyError, ModelError, nearest
from ...graphs.families.family import Size
from ...graphs.families.registry import read_config, with_budget, with_canvas
from ...graphs.fields import show
from ...graphs.plan.routing import Routing
from ...graphs.progress import Advance, no_advance
from ...graphs.safetensors_header import TensorInfo
from ..disk import require_disk_space
from .dummy import make_dummy
from .foreign_formats import reject_file, reject_foreign_folder
from .known_models import ALIASES, KNOWN_MODELS, OWN_MODELS, image_processor, own_folder
from .safetensors_file import FLOAT_DTYPES, read_checkpoint_json, read_tensors

logger = logging.getLogger(__name__)

CHECKPOINT_CACHE = Path(".cache")
"""Folder of dummy checkpoints; downloads go to the hub's own cache."""

ALLOWED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
IGNORED_FILES = ["*/*", "consolidated*"]  # other formats and second copies of the weights

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.A)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,99}/[A-Za-z0-9][\w.-]{0,99}", re.A)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder.

    ``name`` is fit for a directory; ``origin`` says where the model is from without naming this
    machine; ``raw`` is ``config.json``; ``tensors`` has canonical names
    (compile/checkpoint/names.py), those of routers among them; ``files`` are the folder's other
    files by name: tokenizer, templates, processor configs. ``image_tokens``: the budget of an image
    that ``config`` keeps to, if one was asked for.
    """

    name: str
    origin: str
    path: Path
    config: ModelConfig
    raw: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]
    image_tokens: int | None = None
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    @property
    def identity(self) -> str:
        """Its origin or its folder: another checkpoint of the same name has another."""
        return self.origin if self.origin != self.name else str(self.path.resolve())

    def called(self, name: str) -> Checkpoint:
        """Return it under a name of the user's.

        Raises:
            ModelError: no name for a folder.
        """
        if not _NAME.fullmatch(name):
            raise ModelError(
                f"{show(name)} cannot name a folder of bundles, expected up to 100 letters, "
                "digits and . _ - with a letter or digit first. Try --name mine."
            )
        return replace(self, name=name)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the model's tensors."""
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def file_bytes(self) -> int:
        """Size of the weight files together."""
        return sum(file.stat().st_size for file in self.weight_files)

    def limited(self, tokens: int | None, canvas: Size | None) -> Checkpoint:
        """Return it with images of at most so many tokens, or of one height and width; None: as
        its processor has them.

        Raises:
            ModelError: its family has no such option, or no image is that small, or of that size.
        """
        config = with_canvas(with_budget(self.config, tokens), canvas)
        return replace(self, config=config, image_tokens=tokens)

    def json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in ``files[name]``, or None where there is no such file."""
        return read_checkpoint_json(self.files[name]) if name in self.files else None

    def load(self, name: str) -> Tensor:
        """Return the tensor ``name``, mapped from its file: pages are read when they are used.

        Writing to it changes this process's view only; clone it first all the same.

        Raises:
            KeyError: no such tensor in ``tensors``.
        """
        info = self.tensors[name]
        if info.file not in self._maps:
            self._maps[info.file] = _map(info.file)
        dtype = getattr(torch, BY_SAFETENSORS[info.dtype].name)
        count = info.nbytes // dtype.itemsize
        if info.offset % dtype.itemsize:  # allowed by the format, but not by the processor
            raw = torch.frombuffer(
                self._maps[info.file], dtype=torch.uint8, count=info.nbytes, offset=info.offset
            )
            return raw.clone().view(dtype).view(info.shape)
        flat = torch.frombuffer(self._maps[info.file], dtype=dtype, count=count, offset=info.offset)
        return flat.view(info.shape)

    def release(self) -> None:
        """Let go of the pages read so far; tensors returned stay valid and are read again.

        A mapped file counts as memory of this process as far as it was touched: call this in
        between when streaming through gigabytes.
        """
        for mapped in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def state_dict(self, prefix: str | Iterable[str] = "") -> dict[str, Tensor]:
        """Load all tensors whose name starts with ``prefix``, or with one of several."""
        wanted = prefix if isinstance(prefix, str) else tuple(prefix)
        return {name: self.load(name) for name in self.tensors if name.startswith(wanted)}


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    dummy_weights: bool = False,
    cache: Path = CHECKPOINT_CACHE,
    routing: Routing | None = None,
    image_tokens: int | None = None,
    canvas: Size | None = None,
    progress: Advance = no_advance,
) -> Checkpoint:
    """Find ``model``, download or make it if need be, and check all but the weights' values.

    Args:
        model: an alias, one of ``OWN_MODELS``, a folder, or a hub id ``org/name``.
        revision: branch, tag or commit of a hub checkpoint.
        offline: use what the hub's cache already holds; no connection is made.
        dummy_weights: random weights of that model's shape instead, made below ``cache``.
        cache: folder for dummy checkpoints.
        routing: dummy weights have routers of its kind; other checkpoints have theirs, or none.
        image_tokens: the most of an image, by the image processor's own option; None: as it is.
        canvas: height and width that every image is brought to first; None: it is not.
        progress: called with bytes of dummy weights as they are written.

    Raises:
        ModelError: unknown, unreachable, incomplete, corrupt or unsupported.
        CapacityError: the disk has no space for the download or the dummy weights.
    """
    if revision is not None and (dummy_weights or model in OWN_MODELS or os.path.isdir(model)):
        raise ModelError(
            f"{model!r} has no revisions, only checkpoints on the hub do. Leave out --revision."
        )
    if dummy_weights:
        geometry = {repo: alias for alias, repo in ALIASES.items()}.get(model, model)
        place = Path(cache) / "dummy" / (f"{geometry}-{routing.kind}" if routing else geometry)
        folder = make_dummy(geometry, place, routing=routing, progress=progress)
        name, origin = f"{geometry}-dummy", f"dummy weights of {geometry}"
        return open_folder(folder, name=name, origin=origin).limited(image_tokens, canvas)
    repository = ALIASES.get(model, model)
    if model in OWN_MODELS:
        folder, name, origin = own_folder(model), model, f"the {model} model"
    elif model and model not in ALIASES and os.path.isdir(os.path.expanduser(model)):
        folder = Path(os.path.expanduser(model))
        name = origin = folder.resolve().name or "model"
    elif _HUB_ID.fullmatch(repository) and not os.path.exists(repository):
        folder = _download(repository, revision, offline)
        name = model if model in ALIASES else repository.split("/")[1]
        origin = f"{repository}@{folder.name}"
    else:
        _unknown(model)
    return open_folder(folder, name=name, origin=origin).limited(image_tokens, canvas)


def open_folder(folder: Path, *, name: str, origin: str) -> Checkpoint:
    """Open a checkpoint folder; reads ``config.json`` and the headers of the weight files.

    Raises:
        ModelError: incomplete, corrupt, quantised or unsupported; names the file.
    """
    reject_foreign_folder(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json: expected a Hugging Face checkpoint folder. Name the "
            "folder that holds it, or save the model with save_pretrained."
        )
    raw = read_checkpoint_json(folder / "config.json")
    for holder in (raw, raw.get("text_config")):
        if isinstance(holder, Mapping) and holder.get("quantization_config"):
            method = holder["quantization_config"]
            method = method.get("quant_method", "?") if isinstance(method, Mapping) else "?"
            raise ModelError(
                f"{folder / 'config.json'} says the weights are quantised ({method}), expected "
                f"{', '.join(FLOAT_DTYPES)}. Use the checkpoint that they were made from, and "
                "quantise it here: --precision w4."
            )
    try:
        config = read_config(raw, image_processor(folder))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    others = {
        file.name: file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt")
    }
    return Checkpoint(name, origin, folder, config, raw, read_tensors(folder, config), others)


def _map(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        # Private and writable, so that torch may treat it as its own; without reservation, so that
        # the kernel does not ask for as much memory as the file is large.
        return mmap.mmap(
            stream.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0),
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )


def _unknown(model: str) -> NoReturn:
    known = [*ALIASES, *OWN_MODELS]
    if os.path.isfile(model):
        reject_file(Path(model))
    if model in KNOWN_MODELS:
        raise ModelError(f"{model} has no weights, only a shape. Add --dummy-weights.")
    hint = nearest(model, [*known, *KNOWN_MODELS])
    raise ModelError(
        f"there is no model {model!r}: neither a folder, nor a hub id org/name, nor one of "
        f"{', '.join(known)}.{hint} Try demo."
    )


def _download(repository: str, revision: str | None, offline: bool) -> Path:
    """Return the snapshot of a hub checkpoint, complete in the hub's cache."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependencyError(
            f"{repository} is on the Hugging Face hub and huggingface_hub is not installed. "
            f"{install('compile')}; or name a folder: ./my-llava"
        ) from error

    def snapshot(**options: Any) -> Any:
        return huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=ALLOWED,
            ignore_patterns=IGNORED_FILES,
            **options,
        )

    at = f"{repository}@{revision}" if revision else repository
    local = "name a folder that holds it: ./my-llava"
    try:
        if not offline:
            try:
                files = snapshot(dry_run=True)
            except errors.DryRunError:
                files = []  # unreachable; the next call finds the cached copy or says why not
            needed = sum(file.file_size for file in files if file.will_download)
            target = Path(huggingface_hub.constants.HF_HUB_CACHE)
            require_disk_space(target, needed, f"downloading {at}", "set HF_HOME to another disk")
        return Path(snapshot(local_files_only=offline))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{at} is gated. Ask for access on its page, then log in once: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no {repository}, or it is private. Check the name, log in (hf auth "
            f"login), or {local}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{repository} has no revision {revision!r}. Use a branch, tag or commit of it."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        how = "offline" if offline else "no connection to the hub"
        again = "Run once without --offline" if offline else "Connect, set HF_ENDPOINT to a mirror"
        raise ModelError(
            f"{at} is not, or not completely, in the hub's cache ({how}). {again}, {local}, or "
            "build without its weights: --dummy-weights"
        ) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        # HTTPError is the base of the client library that this version of the hub uses.
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(
            f"cannot download {at}: {type(error).__name__}: {reason}. Try again, use the cached "
            f"copy (--offline), {local}, or build without its weights: --dummy-weights"
        ) from error
