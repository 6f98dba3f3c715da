"""The config file: YAML → frozen dataclasses.

One file describes one deployment and is the same on every machine of it: where alice and bob
listen, where keys and state lie, and how much a server may take on. Paths in it are relative to it.
All problems of a file are reported together, each with file, line, key, expected and got.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml

from mpcserve.errors import ConfigError

ENVIRONMENT = "MPCSERVE_CONFIG"
SEARCH = ("mpcserve.yaml", "configs/local.yaml")
SERVER_ROLES = ("alice", "bob", "carol")
LOG_LEVELS = ("debug", "info", "warning", "error")

_SIZE_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens. Port 0 asks the system for a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if the host can only be this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, slots=True)
class Servers:
    """alice and bob listen; carol only connects, so it has a host (for its certificate) alone."""

    alice: Address
    bob: Address
    carol: str = "localhost"

    def address(self, role: str) -> Address:
        """Listening address of alice or bob."""
        return {"alice": self.alice, "bob": self.bob}[role]


@dataclass(frozen=True, slots=True)
class Pool:
    """Bundles dealt ahead: `depth` per deployment, all together in `max_bytes` of memory.

    What that does not hold waits on bob's disk.
    """

    depth: int = 2
    max_bytes: int = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds until waiting becomes an error."""

    connect: float = 30.0
    handshake: float = 10.0
    round: float = 60.0
    request: float = 600.0
    drain: float = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """`requests` evaluations run at once, `queue` requests may wait; any further is refused.

    Of those that wait, up to `together` of one model share an evaluation. Large instructions are
    computed by `threads`; 0: by as many as there are cores, which servers on one machine share.
    """

    requests: int = 2
    queue: int = 64
    together: int = 16
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """A whole deployment. `path` is the file it came from, `model` the default model's name."""

    servers: Servers
    keys: Path = Path("keys")
    state: Path = Path("state")
    pool: Pool = field(default_factory=Pool)
    deadlines: Deadlines = field(default_factory=Deadlines)
    limits: Limits = field(default_factory=Limits)
    log_level: str = "info"
    model: str | None = None
    path: Path | None = None


def find_config(path: Path | str | None = None) -> Path:
    """`path`, else $MPCSERVE_CONFIG, else ./mpcserve.yaml, else configs/local.yaml."""
    if path is not None:
        return _existing(Path(path), "--config")
    if named := os.environ.get(ENVIRONMENT):
        return _existing(Path(named), f"${ENVIRONMENT}")
    for candidate in map(Path, SEARCH):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"no config: no --config, no ${ENVIRONMENT}, no {' and no '.join(SEARCH)} in {Path.cwd()}",
        "run `mpcserve init` to write a mpcserve.yaml for three local servers",
    )


def read_config(path: Path | str | None = None) -> Config:
    """Find, read and parse a config. Raises: ConfigError."""
    found = find_config(path)
    try:
        text = found.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{found}: cannot read the config: {e}", "give a YAML file") from None
    return parse_config(text, found)


def load_config(path: Path | str | None = None) -> Config:
    """`read_config`, and the certificates beside it are checked. Raises: ConfigError."""
    config = read_config(path)
    check_separate_servers(config)
    return config


def parse_config(text: str, path: Path) -> Config:
    """Parse the text of `path`; `keys` and `state` become absolute. Raises: ConfigError."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = getattr(e, "problem", None) or str(e).splitlines()[0]
        raise ConfigError(
            f"{path}{line}: not YAML: {what}", "check indentation and quotes"
        ) from None
    reader = _Reader(str(path))
    values = reader.mapping(root, _SCHEMA, "")
    if not reader.problems:
        reader.problems += _clashes(values, str(path))
    if reader.problems:
        raise ConfigError(
            "\n".join(reader.problems), "`mpcserve init` writes a complete, commented example"
        )
    base = path.resolve().parent
    return Config(
        servers=Servers(**values["servers"]),
        keys=base / values["keys"],
        state=base / values["state"],
        pool=Pool(**values["pool"]),
        deadlines=Deadlines(**values["deadlines"]),
        limits=Limits(**values["limits"]),
        log_level=values["log_level"],
        model=values["model"],
        path=path,
    )


def check_separate_servers(config: Config) -> None:
    """Refuse two server roles with one certificate or one key: carol with either sees everything.

    Certificates that are not on this machine are checked by the peers that meet them.
    Raises: ConfigError naming both files.
    """
    seen: dict[bytes, Path] = {}
    for role in SERVER_ROLES:
        path = config.keys / f"{role}.crt"
        identity = _public_key(path) if path.is_file() else None
        if identity is None:
            continue
        if other := seen.get(identity):
            raise ConfigError(
                f"{path} and {other} hold one key: two server roles must not be one party",
                "issue a certificate for each role: `mpcserve keys issue ROLE --force`",
            )
        seen[identity] = path


def parse_size(text: str) -> int:
    """Bytes of "2 GB", "512 MiB" or "1000". Raises: ValueError."""
    match = _SIZE.fullmatch(text)
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(text)
    return int(float(match[1]) * unit)


def parse_address(text: str) -> Address:
    """`host:port`, or `[v6]:port`. Raises: ValueError."""
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    number = int(port) if port.isascii() and port.isdigit() else -1
    if not (colon and _is_host(host, bracketed) and 0 <= number <= 65535):
        raise ValueError(text)
    return Address(host, number)


def _is_host(text: str, v6: bool = False) -> bool:
    allowed = r"[0-9A-Fa-f:.%]+" if v6 else r"[0-9A-Za-z._-]+"
    return re.fullmatch(allowed, text) is not None


def _existing(path: Path, source: str) -> Path:
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such config file (given by {source})",
            "run `mpcserve init` to write one, or give another path",
        )
    return path


def _public_key(path: Path) -> bytes | None:
    """The certificate's public key; None where it is no certificate (`keys check` says so)."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        key = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
    except (OSError, ValueError):
        return None
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _clashes(values: Mapping[str, Any], path: str) -> Iterator[str]:
    servers = values["servers"]
    if servers["alice"] == servers["bob"] and servers["alice"].port:
        yield f"{path}: servers.bob: expected another address than alice's, got {servers['bob']}"


# --- the schema: one line a key -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Key:
    """A leaf: how its text is read, what that expects, its default, or an example if required."""

    read: Callable[[str], Any]
    expected: str
    default: Any = None
    example: str | None = None


_Schema: TypeAlias = Mapping[str, "_Key | _Schema"]


def _number(kind: type[int] | type[float], low: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not low <= value < 1e12:
            raise ValueError(text)
        return value

    return read


def _one_of(choices: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(text)
        return text.lower()

    return read


def _word(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def _host(text: str) -> str:
    if not (_is_host(text) or _is_host(text, v6=True)):
        raise ValueError(text)
    return text


def _count(default: int, low: int) -> _Key:
    return _Key(_number(int, low), f"a whole number of at least {low}", default)


def _seconds(default: float) -> _Key:
    return _Key(_number(float, 1e-3), "a positive number of seconds", default)


_ADDRESS = "host:port"
_SCHEMA: _Schema = {
    "servers": {
        "alice": _Key(parse_address, _ADDRESS, example="127.0.0.1:7701"),
        "bob": _Key(parse_address, _ADDRESS, example="127.0.0.1:7702"),
        "carol": _Key(_host, "a host name (carol does not listen)", "localhost"),
    },
    "keys": _Key(_word, "a directory", "keys"),
    "state": _Key(_word, "a directory", "state"),
    "pool": {
        "depth": _count(Pool().depth, 0),
        "max_bytes": _Key(parse_size, "a size such as 2 GB or 512 MiB", Pool().max_bytes),
    },
    "deadlines": {
        name: _seconds(getattr(Deadlines(), name))
        for name in ("connect", "handshake", "round", "request", "drain")
    },
    "limits": {
        "requests": _count(Limits().requests, 1),
        "queue": _count(Limits().queue, 0),
        "together": _count(Limits().together, 1),
        "threads": _count(Limits().threads, 0),
    },
    "log_level": _Key(_one_of(LOG_LEVELS), f"one of {', '.join(LOG_LEVELS)}", "info"),
    "model": _Key(_word, "a model name", None),
}


class _Reader:
    """Walks a YAML node tree along a schema and collects every problem."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[str] = []

    def mapping(self, node: yaml.Node | None, schema: _Schema, path: str) -> dict[str, Any]:
        """Values of all keys of `schema`, defaults where absent."""
        given = self._children(node, schema, path)
        return {
            name: self._value(given.get(name), key, f"{path}{name}", node)
            for name, key in schema.items()
        }

    def _children(self, node: yaml.Node | None, schema: _Schema, path: str) -> dict[str, yaml.Node]:
        if node is None or _is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            keys = ", ".join(schema)
            self._say(node, path.rstrip(".") or "(top level)", f"keys {keys}", _got(node))
            return {}
        children: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else _got(key)
            if name not in schema:
                self._unknown(key, f"{path}{name}", name, schema)
            elif name in children:
                self.problems.append(f"{self._at(key)}: {path}{name}: given twice")
            else:
                children[name] = value
        return children

    def _value(
        self, node: yaml.Node | None, key: _Key | _Schema, path: str, parent: yaml.Node | None
    ) -> Any:
        if not isinstance(key, _Key):
            return self.mapping(node, key, f"{path}.")
        if node is None or (_is_null(node) and key.example is None):
            if key.example is not None:
                self._missing(parent, path, key)
            return key.default
        if not isinstance(node, yaml.ScalarNode):
            self._say(node, path, key.expected, _got(node))
            return key.default
        try:
            return key.read(node.value)
        except (ValueError, OverflowError):
            self._say(node, path, key.expected, _got(node))
            return key.default

    def _missing(self, parent: yaml.Node | None, path: str, key: _Key) -> None:
        section, _, name = path.rpartition(".")
        where = self._at(parent) if parent is not None else self.file
        self.problems.append(
            f'{where}: {path}: missing, expected {key.expected}; add "{name}: {key.example}" '
            f'under "{section}:"'
        )

    def _unknown(self, key: yaml.Node, path: str, name: str, schema: _Schema) -> None:
        close = difflib.get_close_matches(name, list(schema), 1, 0.5)
        advice = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(schema)}"
        self.problems.append(f"{self._at(key)}: {path}: unknown key; {advice}")

    def _say(self, node: yaml.Node, path: str, expected: str, got: str) -> None:
        self.problems.append(f"{self._at(node)}: {path}: expected {expected}, got {got}")

    def _at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _got(node: yaml.Node) -> str:
    kind: Literal["a list", "a mapping"] = (
        "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    )
    return repr(node.value) if isinstance(node, yaml.ScalarNode) else kind
