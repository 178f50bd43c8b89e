# linear(bitmap(64).f16.panels(64)) -> row, many, ragged, tail, f16
# gpu(bm=128, bn=64, bk=64, split=1, warps=4, stages=3)
# x: *fp16, y: *fp16, bias: *fp16, ptr0: *i32, bits0: *u16, val0: *fp16, M: i32, N: i32, K: i32, x_step: i32 % 16
@triton.jit
def linear(x, y, bias, ptr0, bits0, val0, M, N, K, x_step):
    tiles = tl.cdiv(N, 64)
    tile_n = tl.program_id(0) % tiles
    rn = tile_n * 64 + tl.arange(0, 64)
    tokens = tl.program_id(0) // tiles * 128 + tl.arange(0, 128)
    rm = tl.minimum(tokens, M - 1)
    x_rows = x + rm.to(tl.int64)[None, :] * x_step
    acc = tl.zeros((64, 128), tl.float32)
    tiles0 = tl.cdiv(N, 64)
    words0 = bits0.to(tl.pointer_type(tl.uint32))
    parent0 = tl.arange(0, 64)
    nibble0 = tl.arange(0, 8)[None, :]
    byte0 = nibble0 // 2 * 8
    k0 = tl.arange(0, 32)
    for j in tl.range(0, tl.cdiv(K, 64), num_stages=3):
        window = j * tiles0 + tile_n
        stored = val0 + tl.load(ptr0 + window).to(tl.int64)
        bits = words0 + (window.to(tl.int64) * 64 + parent0) * 2
        word_0 = tl.load(bits)
        pairs = word_0 - ((word_0 >> 1) & 0x55555555)
        nibbles_0 = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        sums_0 = ((nibbles_0 + (nibbles_0 >> 4)) & 0x0F0F0F0F) * 0x01010101
        count_0 = (sums_0 >> 24).to(tl.int32)
        word_1 = tl.load(bits + 1)
        pairs = word_1 - ((word_1 >> 1) & 0x55555555)
        nibbles_1 = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
        sums_1 = ((nibbles_1 + (nibbles_1 >> 4)) & 0x0F0F0F0F) * 0x01010101
        count_1 = (sums_1 >> 24).to(tl.int32)
        counts = count_0 + count_1
        at = tl.cumsum(counts, 0) - counts
        before = ((sums_0 << 8)[:, None] >> byte0) & 0xFF
        before += tl.where(nibble0 % 2 == 1, (nibbles_0[:, None] >> byte0) & 0xF, 0)
        rank = at[:, None] + before.to(tl.int32)
        four = (word_0[:, None] >> (nibble0 * 4)).to(tl.int32)
        kept_0 = (four & 1) != 0
        value_0_0 = tl.load(stored + rank, mask=kept_0, other=0.0)
        rank += kept_0.to(tl.int32)
        kept_1 = (four & 2) != 0
        value_0_1 = tl.load(stored + rank, mask=kept_1, other=0.0)
        rank += kept_1.to(tl.int32)
        kept_2 = (four & 4) != 0
        value_0_2 = tl.load(stored + rank, mask=kept_2, other=0.0)
        rank += kept_2.to(tl.int32)
        kept_3 = (four & 8) != 0
        value_0_3 = tl.load(stored + rank, mask=kept_3, other=0.0)
        weights = tl.reshape(tl.join(tl.join(value_0_0, value_0_2), tl.join(value_0_1, value_0_3)), (64, 32))
        xs = tl.load(x_rows + (j * 64 + 0 + k0)[:, None], mask=((j * 64 + 0 + k0) < K)[:, None], other=0.0)
        acc = tl.dot(weights.to(tl.float16), xs, acc)
        at += count_0
        before = ((sums_1 << 8)[:, None] >> byte0) & 0xFF
        before += tl.where(nibble0 % 2 == 1, (nibbles_1[:, None] >> byte0) & 0xF, 0)
        rank = at[:, None] + before.to(tl.int32)
        four = (word_1[:, None] >> (nibble0 * 4)).to(tl.int32)
        kept_0 = (four & 1) != 0
        value_0_0 = tl.load(stored + rank, mask=kept_0, other=0.0)
        rank += kept_0.to(tl.int32)
        kept_1 = (four & 2) != 0
        value_0_1 = tl.load(stored + rank, mask=kept_1, other=0.0)
        rank += kept_1.to(tl.int32)
        kept_2 = (four & 4) != 0
        value_0_2 = tl.load(stored + rank, mask=kept_2, other=0.0)
        rank += kept_2.to(tl.int32)
        kept_3 = (four & 8) != 0
        value_0_3 = tl.load(stored + rank, mask=kept_3, other=0.0)
        weights = tl.reshape(tl.join(tl.join(value_0_0, value_0_2), tl.join(value_0_1, value_0_3)), (64, 32))
        xs = tl.load(x_rows + (j * 64 + 32 + k0)[:, None], mask=((j * 64 + 32 + k0) < K)[:, None], other=0.0)
        acc = tl.dot(weights.to(tl.float16), xs, acc)
    acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + tokens.to(tl.int64)[None, :] * N + rn[:, None], acc.to(tl.float16), mask=(tokens < M)[None, :] & (rn < N)[:, None])
