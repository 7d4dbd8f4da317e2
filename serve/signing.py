"""Who made a package: signed by the publisher's key (OpenSSF model signing), held against the keys trusted here.

A signature lies in the package: `signature.json`, and `publisher.pub` that it can be checked with. Neither is listed in
SHA256SUMS, so signing changes no hash and not the package's name. That key proves that one hand made all of it, and
that an upgrade comes from the same hand; whose hand it is, only `dmoe trust` can say.
"""

import base64
import json
import re
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.errors import UserError, relative, shown
from factory.store import write_text
from serve.package_files import PUBLISHER, SIGNATURE, check_sums, copied

NEEDED = "signatures need a package that is not installed here\n  then run: pip install 'dmoe[market]'"


@dataclass(frozen=True)
class Signer:
    """Whose signature it is: the SHA-256 of their key (None: unsigned), and what that key is called here."""

    key: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.key is None:
            return "unsigned"
        return f"signed by {self.name}, trusted here" if self.name else "signed, key unknown"


def sign(package: Path, key: Path, password: str | None = None) -> Path:
    """Signs a folder in place, or a tar as NAME.signed.tar beside it; returns which.

    Args:
        key: an elliptic curve key (P-256, P-384 or P-521) in PEM.

    Raises:
        UserError: no sound package, signed already, or no such key.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "package"
        folder.mkdir()
        top = copied(package, folder)
        check_sums(folder, relative(package))
        if top is not None and (folder / SIGNATURE).exists():
            raise UserError(f"{relative(package)}: is signed already; sign the tar that `dmoe package` wrote")
        for name in (SIGNATURE, PUBLISHER):
            (folder / name).unlink(missing_ok=True)
        _sign(folder, key, password)
        if top is None:
            for name in (PUBLISHER, SIGNATURE):
                shutil.copy(folder / name, package / name)
            return package
        out = package.with_name(f"{package.name.removesuffix('.tar')}.signed.tar")
        shutil.copy(package, out)
        with tarfile.open(out, "a", format=tarfile.USTAR_FORMAT) as tar:
            for name in (PUBLISHER, SIGNATURE):
                tar.add(folder / name, f"{top}/{name}", filter=_nobody)
        return out


def _nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname, entry.gname, entry.mode = "", "", 0o644
    return entry


def _sign(folder: Path, key: Path, password: str | None) -> None:
    try:
        from cryptography.hazmat.primitives import serialization
        from model_signing import signing
    except ImportError:
        raise UserError(NEEDED) from None
    try:
        secret = password.encode() if password else None
        private = serialization.load_pem_private_key(key.read_bytes(), secret)
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        public = private.public_key().public_bytes(serialization.Encoding.PEM, form)
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        config.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)
    except OSError as error:
        raise UserError(f"{relative(key)}: cannot be read: {error.strerror}") from None
    except Exception as error:  # no key, another kind of key, a wrong password: whatever OpenSSL makes of it
        told = str(error).split("\n")[0] or type(error).__name__
        raise UserError(f"{relative(key)}: cannot sign: {told}; it must be an elliptic curve key in PEM") from None
    (folder / PUBLISHER).write_bytes(public)


def _hashing() -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE, PUBLISHER], ignore_git_paths=False)


def signer(folder: Path, trusted: Path, where: str) -> Signer:
    """Whose signature an unpacked package carries, checked over all of its files.

    Args:
        trusted: the folder of public keys that `trust` fills.

    Raises:
        UserError: a signature that does not fit the files, half of one, or none that can be read.
    """
    there = [(folder / name).exists() for name in (SIGNATURE, PUBLISHER)]
    if not any(there):
        return Signer()
    if not all(there):
        raise UserError(f"{where}: has only one of {SIGNATURE} and {PUBLISHER}; get the package again")
    key = fingerprint(folder / PUBLISHER, f"{where}: {PUBLISHER}")
    try:
        from model_signing import verifying
    except ImportError:
        raise UserError(NEEDED) from None
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=folder / PUBLISHER)
        config.set_hashing_config(_hashing()).verify(folder, folder / SIGNATURE)
        signed = _signed(folder / SIGNATURE)
    except Exception as error:  # a stranger's file: whatever is wrong with it, it is no signature of this package
        told = " ".join((str(error) or type(error).__name__).split())[:100]
        raise UserError(f"{where}: the signature is forged or broken ({told}); do not use the package") from None
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {SIGNATURE, PUBLISHER}
    if signed != files:  # a signature may name paths to leave out
        raise UserError(f"{where}: the signature leaves out {shown(sorted(files ^ signed)[0])}; do not use the package")
    return Signer(key, known_as(trusted, key))


def _signed(path: Path) -> set[str]:
    """The files that a signature is of; to be read only after it was verified."""
    payload = base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"])
    return {resource["name"] for resource in json.loads(payload)["predicate"]["resources"]}


def fingerprint(public: Path, where: str | None = None) -> str:
    """SHA-256 of a public key, whatever way its PEM is written.

    Raises:
        UserError: it is no public key of an elliptic curve.
    """
    import hashlib

    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise UserError(NEEDED) from None
    where = where or relative(public)
    try:
        key = serialization.load_pem_public_key(public.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except Exception:
        raise UserError(f"{where}: is no public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(f"{where}: is no elliptic curve key; make one as docs/market.md says")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def publisher(package: Path) -> str | None:
    """The key of an installed package, whose signature was checked when it was installed."""
    path = package / PUBLISHER
    return fingerprint(path) if path.exists() else None


def known_as(trusted: Path, key: str) -> str | None:
    """The name under which a key is trusted here."""
    return next((path.stem for path in sorted(trusted.glob("*.pub")) if fingerprint(path) == key), None)


def trust(public: Path, trusted: Path, name: str | None = None) -> str:
    """Keeps a public key; returns the name it is trusted under: `name`, or the file's.

    Raises:
        UserError: it is no public key, or the name is taken by another.
    """
    name = name or public.stem
    if not re.fullmatch(r"[\w-][\w.-]{0,63}", name, re.ASCII):
        raise UserError(f"{shown(name)} is no name for a key: letters, digits, -, _ and . only\n  give one with --name")
    key, kept = fingerprint(public), trusted / f"{name}.pub"
    if kept.exists() and fingerprint(kept) != key:
        raise UserError(f"{name!r} is another key already; give another --name, or remove {relative(kept)}")
    write_text(kept, public.read_text(encoding="ascii", errors="replace"))
    return name
