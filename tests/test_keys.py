"""Certificates: what is issued, what is bound, what is refused, what is noticed in time."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpcserve.errors import ConfigError, Refused
from mpcserve.serving.keys import (
    ROLES,
    Finding,
    check_keys,
    init_keys,
    issue,
    key_files,
    role_of_certificate,
    show_keys,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A complete set of keys."""
    made = tmp_path / "keys"
    init_keys(made)
    for role in ROLES:
        issue(made, role, ["localhost", "127.0.0.1", "::1"])
    return made


def messages(findings: list[Finding]) -> str:
    return "\n".join(f"{f.level}: {f.message}" for f in findings)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def der(path: Path) -> bytes:
    return certificate(path).public_bytes(serialization.Encoding.DER)


def test_a_fresh_set_of_keys_has_nothing_to_report(directory: Path) -> None:
    assert check_keys(directory) == []


@pytest.mark.parametrize("role", ROLES)
def test_a_certificate_binds_its_role(role: str, directory: Path) -> None:
    assert role_of_certificate(der(directory / f"{role}.crt")) == role
    subject = certificate(directory / f"{role}.crt").subject
    assert subject.rfc4514_string() == f"CN={role}"


def test_private_keys_and_their_directory_are_for_their_owner_alone(directory: Path) -> None:
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    keys = sorted(directory.glob("*.key"))
    assert len(keys) == 6
    assert {stat.S_IMODE(k.stat().st_mode) for k in keys} == {0o600}


def test_certificates_live_two_years_and_name_their_hosts(directory: Path) -> None:
    found = {c.role: c for c in show_keys(directory)}
    assert set(found) == {"ca", *ROLES}
    left = found["alice"].not_after - datetime.now(timezone.utc)
    assert timedelta(days=729) < left <= timedelta(days=730)
    assert found["alice"].hosts == ("localhost", "127.0.0.1", "::1")
    assert len({c.fingerprint for c in found.values()}) == 6


def test_openssl_accepts_the_chain_strictly_both_ways(directory: Path) -> None:
    def context(protocol: int, role: str) -> ssl.SSLContext:
        files, made = key_files(directory, role), ssl.SSLContext(protocol)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        made.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        made.load_verify_locations(files.ca)
        made.load_cert_chain(files.certificate, files.key)
        return made

    near, far = socket.socketpair()
    seen_by: dict[str, str] = {}

    def serve() -> None:
        with context(ssl.PROTOCOL_TLS_SERVER, "alice").wrap_socket(far, server_side=True) as s:
            seen_by["alice"] = role_of_certificate(s.getpeercert(True) or b"")
            s.sendall(b"!")

    server = threading.Thread(target=serve)
    server.start()
    client = context(ssl.PROTOCOL_TLS_CLIENT, "bob")
    with client.wrap_socket(near, server_hostname="127.0.0.1") as s:
        seen_by["bob"] = role_of_certificate(s.getpeercert(True) or b"")
        assert s.recv(1) == b"!"
    server.join()
    assert seen_by == {"alice": "bob", "bob": "alice"}


def test_nothing_is_overwritten_unless_forced(directory: Path) -> None:
    before = (directory / "alice.crt").read_bytes()
    with pytest.raises(ConfigError, match=r"alice\.crt: exists already"):
        issue(directory, "alice")
    with pytest.raises(ConfigError, match=r"ca\.crt: exists already"):
        init_keys(directory)
    assert (directory / "alice.crt").read_bytes() == before
    issue(directory, "alice", force=True)
    assert (directory / "alice.crt").read_bytes() != before
    assert check_keys(directory) == []


def test_issuing_needs_the_authority(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        issue(tmp_path, "alice")
    assert "ca.crt: missing" in str(caught.value)
    assert "keys init" in caught.value.hint


def test_unknown_roles_and_bad_hosts_are_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="unknown role 'dave'"):
        issue(directory, "dave")
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        issue(directory, "alice", ["münchen.example"], force=True)


def test_a_missing_file_names_itself_and_the_role(directory: Path) -> None:
    (directory / "carol.key").unlink()
    with pytest.raises(ConfigError, match=r"carol\.key: missing, carol cannot prove"):
        key_files(directory, "carol")


def _forged(common: str, uris: list[str]) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(u) for u in uris])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    ("common", "uris"),
    [
        ("alice", []),
        ("alice", ["mpcserve:role:alice", "mpcserve:role:bob"]),
        ("alice", ["mpcserve:role:bob"]),
        ("dave", ["mpcserve:role:dave"]),
        ("alice", ["https://alice.example.org"]),
    ],
)
def test_a_certificate_of_no_or_two_roles_is_refused(common: str, uris: list[str]) -> None:
    with pytest.raises(Refused):
        role_of_certificate(_forged(common, uris))


def test_bytes_that_are_no_certificate_are_refused() -> None:
    with pytest.raises(Refused, match="not one of mpcserve's"):
        role_of_certificate(b"hello")


def _copy(source: str, target: str) -> Callable[[Path], None]:
    return lambda d: (d / target).write_bytes((d / source).read_bytes()) and None


def _foreign(directory: Path) -> None:
    init_keys(directory, force=True)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "mode": (lambda d: (d / "bob.key").chmod(0o644), ["bob.key: mode 0644, others can read"]),
    "no key": (lambda d: (d / "bob.key").unlink(), ["bob.key: missing"]),
    "wrong key": (_copy("alice.key", "bob.key"), ["bob.key: does not belong to bob.crt"]),
    "garbage": (
        lambda d: (d / "bob.crt").write_text("x"),
        ["bob.crt: not a readable PEM certificate"],
    ),
    "garbage key": (
        lambda d: (d / "bob.key").write_text("x"),
        ["bob.key: not a readable EC private key"],
    ),
    "wrong role": (
        _copy("alice.crt", "bob.crt"),
        ["bob.crt: bound to role alice, expected bob", "alice and bob hold one key"],
    ),
    "other authority": (_foreign, [f"{r}.crt: not signed by" for r in ROLES]),
    "no authority": (lambda d: (d / "ca.crt").unlink(), ["ca.crt: missing"]),
    "nobody": (
        lambda d: [(d / f"{r}.crt").unlink() for r in ROLES],
        ["no role has a certificate"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_names_every_kind_of_damage(damage: str, directory: Path) -> None:
    do, expected = DAMAGE[damage]
    do(directory)
    findings = check_keys(directory)
    for text in expected:
        assert text in messages(findings)
    assert all(f.hint for f in findings)
    assert {f.level for f in findings} == {"error"}


def test_check_reports_all_problems_at_once(directory: Path) -> None:
    (directory / "alice.key").chmod(0o640)
    (directory / "bob.key").unlink()
    (directory / "carol.crt").write_text("x")
    found = messages(check_keys(directory))
    assert all(name in found for name in ("alice.key", "bob.key", "carol.crt"))


EXPIRY = [(699, None), (705, "warning"), (731, "error"), (-1, "error")]


@pytest.mark.parametrize(("later", "level"), EXPIRY)
def test_expiry_is_warned_of_thirty_days_ahead(
    later: int, level: str | None, directory: Path
) -> None:
    now = datetime.now(timezone.utc) + timedelta(days=later)
    findings = [f for f in check_keys(directory, now) if "alice.crt" in f.message]
    assert [f.level for f in findings] == ([level] if level else [])
