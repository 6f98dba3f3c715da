"""The config: what is accepted, and how every mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpcserve.config import (
    Address,
    Config,
    Servers,
    find_config,
    load_config,
    parse_address,
    parse_config,
    parse_size,
)
from mpcserve.errors import ConfigError
from mpcserve.serving import keys

SERVERS = "servers: {alice: 10.0.0.1:7701, bob: 10.0.0.2:7702}\n"


def parse(text: str) -> Config:
    return parse_config(text, Path("/somewhere/mpcserve.yaml"))


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert caught.value.hint
    return caught.value.message.splitlines()


def test_two_addresses_are_a_complete_config() -> None:
    config = parse(SERVERS)
    assert config == Config(
        servers=Servers(Address("10.0.0.1", 7701), Address("10.0.0.2", 7702), "localhost"),
        keys=Path("/somewhere/keys"),
        state=Path("/somewhere/state"),
        path=Path("/somewhere/mpcserve.yaml"),
    )


def test_the_local_example_shows_every_default() -> None:
    example = Path(__file__).parent.parent / "configs" / "local.yaml"
    text = example.read_text()
    shown, least = parse(text), parse("servers: {alice: 127.0.0.1:7701, bob: 127.0.0.1:7702}")
    assert shown == least
    for name in ("servers", "keys", "state", "pool", "deadlines", "limits", "log_level", "model"):
        assert f"{name}:" in text


def test_every_key_is_read() -> None:
    config = parse(
        "servers: {alice: 'a.example.org:1', bob: '[::1]:2', carol: c.example.org}\n"
        "keys: /etc/mpcserve\nstate: ../state\n"
        "pool: {depth: 5, max_bytes: 1.5 GiB}\n"
        "deadlines: {connect: 1, handshake: 2, round: 3, request: 4.5, drain: 5}\n"
        "limits: {requests: 7, queue: 0}\nlog_level: DEBUG\nmodel: mnist\n"
    )
    assert config.servers.bob == Address("::1", 2)
    assert str(config.servers.bob) == "[::1]:2"
    assert config.servers.carol == "c.example.org"
    assert config.keys == Path("/etc/mpcserve")
    assert config.state == Path("/somewhere/../state")
    assert (config.pool.depth, config.pool.max_bytes) == (5, 3 * 2**29)
    assert config.deadlines.request == 4.5
    assert (config.limits.requests, config.limits.queue) == (7, 0)
    assert (config.log_level, config.model) == ("debug", "mnist")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("2 GB", 2 * 10**9), ("512MiB", 2**29), (" 1.5 kb ", 1500)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2 parsecs", "1e3", "2 G B"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:x", "host:65536", "a b:1", "::1:2"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


def test_all_problems_are_reported_at_once_with_their_lines() -> None:
    lines = problems(
        "servers:\n"
        "  alice: nowhere\n"
        "pool:\n"
        "  depht: 3\n"
        "  max_bytes: much\n"
        "limits: [1]\n"
        "colour: red\n"
        "deadlines: {round: -1, request: soon}\n"
    )
    assert lines == [
        "/somewhere/mpcserve.yaml:7: colour: unknown key; expected one of servers, keys, state, "
        "pool, deadlines, limits, log_level, model",
        "/somewhere/mpcserve.yaml:2: servers.alice: expected host:port, got 'nowhere'",
        "/somewhere/mpcserve.yaml:2: servers.bob: missing, expected host:port; "
        'add "bob: 127.0.0.1:7702" under "servers:"',
        "/somewhere/mpcserve.yaml:4: pool.depht: unknown key; did you mean depth?",
        "/somewhere/mpcserve.yaml:5: pool.max_bytes: expected a size such as 2 GB or 512 MiB, "
        "got 'much'",
        "/somewhere/mpcserve.yaml:8: deadlines.round: expected a positive number of seconds, "
        "got '-1'",
        "/somewhere/mpcserve.yaml:8: deadlines.request: expected a positive number of seconds, "
        "got 'soon'",
        "/somewhere/mpcserve.yaml:6: limits: expected keys requests, queue, together, threads, "
        "got a list",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "servers:\n", "keys: keys\n"])
def test_missing_servers_say_what_to_add(text: str) -> None:
    lines = problems(text)
    assert [line.split(": ")[1] for line in lines] == ["servers.alice", "servers.bob"]
    assert all(', expected host:port; add "' in line for line in lines)


def test_a_list_is_no_config() -> None:
    assert "expected keys servers" in problems("- 1\n- 2\n")[0]


def test_a_key_given_twice_is_refused() -> None:
    assert problems(SERVERS + "keys: a\nkeys: b\n") == [
        "/somewhere/mpcserve.yaml:3: keys: given twice"
    ]


def test_one_address_for_two_servers_is_refused() -> None:
    (line,) = problems("servers: {alice: h:7, bob: h:7}")
    assert "servers.bob: expected another address than alice's, got h:7" in line


@pytest.mark.parametrize("text", ["servers: [", "a: b: c", "\tx: 1", "x: 'open", "\x00"])
def test_broken_yaml_is_named_as_such(text: str) -> None:
    (line,) = problems(text)
    assert ": not YAML: " in line


def test_no_value_ever_runs_as_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = SERVERS + f"model: !!python/object/apply:os.mkdir ['{made}']\n"
    assert "model: expected a model name, got a list" in problems(text)[0]
    assert not made.exists()


def test_a_file_is_found_by_option_then_environment_then_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MPCSERVE_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="no config: no --config"):
        find_config()
    (tmp_path / "configs").mkdir()
    for name in ("configs/local.yaml", "mpcserve.yaml", "environment.yaml", "option.yaml"):
        (tmp_path / name).write_text(SERVERS)
    assert find_config() == Path("mpcserve.yaml")
    (tmp_path / "mpcserve.yaml").unlink()
    assert find_config() == Path("configs/local.yaml")
    monkeypatch.setenv("MPCSERVE_CONFIG", "environment.yaml")
    assert find_config() == Path("environment.yaml")
    assert find_config("option.yaml") == Path("option.yaml")


@pytest.mark.parametrize("given_by", ["--config", "$MPCSERVE_CONFIG"])
def test_a_missing_file_names_who_asked_for_it(
    given_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPCSERVE_CONFIG", "/nowhere.yaml")
    with pytest.raises(ConfigError) as caught:
        find_config("/nowhere.yaml" if given_by == "--config" else None)
    assert "/nowhere.yaml" in str(caught.value)
    assert given_by in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", None])
def test_an_unreadable_file_is_an_error(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mpcserve.yaml"
    path.write_bytes(data) if data is not None else path.mkdir()
    with pytest.raises(ConfigError):
        load_config(path)


@pytest.mark.parametrize("other", ["bob", "carol"])
def test_two_servers_with_one_certificate_are_refused(other: str, tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    keys.init_keys(directory)
    for role in ("alice", "bob", "carol"):
        keys.issue(directory, role)
    path = tmp_path / "mpcserve.yaml"
    path.write_text(SERVERS)
    assert load_config(path).keys == directory
    (directory / f"{other}.crt").write_bytes((directory / "alice.crt").read_bytes())
    with pytest.raises(ConfigError, match="two server roles must not be one party"):
        load_config(path)
