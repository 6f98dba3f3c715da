"""The kernels on ARM: compiled for it by LLVM, and run by an emulated processor in this process.

`python -m tests.aarch64 tests/test_kernels_linear.py …` is pytest with every kernel so. Memory has
the same addresses for the emulated processor as for this process, so kernels read and write NumPy's
arrays where they lie; where they call C, this process calls it for them.

Integers, booleans, float64, arrays and tuples of integers are what kernels take and return. The
calling conventions are numba's (a place for the result, a place for an exception, then an array as
its seven or more fields) over those of the ARM 64-bit ABI (eight registers, then the stack).
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numpy as np
import pytest
import unicorn as emulator
from numba.extending import typeof_impl
from unicorn import arm64_const as arm

TRIPLE, PROCESSOR = "aarch64-unknown-linux-gnu", "neoverse-n1"
"""NEON, dot products and 128-bit registers: Graviton 2, Ampere Altra, and much like Apple's M1."""

BLOCK = 1 << 30
"""Bytes of address space that the emulated processor is given at once."""
STACK = 8 << 20
RETURNED = 0x1000
"""Where a kernel returns to; nothing is there."""

_registers = [arm.UC_ARM64_REG_X0 + n for n in range(8)]
_reals = [arm.UC_ARM64_REG_D0 + n for n in range(8)]


def _is_machine_code(address: int) -> bool:
    """Is it of LLVM's compiling? What a library has for this process's own processor is not."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            place, rights, *_, file = line.rstrip("\n").split(" ", 5)
            first, end = (int(at, 16) for at in place.split("-"))
            if first <= address < end:
                return "x" in rights and not file.strip()
    return False


class Processor:
    """One emulated ARM processor that sees this process's memory."""

    def __init__(self) -> None:
        self._its = emulator.Uc(emulator.UC_ARCH_ARM64, emulator.UC_MODE_ARM)
        self._its.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        self._its.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # lanes and floats allowed
        self._its.hook_add(emulator.UC_HOOK_MEM_UNMAPPED, self._missing)
        self._blocks: set[int] = set()
        self._stack = np.zeros(STACK, np.uint8)
        self._lock = threading.Lock()
        self.calls = 0

    def call(self, address: int, words: list[int], reals: list[float]) -> int:
        """The word that the function there returns."""
        with self._lock:
            self.calls += 1
            its, top = self._its, (self._stack.ctypes.data + STACK) // 16 * 16
            above = np.array(words[8:], np.uint64)
            bottom = (top - above.nbytes) // 16 * 16
            ctypes.memmove(bottom, above.ctypes.data, above.nbytes)
            for register, word in zip(_registers, words, strict=False):
                its.reg_write(register, word)
            for register, bits in zip(_reals, np.array(reals).view(np.uint64), strict=False):
                its.reg_write(register, int(bits))
            its.reg_write(arm.UC_ARM64_REG_SP, bottom)
            its.reg_write(arm.UC_ARM64_REG_LR, RETURNED)
            while address != RETURNED:
                try:
                    its.emu_start(address, RETURNED)
                    break
                except emulator.UcError as error:
                    if error.errno not in (
                        emulator.UC_ERR_FETCH_PROT,
                        emulator.UC_ERR_FETCH_UNMAPPED,
                    ):
                        raise
                    address = self._elsewhere(its.reg_read(arm.UC_ARM64_REG_PC))
            return int(its.reg_read(arm.UC_ARM64_REG_X0))

    def _elsewhere(self, address: int) -> int:
        """Where to go on after a jump out of the pages that may be executed so far."""
        if _is_machine_code(address):
            self._its.mem_protect(address & ~0xFFF, 0x1000, emulator.UC_PROT_ALL)
            return address
        self._call_native(address)
        return int(self._its.reg_read(arm.UC_ARM64_REG_LR))

    def _call_native(self, address: int) -> None:
        """A function of C with up to eight words, which this process's processor computes."""
        function = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * 8)(address)
        result = function(*(self._its.reg_read(register) for register in _registers))
        self._its.reg_write(arm.UC_ARM64_REG_X0, result)

    def _missing(self, its: Any, access: int, address: int, *_: Any) -> bool:
        """Give the processor a block; what is code in it is told when a jump there has failed."""
        block = address // BLOCK * BLOCK
        if block in self._blocks or address < BLOCK:
            return False
        rights = emulator.UC_PROT_READ | emulator.UC_PROT_WRITE
        its.mem_map_ptr(block, BLOCK, rights, ctypes.c_void_p(block))
        self._blocks.add(block)
        return bool(access != emulator.UC_MEM_FETCH_UNMAPPED)


class Kernel:
    """A compiled kernel: a call of it is a call on the emulated processor."""

    def __init__(self, dispatcher: Any, processor: Processor) -> None:
        self.dispatcher, self._processor = dispatcher, processor
        self.versions = list(dispatcher.overloads.values())
        self._name = dispatcher.py_func.__qualname__

    def __call__(self, *args: Any) -> Any:
        version = next((v for v in self.versions if _fit(v.signature.args, args)), None)
        if version is None:
            raise TypeError(f"no version of {self._name} takes {[numba.typeof(a) for a in args]}")
        address = version.library.get_pointer_to_function(version.fndesc.llvm_func_name)
        result = np.zeros(64, np.uint64)
        words, reals = [result.ctypes.data, result[-1:].ctypes.data], []
        for kind, arg in zip(version.signature.args, args, strict=True):
            if kind == numba.types.float64:
                reals.append(float(arg))
            else:
                words.extend(_words(kind, arg))
        status = self._processor.call(address, words, reals) & 0xFFFFFFFF
        if status:
            raise RuntimeError(f"{self._name} returned with status {status}")
        returns = version.signature.return_type
        if isinstance(returns, numba.types.UniTuple):
            return tuple(int(word) for word in result[: returns.count].view(np.int64))
        if returns in (numba.types.none, numba.types.void):
            return None
        return _returned(returns, result)


@typeof_impl.register(Kernel)
def _of_numba(kernel: Kernel, _: Any) -> Any:
    """For a kernel that another one calls."""
    return numba.types.Dispatcher(kernel.dispatcher)


def _returned(kind: Any, result: np.ndarray) -> Any:
    if kind == numba.types.boolean:
        return bool(result.view(np.uint8)[0])
    return result.view(np.dtype(str(kind)))[0].item()


def _fit(kinds: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    return len(kinds) == len(args) and all(map(_fits, kinds, args))


def _fits(kind: Any, arg: Any) -> bool:
    if isinstance(kind, numba.types.Array):
        return (
            isinstance(arg, np.ndarray)
            and (str(kind.dtype), kind.ndim) == (arg.dtype.name, arg.ndim)
            and arg.flags.c_contiguous
            and (arg.flags.writeable or not kind.mutable)
        )
    if isinstance(kind, numba.types.UniTuple):
        return isinstance(arg, tuple) and len(arg) == kind.count
    return not isinstance(arg, np.ndarray | tuple)


def _words(kind: Any, arg: Any) -> Iterator[int]:
    """The words that numba passes an argument in."""
    if isinstance(kind, numba.types.Array):
        yield from (0, 0, arg.size, arg.itemsize, arg.ctypes.data, *arg.shape, *arg.strides)
    elif isinstance(kind, numba.types.UniTuple):
        for item in arg:
            yield int(item) & (1 << 64) - 1
    else:
        yield int(arg) & (1 << 64) - 1


def compile_kernels() -> Processor:
    """From here on numba compiles for ARM, and `kernel` makes what the processor runs.

    To be called before anything of the package is imported.
    """
    assert "mpcserve.kernels" not in sys.modules, "its kernels are compiled for this machine"
    os.environ |= {"NUMBA_CPU_NAME": PROCESSOR, "NUMBA_CPU_FEATURES": ""}
    numba.config.reload_config()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    for module in (llvm, llvm.targets):
        module.get_process_triple = module.get_default_triple = lambda: TRIPLE

    from mpcserve.kernels import jit

    processor, compiled = Processor(), jit.kernel

    def kernel(*signatures: str) -> Callable[[Any], Any]:
        return lambda function: Kernel(compiled(*signatures)(function), processor)

    jit.kernel = kernel
    return processor


if __name__ == "__main__":
    processor = compile_kernels()
    failed = pytest.main(sys.argv[1:])
    print(f"{processor.calls:,} calls of kernels on {PROCESSOR}")
    sys.exit(failed)
