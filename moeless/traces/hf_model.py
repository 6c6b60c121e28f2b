"""Loading a Transformers model with its tokenizer, from a folder or the hub."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeless.devices import auto_device
from moeless.errors import UserError
from moeless.files import may

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        dtype: ``auto`` takes the checkpoint's own.
        device: ``auto`` (a GPU with room for the weights, else the CPU), ``cpu``, ``cuda``, ``cuda:1`` ...
        device_map: Accelerate's placement over several devices (``auto``, ``balanced`` ...), overrides ``device``.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer, and how a trace names it."""

    model: Any
    tokenizer: Any
    name: str
    source: dict[str, Any]


def _quiet() -> None:
    """Transformers' own progress bars only where someone looks at them."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_config(model: str, options: LoadOptions | None = None) -> Any:
    """A model's configuration; nothing else is fetched.

    Raises:
        UserError: no such folder, no such model on the hub, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    options = options or LoadOptions()
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{model} holds no config.json, so it is not a model folder")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if path.is_file() or (looks_local and not path.exists()):
        raise UserError(f"there is no model folder at {model}; give a folder with config.json or a hub id (owner/name)")
    try:
        return AutoConfig.from_pretrained(
            str(path) if path.is_dir() else model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        raise _explain(model, path.is_dir(), error) from None


def _explain(model: str, local: bool, error: Exception) -> UserError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UserError(f"{model} comes with Python code of its own; add --trust-remote-code if you trust its authors")
    if local:
        for file in sorted(Path(model).expanduser().iterdir()):
            if not may(os.R_OK, file):
                return UserError(f"cannot read {file}: permission denied")
        return UserError(f"the model in {model} cannot be loaded: {text[:200]}")
    if not isinstance(error, OSError | ValueError | RuntimeError):
        return UserError(f"{model} cannot be loaded from the hub: {type(error).__name__}: {text[:200]}")
    return UserError(
        f"{model} is neither a local folder nor could it be fetched from the Hugging Face hub; check the name and "
        f"the network (or log in for a gated model), or give a folder ({text[:120]})"
    )


def model_classes(config: Any) -> list[Any]:
    """Auto classes that know the configuration, causal language models first.

    Raises:
        UserError: none does.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    found = [
        auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping
    ]
    if not found and getattr(config, "auto_map", None):
        return [AutoModelForCausalLM]
    if not found:
        raise UserError(f"{config.model_type} is not a generative language model that Transformers knows")
    return found


def _weight_bytes(folder: Path) -> int:
    """Bytes of the weights in a model folder; 0 where they are not there yet."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


def load_model(model: str, options: LoadOptions | None = None, *, name: str | None = None) -> LoadedModel:
    """Load weights and tokenizer; sharded checkpoints are read shard by shard by Transformers.

    Raises:
        UserError: anything is missing, unknown or unreachable.
    """
    import torch
    from transformers import AutoTokenizer

    _quiet()
    options = options or LoadOptions()
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype!r} is none of {', '.join(DTYPES)}")
    device = options.device
    if device == "auto" and options.device_map:
        # Accelerate looks for itself
        device = "cpu"
    elif device == "auto":
        device, remark = auto_device(_weight_bytes(Path(model).expanduser()))
        if remark is not None:
            sys.stderr.write(f"{remark}\n")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device!r} is not a device; give cpu, cuda or cuda:N") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; give --device cpu")
    config = load_config(model, options)
    path = Path(model).expanduser()
    where = str(path) if path.is_dir() else model
    arguments: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        # a plain load needs no placement, and none of Accelerate
        "device_map": options.device_map or (None if target.type == "cpu" else {"": str(target)}),
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
        loaded = model_classes(config)[0].from_pretrained(where, **arguments)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{model} does not fit the device's memory; try --device-map auto or a smaller --dtype"
        ) from error
    except Exception as error:
        raise _explain(model, path.is_dir(), error) from None
    source: dict[str, Any] = {"model": name or (path.resolve().name if path.is_dir() else model)}
    revision = getattr(config, "_commit_hash", None) or options.revision
    if revision:
        source["revision"] = revision
    elif path.is_dir():
        source["config_sha256"] = hashlib.sha256((path / "config.json").read_bytes()).hexdigest()
    return LoadedModel(loaded.eval(), tokenizer, str(source["model"]), source)
