"""Publishes a prepared dataset on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from parquet_dataset import InputError


def check_upload(repo_id: str) -> None:
    """Asks the Hub who we are, before hours of work and not after them.

    Raises:
        InputError: the id is malformed, or nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
        HfApi().whoami()
    except Exception as error:  # the Hub's, the network library's, or a missing login
        raise InputError(f"--push_to_hub {repo_id}: {_one_line(error)} (to log in: hf auth login)") from error


def upload_dataset(folder: Path, repo_id: str) -> str:
    """Uploads a dataset folder in one commit, card and figures included.

    Args:
        folder: the finished dataset.
        repo_id: `user/name`; made if it does not exist. Existing settings, such as private, stay.

    Returns:
        The address of the dataset.

    Raises:
        InputError: the Hub refused, or cannot be reached. The folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            repo_type="dataset",
            commit_message="Upload the prepared dataset",
            # Shards of an earlier, larger upload would otherwise be read along with these.
            delete_patterns=["data/*.parquet", "unlabeled/*.parquet"],
        )
    except Exception as error:  # as above
        raise InputError(
            f"{folder} is complete, but the upload to {repo_id} failed ({_one_line(error)}); "
            f"to upload it again: hf upload {repo_id} {folder} . --repo-type dataset"
        ) from error
    return str(address)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
