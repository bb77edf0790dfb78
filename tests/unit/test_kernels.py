"Every GPU kernel against its plain form, on a CPU through Triton's interpreter, at sizes that are multiples of nothing."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saferlhf.hardware.kernels import attend_cache


def test_kernels_equal_their_plain_forms():
    env = os.environ | {'TRITON_INTERPRET': '1'}
    out = subprocess.run([sys.executable, Path(__file__).parents[1]/'gpu/gpu_kernels.py'], env=env, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.count(' ok') == 9, out.stdout + out.stderr


NARROW, WIDE, INDEX, SIZE = '*bf16', '*fp32', '*i64', 'i32'
CACHE = dict(k_cache=NARROW, v_cache=NARROW, cos=NARROW, sin=NARROW, L=SIZE, H=8, K=2, D=64, HALF=32)
COMPILED = [ # module, kernel, its arguments: types of what comes at run time, values of the rest
    ('kernels', '_add_norm', dict(x=NARROW, h=WIDE, w=NARROW, out=NARROW, y=NARROW, D=SIZE, step=SIZE, eps='fp32', PARTS=4, BLOCK=2048)),
    ('kernels', '_attend_cache', CACHE | dict(qkv=WIDE, pos=INDEX, out=NARROW, scale='fp32', step=SIZE, CAP=0., ROWS=16, BLOCK=64,
                                            PARTS=2)),
    ('kernels', '_rotate_append', CACHE | dict(qkv=NARROW, slot=INDEX, position=INDEX, turned=NARROW, HEADS=8, KEYS=2)),
    *[('products', '_product', dict(x=NARROW, w=NARROW, out=NARROW, M=SIZE, N=SIZE, K=SIZE, part=SIZE, up=SIZE, GATED=gated, SILU=True,
                                    ROWS=16, BN=64, BK=64, EVEN=not gated)) for gated in (False, True)],
    ('slots', '_record', dict(drawn=INDEX, logp=WIDE, raw=WIDE, tokens=INDEX, logps=WIDE, raws=WIDE, token=INDEX, t=INDEX, alive='*i1',
                              pos=INDEX, n=SIZE, T=SIZE, eos=SIZE, BLOCK=128))]


@pytest.mark.parametrize('early', (True, False))
def test_kernels_compile_for_a_gpu_that_is_not_here(early): # types that the interpreter does not look at
    from importlib import import_module
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    for module, name, given in COMPILED:
        kernel, given = getattr(import_module(f'saferlhf.hardware.{module}'), name), given | dict(EARLY=early)
        assert {*given} == {*kernel.arg_names}, name
        run_time = {k: x for k, x in given.items() if isinstance(x, str)}
        signature = {k: run_time.get(k, 'constexpr') for k in kernel.arg_names}
        source = ASTSource(kernel, signature, {k: x for k, x in given.items() if k not in run_time})
        text = triton.compile(source, GPUTarget('cuda', 90, 32), dict(num_warps=4, launch_pdl=early)).asm['ptx']
        assert ('griddepcontrol.wait' in text) == early and ('prefetch' in text) == (early and module == 'products')


def test_attention_asks_the_device_for_nothing():
    "A GPU records the plain form where heads are smaller than a kernel takes; 'meta' has no values to ask for."
    with torch.device('meta'):
        qkv, cache, pos, turn = torch.empty(3, 8 * 16), torch.empty(4, 2, 32, 16), torch.empty(3, dtype=torch.long), torch.empty(3, 16)
        assert attend_cache(qkv, cache, cache.clone(), pos, turn, turn, .25).shape == (3, 4 * 16)
