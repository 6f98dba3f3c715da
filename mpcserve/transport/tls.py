"""TLS 1.3, mutual: who the peer is, and what to say when it is not who it should be.

A certificate carries its role twice: the subject's common name, and one URI in the subject
alternative names, `mpcserve:role:<role>`. Both must agree. The role is the identity: host names are
not compared, for a deployment has a CA of its own that signs nothing but roles. The connection
itself is `codec.TlsCodec`.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cryptography import x509

from mpcserve.errors import ConfigError, PeerError, PeerLost, PeerTimeout
from mpcserve.wire import ROLES

ROLE_URI = "mpcserve:role:"
_CLOSE_S = 1.0  # how long a refused peer has to read why
_LAST_BYTES = 64 << 10  # read at once of what is not wanted any more

ISSUE = "issue a new one with `mpcserve keys issue`"
_SAME_CA = "give all parties certificates of one CA (`mpcserve keys show` prints it)"
_VERIFY = MappingProxyType(
    {
        9: ("is not valid yet", "compare the clocks of the two machines"),
        10: ("has expired", ISSUE),
        18: ("is signed by itself, not by our CA", _SAME_CA),
        19: ("is signed by a CA that is not ours", _SAME_CA),
        20: ("is signed by a CA that is not ours", _SAME_CA),
        21: ("is signed by a CA that is not ours", _SAME_CA),
        7: ("is signed by a CA that is not ours", _SAME_CA),
    }
)
_ALERTS = MappingProxyType(
    {
        "certificate expired": ("says that our certificate has expired", ISSUE),
        "unknown ca": ("does not know the CA that signed our certificate", _SAME_CA),
        "decrypt error": ("does not know the CA that signed our certificate", _SAME_CA),
        "certificate required": ("wants a certificate and got none", _SAME_CA),
        "bad certificate": ("does not accept our certificate", ISSUE),
        "certificate unknown": ("does not accept our certificate", ISSUE),
        "unsupported certificate": ("does not accept our certificate for this purpose", ISSUE),
        "protocol version": ("does not speak TLS 1.3", "upgrade its OpenSSL"),
        "unsupported protocol": ("does not speak TLS 1.3", "upgrade its OpenSSL"),
        "wrong version number": ("does not speak TLS", "check the address; start both alike"),
        "http request": ("speaks HTTP, not TLS", "check the address"),
        "record layer failure": ("does not speak TLS", "check the address; start both alike"),
    }
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of three PEM files: the CA's certificate, this party's certificate, its private key."""

    ca: Path | str
    cert: Path | str
    key: Path | str


class TlsError(OSError):
    """`reason`: OpenSSL's words. `code`: X509_V_ERR_… of the peer's certificate, or 0."""

    def __init__(self, reason: str, code: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code


def role_of(certificate: x509.Certificate) -> str:
    """The role in a verified certificate. Raises: PeerError."""
    uris: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    roles = [uri.removeprefix(ROLE_URI) for uri in uris if uri.startswith(ROLE_URI)]
    common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return _one_role(roles, [str(name.value) for name in common])


def own_role(files: TlsFiles) -> str:
    """The role in this party's own certificate. Raises: ConfigError."""
    try:
        return role_of(x509.load_pem_x509_certificate(Path(files.cert).read_bytes()))
    except (OSError, ValueError, PeerError) as error:
        raise ConfigError(f"{files.cert}: no role in this certificate: {error}", ISSUE) from None


def _one_role(uris: list[str], common: list[str]) -> str:
    if len(uris) != 1 or uris != common or uris[0] not in ROLES:
        raise PeerError(
            f"expected a certificate with one role of {', '.join(ROLES)} as its common name and "
            f"as URI {ROLE_URI}…, got common name {common} and URI {uris}",
            ISSUE,
        )
    return uris[0]


def explain(error: Exception, peer: str, doing: str) -> PeerError:
    """What a failure of TLS or of the socket means, in words; `peer` is a role and an address."""
    if isinstance(error, PeerError):
        return type(error)(f"{peer}: {error.message}", error.hint)
    if isinstance(error, TlsError) and error.code:
        what, hint = _VERIFY.get(error.code, (f"is bad: {error.reason}", ISSUE))
        return PeerError(f"the certificate of {peer} {what} ({doing})", hint)
    if isinstance(error, TlsError):
        reason = error.reason.lower()
        for words, (what, hint) in _ALERTS.items():
            if words in reason:
                return PeerError(f"{peer} {what} ({doing})", hint)
        return PeerError(f"TLS with {peer} failed: {reason} ({doing})", _SAME_CA)
    if isinstance(error, TimeoutError):
        return PeerTimeout(f"{peer} did not answer in time ({doing})", "check that it is alive")
    if isinstance(error, ConnectionRefusedError):
        return PeerLost(f"{peer} refused the connection ({doing})", "check that it is running")
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return PeerLost(f"lost the connection to {peer}: {why} ({doing})", "see the log of that party")


def part(sock: socket.socket) -> None:
    """Close a socket so that the peer can still read what was sent last.

    Closing while bytes of the peer are unread resets the connection, and the reset may overtake the
    reason: so say that no more comes, and read until the peer closes, for a second at most.
    """
    deadline = time.monotonic() + _CLOSE_S
    try:
        sock.shutdown(socket.SHUT_WR)
        while time.monotonic() < deadline:
            sock.settimeout(left(deadline))
            if not sock.recv(_LAST_BYTES):
                break
    except OSError:
        return  # the peer is gone already
    finally:
        sock.close()


def left(deadline: float) -> float:
    """Seconds to the deadline. Raises: TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
