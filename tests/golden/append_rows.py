@T.prim_func(s_tir=True)
def append(cache_h: T.handle("float32"), x_h: T.handle("float32"), y_h: T.handle("float32"), heads: T.int64, G: T.int64, past: T.int64, S: T.int64, D: T.int64, x_batch: T.int64, x_head: T.int64, x_token: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "append"})
    cache = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=cache_h, align=4)
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    parts_at = T.alloc_buffer((1,), "int64", scope="global")
    parts_at[0] = T.if_then_else(heads * past * D > 65536, heads, T.int64(1))
    parts: T.let = parts_at[0]
    for part in T.parallel(parts):
        first_at = T.alloc_buffer((1,), "int64", scope="global")
        first_at[0] = part * heads // parts
        first: T.let = first_at[0]
        for i in range((part + 1) * heads // parts - first):
            head_at = T.alloc_buffer((1,), "int64", scope="global")
            head_at[0] = first + i
            head: T.let = head_at[0]
            count_at = T.alloc_buffer((1,), "int64", scope="global")
            count_at[0] = past * D
            count: T.let = count_at[0]
            to_at = T.alloc_buffer((1,), "int64", scope="global")
            to_at[0] = head * (past + S) * D
            to: T.let = to_at[0]
            for v in range(count // 8):
                n_1: T.let = v * 8
                y[T.ramp(to + n_1, 1, 8)] = cache[T.ramp(head * count + n_1, 1, 8)]
            for v in range(count % 8):
                n_2: T.let = count // 8 * 8 + v
                y[to + n_2] = cache[head * count + n_2]
            for s in range(S):
                from_x_at = T.alloc_buffer((1,), "int64", scope="global")
                from_x_at[0] = head // G * x_batch + head % G * x_head + s * x_token
                from_x: T.let = from_x_at[0]
                new_at = T.alloc_buffer((1,), "int64", scope="global")
                new_at[0] = to + count + s * D
                new: T.let = new_at[0]
                for v in range(D // 4):
                    n_3: T.let = v * 4
                    y[T.ramp(new + n_3, 1, 4)] = x[T.ramp(from_x + n_3, 1, 4)]
                for v in range(D % 4):
                    n_4: T.let = D // 4 * 4 + v
                    y[new + n_4] = x[from_x + n_4]
