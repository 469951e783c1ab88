"""Weights by Hub id, `owner/name[@revision][/file]`: fetched by huggingface_hub into its own cache.

Only what an export reads is downloaded. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as
huggingface_hub documents them; offline, no socket is opened.
"""

import errno
import re
from pathlib import Path
from typing import Any

from seechat_weights.errors import CheckpointError, SeechatError
from seechat_weights.files.checkpoint import STEMS
from seechat_weights.files.reading import line

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9_.-]+))?(?:/(.+))?")
# configurations and tokenizers, and what tells how pictures are prepared
_BESIDE = ("*.json", "ice_text.model")


def fetch(given: Path, *, offline: bool = False) -> tuple[Path, dict[str, str] | None]:
    """A local path as it is; what looks like a Hub id and is no path, downloaded.

    Returns where it lies, and its repository and commit for the bundle's provenance.
    Raises CheckpointError: not on the Hub, gated, no network, or offline and not in the cache.
    """
    match = _HUB_ID.fullmatch(given.as_posix())
    # a path with a typo in its last part is no repository
    if given.exists() or match is None or given.parent.exists():
        return given, None
    repo, revision, file = match.groups()
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise SeechatError(
            f"{given}: no such path, so a Hub id; huggingface_hub is not installed: "
            'pip install "seechat-lite[download]", or download it yourself and name the folder'
        ) from None
    offline = offline or constants.HF_HUB_OFFLINE
    ask: dict[str, Any] = {"repo_id": repo, "revision": revision}
    try:
        if offline:
            patterns = [file] if file else []  # no pattern: the folder, whatever is in it
            folder = hub.snapshot_download(**ask, local_files_only=True, allow_patterns=patterns)
        else:
            info = hub.HfApi(library_name="seechat-lite").model_info(repo, revision=revision)
            names = [s.rfilename for s in info.siblings or []]
            folder = hub.snapshot_download(
                **ask, allow_patterns=[file] if file else _needed(names, repo)
            )
    except CheckpointError:
        raise
    except errors.GatedRepoError:
        terms = f"accept its terms on {constants.ENDPOINT}/{repo}, then run `hf auth login`"
        raise _refused(given, f"{repo} is gated", terms) from None
    except errors.RepositoryNotFoundError:
        found = f"neither a path nor a repository on {constants.ENDPOINT}"
        do = "check the name; for a private one run `hf auth login`"
        raise _refused(given, found, do) from None
    except errors.RevisionNotFoundError:
        raise _refused(given, f"{repo} has no revision {revision}", "check it") from None
    except errors.LocalEntryNotFoundError:
        do = "run once without --offline and HF_HUB_OFFLINE" if offline else "check the network"
        found = f"no such path, and not in the cache {constants.HF_HUB_CACHE}"
        raise _refused(given, found, do) from None
    except Exception as e:  # whatever a network, a proxy or a disk has to say
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            do = "free some space, or set HF_HOME to another disk; run again, it continues"
            raise _refused(given, "the disk is full", do) from None
        found = f"{constants.ENDPOINT} cannot be reached ({line(e)})"
        do = "check the network, set HF_ENDPOINT to a mirror, or use --offline with the cache"
        raise _refused(given, found, do) from None
    path = Path(folder) / file if file else Path(folder)
    if not path.exists():
        raise _refused(given, f"{repo} has no file {file}", "check the name")
    return path, {"repository": repo, "revision": Path(folder).name}


def _needed(names: list[str], repo: str) -> list[str]:
    """Of a repository's files, one form of its weights, safetensors first, and what is beside."""
    for stem, suffix in (*STEMS, ("adapter_model", ".safetensors"), ("adapter_model", ".bin")):
        weights = re.compile(rf"{stem}(-\d+-of-\d+)?{re.escape(suffix)}(\.index\.json)?")
        found = [name for name in names if weights.fullmatch(name)]
        if any(name.endswith(suffix) for name in found):
            return [*found, *_BESIDE]
    raise CheckpointError(
        f"{repo}: holds no weights that are read here; expected safetensors or .bin of ChatGLM-6B, "
        f"CLIP or an adapter: name another repository, or one file of it as {repo}/FILE"
    )


def _refused(given: Path, found: str, do: str) -> CheckpointError:
    return CheckpointError(f"{given.as_posix()}: {found}; expected a folder or a Hub id: {do}")
