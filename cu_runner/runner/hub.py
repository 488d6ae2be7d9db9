"""A directory as a repository of the Hugging Face hub, by the login of huggingface_hub itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cu_runner.runtime.lazy import huggingface_hub
from cu_runner.schema.errors import HubError, first_line

EMPTY = {".gitattributes"}  # what a new repository holds
LOGIN = "run `hf auth login`, or set HF_TOKEN"


def check_login(name: str) -> None:
    """Find out whether a repository of this name can be written, before anything is made for it.

    Raises:
        ValueError: it is no name of a repository. HubError: nobody is logged in, or the hub does
            not answer.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {name}: {first_line(error)}") from None
    if huggingface_hub.get_token() is None:
        raise HubError(f"--push-to-hub {name}: not logged in to the Hugging Face hub; {LOGIN}")
    with hub_failures(f"--push-to-hub {name}"):
        huggingface_hub.HfApi().whoami()


def push(folder: Path, name: str, *, overwrite: bool, said: str) -> str:
    """Upload a directory; a repository that is not there is made, and is private.

    Args:
        name: NAME, of one's own, or ORGANISATION/NAME.
        overwrite: the repository may hold something, which this replaces; its history is kept.
        said: the message of the commit.

    Returns:
        The address of the repository.

    Raises:
        HubError: it was not uploaded, or the repository holds something.
    """
    with hub_failures(f"{folder} is complete, and was not pushed to {name}"):
        api = huggingface_hub.HfApi()
        repository = api.create_repo(name, private=True, exist_ok=True)
        there = sorted(set(api.list_repo_files(repository.repo_id)) - EMPTY)
        if there and not overwrite:
            raise HubError(
                f"{repository.repo_id}: holds files already, e.g. {there[0]}; {folder} is "
                "complete, push it under another name or add --overwrite"
            )
        api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=said,
            delete_patterns="*" if there else None,
        )
        return str(repository)


@contextmanager
def hub_failures(what: str) -> Iterator[None]:
    """Turn what the hub's library raises into a HubError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except HubError:
        raise
    except OfflineModeIsEnabled:
        raise HubError(f"{what}: HF_HUB_OFFLINE is set; unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = {
            401: f"the login is not accepted; {LOGIN}",
            403: "the login may not write there; give a name of your own, and a token that writes",
        }.get(status, f"the hub says: {first_line(error)}")
        raise HubError(f"{what}: {advice}") from None
    # no route, no name server, a time-out, a broken connection: its client has a type for each
    except Exception as error:
        client = type(error).__module__.startswith("http")
        if not (client or isinstance(error, OSError)):
            raise
        said = f"{type(error).__name__}: {first_line(error)}"
        raise HubError(f"{what}: the hub cannot be reached ({said}); try again later") from None
