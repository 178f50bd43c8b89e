@T.prim_func(s_tir=True)
def spmm(x_h: T.handle("float32"), y_h: T.handle("float32"), bias_h: T.handle("float32"), ptr0_h: T.handle("int32"), idx0_h: T.handle("uint16"), val0_h: T.handle("float32"), ptr1_h: T.handle("int32"), idx1_h: T.handle("uint16"), val1_h: T.handle("uint16"), S: T.int64, N: T.int64, tiles: T.int64, per: T.int64, x_stride: T.int64, x_span: T.int64, x_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_batch: T.int64, res_stride: T.int64, res_span: T.int64, res_batch: T.int64, C0: T.int64, P0: T.int64, C1: T.int64, P1: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmm"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    ptr0 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr0_h, align=4)
    idx0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=idx0_h, align=2)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=val0_h, align=4)
    ptr1 = T.decl_buffer((T.int64(1) << T.int64(40),), "int32", data=ptr1_h, align=4)
    idx1 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=idx1_h, align=2)
    val1 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint16", data=val1_h, align=2)
    T.attr(T.int32(0), "device_id", 0)
    T.attr(T.int32(0), "device_type", 1)
    chunks: T.let = (N + 127) // 128
    for task in T.parallel(tiles * chunks):
        tile_at = T.alloc_buffer((1,), "int64", scope="global")
        tile_at[0] = task // chunks
        tile: T.let = tile_at[0]
        first_at = T.alloc_buffer((1,), "int64", scope="global")
        first_at[0] = task % chunks * 128
        first: T.let = first_at[0]
        last_at = T.alloc_buffer((1,), "int64", scope="global")
        last_at[0] = T.min(N, first + 128)
        last: T.let = last_at[0]
        batch_at = T.alloc_buffer((1,), "int64", scope="global")
        batch_at[0] = tile // per
        batch: T.let = batch_at[0]
        start_at = T.alloc_buffer((1,), "int64", scope="global")
        start_at[0] = tile % per * 4
        start: T.let = start_at[0]
        left_at = T.alloc_buffer((1,), "int64", scope="global")
        left_at[0] = T.min((S - start + 3) // 4, T.int64(1))
        left: T.let = left_at[0]
        xt_at = T.alloc_buffer((1,), "int64", scope="global")
        xt_at[0] = batch * x_batch + start // 64 * x_span + start % 64
        xt: T.let = xt_at[0]
        out = T.alloc_buffer((512,), "float32", scope="global")
        if left == 1:
            for i in range((last - first + 1) // 2):
                parent0: T.let = first // 2 + i
                row_1: T.let = first + i * 2
                acc0 = T.alloc_buffer((4,), "float32", scope="global")
                acc1 = T.alloc_buffer((4,), "float32", scope="global")
                if row_1 + 0 < N:
                    acc0[T.ramp(0, 1, 4)] = T.broadcast(bias[row_1 + 0], 4)
                if row_1 + 1 < N:
                    acc1[T.ramp(0, 1, 4)] = T.broadcast(bias[row_1 + 1], 4)
                lo0: T.let = T.Cast("int64", ptr0[parent0])
                count0: T.let = T.Cast("int64", ptr0[parent0 + T.int64(1)]) - lo0
                for j in range(count0 // 1):
                    block_2: T.let = lo0 + j * 1 + 0
                    xb_3: T.let = xt + (T.Cast("int64", idx0[lo0 + j * 1 + 0])) * x_stride + T.int64(0)
                    acc0[T.ramp(0, 1, 4)] = acc0[T.ramp(0, 1, 4)] + T.broadcast(val0[(block_2 * 1 + 0) * 2 + 0 + 0], 4) * x[T.ramp(xb_3 + (0) * x_stride + 0, 1, 4)]
                    acc1[T.ramp(0, 1, 4)] = acc1[T.ramp(0, 1, 4)] + T.broadcast(val0[(block_2 * 1 + 0) * 2 + 0 + 1], 4) * x[T.ramp(xb_3 + (0) * x_stride + 0, 1, 4)]
                if row_1 + 0 < N:
                    out[T.ramp((row_1 + 0 - first) * 4 + T.int64(0) + 0, 1, 4)] = acc0[T.ramp(0, 1, 4)]
                if row_1 + 1 < N:
                    out[T.ramp((row_1 + 1 - first) * 4 + T.int64(0) + 0, 1, 4)] = acc1[T.ramp(0, 1, 4)]
            for i in range((last - first + 0) // 1):
                parent1: T.let = first // 1 + i
                row_4: T.let = first + i * 1
                acc0 = T.alloc_buffer((4,), "float32", scope="global")
                if row_4 + 0 < N:
                    acc0[T.ramp(0, 1, 4)] = out[T.ramp((row_4 + 0 - first) * 4 + T.int64(0) + 0, 1, 4)]
                lo1: T.let = T.Cast("int64", ptr1[parent1])
                count1: T.let = T.Cast("int64", ptr1[parent1 + T.int64(1)]) - lo1
                for j in range(count1 // 1):
                    block_5: T.let = lo1 + j * 1 + 0
                    xb_6: T.let = xt + (T.Cast("int64", idx1[lo1 + j * 1 + 0])) * x_stride + T.int64(0)
                    acc0[T.ramp(0, 1, 4)] = acc0[T.ramp(0, 1, 4)] + T.broadcast(T.reinterpret("float32", T.shift_left(T.Cast("uint32", val1[(block_5 * 1 + 0) * 1 + 0 + 0]), T.uint32(16))), 4) * x[T.ramp(xb_6 + (0) * x_stride + 0, 1, 4)]
                if row_4 + 0 < N:
                    out[T.ramp((row_4 + 0 - first) * 4 + T.int64(0) + 0, 1, 4)] = acc0[T.ramp(0, 1, 4)]
        for slab in range(left):
            token_at = T.alloc_buffer((1,), "int64", scope="global")
            token_at[0] = start + slab * 4
            token: T.let = token_at[0]
            m_at = T.alloc_buffer((1,), "int64", scope="global")
            m_at[0] = batch * S + token
            m: T.let = m_at[0]
            whole_at = T.alloc_buffer((1,), "int64", scope="global")
            whole_at[0] = T.Select(token + 4 <= S, (last - first) // 4 * 4, T.int64(0))
            whole: T.let = whole_at[0]
            for nb in range(whole // 4):
                n: T.let = nb * 4
                v0 = T.alloc_buffer((4,), "float32", scope="global")
                v1 = T.alloc_buffer((4,), "float32", scope="global")
                v2 = T.alloc_buffer((4,), "float32", scope="global")
                v3 = T.alloc_buffer((4,), "float32", scope="global")
                v4 = T.alloc_buffer((4,), "float32", scope="global")
                v5 = T.alloc_buffer((4,), "float32", scope="global")
                v6 = T.alloc_buffer((4,), "float32", scope="global")
                v7 = T.alloc_buffer((4,), "float32", scope="global")
                v0[T.ramp(0, 1, 4)] = out[T.ramp((n + 0) * 4 + slab * 4, 1, 4)]
                v1[T.ramp(0, 1, 4)] = out[T.ramp((n + 1) * 4 + slab * 4, 1, 4)]
                v2[T.ramp(0, 1, 4)] = out[T.ramp((n + 2) * 4 + slab * 4, 1, 4)]
                v3[T.ramp(0, 1, 4)] = out[T.ramp((n + 3) * 4 + slab * 4, 1, 4)]
                v4[T.ramp(0, 1, 4)] = T.Shuffle([v0[T.ramp(0, 1, 4)], v1[T.ramp(0, 1, 4)]], [0, 4, 2, 6])
                v5[T.ramp(0, 1, 4)] = T.Shuffle([v0[T.ramp(0, 1, 4)], v1[T.ramp(0, 1, 4)]], [1, 5, 3, 7])
                v6[T.ramp(0, 1, 4)] = T.Shuffle([v2[T.ramp(0, 1, 4)], v3[T.ramp(0, 1, 4)]], [0, 4, 2, 6])
                v7[T.ramp(0, 1, 4)] = T.Shuffle([v2[T.ramp(0, 1, 4)], v3[T.ramp(0, 1, 4)]], [1, 5, 3, 7])
                v0[T.ramp(0, 1, 4)] = T.Shuffle([v4[T.ramp(0, 1, 4)], v6[T.ramp(0, 1, 4)]], [0, 1, 4, 5])
                v1[T.ramp(0, 1, 4)] = T.Shuffle([v5[T.ramp(0, 1, 4)], v7[T.ramp(0, 1, 4)]], [0, 1, 4, 5])
                v2[T.ramp(0, 1, 4)] = T.Shuffle([v4[T.ramp(0, 1, 4)], v6[T.ramp(0, 1, 4)]], [2, 3, 6, 7])
                v3[T.ramp(0, 1, 4)] = T.Shuffle([v5[T.ramp(0, 1, 4)], v7[T.ramp(0, 1, 4)]], [2, 3, 6, 7])
                y[T.ramp((m + 0) * y_stride + first + n, 1, 4)] = v0[T.ramp(0, 1, 4)]
                y[T.ramp((m + 1) * y_stride + first + n, 1, 4)] = v1[T.ramp(0, 1, 4)]
                y[T.ramp((m + 2) * y_stride + first + n, 1, 4)] = v2[T.ramp(0, 1, 4)]
                y[T.ramp((m + 3) * y_stride + first + n, 1, 4)] = v3[T.ramp(0, 1, 4)]
            for nr in range(last - first - whole):
                for i in range(T.min(T.int64(4), S - token)):
                    n: T.let = whole + nr
                    y[(m + i) * y_stride + first + n] = out[n * 4 + slab * 4 + i]
