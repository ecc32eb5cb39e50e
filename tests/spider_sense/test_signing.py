"""Signatures of guards: what they cover, and what an error says."""

import os
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from spider_sense.errors import ConfigError, GuardError, MissingExtraError, SignatureError
from spider_sense.guard import Guard
from spider_sense.signing import SIGNATURE, generate_keys, is_signed, sign, verify

pytest.importorskip("OpenSSL", reason="model-signing imports it")
pytest.importorskip("model_signing")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return generate_keys(tmp_path / "alice")


@pytest.fixture
def guard(tiny_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "guard"))


@pytest.fixture
def signed(guard: Path, keys: tuple[Path, Path]) -> Path:
    sign(guard, keys[0])
    return guard


def test_keys(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert (private.name, public.name) == ("alice.private.pem", "alice.public.pem")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert b"PRIVATE" in private.read_bytes()
    assert b"PRIVATE" not in public.read_bytes()
    before = private.read_bytes()
    with pytest.raises(ConfigError, match=r"alice\.private\.pem exists and is not overwritten"):
        generate_keys(tmp_path / "alice")
    private.unlink()
    with pytest.raises(ConfigError, match=r"alice\.public\.pem exists and is not overwritten"):
        generate_keys(tmp_path / "alice")
    assert not private.exists()
    assert generate_keys(tmp_path / "bob")[0].read_bytes() != before
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere"):
        generate_keys(tmp_path / "nowhere" / "carol")


def test_signed_guard_verifies(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    assert is_signed(signed)
    verify(signed, keys[1])
    Guard.from_pretrained(signed)
    # Neither another name nor another place matters, nor signing once more.
    moved = Path(shutil.copytree(signed, tmp_path / "elsewhere" / "other"))
    verify(moved, keys[1])
    sign(moved, keys[0])
    verify(moved, keys[1])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_relative_folder(signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(signed.parent)
    sign(Path("guard"), keys[0])
    verify(Path("guard"), keys[1])
    (signed / "extra").touch()
    with pytest.raises(SignatureError, match="extra"):
        verify(Path("guard"), keys[1])


@pytest.mark.parametrize(
    "name", ["guard.json", "probes.safetensors", "vectors.safetensors", "baselines/misuse/baselines.json"]
)
def test_changed_file_is_named(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    content = bytearray((signed / name).read_bytes())
    content[-1] ^= 1
    (signed / name).write_bytes(content)
    with pytest.raises(SignatureError, match=f"Hash mismatch for '{name}'[^,]*; get it, or the public key"):
        verify(signed, keys[1])


@pytest.mark.parametrize("name", ["added.txt", ".hidden", ".gitignore", ".git/config", "baselines/misuse/more.json"])
def test_added_file_is_named(signed: Path, keys: tuple[Path, Path], name: str) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("x")
    with pytest.raises(SignatureError, match=name):
        verify(signed, keys[1])


def test_removed_file_is_named(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "vectors.safetensors").unlink()
    with pytest.raises(SignatureError, match=r"vectors\.safetensors"):
        verify(signed, keys[1])


def test_symbolic_link_is_refused(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    os.rename(signed / "vectors.safetensors", tmp_path / "outside")
    (signed / "vectors.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(SignatureError, match=r"vectors\.safetensors"):
        verify(signed, keys[1])
    with pytest.raises(SignatureError, match=r"vectors\.safetensors"):
        sign(signed, keys[0])


def test_wrong_key(signed: Path, tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match=r"does not match the provided public key.*whoever signed"):
        verify(signed, generate_keys(tmp_path / "mallory")[1])


def test_missing_signature(guard: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SignatureError, match=r"is not signed: it has no model\.sig; run `spider-sense sign"):
        verify(guard, keys[1])
    with pytest.raises(GuardError, match="does not exist"):
        verify(tmp_path / "nothing", keys[1])


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "not json", '{"verificationMaterial": 1}'])
def test_damaged_signature(signed: Path, keys: tuple[Path, Path], content: str) -> None:
    (signed / SIGNATURE).write_text(content)
    with pytest.raises(SignatureError, match="guard"):
        verify(signed, keys[1])


def test_signature_cannot_be_taken_over(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """The owner's name on somebody else's signature: the key's hash is exchanged, the content is not."""
    import json

    mallory = generate_keys(tmp_path / "mallory")
    genuine = json.loads((signed / SIGNATURE).read_text())
    sign(signed, mallory[0])
    forged = json.loads((signed / SIGNATURE).read_text())
    forged["verificationMaterial"] = genuine["verificationMaterial"]
    (signed / SIGNATURE).write_text(json.dumps(forged))
    with pytest.raises(SignatureError, match=r"model\.sig was changed"):
        verify(signed, keys[1])


def test_wrong_kind_of_key(guard: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    def written(key: Any, encryption: Any) -> Path:
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        (tmp_path / "key.pem").write_bytes(pem)
        return tmp_path / "key.pem"

    plain = serialization.NoEncryption()
    locked = serialization.BestAvailableEncryption(b"secret")
    with pytest.raises(ConfigError, match="not an unencrypted private key"):
        sign(guard, keys[1])
    with pytest.raises(ConfigError, match="not a public key"):
        verify(guard, keys[0])
    with pytest.raises(ConfigError, match="not an unencrypted private key"):
        sign(guard, written(ec.generate_private_key(ec.SECP256R1()), locked))
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256K1())):
        with pytest.raises(ConfigError, match="not a key on one of the curves"):
            sign(guard, written(key, plain))
    with pytest.raises(ConfigError, match="cannot read the key"):
        sign(guard, tmp_path / "none.pem")
    assert not is_signed(guard)


def test_private_key_inside_the_guard(guard: Path) -> None:
    private, _ = generate_keys(guard / "key")
    with pytest.raises(ConfigError, match="move it away"):
        sign(guard, private)


def test_damaged_guard_is_not_signed(guard: Path, keys: tuple[Path, Path]) -> None:
    (guard / "probes.safetensors").write_bytes(b"x")
    with pytest.raises(GuardError):
        sign(guard, keys[0])
    assert not is_signed(guard)


def test_signature_does_not_survive_saving(signed: Path) -> None:
    Guard.from_pretrained(signed).save_pretrained(signed)
    assert not is_signed(signed)


def test_missing_package(guard: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("model_signing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(
        MissingExtraError, match=r"model-signing is not installed; run, in the checkout: pip install '\.\[sign"
    ):
        sign(guard, keys[0])
    monkeypatch.delitem(sys.modules, "model_signing")
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    with pytest.raises(MissingExtraError, match="pyopenssl is not installed"):
        verify(guard, keys[1])
