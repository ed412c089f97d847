"""The model folder of an artifact to a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.artifacts import desk, manifest
from compress.artifacts.manifest import MODEL_FOLDER, Manifest
from compress.artifacts.verify import verify
from compress.errors import CompressError, EnvironmentLacksError, RecipeError, RefusedError
from compress.events import Progress
from compress.steps.standing import store_of

_TOKEN_REMEDY = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Upload:
    """What will be uploaded. `files` are (path below model/, bytes), sorted."""

    reference: str
    verdict: str
    folder: Path
    repo_id: str
    private: bool
    files: tuple[tuple[str, int], ...]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


def prepare(folder: Path, repo_id: str, private: bool, rejected_too: bool) -> Upload:
    """What publishing the artifact in `folder` would upload.

    Raises RecipeError for a repository that cannot be named so; RefusedError for a version that did not pass, unless
    `rejected_too` says so or waivers that count cover every gate that decides; ManifestError for a damaged manifest.
    """
    _check_id(repo_id)
    read = manifest.read(folder)
    reference = f"{read.name}@{read.version}"
    if read.verdict != "passed" and not rejected_too:
        store = store_of(folder, read.name, read.version)
        open_gates = ["its gates"] if store is None else desk.uncovered(store, read.name, read.version)
        if open_gates:
            raise RefusedError(
                f"{reference}: its verdict is {read.verdict} and no waiver that counts covers {', '.join(open_gates)}, "
                "so it is not published; give --rejected-too to do so all the same (its model card says what it "
                "failed), or publish a version that passed"
            )
    return Upload(reference, read.verdict, folder, repo_id, private, _files(read))


def upload(planned: Upload, progress: Progress) -> str:
    """Upload, and return the address of the commit.

    What goes out is what was judged (`check_whole`). Raises EnvironmentLacksError without a token, offline, or where
    the hub refuses; CompressError for an artifact that is not whole.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise EnvironmentLacksError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    token = get_token()
    if not token:
        raise EnvironmentLacksError(f"no Hugging Face token was found: {_TOKEN_REMEDY}")
    check_whole(planned, progress)
    api = HfApi(token=token)
    with _hub_errors(planned.repo_id), progress.task(f"uploading to {planned.repo_id}", 1) as advance:
        api.create_repo(planned.repo_id, private=planned.private or None, exist_ok=True, repo_type="model")
        if planned.private and not api.repo_info(planned.repo_id, repo_type="model").private:
            raise RecipeError(
                f"{planned.repo_id} exists and is public, but --private was given; nothing was uploaded. Make it "
                "private on its settings page, or name another repository"
            )
        done = api.upload_folder(
            repo_id=planned.repo_id,
            repo_type="model",
            folder_path=planned.folder / MODEL_FOLDER,
            allow_patterns=[path for path, _ in planned.files],
            commit_message=f"compress: {planned.reference}, {planned.verdict}",
        )
        advance("")
    return str(done.commit_url)


def check_whole(planned: Upload, progress: Progress) -> None:
    """Hash the artifact again. Raises CompressError where it is not what its manifest says."""
    with progress.task(f"hashing {planned.reference}", 1) as advance:
        checked = verify(planned.folder)
        advance("")
    if not checked.ok:
        problems = "; ".join(checked.problems[:3])
        raise CompressError(f"{planned.reference} is not whole and was not published: {problems}")


def _files(read: Manifest) -> tuple[tuple[str, int], ...]:
    prefix = f"{MODEL_FOLDER}/"
    return tuple(
        (entry.path.removeprefix(prefix), entry.bytes) for entry in read.files if entry.path.startswith(prefix)
    )


def _check_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(f"{repo_id}: no name of a repository: {str(error).splitlines()[0]}") from error
    if repo_id.count("/") != 1:
        raise RecipeError(f"{repo_id}: name the repository with its owner, e.g. me/{repo_id}")


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What the hub and the network can answer, in words."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        remedy = {401: _TOKEN_REMEDY, 403: f"the token may not write to {repo_id}; {_TOKEN_REMEDY}"}.get(
            status or 0, "try again; files that arrived are not sent twice"
        )
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentLacksError(f"{repo_id}: the hub refused ({first}): {remedy}") from error
    except (HTTPError, OSError) as error:
        raise EnvironmentLacksError(f"{repo_id}: the hub cannot be reached ({error}); check the network") from error
