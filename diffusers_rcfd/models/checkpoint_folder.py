"""The folder of a classifier's checkpoint, here or from the Hub, and the reason where there is none."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of the top level only. Pickled weights are not downloaded.
_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def checkpoint_folder(name: str, pretrained: bool, revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloaded where `name` is a Hub repository.

    Raises:
        ValueError: the Hub does not give it, or its weights are wanted and are not in safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = _CONFIGS + (_WEIGHTS if pretrained else [])
        with explain_hub_errors(name, revision):
            hub = {"revision": revision, "token": token}
            folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"], **hub))
    if pretrained and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name!r} must hold model.safetensors: pickled weights can run code and are not read.")
    return folder


def read_config(path: Path, name: str) -> dict[str, Any]:
    """Read a checkpoint's config.json, a `ValueError` that names the checkpoint where it is damaged."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"The config.json of {name!r} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"The config.json of {name!r} must hold an object, got {type(config).__name__}.")
    return config


@contextmanager
def explain_hub_errors(name: str, revision: str | None = None, hint: str = "") -> Iterator[None]:
    """Say in one `ValueError` for each reason why the Hub does not give what is asked for in the block.

    Args:
        name (`str`): the repository, or a timm model whose weights are in one.
        revision (`str`, *optional*): branch, tag or commit that is asked for.
        hint (`str`, defaults to none): what to write after a name that the Hub does not know.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = repr(name) if revision is None else f"`revision` {revision!r} of {name!r}"
    try:
        yield
    except GatedRepoError as error:
        reason = "is gated: ask for access on its page, then run `hf auth login` or give `token`."
        raise ValueError(f"{name!r} {reason}") from error
    except RepositoryNotFoundError as error:
        private = "or it is private: then run `hf auth login` or give `token`"
        raise ValueError(f"No classifier {name!r} here or on the Hub, {private}.{hint}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"`revision` {revision!r} of {name!r} is not on the Hub.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            reason = "is not in the cache, and offline mode is on (HF_HUB_OFFLINE=1)"
        else:
            reason = f"is not in the cache, and the Hub is out of reach ({_first_line(error.__cause__ or error)})"
        raise ValueError(f"{place} {reason}.") from error
    except EntryNotFoundError as error:
        raise ValueError(f"{place} is on the Hub, but holds no classifier: {_first_line(error)}") from error
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a Hub repository: {_first_line(error)}{hint}") from error
    except HfHubHTTPError as error:
        raise ValueError(f"The Hub does not give {place}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
