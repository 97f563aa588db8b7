import os
from pathlib import Path

import pytest

from veilgraft.errors import InputError
from veilgraft.identity import PublicKey, SignatureError, SigningKey

# RFC 8032, 7.1, test 2: the key pair; the domain goes before the message.
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"


def test_a_signature_is_over_exact_bytes_and_one_domain() -> None:
    key = SigningKey.generate()
    signature = key.sign("request", b"data")
    key.public.verify("request", b"data", signature)
    for domain, data, given in (
        ("answer", b"data", signature),
        ("request", b"Data", signature),
        ("request", b"data", signature[:-1]),
        ("request", b"data", b""),
        ("request", b"data", signature[:-1] + bytes([signature[-1] ^ 1])),
    ):
        with pytest.raises(SignatureError):
            key.public.verify(domain, data, given)  # type: ignore[arg-type]


def test_another_key_did_not_sign() -> None:
    signature = SigningKey.generate().sign("answer", b"data")
    with pytest.raises(SignatureError):
        SigningKey.generate().public.verify("answer", b"data", signature)


def test_a_public_key_has_one_text_form() -> None:
    key = PublicKey.parse("ed25519:" + PUBLIC)
    assert key.text == "ed25519:" + PUBLIC
    assert PublicKey.parse(key.text) == key
    assert len(key.fingerprint.split()) == 8
    for text in (PUBLIC, "ed25519:" + PUBLIC.upper(), "ed25519:" + PUBLIC[:-2], "ed25519:xyz", ""):
        with pytest.raises(InputError, match="64 lower-case hex digits"):
            PublicKey.parse(text)


def test_two_keys_have_two_fingerprints() -> None:
    prints = {SigningKey.generate().public.fingerprint for _ in range(100)}
    assert len(prints) == 100


@pytest.mark.parametrize("passphrase", [None, b"a long passphrase"])
def test_a_key_is_read_as_it_was_written(tmp_path: Path, passphrase: bytes | None) -> None:
    key, path = SigningKey.generate(), tmp_path / "key.pem"
    key.save(path, passphrase)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path, passphrase).public == key.public


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    SigningKey.generate().save(path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="never replaced"):
        SigningKey.generate().save(path)
    assert path.read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    SigningKey.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match="expected mode 600, got 640"):
        SigningKey.load(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    SigningKey.generate().save(path)
    os.chown(path, 12345, 12345)
    with pytest.raises(InputError, match="owned by user 0, got user 12345"):
        SigningKey.load(path)


def test_what_is_no_key_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    with pytest.raises(InputError, match="can't be read"):
        SigningKey.load(path)
    SigningKey.generate().save(path, b"one")
    with pytest.raises(InputError, match="expected a passphrase"):
        SigningKey.load(path)
    with pytest.raises(InputError, match="the passphrase is another"):
        SigningKey.load(path, b"two")
    (tmp_path / "link.pem").symlink_to(path)
    with pytest.raises(InputError, match="can't be read"):
        SigningKey.load(tmp_path / "link.pem", b"one")
    path.write_text("no key")
    with pytest.raises(InputError, match="private key"):
        SigningKey.load(path)


def test_neither_repr_nor_error_shows_a_private_key(tmp_path: Path) -> None:
    key = SigningKey.generate()
    path = tmp_path / "key.pem"
    key.save(path)
    secret = path.read_text().splitlines()[1]
    assert secret not in repr(key)
    assert secret not in repr(vars(key))
