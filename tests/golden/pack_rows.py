@T.prim_func(s_tir=True)
def pack_rows(x_h: T.handle("float32"), y_h: T.handle("float32"), B: T.int64, S: T.int64, K: T.int64, padded_k: T.int64, x_stride: T.int64, x_span: T.int64, x_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_batch: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "pack_rows"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    vectors: T.let = (S + 1) // 2
    blocks: T.let = (padded_k + 127) // 128
    for task in T.parallel(B * vectors * blocks):
        batch_at = T.alloc_buffer((1,), "int64", scope="global")
        batch_at[0] = task // blocks // vectors
        batch: T.let = batch_at[0]
        s_at = T.alloc_buffer((1,), "int64", scope="global")
        s_at[0] = task // blocks % vectors * 2
        s: T.let = s_at[0]
        first_at = T.alloc_buffer((1,), "int64", scope="global")
        first_at[0] = task % blocks * 128
        first: T.let = first_at[0]
        last_at = T.alloc_buffer((1,), "int64", scope="global")
        last_at[0] = T.min(padded_k, first + 128)
        last: T.let = last_at[0]
        at_at = T.alloc_buffer((1,), "int64", scope="global")
        at_at[0] = batch * x_batch
        at: T.let = at_at[0]
        to_at = T.alloc_buffer((1,), "int64", scope="global")
        to_at[0] = batch * y_batch + s // 64 * y_span + s % 64
        to: T.let = to_at[0]
        whole_at = T.alloc_buffer((1,), "int64", scope="global")
        whole_at[0] = T.Select(s + 2 <= S, T.max(first, T.min(last, K // 2 * 2)), first)
        whole: T.let = whole_at[0]
        for kb in range((whole - first) // 2):
            k: T.let = first + kb * 2
            v0 = T.alloc_buffer((2,), "float32", scope="global")
            v1 = T.alloc_buffer((2,), "float32", scope="global")
            v2 = T.alloc_buffer((2,), "float32", scope="global")
            v3 = T.alloc_buffer((2,), "float32", scope="global")
            v0[T.ramp(0, 1, 2)] = x[T.ramp(at + (s + 0) * x_stride + k, 1, 2)]
            v1[T.ramp(0, 1, 2)] = x[T.ramp(at + (s + 1) * x_stride + k, 1, 2)]
            v2[T.ramp(0, 1, 2)] = T.Shuffle([v0[T.ramp(0, 1, 2)], v1[T.ramp(0, 1, 2)]], [0, 2])
            v3[T.ramp(0, 1, 2)] = T.Shuffle([v0[T.ramp(0, 1, 2)], v1[T.ramp(0, 1, 2)]], [1, 3])
            y[T.ramp(to + (k + 0) * y_stride, 1, 2)] = v2[T.ramp(0, 1, 2)]
            y[T.ramp(to + (k + 1) * y_stride, 1, 2)] = v3[T.ramp(0, 1, 2)]
        for kr in range(last - whole):
            for i in range(2):
                k: T.let = whole + kr
                y[to + k * y_stride + i] = T.if_then_else((s + i < S) and (k < K), x[at + (s + i) * x_stride + k], T.float32(0))
