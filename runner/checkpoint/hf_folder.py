"""What a folder of Hugging Face holds: its configuration, and where each tensor lies. No tensor is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.errors import ConfigError
from runner.files import parse_json
from runner.text import display_path, shorten

# How `init_from` names such a folder.
HF = "hf:"
PREPROCESSOR = "preprocessor_config.json"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# OWNER/MODEL, as the Hub has it.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_JSON_BYTES = 64 << 20
# The types of tensors that are taken, as safetensors names them: each value of these is one of float32 as well.
DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class TensorPlace:
    """Say where one tensor lies.

    Attributes:
        file: the file that holds it.
        dtype: its type, as safetensors names it.
        shape: its dimensions.
        offset: the bytes of the file before it.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class HfFolder:
    """Hold what a folder says of itself.

    Attributes:
        path: the folder.
        config: its config.json.
        files: every file that is read, the configuration first.
        tensors: where each lies, by name.
    """

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorPlace]


def find_hf_path(reference: str | None) -> Path | None:
    """Return the folder that `init_from=hf:DIR` names; None where it names a run."""
    if reference is None or not reference.startswith(HF):
        return None
    return Path(reference.removeprefix(HF)).expanduser()


def read_hf_config(path: Path) -> Mapping[str, Any]:
    """Return the config.json of a folder. Raises ConfigError where there is none."""
    if not path.is_dir():
        raise ConfigError(f"hf:{display_path(path)}: is no folder; {_explain_way(path)}")
    return read_json_file(path / CONFIG)


def _explain_way(path: Path) -> str:
    """Return how to come to a folder; what may be the name of a model on the Hub has to be brought first."""
    if HUB_NAME.fullmatch(str(path)):
        return f"bring it here first (hf download {path} --local-dir {path.name}), then say hf:{path.name}"
    return f"expected one with {CONFIG} and {WEIGHTS}"


def open_hf_folder(path: Path) -> HfFolder:
    """Return what a folder holds. Raises ConfigError where a file of it is missing, damaged, or outside of it."""
    config = read_hf_config(path)
    if (path / WEIGHTS).is_file():
        return HfFolder(path, config, (path / CONFIG, path / WEIGHTS), _read_header(path / WEIGHTS))
    if not (path / INDEX).is_file():
        there = sorted(file.name for file in path.glob("*.bin"))
        why = (
            f"; {there[0]} is a pickle, which runs code when it is read: save it again as safetensors" if there else ""
        )
        raise ConfigError(f"hf:{display_path(path)}: has neither {WEIGHTS} nor {INDEX}{why}")
    index = read_json_file(path / INDEX)
    named = index.get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ConfigError(f"{display_path(path / INDEX)}: has no weight_map from tensors to files")
    places: dict[str, TensorPlace] = {}
    for name in sorted(set(named.values())):
        # A name alone: a path could lead to any file of this machine.
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.safetensors", name):
            raise ConfigError(
                f"{display_path(path / INDEX)}: names {json.dumps(shorten(name, 80))}; expected files of this folder, "
                "*.safetensors"
            )
        if not (path / name).is_file():
            raise ConfigError(f"hf:{display_path(path)}: {name} is missing, which {INDEX} names; download it again")
        places |= {tensor: place for tensor, place in _read_header(path / name).items() if named.get(tensor) == name}
    if absent := sorted(set(named) - set(places)):
        raise ConfigError(
            f"hf:{display_path(path)}: {named[absent[0]]} has no tensor {absent[0]}, which {INDEX} says is in it "
            f"({len(absent)} of these); download it again"
        )
    shards = tuple(path / name for name in sorted(set(named.values())))
    return HfFolder(path, config, (path / CONFIG, path / INDEX, *shards), places)


def read_json_file(path: Path) -> dict[str, Any]:
    """Return an object of JSON. Raises ConfigError where it is none."""
    try:
        with path.open("rb") as file:
            content = parse_json(file.read(MAX_JSON_BYTES))
    except OSError as error:
        raise ConfigError(f"{display_path(path)}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{display_path(path)}: is no JSON ({shorten(str(error), 80)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{display_path(path)}: is no object of JSON")
    return content


def _read_header(path: Path) -> dict[str, TensorPlace]:
    """Return where the tensors of a file lie. Raises ConfigError where it is cut off or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        # It checks that the tensors fill the file, no more and no less, and that none reaches into another.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except SafetensorError as error:
        raise ConfigError(f"{display_path(path)}: is damaged or cut off ({error}); download it again") from None
    except OSError as error:
        raise ConfigError(f"{display_path(path)}: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    return {
        name: TensorPlace(path, said["dtype"], tuple(said["shape"]), 8 + size + said["data_offsets"][0])
        for name, said in header.items()
    }
