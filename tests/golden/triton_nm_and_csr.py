# linear(packed_nm(2, 4).f16 + csr.f16) -> row, few, f16
# gpu(bm=16, bn=16, bk=64, split=1, warps=4, stages=3)
# x: *fp16, xt: *fp16, y: *fp16, bias: *fp16, idx0: *u8, val0: *fp16, ptr1: *i32, idx1: *u16, val1: *fp16, M: i32, N: i32 % 16, K: i32 % 16, x_step: i32 % 16, xt_step: i32 % 16
@triton.jit
def linear(x, xt, y, bias, idx0, val0, ptr1, idx1, val1, M, N, K, x_step, xt_step):
    tiles = tl.cdiv(N, 16)
    tile_n = tl.program_id(0) % tiles
    rn = tile_n * 16 + tl.arange(0, 16)
    tokens = tl.program_id(0) // tiles * 16 + tl.arange(0, 16)
    rm = tl.minimum(tokens, M - 1)
    x_rows = x + rm.to(tl.int64)[None, :] * x_step
    acc = tl.zeros((16, 16), tl.float32)
    groups0 = tl.multiple_of(K // 4, 64)
    words0 = tl.multiple_of(K // 8, 32)
    row0 = rn.to(tl.int64)[:, None]
    slot0 = tl.arange(0, 32)[None, :]
    word0 = tl.arange(0, 8)[None, :]
    k0 = tl.arange(0, 64)
    for j in tl.range(0, tl.cdiv(K, 64), num_stages=3):
        slots = j * 32 + slot0
        packed = tl.load(val0 + row0 * (groups0 * 2) + slots)
        words = j * 8 + word0
        codes = tl.load(idx0 + row0 * words0 + words).to(tl.int32)
        codes = tl.reshape(tl.join(codes >> 0, codes >> 4), (16, 16))
        slot_0, slot_1 = tl.split(tl.reshape(packed, (16, 16, 2)))
        at_0 = (codes >> 0) & 3
        at_1 = (codes >> 2) & 3
        column_0 = tl.where(at_0 == 0, slot_0, tl.where(at_1 == 0, slot_1, 0.0))
        column_1 = tl.where(at_0 == 1, slot_0, tl.where(at_1 == 1, slot_1, 0.0))
        column_2 = tl.where(at_0 == 2, slot_0, tl.where(at_1 == 2, slot_1, 0.0))
        column_3 = tl.where(at_0 == 3, slot_0, tl.where(at_1 == 3, slot_1, 0.0))
        weights = tl.reshape(tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3)), (16, 64))
        xs = tl.load(x_rows + (j * 64 + k0)[:, None])
        acc = tl.dot(weights.to(tl.float16), xs, acc)
    parent1 = tile_n * 16 + tl.arange(0, 16)
    real1 = parent1 < tl.cdiv(N, 1)
    lo1 = tl.load(ptr1 + parent1, mask=real1, other=0)
    hi1 = tl.load(ptr1 + parent1 + 1, mask=real1, other=0)
    longest1 = tl.max(hi1 - lo1, 0)
    lane1 = tl.arange(0, 4)[None, :]
    rows1_0 = tl.zeros((16, 16), tl.float32)
    for j in tl.range(0, longest1, 4, num_stages=3):
        at = lo1[:, None] + j + lane1
        live = at < hi1[:, None]
        k = tl.load(idx1 + at, mask=live, other=0).to(tl.int32)
        xs = tl.load(xt + k.to(tl.int64)[:, :, None] * xt_step + rm[None, None, :], mask=(live)[:, :, None], other=0.0)
        weights = tl.load(val1 + at, mask=live, other=0.0).to(tl.float32)
        rows1_0 += tl.sum(weights[:, :, None] * xs.to(tl.float32), 1)
    acc += rows1_0
    acc += tl.load(bias + rn).to(tl.float32)[:, None]
    tl.store(y + tokens.to(tl.int64)[None, :] * N + rn[:, None], acc.to(tl.float16), mask=(tokens < M)[None, :])
