# linear(bsr(64, 64).bf16) -> row, few, bf16
# gpu(bm=16, bn=64, bk=64, split=4, warps=4, stages=3)
# x: *bf16, y: *bf16, bias: *bf16, ptr0: *i32, idx0: *u16, val0: *bf16, partial: *fp32, done: *i32, M: i32, N: i32 % 16, K: i32 % 16, x_step: i32 % 16
@triton.jit
def linear(x, y, bias, ptr0, idx0, val0, partial, done, M, N, K, x_step):
    tiles = tl.cdiv(N, 64)
    tile_n = tl.program_id(0) % tiles
    part = tl.program_id(1)
    rn = tile_n * 64 + tl.arange(0, 64)
    tokens = tl.program_id(0) // tiles * 16 + tl.arange(0, 16)
    rm = tl.minimum(tokens, M - 1)
    x_rows = x + rm.to(tl.int64)[None, :] * x_step
    acc = tl.zeros((64, 16), tl.float32)
    lo0 = tl.load(ptr0 + tile_n)
    hi0 = tl.load(ptr0 + tile_n + 1)
    k0 = tl.arange(0, 64)
    size0 = tl.full((), 4096, tl.int64)
    in0 = tl.arange(0, 64)[:, None] + k0[None, :] * 64
    steps0 = tl.cdiv(hi0 - lo0, 4)
    from0 = lo0 + part * steps0
    to0 = tl.minimum(from0 + steps0, hi0)
    for j in tl.range(from0, to0, num_stages=3):
        column = tl.load(idx0 + j).to(tl.int32) * 64
        weights = tl.load(val0 + j * size0 + in0)
        xs = tl.load(x_rows + (column + k0)[:, None])
        acc = tl.dot(weights.to(tl.bfloat16), xs, acc)
    tile = tl.program_id(0)
    mine = partial + tile.to(tl.int64) * 4096 + (tl.arange(0, 64)[:, None] * 16 + tl.arange(0, 16)[None, :])
    tl.store(mine + part * 1024, acc)
    tl.debug_barrier()
    arrived = tl.atomic_add(done + tile, 1, sem="acq_rel")
    if arrived == 3:
        tl.debug_barrier()
        acc = tl.zeros((64, 16), tl.float32)
        for other in range(4):
            acc += tl.load(mine + other * 1024, cache_modifier=".cg")
        tl.store(done + tile, 0)
        acc += tl.load(bias + rn).to(tl.float32)[:, None]
        tl.store(y + tokens.to(tl.int64)[None, :] * N + rn[:, None], acc.to(tl.bfloat16), mask=(tokens < M)[None, :])
