@T.prim_func(s_tir=True)
def pack_rows(x_h: T.handle("float32"), y_h: T.handle("float32"), M: T.int64, K: T.int64, padded_k: T.int64, stride: T.int64, width: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "pack_rows"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    blocks: T.let = (padded_k + 127) // 128
    for task in T.parallel((M + 1) // 2 * blocks):
        m_at = T.alloc_buffer((1,), "int64", scope="local")
        m_at[0] = task // blocks * 2
        m: T.let = m_at[0]
        first_at = T.alloc_buffer((1,), "int64", scope="local")
        first_at[0] = task % blocks * 128
        first: T.let = first_at[0]
        last_at = T.alloc_buffer((1,), "int64", scope="local")
        last_at[0] = T.min(padded_k, first + 128)
        last: T.let = last_at[0]
        to: T.let = m // width * padded_k * width + m % width
        whole_at = T.alloc_buffer((1,), "int64", scope="local")
        whole_at[0] = T.Select(m + 2 <= M, T.max(first, T.min(last, K // 2 * 2)), first)
        whole: T.let = whole_at[0]
        for kb in range((whole - first) // 2):
            k: T.let = first + kb * 2
            v = T.alloc_buffer((8,), "float32", scope="local")
            v[T.ramp(0, 1, 2)] = x[T.ramp((m + 0) * stride + k, 1, 2)]
            v[T.ramp(2, 1, 2)] = x[T.ramp((m + 1) * stride + k, 1, 2)]
            v[T.ramp(4, 1, 2)] = T.Shuffle([v[T.ramp(0, 1, 2)], v[T.ramp(2, 1, 2)]], [0, 2])
            v[T.ramp(6, 1, 2)] = T.Shuffle([v[T.ramp(0, 1, 2)], v[T.ramp(2, 1, 2)]], [1, 3])
            y[T.ramp(to + (k + 0) * width, 1, 2)] = v[T.ramp(4, 1, 2)]
            y[T.ramp(to + (k + 1) * width, 1, 2)] = v[T.ramp(6, 1, 2)]
        for kr in range(last - whole):
            for i in range(2):
                k: T.let = whole + kr
                y[to + k * width + i] = T.if_then_else((m + i < M) and (k < K), x[(m + i) * stride + k], T.float32(0))
