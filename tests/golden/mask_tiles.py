@T.prim_func(s_tir=True)
def mask_tiles(mask_h: T.handle("float32"), tiles_h: T.handle("float32"), S: T.int64, Sk: T.int64, heads: T.int64, tasks: T.int64, per: T.int64, across: T.int64, m_stride: T.int64, m_span: T.int64, m_head: T.int64, m_batch: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "mask_tiles"})
    mask = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=mask_h, align=4)
    tiles = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=tiles_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    for task in T.parallel(tasks):
        batch_at = T.alloc_buffer((1,), "int64", scope="global")
        batch_at[0] = task // per // heads
        batch: T.let = batch_at[0]
        head_at = T.alloc_buffer((1,), "int64", scope="global")
        head_at[0] = task // per % heads
        head: T.let = head_at[0]
        start_at = T.alloc_buffer((1,), "int64", scope="global")
        start_at[0] = task % per * 64
        start: T.let = start_at[0]
        mt_at = T.alloc_buffer((1,), "int64", scope="global")
        mt_at[0] = head * m_head + batch * m_batch + start // 64 * m_span + start % 64
        mt: T.let = mt_at[0]
        vectors_at = T.alloc_buffer((1,), "int64", scope="global")
        vectors_at[0] = (T.min(S - start, T.int64(64)) + 1) // 2
        vectors: T.let = vectors_at[0]
        seen = T.alloc_buffer((2,), "float32", scope="global")
        changed = T.alloc_buffer((2,), "float32", scope="global")
        for block in range(across):
            seen[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
            changed[T.ramp(0, 1, 2)] = T.broadcast(T.float32(0.0), 2)
            key_at = T.alloc_buffer((1,), "int64", scope="global")
            key_at[0] = block * 64
            key: T.let = key_at[0]
            for j in range(T.min(Sk - key, T.int64(64))):
                for i in range(vectors):
                    value_1: T.let = mask[T.ramp(mt + (key + j) * m_stride + i * 2, 1, 2)]
                    inside_2: T.let = T.Select(T.ramp(T.Cast('int32', start + i * 2), 1, 2) < T.broadcast(T.Cast('int32', S), 2), T.broadcast(T.float32(1.0), 2), T.broadcast(T.float32(0.0), 2))
                    seen[T.ramp(0, 1, 2)] = T.max(seen[T.ramp(0, 1, 2)], T.Select(value_1 == T.broadcast(T.float32("-inf"), 2), T.broadcast(T.float32(0.0), 2), inside_2))
                    changed[T.ramp(0, 1, 2)] = T.max(changed[T.ramp(0, 1, 2)], T.Select(value_1 == T.broadcast(T.float32(0.0), 2), T.broadcast(T.float32(0.0), 2), inside_2))
            for i in range(1):
                seen[0] = T.max(seen[0], seen[i + 1])
                changed[0] = T.max(changed[0], changed[i + 1])
            tiles[task * across + block] = T.Select(seen[0] == T.float32(0), T.float32(0), T.float32(1) + changed[0])
