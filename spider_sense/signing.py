"""Signatures of folders, such as a guard, made with an elliptic curve key and checked with its public half.

A signature covers the name and the content of every file in the folder. It is a file beside them, and whatever writes
the folder anew leaves it out, since it would no longer hold.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from spider_sense.errors import ConfigError, MissingExtraError, SignatureError
from spider_sense.guard import Guard

__all__ = ["SIGNATURE", "generate_keys", "is_signed", "sign", "verify"]

SIGNATURE = "model.sig"

Reader = Callable[[Path], object]
"""Reads a folder and raises if it is not sound."""

_DIGESTS = re.compile(r": Expected 'Digest\(.*?\)', Actual 'Digest\(.*?\)'")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def is_signed(folder: Path) -> bool:
    """Whether the folder has a signature; only :func:`verify` says whether it holds."""
    return (folder / SIGNATURE).is_file()


def generate_keys(prefix: Path) -> tuple[Path, Path]:
    """Write a new P-256 key pair, ``PREFIX.private.pem`` for its owner alone and ``PREFIX.public.pem``.

    Returns:
        The two paths.

    Raises:
        ConfigError: if one of them exists or cannot be written.
        MissingExtraError: if model-signing is not installed.
    """
    _, serialization, ec = _cryptography()
    paths = prefix.with_name(f"{prefix.name}.private.pem"), prefix.with_name(f"{prefix.name}.public.pem")
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path} exists and is not overwritten; choose another prefix, or move it away")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        for path, content, mode in zip(paths, (private, public), (0o600, 0o644), strict=True):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
                stream.write(content)
    except OSError as error:
        raise ConfigError(
            f"cannot write {error.filename}: {error.strerror}; name a prefix in a folder of yours"
        ) from error
    return paths


def sign(folder: Path, private_key: Path, read: Reader = Guard.from_pretrained) -> Path:
    """Sign a guard, or another artifact; an older signature is replaced.

    Args:
        folder: the artifact.
        private_key: PEM file with an elliptic curve key.
        read: reads it; what it cannot read is not signed.

    Returns:
        Path of the signature.

    Raises:
        ConfigError: if the key cannot be used or lies in the artifact's own folder.
        GuardError: if the folder holds no sound guard; ``read`` may raise others.
        MissingExtraError: if model-signing is not installed.
        SignatureError: if the folder holds something that cannot be signed, such as a symbolic link.
    """
    signing = _model_signing("signing")
    read(folder)
    _check_key(private_key, private=True)
    if folder.resolve() in private_key.resolve().parents:
        raise ConfigError(f"the private key {private_key} lies in {folder} and would be copied with it; move it away")
    # Beside the folder: inside it, a signature left by a killed run would be one file too many for ever.
    beside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}.sig")
    config = signing.Config().set_hashing_config(_hashing()).use_elliptic_key_signer(private_key=private_key)
    try:
        with _explained(folder, "remove what is not part of it"):
            config.sign(folder, beside)
        os.replace(beside, folder / SIGNATURE)
    finally:
        beside.unlink(missing_ok=True)
    return folder / SIGNATURE


def verify(folder: Path, public_key: Path, read: Reader = Guard.from_pretrained) -> None:
    """Check that a guard, or another artifact, is, file by file, what the owner of a key signed.

    Args:
        folder: the artifact.
        public_key: PEM file with the public half of the key.
        read: reads it, to tell an artifact that is not signed from none at all.

    Raises:
        ConfigError: if the key cannot be used.
        GuardError: if there is no guard in the folder; ``read`` may raise others.
        MissingExtraError: if model-signing is not installed.
        SignatureError: if it is not signed, was signed with another key, or a file was changed, added or taken
            away.
    """
    verifying = _model_signing("verifying")
    _check_key(public_key, private=False)
    if not is_signed(folder):
        read(folder)
        raise SignatureError(
            f"{folder} is not signed: it has no {SIGNATURE}; run `spider-sense sign {folder} --key ...`"
        )
    config = verifying.Config().set_hashing_config(_hashing()).use_elliptic_key_verifier(public_key=public_key)
    with _explained(folder, "get it, or the public key, once more from whoever signed it"):
        config.verify(folder, folder / SIGNATURE)


@contextmanager
def _explained(folder: Path, advice: str) -> Iterator[None]:
    from cryptography.exceptions import InvalidSignature

    try:
        yield
    except InvalidSignature as error:
        raise SignatureError(f"{folder / SIGNATURE} was changed after it was signed; {advice}") from error
    # A signature file is anybody's JSON, and model-signing looks into it before it knows what it is.
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise SignatureError(f"{folder} is not as it was signed, or cannot be: {_reason(error)}; {advice}") from error


def _reason(error: Exception) -> str:
    # Two digests as raw bytes tell nobody anything; the file's name before them does.
    text = _DIGESTS.sub("", str(error).replace("\\'", "'"))
    return text.strip().removesuffix(".") or type(error).__name__


def _hashing() -> Any:
    """Return what is hashed: all files but the signature itself, git's among them, which are ignored by default."""
    return _model_signing("hashing").Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _check_key(path: Path, *, private: bool) -> None:
    exceptions, serialization, ec = _cryptography()
    try:
        content = path.read_bytes()
        key = (
            serialization.load_pem_private_key(content, None).public_key()
            if private
            else serialization.load_pem_public_key(content)
        )
    except OSError as error:
        raise ConfigError(f"cannot read the key {path}: {error.strerror}; name a PEM file") from error
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
        kind = "an unencrypted private" if private else "a public"
        raise ConfigError(
            f"{path} is not {kind} key in PEM format; make one with sign --generate-key PREFIX"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise ConfigError(
            f"{path} is not a key on one of the curves {', '.join(_CURVES)}; sign --generate-key makes one"
        )


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise MissingExtraError("cryptography", "sign") from error
    return exceptions, serialization, ec


def _model_signing(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{name}")
    except ImportError as error:
        # model-signing imports pyOpenSSL without asking for it to be installed.
        missing = "pyopenssl" if error.name == "OpenSSL" else "model-signing"
        raise MissingExtraError(missing, "sign") from error
