"""What each party receives is uniform, whatever the inputs; its shape depends on the plan alone."""

from __future__ import annotations

import numpy as np
import pytest

from mpcserve import randomness
from mpcserve.plan.plan import Plan
from mpcserve.protocol import Dealer, ServerProgram, Together, Transcript
from mpcserve.protocol.parties import Mask
from tests.plans import PlanWriter, even_chunks

RUNS = 1000
VIEWS = {
    "alice": ("owner->alice", "client->alice", "bob->alice"),
    "bob": ("owner->bob", "client->bob", "alice->bob", "carol->bob"),
    "alice's word to the data owner": ("alice->client",),
    "bob's word to the data owner": ("bob->client",),
}


def every_primitive() -> Plan:
    """Products by a weight and of secrets, signs of both kinds, select, extend, tally, a bit.

    Each is opened; a product, a tally, a select and a bit are told the data owner unopened as well.
    """
    p = PlanWriter()
    x = p.input((8, 4), 48, bound=20)
    w, d = p.weight((4, 8), 48, bound=20), p.weight((8,), 48, bound=30)
    z = p.emit("matmul", [x, w, d], width=36, frac_bits=-8, bound=35, ring=48, truncate=8)
    bit = p.sign(z, 36, even_chunks(36, 5), [3, 2, 2])
    y = p.emit("select", [bit, z], width=44, bound=35, reads=36, when=0, nonnegative=True)
    narrow = p.emit("shift", [y], width=12, frac_bits=-8, bound=10, bits=30)
    wide = p.emit("extend", [narrow], width=32, bound=10, reads=12)
    low = p.sign(narrow, 12, even_chunks(12, 5), [3])
    part = p.emit("select", [low, narrow], width=32, bound=11, reads=12, when=1, nonnegative=False)
    out = p.emit("mul", [wide, part], width=30, frac_bits=-16, bound=21, ring=32, truncate=0)
    count = p.emit("tally", [bit], width=20, bound=10, values=[1] * 8)
    told = [
        p.emit("mul", [wide, part], width=30, frac_bits=-16, bound=21, ring=32, truncate=0),
        p.emit("tally", [bit], width=20, bound=10, values=[1] * 8),
        p.emit("select", [low, narrow], width=32, bound=11, reads=12, when=0, nonnegative=False),
        p.emit("all", [low, bit], width=1, when=[1, 0]),
        p.emit("rectify", [narrow], width=32, bound=11, chunks=[4, 4, 3]),
    ]
    relu = p.emit("rectify", [z], width=44, bound=35, chunks=[7, 7, 7, 7, 7])
    read = [
        p.emit("offset", [relu], width=44, frac_bits=-8, bound=36, value=3),
        p.emit("offset", [out], width=30, frac_bits=-16, bound=21, value=3),
        p.emit("offset", [count], width=20, bound=10, value=3),
    ]
    plan = p.done(*read, low, *told)
    assert set(plan.unopened) == set(told)
    return plan


def inputs_of(kind: str, rng: np.random.Generator, bound: int) -> tuple[np.ndarray, ...]:
    shapes = ((8, 4), (4, 8), (8,))
    if kind == "zeros":
        return tuple(np.zeros(s, np.int64) for s in shapes)
    if kind == "equal":
        return tuple(np.full(s, bound - 1) for s in shapes)
    return tuple(rng.integers(-bound, bound, s) for s in shapes)


def transcript_of(plan: Plan, x: np.ndarray, w: np.ndarray, d: np.ndarray) -> Transcript:
    transcript = Transcript()
    names = list(plan.weights)
    together = Together(plan, {names[0]: w, names[1]: d}, transcript)
    upload: list[bytes] = []
    alice, bob, _ = together.prepare()
    from mpcserve.protocol import drive, share_input

    upload.append(
        b"".join(share_input(plan, 0, x.astype(float), alice.input_seeds[0], bob.input_seeds[0]))
    )
    transcript.add("client->alice", upload[0])
    transcript.add("client->bob", upload[0])
    _, _, messages = drive(
        together.alice.evaluate(alice, upload), together.bob.evaluate(bob, upload), transcript
    )
    for side, message in zip(("alice", "bob"), messages, strict=True):
        transcript.add(f"{side}->client", message)
    return transcript


def views_of(transcripts: list[Transcript], party: str) -> np.ndarray:
    """Every bit that a party received, one row a run, and the bits of Δ it can compute."""
    rows = []
    for t in transcripts:
        sent = b"".join(m for link, m in t.messages if link == "alice->bob")
        back = b"".join(m for link, m in t.messages if link == "bob->alice")
        opened = np.frombuffer(sent, np.uint8) ^ np.frombuffer(back, np.uint8)
        got = b"".join(m for link, m in t.messages if link in VIEWS[party])
        rows.append(np.concatenate([np.frombuffer(got, np.uint8), opened]))
    return np.unpackbits(np.stack(rows), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zeros", "equal", "random"])
def test_every_received_bit_is_uniform_and_uncorrelated_over_a_thousand_runs(kind: str) -> None:
    rng = np.random.default_rng([3, len(kind)])
    plan = every_primitive()
    values = inputs_of(kind, rng, 1 << 11)
    transcripts = [transcript_of(plan, *values) for _ in range(RUNS)]
    for party in VIEWS:
        bits = views_of(transcripts, party).astype(np.float32) * 2 - 1
        columns = bits.shape[1]
        z = np.abs(bits.sum(axis=0)) / np.sqrt(RUNS)
        # a fair bit exceeds 6.5 sigma once in 10^10; there are about 2·10^4 columns
        assert z.max() < 6.5, f"{party}: bit {int(z.argmax())} of {columns} is biased"
        pick = np.sort(rng.choice(columns, min(columns, 6000), replace=False))
        chosen = bits[:, pick]
        pairs = np.abs(chosen.T @ chosen) / np.sqrt(RUNS)
        np.fill_diagonal(pairs, 0)
        worst = divmod(int(pairs.argmax()), len(pick))
        # two values under one mask would agree in a bit in every run: 31 sigma
        assert pairs.max() < 8, f"{party}: bits {pick[list(worst)]} are related"


def test_lengths_and_order_of_messages_do_not_depend_on_inputs_or_weights() -> None:
    rng = np.random.default_rng(5)
    plan = every_primitive()
    shapes = {
        tuple((link, len(m)) for link, m in transcript_of(plan, *inputs_of(k, rng, b)).messages)
        for k in ("zeros", "equal", "random")
        for b in (2, 1 << 11)
    }
    assert len(shapes) == 1


def test_no_stream_is_opened_twice_over_bundles_and_restarts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = every_primitive()
    keys = [bytes([k]) * 32 for k in (1, 2, 3)]
    weights = {n: np.zeros(plan.value(i).shape, np.uint64) for n, i in plan.weights.items()}
    opened: list[bytes] = []
    original = randomness.Stream.__init__

    def watch(self: randomness.Stream, seed: bytes) -> None:
        opened.append(seed)
        original(self, seed)

    monkeypatch.setattr(randomness.Stream, "__init__", watch)
    for make in (
        lambda: list_deal(Dealer(plan, keys[0], keys[1])),
        lambda: list_prepare(ServerProgram(plan, "alice", keys[0], keys[2], weights.items())),
    ):
        opened.clear()
        make()
        make()
        static = len(plan.weights) * (2 if opened.count(opened[0]) else 1)
        repeats = len(opened) - len(set(opened))
        # only the weights' masks, fixed for the deployment, are expanded again by a restart
        assert repeats <= static
        bundles = [s for s in opened if opened.count(s) == 1]
        assert len(bundles) == len(opened) - 2 * repeats


def list_deal(dealer: Dealer) -> None:
    import secrets

    for _ in range(3):
        for _ in dealer.deal(secrets.token_bytes(16)):
            pass


def list_prepare(program: ServerProgram) -> None:
    import secrets

    for _ in range(3):
        program.prepare(secrets.token_bytes(16), None)


def test_reading_a_stream_never_returns_a_position_twice() -> None:
    whole = randomness.Stream(bytes(32)).words(1000)
    stream = randomness.Stream(bytes(32))
    parts = [stream.words(n) for n in (1, 2, 3, 394, 600)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert len(set(whole.tolist())) == 1000


def test_contexts_of_derived_keys_never_collide() -> None:
    key = bytes(range(32))
    contexts = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc",),
        (b"abc", ""),
        ("", "abc"),
        (1, 2),
        (12,),
        ("1", "2", ""),
    ]
    assert len({randomness.derive(key, *c) for c in contexts}) == len(contexts)


def test_nothing_secret_is_shown_by_repr() -> None:
    plan = every_primitive()
    names = list(plan.weights)
    together = Together(plan, {names[0]: np.ones((4, 8), np.int64), names[1]: np.ones(8, np.int64)})
    alice, bob, _ = together.prepare()
    mask = Mask(np.array([123456789], np.uint64), np.array([987654321], np.uint64))
    shown = " ".join(
        map(repr, (mask, alice, bob, together.alice, together.dealer, randomness.Stream(bytes(32))))
    )
    assert "123456789" not in shown
    assert "array" not in shown
    assert "object at" not in shown


def test_a_bundle_is_spent_by_its_first_use() -> None:
    from mpcserve.errors import Refused

    p = PlanWriter()
    x = p.input((4,), 20, bound=10)
    together = Together(p.done(p.emit("offset", [x], width=20, bound=11, value=1)), {})
    alice, _, _ = together.prepare()
    alice.spend()
    with pytest.raises(Refused, match="spent"):
        alice.spend()
