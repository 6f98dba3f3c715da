"""Certificates: one authority per deployment, one certificate per role, the role bound inside it.

    ca.crt  ca.key                the authority; ca.key stays with whoever issues certificates
    <role>.crt  <role>.key        what a party needs, beside ca.crt; private keys have mode 0600

The role is the common name and the URI `mpcserve:role:<role>` of the subject alternative name;
a peer is who its certificate says, never who it claims to be. EC P-256, SHA-256.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mpcserve.errors import ConfigError, Refused

ROLES = ("alice", "bob", "carol", "model-owner", "data-owner")
ROLE_URI = "mpcserve:role:"
LIFETIME = timedelta(days=730)
CA_LIFETIME = timedelta(days=3650)
WARN_BEFORE = timedelta(days=30)
_BACKDATE = timedelta(hours=1)
"""Clocks of different machines differ a little: a certificate is valid an hour before its issue."""


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """What one party loads for TLS."""

    role: str
    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class CertificateInfo:
    """One line of `keys show`. `role` is "ca" for the authority."""

    role: str
    path: Path
    hosts: tuple[str, ...]
    not_after: datetime
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `keys check`: an error, or a warning that an expiry is near."""

    level: str
    message: str
    hint: str


def key_files(directory: Path, role: str) -> KeyFiles:
    """Paths of a role's certificate and key and of the authority. Raises: ConfigError."""
    files = KeyFiles(
        role, directory / "ca.crt", directory / f"{role}.crt", directory / f"{role}.key"
    )
    for path in (files.ca, files.certificate, files.key):
        if not path.is_file():
            raise ConfigError(
                f"{path}: missing, {role} cannot prove who it is",
                "make keys with `mpcserve keys init` and `mpcserve keys issue "
                f"{role}`, or copy the files from whoever issues them",
            )
    return files


def role_of_certificate(der: bytes) -> str:
    """The role a peer's certificate binds it to. Raises: Refused when it names none, or several."""
    try:
        return _role_of(x509.load_der_x509_certificate(der))
    except ValueError as e:
        raise Refused(
            f"the peer's certificate is not one of mpcserve's: {e}",
            "issue it with `mpcserve keys issue ROLE`",
        ) from None


def init_keys(directory: Path, *, force: bool = False) -> Path:
    """Create the authority: ca.crt and ca.key. Returns the certificate's path."""
    _make_directory(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mpcserve CA")])
    certificate = (
        _builder(name, name, key.public_key(), CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _write_pair(directory, "ca", certificate, key, force)


def issue(
    directory: Path,
    role: str,
    hosts: Sequence[str] = (),
    *,
    lifetime: timedelta = LIFETIME,
    force: bool = False,
) -> Path:
    """Issue `role`'s certificate and key, signed by the authority in `directory`."""
    if role not in ROLES:
        raise ConfigError(f"unknown role {role!r}", f"roles are {', '.join(ROLES)}")
    authority, authority_key = _load_authority(directory)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, role)])
    names = [x509.UniformResourceIdentifier(ROLE_URI + role), *map(_general_name, hosts)]
    certificate = (
        _builder(name, authority.subject, key.public_key(), lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    return _write_pair(directory, role, certificate, key, force)


def show_keys(directory: Path) -> list[CertificateInfo]:
    """The authority and every role's certificate that are in `directory`. Raises: ConfigError."""
    found = [
        _info(role, directory / f"{role}.crt")
        for role in ("ca", *ROLES)
        if (directory / f"{role}.crt").is_file()
    ]
    if not found:
        raise ConfigError(f"{directory}: no certificates", "run `mpcserve keys init`")
    return found


def check_keys(directory: Path, now: datetime | None = None) -> list[Finding]:
    """All problems of the files in `directory` at once; empty when all is well."""
    now = now or datetime.now(timezone.utc)
    authority_path = directory / "ca.crt"
    if not authority_path.is_file():
        return [_error(f"{authority_path}: missing", "run `mpcserve keys init`")]
    try:
        authority = _load_certificate(authority_path)
    except ConfigError as e:
        return [_error(e.message, e.hint)]
    findings = [*_check_validity(authority_path, authority, now, "keys init --force")]
    if (directory / "ca.key").is_file():
        findings += _check_key(directory / "ca.key", authority)
    roles = [r for r in ROLES if (directory / f"{r}.crt").is_file()]
    if not roles:
        findings.append(_error(f"{directory}: no role has a certificate", "run `keys issue ROLE`"))
    for role in roles:
        findings += _check_role(directory, role, authority, now)
    return [*findings, *_check_separate(directory, roles)]


# --- issuing ------------------------------------------------------------------------------------


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise ConfigError(
            f"{host!r} is neither a host name nor an IP address",
            "give the name the other machines connect to; write it in ASCII (punycode)",
        ) from None


def _load_authority(directory: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    for path in (directory / "ca.crt", directory / "ca.key"):
        if not path.is_file():
            raise ConfigError(f"{path}: missing", "run `mpcserve keys init` first, on one machine")
    certificate = _load_certificate(directory / "ca.crt")
    return certificate, _load_key(directory / "ca.key")


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(
            f"{directory}: cannot make the directory: {e.strerror}", "give another directory"
        ) from None


def _write_pair(
    directory: Path,
    name: str,
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    force: bool,
) -> Path:
    paths = directory / f"{name}.crt", directory / f"{name}.key"
    for path in paths:
        if path.exists() and not force:
            raise ConfigError(f"{path}: exists already", "give --force to replace it")
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write(paths[1], private, 0o600)
    _write(paths[0], certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return paths[0]


def _write(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never readable by others for a moment."""
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as e:
        raise ConfigError(f"{path}: cannot write: {e.strerror}", "check the directory") from None


# --- reading and checking -----------------------------------------------------------------------


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise ConfigError(
            f"{path}: not a readable PEM certificate", "issue it again with `mpcserve keys issue`"
        ) from None


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path}: not a readable EC private key", "issue it again with `mpcserve keys issue`"
        )
    return key


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None


def _role_of(certificate: x509.Certificate) -> str:
    """Raises: ValueError unless common name and URI agree on one known role."""
    names = _names(certificate)
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    roles = [u.removeprefix(ROLE_URI) for u in uris if u.startswith(ROLE_URI)]
    if len(roles) != 1 or roles[0] not in ROLES:
        raise ValueError(f"expected one role of {', '.join(ROLES)}, got {roles or 'none'}")
    common = [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if common != roles:
        raise ValueError(f"its role is {roles[0]} but its common name is {common}")
    return roles[0]


def _info(role: str, path: Path) -> CertificateInfo:
    certificate = _load_certificate(path)
    names = _names(certificate)
    hosts = [*names.get_values_for_type(x509.DNSName)] if names else []
    addresses = names.get_values_for_type(x509.IPAddress) if names else []
    digest = certificate.fingerprint(hashes.SHA256()).hex()
    return CertificateInfo(
        role, path, (*hosts, *map(str, addresses)), certificate.not_valid_after_utc, digest
    )


def _error(message: str, hint: str) -> Finding:
    return Finding("error", message, hint)


def _check_validity(
    path: Path, certificate: x509.Certificate, now: datetime, renew: str
) -> Iterator[Finding]:
    until, since = certificate.not_valid_after_utc, certificate.not_valid_before_utc
    hint = f"renew it with `mpcserve {renew}`"
    if now > until:
        yield _error(f"{path}: expired on {until:%Y-%m-%d}", hint)
    elif now < since:
        yield _error(f"{path}: not valid before {since:%Y-%m-%d %H:%M} UTC", "check the clock")
    elif now > until - WARN_BEFORE:
        days = (until - now).days
        yield Finding("warning", f"{path}: expires in {days} days, on {until:%Y-%m-%d}", hint)


def _check_key(path: Path, certificate: x509.Certificate) -> Iterator[Finding]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        key = _load_key(path)
    except FileNotFoundError:
        yield _error(f"{path}: missing", "copy it from whoever issued the certificate")
        return
    except ConfigError as e:
        yield _error(e.message, e.hint)
        return
    if mode & 0o077:
        yield _error(f"{path}: mode {mode:04o}, others can read a private key", f"chmod 600 {path}")
    if key.public_key() != certificate.public_key():
        yield _error(
            f"{path}: does not belong to {path.with_suffix('.crt').name}",
            "issue both again with `mpcserve keys issue --force`",
        )


def _check_role(
    directory: Path, role: str, authority: x509.Certificate, now: datetime
) -> Iterator[Finding]:
    path = directory / f"{role}.crt"
    again = f"keys issue {role} --force"
    try:
        certificate = _load_certificate(path)
    except ConfigError as e:
        yield _error(e.message, e.hint)
        return
    yield from _check_validity(path, certificate, now, again)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        yield _error(f"{path}: not signed by {directory / 'ca.crt'}", f"run `mpcserve {again}`")
    try:
        bound = _role_of(certificate)
        if bound != role:
            yield _error(f"{path}: bound to role {bound}, expected {role}", "rename or reissue it")
    except ValueError as e:
        yield _error(f"{path}: {e}", f"run `mpcserve {again}`")
    yield from _check_key(directory / f"{role}.key", certificate)


def _check_separate(directory: Path, roles: Sequence[str]) -> Iterator[Finding]:
    seen: dict[bytes, str] = {}
    for role in roles:
        try:
            public = _load_certificate(directory / f"{role}.crt").public_key()
        except ConfigError:
            continue  # reported with the role
        identity = public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        other = seen.setdefault(identity, role)
        if other != role:
            yield _error(
                f"{directory}: {other} and {role} hold one key, two roles must not be one party",
                f"run `mpcserve keys issue {role} --force`",
            )
