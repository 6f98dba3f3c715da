"""LSTM, GRU and RNN: a loop over the public length, written out.

The input of a step and the state before it are one operand, of one product for all gates: a step
opens its gates once, and needs no more of the layer below than what that has made by then, so that
stacked layers advance together. Where inputs are so much larger than states that one scale would
not do for both, the inputs of all steps are multiplied before the loop. Directions are independent,
so that they share their rounds. Steps beyond a sequence's own length are not computed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpcserve.compiler import functions as f
from mpcserve.compiler import smooth
from mpcserve.compiler.builder import Builder, Operand, Ref
from mpcserve.compiler.functions import aligned, ints_of, secret
from mpcserve.compiler.ops import activation as act
from mpcserve.compiler.ops.elementwise import leaky_relu
from mpcserve.compiler.problems import Unsupported
from mpcserve.compiler.registry import lowers

Function = Callable[[Builder, Ref], Ref]


MUCH_LARGER = 16.0
"""Inputs up to here share a scale with states, which lie within ±1 as a rule."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One direction. Shapes: joint: (inputs + hidden) × gates·hidden, b: gates·hidden.

    `functions`: its activations in ONNX's order.
    """

    joint: Ref
    input_bias: Operand | None
    state_bias: Operand | None
    peephole: Operand | None
    functions: tuple[Function, ...]
    clip: float | None
    hidden: int

    def w(self, b: Builder) -> Ref:
        """Weights of the inputs."""
        return b.slice(self.joint, 0, 0, self.joint.shape[0] - self.hidden)

    def r(self, b: Builder) -> Ref:
        """Weights of the state."""
        return b.slice(self.joint, 0, self.joint.shape[0] - self.hidden, self.joint.shape[0])

    def bounded(self, b: Builder, x: Ref) -> Ref:
        """x as an activation gets it."""
        return x if self.clip is None else f.clip(b, x, -self.clip, self.clip)

    def applied(self, b: Builder, which: int, x: Ref) -> Ref:
        """An activation of x."""
        return self.functions[which](b, self.bounded(b, x))


States = tuple[Ref | None, ...]
"""What a cell hands on: h, and c of an LSTM; None stands for zeros. Shapes: rows × hidden."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of one step: as they are, or `projected` by w and biased. Shapes: rows × columns."""

    x: Ref
    projected: bool

    def gates(self, b: Builder, cell: Cell, h: Ref | None, start: int, stop: int) -> Ref:
        """Columns `start` … `stop` of x @ w + h @ r + bias."""
        if self.projected:
            mine = b.slice(self.x, 1, start, stop)
            if h is None:
                return mine
            return b.add(*aligned(b, mine, b.matmul(h, b.slice(cell.r(b), 1, start, stop))))
        if h is None:
            both, weights = self.x, cell.w(b)
        else:
            both, weights = b.concat(aligned(b, self.x, h), 1), cell.joint
        bias = None if cell.input_bias is None else _cut(b, cell.input_bias, start, stop)
        return _biased(b, both, b.slice(weights, 1, start, stop), bias)


Step = Callable[[Builder, Cell, Inputs, States], States]
"""(inputs, states) → states."""


@dataclass(frozen=True, slots=True)
class Network:
    """What LSTM, GRU and RNN have in common: their attributes and inputs as ONNX gives them."""

    gates: int
    usual: tuple[str, ...]
    step: Step
    direction: str
    activations: Sequence[str | bytes] | None
    alphas: Sequence[float] | None
    betas: Sequence[float] | None
    clip: float | None
    layout: int
    joint_bias: bool = True

    def run(
        self,
        b: Builder,
        x: Ref,
        w: Operand,
        r: Operand,
        bias: Operand | None,
        lengths: Operand | None,
        starts: Sequence[Operand | None],
        peepholes: Operand | None = None,
    ) -> tuple[Ref, ...]:
        """(Y, Y_h, Y_c of an LSTM)."""
        x = b.transpose(x, (1, 0, 2)) if self.layout else x
        time, batch = x.shape[:2]
        ends = [time] * batch if lengths is None else ints_of(lengths, "sequence_lens")
        results = []
        backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        for d, back in enumerate(backward[self.direction]):
            cell = self._cell(b, d, w, r, bias, peepholes)
            first = tuple(None if s is None else self._start(b, s, d) for s in starts)
            results.append(_unrolled(b, cell, self.step, x, ends, first, back))
        whole, *last = (
            b.concat(aligned(b, *(_at(b, t, axis) for t in parts)), axis)
            for axis, parts in zip((1, *[0] * len(starts)), zip(*results, strict=True), strict=True)
        )
        if self.layout:
            whole = b.transpose(whole, (2, 0, 1, 3))
            last = [b.transpose(t, (1, 0, 2)) for t in last]
        return whole, *last

    def _start(self, b: Builder, x: Operand, d: int) -> Ref:
        return _part(b, x, d, 1 if self.layout else 0)

    def _cell(
        self,
        b: Builder,
        d: int,
        w: Operand,
        r: Operand,
        bias: Operand | None,
        peepholes: Operand | None,
    ) -> Cell:
        hidden = int(r.shape[-1])
        size = self.gates * hidden
        both = None if bias is None else _row(b, bias, d)
        before = None if both is None else _cut(b, both, 0, size)
        after = None if both is None else _cut(b, both, size)
        if before is not None and after is not None:
            # What a reset gate multiplies keeps the bias of its state.
            joint = size - (0 if self.joint_bias else hidden)
            summed = _sum(b, _cut(b, before, 0, joint), _cut(b, after, 0, joint))
            rest = [_cut(b, t, joint) for t in (before, after)] if joint < size else []
            before = _joined(b, [summed, *rest[:1]])
            after = rest[1] if rest else None
        return Cell(
            _joint(b, w, r, d),
            before,
            after,
            None if peepholes is None else _row(b, peepholes, d),
            tuple(self._functions(d)),
            self.clip,
            hidden,
        )

    def _functions(self, d: int) -> Iterable[Function]:
        count = len(self.usual)
        given = self.activations or self.usual * 2
        names = [n.decode() if isinstance(n, bytes) else n for n in given]
        alphas, betas = iter(self.alphas or ()), iter(self.betas or ())
        found = []
        for name in names:
            kind = name.lower()
            if kind not in _DEFAULTS:
                raise Unsupported(f"activation {name!r} is not supported")
            alpha, beta = _DEFAULTS[kind]
            alpha = None if alpha is None else next(alphas, alpha)
            beta = None if beta is None else next(betas, beta)
            found.append(_function(kind, alpha, beta))
        return found[d * count : (d + 1) * count]


_DEFAULTS: dict[str, tuple[float | None, float | None]] = {
    "relu": (None, None),
    "tanh": (None, None),
    "sigmoid": (None, None),
    "softsign": (None, None),
    "softplus": (None, None),
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01, None),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0, None),
}
"""alpha and beta of the activations that have them."""


def _function(kind: str, alpha: float | None, beta: float | None) -> Function:
    a, c = alpha or 0.0, beta or 0.0
    table: dict[str, Function] = {
        "relu": f.relu,
        "tanh": smooth.tanh,
        "sigmoid": smooth.sigmoid,
        "softsign": act.softsign,
        "softplus": smooth.softplus,
        "affine": lambda b, x: b.offset(f.times(b, x, a), c),
        "leakyrelu": lambda b, x: leaky_relu(b, x, alpha=a),
        "scaledtanh": lambda b, x: f.times(b, smooth.tanh(b, f.times(b, x, c)), a),
        "hardsigmoid": lambda b, x: act.hard_sigmoid(b, x, alpha=a, beta=c),
        "elu": lambda b, x: smooth.elu(b, x, a),
    }
    return table[kind]


@lowers("LSTM", since=7)
def lstm(
    b: Builder,
    x: Operand,
    w: Operand,
    r: Operand,
    bias: Operand | None = None,
    lengths: Operand | None = None,
    start_h: Operand | None = None,
    start_c: Operand | None = None,
    peepholes: Operand | None = None,
    /,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Ref, ...]:
    """Long short-term memory: 5 to 8 rounds per time step, however many gates and directions."""
    usual = ("Sigmoid", "Tanh", "Tanh")
    about = (direction, activations, activation_alpha, activation_beta, clip, layout)
    step = _coupled_lstm_step if input_forget else _lstm_step
    network = Network(4, usual, step, *about)
    return network.run(b, secret(b, x), w, r, bias, lengths, (start_h, start_c), peepholes)


@lowers("GRU", since=7)
def gru(
    b: Builder,
    x: Operand,
    w: Operand,
    r: Operand,
    bias: Operand | None = None,
    lengths: Operand | None = None,
    start_h: Operand | None = None,
    /,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Ref, ...]:
    """Gated recurrent units: 5 or 6 rounds per time step inside the activations' ranges."""
    about = (direction, activations, activation_alpha, activation_beta, clip, layout)
    step = _linear_gru_step if linear_before_reset else _gru_step
    network = Network(3, ("Sigmoid", "Tanh"), step, *about, joint_bias=not linear_before_reset)
    return network.run(b, secret(b, x), w, r, bias, lengths, (start_h,))


@lowers("RNN", since=7)
def rnn(
    b: Builder,
    x: Operand,
    w: Operand,
    r: Operand,
    bias: Operand | None = None,
    lengths: Operand | None = None,
    start_h: Operand | None = None,
    /,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str | bytes] = (b"Tanh", b"Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Ref, ...]:
    """A layer with feedback: 2 rounds per time step inside the activation's range."""
    about = (direction, activations, activation_alpha, activation_beta, clip, layout)
    network = Network(1, ("Tanh",), _rnn_step, *about)
    return network.run(b, secret(b, x), w, r, bias, lengths, (start_h,))


def _unrolled(
    b: Builder, cell: Cell, step: Step, x: Ref, ends: list[int], start: States, back: bool
) -> tuple[Ref, ...]:
    """(all h: time × batch × hidden, last states: batch × hidden) of one direction."""
    time, batch = x.shape[:2]
    rows = b.reshape(x, (time * batch, x.shape[2]))
    apart = b.interval(x).magnitude > MUCH_LARGER
    if apart:
        rows = _biased(b, rows, cell.w(b), cell.input_bias)
    states, made, count = start, list[Ref](), 0
    where = np.full((time, batch), -1)
    for t in range(max(ends)):
        active = [k for k in range(batch) if t < ends[k]]
        at = [ends[k] - 1 - t if back else t for k in active]
        places = [s * batch + k for s, k in zip(at, active, strict=True)]
        inputs = Inputs(b.gather(rows, 0, places), apart)
        if len(active) < batch:
            new = step(b, cell, inputs, tuple(_some(b, s, active, cell, batch) for s in states))
            states = tuple(
                _updated(b, old, v, active, batch) for old, v in zip(states, new, strict=True)
            )
        else:
            new = states = step(b, cell, inputs, states)
        where[at, active] = count + np.arange(len(active))
        count += len(active)
        assert new[0] is not None
        made.append(new[0])
    every = b.concat(aligned(b, *made), 0)
    if (where < 0).any():
        every = b.pad(every, (1, 0), (0, 0))
        where = where + 1
    whole = b.reshape(b.gather(every, 0, where.ravel().tolist()), (time, batch, cell.hidden))
    return whole, *(_some(b, s, range(batch), cell, batch) for s in states)


def _zeros(b: Builder, rows: int, hidden: int) -> Ref:
    return b.expand(b.constant(np.zeros((1, 1)), b.frac_bits), (rows, hidden))


def _some(b: Builder, x: Ref | None, rows: Sequence[int], cell: Cell, batch: int) -> Ref:
    """Some rows of a state."""
    x = _zeros(b, batch, cell.hidden) if x is None else x
    return b.gather(x, 0, list(rows))


def _updated(b: Builder, old: Ref | None, new: Ref | None, rows: list[int], batch: int) -> Ref:
    """A state whose `rows` are new."""
    assert new is not None
    old = _zeros(b, batch, new.shape[1]) if old is None else old
    order = np.arange(batch)
    order[rows] = batch + np.arange(len(rows))
    return b.gather(b.concat(aligned(b, old, new), 0), 0, order.tolist())


# one time step


def _lstm_step(b: Builder, cell: Cell, x: Inputs, states: States) -> States:
    return _lstm(b, cell, x, states, False)


def _coupled_lstm_step(b: Builder, cell: Cell, x: Inputs, states: States) -> States:
    return _lstm(b, cell, x, states, True)


def _lstm(b: Builder, cell: Cell, x: Inputs, states: States, coupled: bool) -> States:
    """i, o, f, c̃ → c' = f·c + i·c̃, h' = o·tanh(c'); peepholes let c into i, f and c' into o."""
    h, c = states
    n = cell.hidden
    gates = x.gates(b, cell, h, 0, 4 * n)
    i, o, forget, new = (b.slice(gates, 1, k * n, (k + 1) * n) for k in range(4))
    peep = (
        [None] * 3
        if cell.peephole is None
        else [_cut(b, cell.peephole, k * n, k * n + n) for k in range(3)]
    )
    i = cell.applied(b, 0, _peeped(b, i, peep[0], c))
    if coupled:
        forget = b.offset(b.scale(i, -1), 1.0)
    else:
        forget = cell.applied(b, 0, _peeped(b, forget, peep[2], c))
    new = cell.applied(b, 1, new)
    c2 = b.mul(i, new)
    if c is not None:
        c2 = b.add(*aligned(b, c2, b.mul(forget, c)))
    o = cell.applied(b, 0, _peeped(b, o, peep[1], c2))
    return b.mul(o, cell.functions[2](b, c2)), c2


def _peeped(b: Builder, x: Ref, p: Operand | None, c: Ref | None) -> Ref:
    if p is None or c is None:
        return x
    return b.add(*aligned(b, x, b.mul(c, secret(b, p))))


def _gru_step(b: Builder, cell: Cell, x: Inputs, states: States) -> States:
    """z, r → h̃ = g(x + (r·h)@R) → h' = h̃ + z·(h − h̃)."""
    (h,), n = states, cell.hidden
    if h is None:
        both = x.gates(b, cell, None, 0, 3 * n)
        z = cell.applied(b, 0, b.slice(both, 1, 0, n))
        return _gru_mixed(b, cell, z, b.slice(both, 1, 2 * n, 3 * n), None)
    gates = cell.applied(b, 0, x.gates(b, cell, h, 0, 2 * n))
    z, reset = b.slice(gates, 1, 0, n), b.slice(gates, 1, n, 2 * n)
    return _gru_mixed(b, cell, z, x.gates(b, cell, b.mul(reset, h), 2 * n, 3 * n), h)


def _linear_gru_step(b: Builder, cell: Cell, x: Inputs, states: States) -> States:
    """z, r → h̃ = g(x + r·(h@R + bias)) → h' = h̃ + z·(h − h̃)."""
    (h,), n = states, cell.hidden
    if h is None and cell.state_bias is None:
        return _gru_step(b, cell, x, states)
    h = _zeros(b, x.x.shape[0], n) if h is None else h
    gates = cell.applied(b, 0, x.gates(b, cell, h, 0, 2 * n))
    z, reset = b.slice(gates, 1, 0, n), b.slice(gates, 1, n, 2 * n)
    fed = _biased(b, h, b.slice(cell.r(b), 1, 2 * n, 3 * n), cell.state_bias)
    new = aligned(b, x.gates(b, cell, None, 2 * n, 3 * n), b.mul(reset, fed))
    return _gru_mixed(b, cell, z, b.add(*new), h)


def _gru_mixed(b: Builder, cell: Cell, z: Ref, new: Ref, h: Ref | None) -> States:
    new = cell.applied(b, 1, new)
    if h is None:
        return (b.sub(new, b.mul(z, new)),)
    new, h = aligned(b, new, h)
    mixed = b.add(new, b.mul(z, b.sub(h, new), to=new.frac_bits))
    # A mixture lies between the two, wherever interval arithmetic would put it.
    one, two, slack = b.interval(new), b.interval(h), 4 * 2.0**-b.frac_bits
    return (b.within(mixed, min(one.least, two.least) - slack, max(one.most, two.most) + slack),)


def _rnn_step(b: Builder, cell: Cell, x: Inputs, states: States) -> States:
    return (cell.applied(b, 0, x.gates(b, cell, states[0], 0, cell.hidden)),)


# parts


def _biased(b: Builder, x: Ref, w: Ref, bias: Operand | None) -> Ref:
    if bias is None:
        return b.matmul(x, w)
    if isinstance(bias, Ref):
        return b.add(*aligned(b, b.matmul(x, w), bias))
    return b.matmul(x, w, b.weight(bias, x.frac_bits + w.frac_bits))


def _at(b: Builder, x: Ref, axis: int) -> Ref:
    """An axis of length one put in."""
    return b.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


def _part(b: Builder, x: Operand, d: int, axis: int = 0) -> Ref:
    """Entry d of an axis, which is dropped."""
    x = secret(b, x)
    part = b.slice(x, axis, d, d + 1)
    return b.reshape(part, (*x.shape[:axis], *x.shape[axis + 1 :]))


def _joint(b: Builder, w: Operand, r: Operand, d: int) -> Ref:
    """A direction's weights, inputs first: those of the inputs, below them those of the state."""
    if isinstance(w, Ref) or isinstance(r, Ref):
        parts = aligned(b, *(b.transpose(_part(b, x, d), (1, 0)) for x in (w, r)))
        return b.concat(parts, 0)
    return b.weight(np.concatenate([w[d].T, r[d].T]))


def _row(b: Builder, x: Operand, d: int) -> Operand:
    return _part(b, x, d) if isinstance(x, Ref) else x[d]


def _cut(b: Builder, x: Operand, start: int, stop: int | None = None) -> Operand:
    if isinstance(x, Ref):
        return b.slice(x, 0, start, x.shape[0] if stop is None else stop)
    return x[start:stop]


def _joined(b: Builder, parts: list[Operand]) -> Operand:
    """Along the only axis."""
    if len(parts) == 1:
        return parts[0]
    arrays = [p for p in parts if not isinstance(p, Ref)]
    return np.concatenate(arrays) if len(arrays) == len(parts) else b.concat(aligned(b, *parts), 0)


def _sum(b: Builder, x: Operand, y: Operand) -> Operand:
    if isinstance(x, Ref) or isinstance(y, Ref):
        return b.add(*aligned(b, x, y))
    return x + y
