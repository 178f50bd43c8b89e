# linear(bsr(4, 1)) -> row, many
# gpu(bm=64, bn=16, bk=64, split=1, warps=4, stages=1)
# x: *fp32, xt: *fp32, y: *fp32, bias: *fp32, ptr0: *i32, idx0: *u16, val0: *fp32, M: i32, N: i32 % 16, K: i32 % 16, x_step: i32 % 16, xt_step: i32 % 16
@triton.jit
def linear(x, xt, y, bias, ptr0, idx0, val0, M, N, K, x_step, xt_step):
    tiles = tl.cdiv(N, 16)
    tile_n = tl.program_id(0) % tiles
    rn = tile_n * 16 + tl.arange(0, 16)
    tokens = tl.program_id(0) // tiles * 64 + tl.arange(0, 64)
    rm = tl.minimum(tokens, M - 1)
    x_rows = x + rm.to(tl.int64)[None, :] * x_step
    acc = tl.zeros((16, 64), tl.float32)
    parent0 = tile_n * 4 + tl.arange(0, 4)
    real0 = parent0 < tl.cdiv(N, 4)
    lo0 = tl.load(ptr0 + parent0, mask=real0, other=0)
    hi0 = tl.load(ptr0 + parent0 + 1, mask=real0, other=0)
    longest0 = tl.max(hi0 - lo0, 0)
    lane0 = tl.arange(0, 4)[None, :]
    rows0_0 = tl.zeros((4, 64), tl.float32)
    rows0_1 = tl.zeros((4, 64), tl.float32)
    rows0_2 = tl.zeros((4, 64), tl.float32)
    rows0_3 = tl.zeros((4, 64), tl.float32)
    for j in tl.range(0, longest0, 4, num_stages=1):
        at = lo0[:, None] + j + lane0
        live = at < hi0[:, None]
        k = tl.load(idx0 + at, mask=live, other=0).to(tl.int32)
        at = at.to(tl.int64) * 4
        xs = tl.load(xt + k.to(tl.int64)[:, :, None] * xt_step + rm[None, None, :], mask=(live)[:, :, None], other=0.0)
        weights = tl.load(val0 + at, mask=live, other=0.0).to(tl.float32)
        rows0_0 += tl.sum(weights[:, :, None] * xs.to(tl.float32), 1)
        weights = tl.load(val0 + at + 1, mask=live, other=0.0).to(tl.float32)
        rows0_1 += tl.sum(weights[:, :, None] * xs.to(tl.float32), 1)
        weights = tl.load(val0 + at + 2, mask=live, other=0.0).to(tl.float32)
        rows0_2 += tl.sum(weights[:, :, None] * xs.to(tl.float32), 1)
        weights = tl.load(val0 + at + 3, mask=live, other=0.0).to(tl.float32)
        rows0_3 += tl.sum(weights[:, :, None] * xs.to(tl.float32), 1)
    acc += tl.reshape(tl.permute(tl.reshape(tl.join(tl.join(rows0_0, rows0_2), tl.join(rows0_1, rows0_3)), (4, 64, 4)), (0, 2, 1)), (16, 64))
    acc += tl.load(bias + rn).to(tl.float32)[:, None]
    tl.store(y + tokens.to(tl.int64)[None, :] * N + rn[:, None], acc.to(tl.float32), mask=(tokens < M)[None, :])
