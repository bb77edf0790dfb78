"Every kernel against its plain form: on a GPU as it is, on a CPU with TRITON_INTERPRET=1. Prints the largest error of each."
import torch
import torch.nn.functional as F
from saferlhf.hardware.kernels import (_plain_add_norm, _plain_attend_cache, _plain_gate, _plain_norm_heads,
                                       _plain_rotate_append, add_norm, attend_cache, gate, norm_heads, on_gpu,
                                       rotate_append, whole)
from saferlhf.hardware.logprobs import _plain_log_probs, _plain_log_probs_back, log_probs, log_probs_back
from saferlhf.hardware.products import gated, product
from saferlhf.hardware.slots import Choice, _pieces_choose, _plain_record, choose, plain_choose, record

device = 'cuda' if torch.cuda.is_available() else 'cpu'
types = (torch.float32, torch.bfloat16) if device == 'cuda' else (torch.float32,)
small = device == 'cpu'      # the interpreter takes a minute for what a GPU does at once: no shape there is the second of its kind
tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
torch.manual_seed(0)


def error(got, want):
    got, want = (torch.cat([x.double().flatten() for x in xs]) for xs in (got, want))
    assert got.isfinite().all()
    return ((got - want).norm() / want.norm()).item()


def check(name, cases):
    worst = {}
    for dtype in types:
        worst[dtype] = max(cases(dtype))
        assert worst[dtype] < tolerance[dtype], (name, dtype, worst)
    print(name, *[f'{str(k)[6:]} {v:.1e}' for k, v in worst.items()], 'ok')


def norms(dtype):
    for n, d in ((1, 7), (5, 192), (3, 2048)):
        x, h, w = (torch.randn(*s, device=device, dtype=dtype) for s in ((n, d), (n, d), (d,)))
        parts = torch.randn(3, n, d, device=device)                              # as a product leaves them
        for weight in (w, w.float(), None):                                      # one in 32 bits rounds once, as Gemma does
            yield error(add_norm(x, h, weight, 1e-6), _plain_add_norm(x, h, weight, 1e-6))
            yield error(add_norm(x, None, weight, 1e-6), _plain_add_norm(x, None, weight, 1e-6))
            yield error(add_norm(x, parts, weight, 1e-6), _plain_add_norm(x, parts, weight, 1e-6))


def heads(dtype):
    for H, K, D in ((4, 2, 32), (3, 1, 96), (16, 16, 128)):
        for nq, nk in ((D, D), (H * D, K * D)):                                  # each head alone, all together
            qkv, wq, wk = (torch.randn(*s, device=device, dtype=dtype) for s in ((5, (H + 2 * K) * D), (nq,), (nk,)))
            for w in ((wq, wk), (wq.float(), wk.float())):
                got, want = norm_heads(qkv.clone(), *w, K * D, 1e-6), _plain_norm_heads(qkv, *w, K * D, 1e-6)
                assert torch.equal(got[:, -K * D:], qkv[:, -K * D:])
                yield error([got], [want])


def gates(dtype):
    for n, f in ((1, 3), (4, 1500), (3, 5632)):
        for act in ('silu', 'gelu'):
            x = 3 * torch.randn(n, 2 * f, device=device, dtype=dtype)
            yield error([gate(x, act)], [_plain_gate(x, act)])


def products(dtype):
    for M, N, K in ((1, 70, 130), (16, 64, 256), (37, 40, 64), (101, 32, 256), (130, 8, 64)):
        x, w, b = (torch.randn(*s, device=device, dtype=dtype) for s in ((M, K), (2 * N, K), (2 * N,)))
        scaled = w / K ** .5
        for bias in (None, b):
            yield error([product(x, scaled, bias)], [F.linear(x, scaled, bias)])
            parts = product(x, scaled, bias, parts=True)
            yield error([whole(parts, dtype)], [F.linear(x, scaled, bias)])
            for act in ('silu', 'gelu'): yield error([gated(x, scaled, bias, act)], [_plain_gate(F.linear(x, scaled, bias), act)])


def attention(dtype):
    for H, K, D, L in ((4, 2, 32, 70), (8, 1, 64, 300), (6, 6, 32, 9), (2, 1, 256, 77), (4, 4, 96, 150), (6, 2, 80, 70),
                       *(() if small else ((32, 4, 64, 512), (8, 8, 128, 140)))):
        N = 5
        qkv, ks, vs = (torch.randn(*s, device=device, dtype=dtype) for s in ((N, (H + 2 * K) * D), (N + 2, K, L, D), (N + 2, K, L, D)))
        pos = torch.tensor([0, 1, L // 2, L - 2, L - 1], device=device)          # an empty cache, and one with a single slot left
        angle = torch.randn(N, D // 2, device=device).repeat(1, 2)
        turn = torch.float32 if D == 96 else dtype                               # OLMo's tables stay in 32 bits
        cos, sin, cap = angle.cos().to(turn), angle.sin().to(turn), 2. if K == 1 else 0.
        caches = [(ks.clone(), vs.clone()) for _ in range(2)]
        for k, v in caches[:1]:                                                  # what lies beyond the used part must not matter
            for b in range(N): k[b, :, pos[b] + 1:], v[b, :, pos[b] + 1:] = float('nan'), float('nan')
        got = attend_cache(qkv, *caches[0], pos, cos, sin, D ** -.5, cap=cap)
        want = _plain_attend_cache(qkv, *caches[1], pos, cos, sin, D ** -.5, cap=cap)
        used = torch.arange(L, device=device) <= pos[:, None]
        yield error([got, *(x[:N].transpose(1, 2)[used] for x in caches[0])], [want, *(x[:N].transpose(1, 2)[used] for x in caches[1])])
        if H != 4: continue
        parts = torch.randn(3, *qkv.shape, device=device)
        yield error([attend_cache(parts, *caches[0], pos, cos, sin, D ** -.5, cap=cap)],
                    [attend_cache(whole(parts, dtype), *caches[1], pos, cos, sin, D ** -.5, cap=cap)])


def prompts(dtype):
    for H, K, D, L in ((4, 2, 32, 20), (3, 1, 128, 20), (3, 3, 96, 20), *(() if small else ((32, 4, 64, 50),))):
        N, slots = 17, 6
        sizes = (N, (H + 2 * K) * D), (slots, K, L, D), (slots, K, L, D)
        qkv, ks, vs = (torch.randn(*s, device=device, dtype=dtype) for s in sizes)
        angle = torch.randn(N, D // 2, device=device).repeat(1, 2)
        place = torch.randperm(slots * 12, device=device)[:N]                    # slots and positions without order,
        slot = (place // 12).index_fill(0, torch.tensor([3, 9], device=device), -1)  # and two tokens that go nowhere
        caches = [(ks.clone(), vs.clone()) for _ in range(2)]
        turn = torch.float32 if D == 96 else dtype
        got, want = (f(qkv.clone(), angle.cos().to(turn), angle.sin().to(turn), slot, place % 12, *c)
                     for f, c in zip((rotate_append, _plain_rotate_append), caches, strict=True))
        yield error([*got, *caches[0]], [*want, *caches[1]])


def tokens(dtype):
    n = 16 if small else 64
    for V in (3, 1000, 1024, 4099, *(() if small else (32003,))):
        z = 4 * torch.randn(n, 2, V, device=device).to(dtype)[:, 1]              # strides of others' tensors
        u = torch.rand(n, 3, device=device, dtype=torch.float64)[:, 1]
        z[0] = float('-inf'); z[0, V // 2] = 1.; u[1] = 0.; u[2] = 1 - 2 ** -53
        for temperature in (1., .7):
            got, want = choose(z, u, temperature), plain_choose(z.float(), u, temperature)
            same = got[0] == want[0]
            assert same[:2].all() and same.sum() >= n - 2, 'the token differs'      # u just below 1, and a draw between two roundings, may
            assert ((got[0] >= 0) & (got[0] < V)).all()
            yield error([x[same] for x in got[1:]], [x[same] for x in want[1:]])
            if device == 'cuda': continue
            got = _pieces_choose(z, u, temperature)                               # a CPU's way, which needs no interpreter
            assert ((same := got[0] == want[0])[:2]).all() and same.sum() >= n - 2
            yield error([x[same] for x in got[1:]], [x[same] for x in want[1:]])


def records(dtype):
    for n, T, eos in ((1, 3, 5), (130, 4, 1), (7, 2, None)):
        def some(high, *size, n=n): return torch.randint(0, high, size or (n,), device=device)
        drawn = Choice(some(3), *torch.randn(2, n, device=device))
        slots = [some(9, n, T + 1), *torch.randn(2, n, T + 1, device=device), some(9), some(T + 1), some(2).bool(), some(50)]
        slots[4].mul_(slots[5])                                                  # an empty slot may have drawn all of T
        got, want = ([x.clone() for x in slots] for _ in range(2))
        for f, x in ((record, got), (_plain_record, want)): f(drawn, x[:3], *x[3:], T, eos)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        yield 0.


def probabilities(dtype):
    for V in (3, 1000, 4096, 9001):
        z, ids = 4 * torch.randn(17, V, device=device).to(dtype), torch.randint(0, V, (17,), device=device)
        z[0, :2] = float('-inf'); z[0, 2], ids[0] = 1., 2; g = torch.randn(17, device=device)
        for temperature in (1., .7):
            got, want = log_probs(z, ids, temperature, True), _plain_log_probs(z, ids, temperature, True)
            yield error(got, want)
            yield error([log_probs_back(z, ids, want[2], g, temperature)], [_plain_log_probs_back(z, ids, want[2], g, temperature)])
    bad = z.clone(); bad[3, 5] = float('nan')
    assert log_probs(bad, ids)[0].isnan().tolist() == [i == 3 for i in range(17)]


assert on_gpu(torch.zeros(1, device=device)), 'no GPU and no interpreter: nothing would be compared'
for name, cases in dict(add_norm=norms, norm_heads=heads, gate=gates, product=products, attend_cache=attention, rotate_append=prompts,
                         choose=tokens, record=records, log_probs=probabilities).items():
    check(name, cases)
