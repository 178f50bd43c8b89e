# linear(bsr(64, 64).bf16) gelu +residual -> row, many, bf16
# gpu(bm=128, bn=64, bk=64, split=1, warps=4, stages=3)
# x: *bf16, y: *bf16, bias: *bf16, res: *bf16, ptr0: *i32, idx0: *u16, val0: *bf16, M: i32, N: i32 % 16, K: i32 % 16, x_step: i32 % 16, res_step: i32 % 16
@triton.jit
def linear(x, y, bias, res, ptr0, idx0, val0, M, N, K, x_step, res_step):
    tiles = tl.cdiv(N, 64)
    tile_n = tl.program_id(0) % tiles
    rn = tile_n * 64 + tl.arange(0, 64)
    tokens = tl.program_id(0) // tiles * 128 + tl.arange(0, 128)
    rm = tl.minimum(tokens, M - 1)
    x_rows = x + rm.to(tl.int64)[None, :] * x_step
    acc = tl.zeros((64, 128), tl.float32)
    lo0 = tl.load(ptr0 + tile_n)
    hi0 = tl.load(ptr0 + tile_n + 1)
    k0 = tl.arange(0, 64)
    size0 = tl.full((), 4096, tl.int64)
    in0 = tl.arange(0, 64)[:, None] + k0[None, :] * 64
    for j in tl.range(lo0, hi0, num_stages=3):
        column = tl.load(idx0 + j).to(tl.int32) * 64
        weights = tl.load(val0 + j * size0 + in0)
        xs = tl.load(x_rows + (column + k0)[:, None])
        acc = tl.dot(weights.to(tl.bfloat16), xs, acc)
    acc += tl.load(bias + rn).to(tl.float32)[:, None]
    acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    acc += tl.load(res + tokens.to(tl.int64)[None, :] * res_step + rn[:, None], mask=(tokens < M)[None, :], other=0.0).to(tl.float32)
    tl.store(y + tokens.to(tl.int64)[None, :] * N + rn[:, None], acc.to(tl.bfloat16), mask=(tokens < M)[None, :])
