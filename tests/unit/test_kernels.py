"Every GPU kernel against its plain form, on a CPU through Triton's interpreter, at sizes that are multiples of nothing."
import os
import subprocess
import sys
from pathlib import Path


def test_kernels_equal_their_plain_forms():
    env = os.environ | {'TRITON_INTERPRET': '1'}
    out = subprocess.run([sys.executable, Path(__file__).parents[1]/'gpu/gpu_kernels.py'], env=env, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.count(' ok') == 7, out.stdout + out.stderr
