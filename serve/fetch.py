"""A package's way here: a file or folder as it lies, https:// or hf://, bounded in size; nothing is believed yet."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from factory.errors import UserError, shown
from serve.package_files import GIB, LARGEST, MIB

LARGEST_DOWNLOAD = 9 * GIB
SECONDS = 60.0  # without a byte


def fetched(source: str, work: Path) -> Path:
    """The file or folder of `source`, downloaded into the folder `work` if it is not on this machine.

    Raises:
        UserError: it cannot be had, or is too large.
    """
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme == "hf":
        return _from_hub(source, work)
    if scheme:
        return _from_url(source, work)
    return Path(source).expanduser()


def _refuse_url(url: Any, source: str) -> None:
    """Whoever sits between can change what plain http brings; hashes alone do not tell, only a signature does."""
    loopback = url.scheme == "http" and url.host in ("127.0.0.1", "localhost", "::1")
    if url.scheme != "https" and not loopback:
        raise UserError(f"{shown(source)}: packages come by https:// or hf://, or lie on this machine")


def _from_url(source: str, work: Path) -> Path:
    import httpx

    target = work / "download.tar"
    try:
        with httpx.Client(follow_redirects=False, timeout=SECONDS) as client:
            url = httpx.URL(source)
            for _ in range(5):
                _refuse_url(url, source)
                with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
                    if response.next_request is None:
                        _save(response, target, source)
                        return target
                    url = response.next_request.url
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{shown(source)}: cannot be had: {str(error) or type(error).__name__}") from None
    raise UserError(f"{shown(source)}: leads from one address to another, and another; give the last one")


def _save(response: Any, target: Path, source: str) -> None:
    if not response.is_success:
        raise UserError(f"{shown(source)}: the server says {response.status_code} {response.reason_phrase}")
    left = LARGEST_DOWNLOAD
    with target.open("xb") as out:
        for block in response.iter_raw(MIB):  # unpacked, one small block could fill the memory
            left -= out.write(block)
            if left < 0:
                raise UserError(f"{shown(source)}: is larger than {LARGEST_DOWNLOAD:,} bytes; no package is")


def _from_hub(source: str, work: Path) -> Path:
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source, re.ASCII)
    if not found:
        raise UserError(f"{shown(source)}: is no hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError("hf:// needs huggingface_hub\n  then run: pip install 'dmoe[market]'") from None
    wanted: Any = {"revision": found[2], "allow_patterns": sorted(LARGEST), "local_dir": work / "download"}
    try:
        info = hub.HfApi().model_info(found[1], revision=found[2], files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        for name, size in sizes.items():
            if size > LARGEST.get(name, size):
                raise UserError(f"{shown(source)}: {name} has {size:,} bytes, more than it may have")
        hub.snapshot_download(found[1], **{**wanted, "revision": info.sha})  # what was looked at, not what is newest
    except UserError:
        raise
    except Exception as error:  # not found, no network, offline mode: the errors of whatever carries the requests
        told = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise UserError(f"{shown(source)}: the Hub did not give it: {told[:200]}") from None
    return work / "download"
