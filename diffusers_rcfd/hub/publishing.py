"""Publishing a folder on the Hub: access is checked before any work, and each revision is one whole commit."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)

# Of an output folder; patterns are of files, so that those of a folder end with a star.
LOCAL_ONLY = [
    "checkpoint-*",
    "partial-*",
    "unused-*",
    "best/*",
    "logs/*",
    "samples/*",
    "*-step/*",
    "made.json",
    "run.lock",
]


def open_repository(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Make sure that a model repository can be written, creating it if it is missing; returns its full name.

    Args:
        repo_id (`str`): "name" or "owner/name".
        token (`str`, *optional*): defaults to that of `hf auth login`.
        private (`bool`, *optional*): of a new repository; the account's default where not given.

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
    """README.md of a repository, or None where it, or the revision, has none."""
    try:
        path = HfApi(token=token).hf_hub_download(repo_id, "README.md", revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return Path(path).read_text(encoding="utf-8")


def publish_folder(
    folder: Path, repo_id: str, revision: str | None = None, token: str | None = None, commit_message: str = "Upload"
) -> str:
    """Upload a folder as one commit; returns the commit's address.

    Args:
        folder (`Path`): what to upload; checkpoints, `best`, samples, logs and the folders of rungs are left out.
        repo_id (`str`): "owner/name" of an existing model repository.
        revision (`str`, *optional*): branch, made if it is missing; `main` by default.
        token (`str`, *optional*): defaults to that of `hf auth login`.
        commit_message (`str`): title of the commit.

    Raises:
        ConnectionError: if the upload fails; nothing of it is published then.
    """
    api = HfApi(token=token)
    try:
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                revision=revision,
                commit_message=commit_message,
                ignore_patterns=LOCAL_ONLY,
            )
        )
    except Exception as error:
        raise ConnectionError(
            f"Publishing {str(folder)!r} as {repo_id!r} failed, and nothing of it was published; it is whole in that "
            f"folder, push it again: {error}"
        ) from error
