"""The Hugging Face hub: fetch a model by ``owner/name[@revision]``, or fail within seconds.

The hub's own cache is asked first and without network, so a model that was fetched once means the same
bits until it is deleted. Only safetensors, JSON, text and tokenizer files are taken.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from persona_sdk.errors import DownloadError, ModelError, UnknownModelError

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
TIMEOUT_S = 5.0

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(@[\w.\-/]+)?")
_ELSE = "use a local folder or an alias (persona_sdk.weights.known)"


def is_hub_id(name: str) -> bool:
    """Whether `name` reads ``owner/name`` or ``owner/name@revision``."""
    return _ID.fullmatch(name) is not None


def download(name: str, report: Callable[[str], None], *, progress: bool = False) -> Path:
    """Return the snapshot folder of a hub model, from the hub's cache or from the hub.

    Raises:
        UnknownModelError: the hub says that there is no such model for this user.
        ModelError: the model has no safetensors.
        DownloadError: offline, unreachable, or broken off.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    repo, _, revision = name.partition("@")
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        # With the patterns, or files that we never take would make a snapshot count as incomplete.
        held = snapshot_download(repo, revision=revision or None, allow_patterns=FILES, local_files_only=True)
        return _usable(held, name)
    except errors.HFValidationError as error:
        raise UnknownModelError(
            f"{name!r} is no hub id.", hint="Hub ids have the form owner/name."
        ) from error
    except (errors.LocalEntryNotFoundError, ModelError):
        pass  # not there, or there without weights: another tool may have fetched only the tokenizer
    if is_offline():
        raise DownloadError(
            f"{name!r} is not in the hub's cache and HF_HUB_OFFLINE is set.", hint=f"Unset it, or {_ELSE}."
        )
    report(f"Looking up {name} on the Hugging Face hub")
    try:
        # One short question first: it tells an unknown name from an unreachable hub within seconds.
        HfApi(endpoint=endpoint).model_info(repo, revision=revision or None, timeout=TIMEOUT_S)
        report(f"Downloading {name} from the Hugging Face hub")
        with nullcontext() if progress else quiet():
            folder = snapshot_download(
                repo,
                revision=revision or None,
                endpoint=endpoint,
                allow_patterns=FILES,
                etag_timeout=TIMEOUT_S,
            )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UnknownModelError(
            f"The hub has no model {name!r} that this machine may read.",
            hint="Check the spelling. For a private or gated model accept its terms and set HF_TOKEN.",
        ) from error
    except Exception as error:  # each network library below the hub client brings errors of its own
        raise DownloadError(
            f"{name!r} could not be fetched from the Hugging Face hub: {error}.",
            hint=f"Check the network, or {_ELSE}.",
        ) from error
    return _usable(folder, name)


def is_offline() -> bool:
    """Whether the user has forbidden the hub (``HF_HUB_OFFLINE``, read now and not at import)."""
    from huggingface_hub import constants

    value = os.environ.get("HF_HUB_OFFLINE")
    return constants.HF_HUB_OFFLINE if value is None else value.upper() in constants.ENV_VARS_TRUE_VALUES


def _usable(snapshot: str, name: str) -> Path:
    folder = Path(snapshot)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name!r} holds no config.json with *.safetensors.",
            hint="Pickled weights (*.bin, *.pt) are not loaded; convert them to safetensors first.",
        )
    return folder


_depth = 0
_depth_lock = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and the hub client from drawing progress bars.

    Their switch is global, so loads that overlap share it: the first turns the bars off, the last on again.
    """
    global _depth
    from transformers.utils import logging as transformers_logging

    with _depth_lock:
        ours = _depth > 0 or transformers_logging.is_progress_bar_enabled()
        _depth += ours
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        with _depth_lock:
            _depth -= ours
            if ours and _depth == 0:
                transformers_logging.enable_progress_bar()
