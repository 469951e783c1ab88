"""Downloads weights by Hub id, `owner/name[@revision][/file]`, into huggingface_hub's own cache.

It downloads only what is read: of a bundle, the files that its manifest lists. HF_HOME, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE work as huggingface_hub documents them. Offline, no socket is opened.
"""

import errno
import glob
import re
from pathlib import Path
from typing import Any

from seechat_weights.bundle.manifest import MANIFEST, Manifest
from seechat_weights.errors import BundleError, CheckpointError, SeechatError
from seechat_weights.files.checkpoint import STEMS
from seechat_weights.files.reading import MAX_JSON, decoded, line
from seechat_weights.files.untrusted import read_file
from seechat_weights.libraries import import_error

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_HUB_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9_.-]+))?(?:/(.+))?")
# configurations, tokenizers, and files that tell how pictures are prepared
_BESIDE = (
    *("*.json", "ice_text.model", "tokenizer.model", "vocab.txt"),
    *("qformer_tokenizer/vocab.txt", "non_lora_trainables.bin"),  # InstructBLIP, a LoRA of LLaVA
)
_LAST = (("adapter_model", ".safetensors"), ("adapter_model", ".bin"), ("mm_projector", ".bin"))


def fetch(
    given: Path, *, offline: bool = False, only_bundles: bool = False
) -> tuple[Path, dict[str, str] | None]:
    """Return a local path as it is; download what looks like a Hub id and is not a path.

    given: a path or a Hub id.
    offline: take only what the cache has.
    only_bundles: refuse other weights before they are downloaded.

    Returns where it lies, and its repository and commit for the bundle's provenance.

    Raises CheckpointError: not on the Hub, gated, no network, or offline and not in the cache.
    """
    match = _HUB_ID.fullmatch(given.as_posix()) if ".." not in given.parts else None
    # a path with a typo in its last part is not a repository
    if match is None or _exists(given) or _exists(given.parent):
        return given, None
    repo, revision, file = match.groups()
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except (ImportError, OSError) as e:
        needed = f"expected it for {given}, which is no path and so a Hub id"
        install = '"seechat-lite[download]", or download it yourself and name the folder'
        raise import_error(SeechatError, e, needed=needed, install=install) from None
    offline = offline or constants.HF_HUB_OFFLINE
    ask: dict[str, Any] = {"repo_id": repo, "revision": revision}
    try:
        if offline:
            patterns = [file] if file else []  # no pattern: the whole folder
            folder = hub.snapshot_download(**ask, local_files_only=True, allow_patterns=patterns)
        else:
            info = hub.HfApi(library_name="seechat-lite").model_info(repo, revision=revision)
            names = [s.rfilename for s in info.siblings or []]
            if file:
                patterns = [file]
            elif MANIFEST in names:
                patterns = _of_bundle(Path(hub.hf_hub_download(repo, MANIFEST, revision=revision)))
            elif only_bundles:
                found = f"{repo} holds no bundle ({MANIFEST})"
                do = "run published weights with the engine torch, or export them once"
                raise _refused(given, found, do)
            else:
                patterns = _needed(names, repo)
            folder = hub.snapshot_download(**ask, allow_patterns=patterns)
    except (BundleError, CheckpointError):
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
        do = "run once online, HF_HUB_OFFLINE unset" if offline else "check the network"
        found = f"no such path, and not in the cache {constants.HF_HUB_CACHE}"
        raise _refused(given, found, do) from None
    except Exception as e:  # networks, proxies and disks raise many types
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            do = "free some space, or set HF_HOME to another disk; run again, it continues"
            raise _refused(given, "the disk is full", do) from None
        found = f"{constants.ENDPOINT} cannot be reached ({line(e)})"
        do = "check the network, set HF_ENDPOINT to a mirror, or use the cache offline"
        raise _refused(given, found, do) from None
    path = Path(folder) / file if file else Path(folder)
    if not path.exists():
        raise _refused(given, f"{repo} has no file {file}", "check the name")
    return path, {"repository": repo, "revision": Path(folder).name}


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hub id; many paths have it too.

    text: the text.
    """
    return _HUB_ID.fullmatch(text) is not None and ".." not in Path(text).parts


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a path that cannot be looked up exists; others will refuse it
        return True


def _of_bundle(manifest: Path) -> list[str]:
    """The names of a bundle's files. Raises BundleError."""
    try:
        text = decoded(read_file(manifest, limit=MAX_JSON))
    except (OSError, ValueError) as e:
        raise BundleError(
            f"{manifest}: cannot be read ({line(e)}); expected a bundle's manifest: download it "
            "again"
        ) from None
    files = Manifest.from_json(text, str(manifest)).files
    return [MANIFEST, *(glob.escape(name) for name in files)]


def _needed(names: list[str], repo: str) -> list[str]:
    """The files to download: one form of a repository's weights, and the files beside it.

    safetensors are the first choice.
    """
    for stem, suffix in (*STEMS, *_LAST):
        weights = re.compile(rf"{stem}(-\d+-of-\d+)?{re.escape(suffix)}(\.index\.json)?")
        found = [name for name in names if weights.fullmatch(name)]
        if any(name.endswith(suffix) for name in found):
            return [*found, *_BESIDE]
    raise CheckpointError(
        f"{repo}: holds no weights that are read here; expected a bundle, or safetensors or .bin "
        "of ChatGLM-6B, CLIP or an adapter: name another repository, or one file of it as "
        f"{repo}/FILE"
    )


def _refused(given: Path, found: str, do: str) -> CheckpointError:
    return CheckpointError(f"{given.as_posix()}: {found}; expected a folder or a Hub id: {do}")
