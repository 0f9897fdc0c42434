"""Publishing on the Hub: access is checked before any work, and each revision is one whole commit."""

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)

from diffusers_rcfd.hub.public_names import is_hub_id, remove_local_names

MODEL_FILES = (
    "config.json",
    "scheduler_config.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.safetensors.index.json",
)
EVAL_RESULTS = ".eval_results/diffusers_rcfd.yaml"
CARD_FILES = ("README.md", "samples.png", EVAL_RESULTS)
RUN_RECORDS = ("run.json", "metrics.jsonl", "evaluation.json")


def open_repository(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Make sure that a model repository can be written, and create it if it is missing.

    Args:
        repo_id (`str`): "name" or "owner/name".
        token (`str`, *optional*): defaults to that of `hf auth login`.
        private (`bool`, *optional*): of a new repository; the account's default where not given.

    Returns:
        `str`: the repository's full name, "owner/name".

    Raises:
        ValueError: if the name is not allowed, there is no valid token, or the repository holds something other than
            a Diffusers pipeline or model.
        ConnectionError: if the Hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        files = [file for file in api.list_repo_files(repo_id) if file not in (".gitattributes", "README.md")]
    except HFValidationError as error:
        raise ValueError(f"`hub_model_id` must be a name the Hub allows, got {repo_id!r}: {error}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError("`hub_token` is missing: run `hf auth login`, or pass a token with write access.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise ValueError(
                f"`hub_token` must be a valid token with write access to {repo_id!r}; the Hub answered {status}."
            ) from error
        raise ValueError(f"`hub_model_id` {repo_id!r} cannot be used: {error}") from error
    except Exception as error:  # the transport errors of hub 1 and 2 have no common class
        raise ConnectionError(f"The Hub cannot be reached for {repo_id!r}: {error}") from error
    if files and not {"model_index.json", "config.json"} & set(files):
        raise ValueError(
            f"`hub_model_id` {repo_id!r} holds files of another kind ({files[0]}, ...): choose a new name."
        )
    return repo_id


def read_card(repo_id: str, token: str | None = None, revision: str | None = None) -> str | None:
    """Read the README.md of a repository.

    Args:
        repo_id (`str`): "owner/name" of an existing model repository.
        token (`str`, *optional*): defaults to that of `hf auth login`.
        revision (`str`, *optional*): branch, tag or commit; `main` by default.

    Returns:
        `str` or `None`: its text, or None where the repository, or the revision, has none.

    Raises:
        ConnectionError: if the Hub cannot be reached: what a person wrote there must not be taken for missing.
    """
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, "README.md", revision=revision)
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"The Hub cannot be reached for the card of {repo_id!r}: {error}") from error
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def list_model_files(folder: Path) -> list[str]:
    """List what a trainer publishes of a folder: the saved pipeline or model, its card, and the records of the run.

    Other files, checkpoints, samples and logs do not belong to it, nor does what lies behind a link.

    Args:
        folder (`Path`): where a pipeline (by its `model_index.json`) or a model was saved.

    Returns:
        `list[str]`: paths inside the folder.
    """
    index = folder / "model_index.json"
    if index.is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        parts = [name for name, value in entries.items() if isinstance(value, list) and value[0] is not None]
        patterns = ["model_index.json", "pipeline.py", *(f"{part}/{file}" for part in parts for file in MODEL_FILES)]
    else:
        patterns = MODEL_FILES
    paths = [path for pattern in (*patterns, *CARD_FILES, *RUN_RECORDS) for path in sorted(folder.glob(pattern))]
    inside = folder.resolve()
    return [
        path.relative_to(folder).as_posix()
        for path in paths
        if path.is_file() and path.resolve() == inside / path.relative_to(folder)
    ]


def publish_files(
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload",
    create_pr: bool = False,
) -> str:
    """Upload files of a folder as one commit, without the local paths that stand in them.

    Results and records of an earlier run, where this one has none, are deleted by the same commit.

    Args:
        folder (`Path`): where the files lie, and in the repository they lie alike.
        files (`Iterable[str]`): paths inside the folder, such as `list_model_files` gives.
        repo_id (`str`): "owner/name" of an existing model repository.
        revision (`str`, *optional*): branch, made if it is missing; `main` by default.
        token (`str`, *optional*): defaults to that of `hf auth login`.
        commit_message (`str`, defaults to `"Upload"`): title of the commit.
        create_pr (`bool`, defaults to `False`): open a pull request instead of committing.

    Returns:
        `str`: the commit's address.

    Raises:
        ConnectionError: if the upload fails; nothing of it is published then.
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(file, public_content(folder / file)) for file in files]
    replaced = {EVAL_RESULTS, *RUN_RECORDS} - {operation.path_in_repo for operation in operations}
    try:
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        outdated = sorted(replaced & set(api.list_repo_files(repo_id, revision=revision)))
        operations += [CommitOperationDelete(file) for file in outdated]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except Exception as error:
        raise ConnectionError(
            f"Publishing {str(folder)!r} as {repo_id!r} failed, and nothing of it was published. The folder is "
            f"complete: push it again. The reason: {error}"
        ) from error
    return str(commit)


def public_content(path: Path) -> Path | bytes:
    """What is published of a file: the file itself, or its JSON without the local paths in it.

    Records of a run lose every local path. The configs of a model lose `_name_or_path`, the place that it was loaded
    from, unless that is a Hub id.
    """
    if path.suffix != ".json":
        return path
    saved = json.loads(path.read_text(encoding="utf-8"))
    if path.name in RUN_RECORDS:
        public = remove_local_names(saved)
    else:
        public = {key: value for key, value in saved.items() if key != "_name_or_path" or is_hub_id(value)}
    return path if public == saved else (json.dumps(public, indent=2) + "\n").encode()
