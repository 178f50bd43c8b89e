# linear(packed_nm(2, 4).f16) -> row, one, f16
# gpu(bm=128, bn=16, bk=256, split=1, warps=4, stages=1)
# x: *fp16, y: *fp16, bias: *fp16, idx0: *u8, val0: *fp16, M: i32, N: i32 % 16, K: i32 % 16, x_step: i32 % 16
@triton.jit
def linear(x, y, bias, idx0, val0, M, N, K, x_step):
    tiles = tl.cdiv(N, 16)
    tile_n = tl.program_id(0) % tiles
    rn = tile_n * 16 + tl.arange(0, 16)
    acc = tl.zeros((16,), tl.float32)
    groups0 = tl.multiple_of(K // 4, 64)
    words0 = tl.multiple_of(K // 8, 32)
    row0 = rn.to(tl.int64)[:, None]
    slot0 = tl.arange(0, 128)[None, :]
    word0 = tl.arange(0, 32)[None, :]
    k0 = tl.arange(0, 256)
    lanes0 = tl.zeros((16, 256), tl.float32)
    for j in tl.range(0, tl.cdiv(K, 256), num_stages=1):
        slots = j * 128 + slot0
        packed = tl.load(val0 + row0 * (groups0 * 2) + slots)
        words = j * 32 + word0
        codes = tl.load(idx0 + row0 * words0 + words).to(tl.int32)
        codes = tl.reshape(tl.join(codes >> 0, codes >> 4), (16, 64))
        slot_0, slot_1 = tl.split(tl.reshape(packed, (16, 64, 2)))
        at_0 = (codes >> 0) & 3
        at_1 = (codes >> 2) & 3
        column_0 = tl.where(at_0 == 0, slot_0, tl.where(at_1 == 0, slot_1, 0.0))
        column_1 = tl.where(at_0 == 1, slot_0, tl.where(at_1 == 1, slot_1, 0.0))
        column_2 = tl.where(at_0 == 2, slot_0, tl.where(at_1 == 2, slot_1, 0.0))
        column_3 = tl.where(at_0 == 3, slot_0, tl.where(at_1 == 3, slot_1, 0.0))
        weights = tl.reshape(tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3)), (16, 256))
        xs = tl.load(x + (j * 256 + k0))
        lanes0 += weights.to(tl.float32) * xs.to(tl.float32)[None, :]
    acc += tl.sum(lanes0, 1)
    acc += tl.load(bias + rn).to(tl.float32)
    tl.store(y + rn, acc.to(tl.float16))
