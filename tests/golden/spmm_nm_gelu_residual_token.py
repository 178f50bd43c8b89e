@T.prim_func(s_tir=True)
def spmm(x_h: T.handle("float32"), y_h: T.handle("float32"), bias_h: T.handle("float32"), res_h: T.handle("float32"), idx0_h: T.handle("uint8"), val0_h: T.handle("float32"), S: T.int64, N: T.int64, tiles: T.int64, per: T.int64, x_stride: T.int64, x_span: T.int64, x_batch: T.int64, y_stride: T.int64, y_span: T.int64, y_batch: T.int64, res_stride: T.int64, res_span: T.int64, res_batch: T.int64, C0: T.int64, P0: T.int64):
    T.func_attr({"tirx.noalias": True, "global_symbol": "spmm"})
    x = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=x_h, align=4)
    y = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=y_h, align=4)
    bias = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=bias_h, align=4)
    res = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=res_h, align=4)
    idx0 = T.decl_buffer((T.int64(1) << T.int64(40),), "uint8", data=idx0_h, align=1)
    val0 = T.decl_buffer((T.int64(1) << T.int64(40),), "float32", data=val0_h, align=4)
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
        yt_at = T.alloc_buffer((1,), "int64", scope="global")
        yt_at[0] = batch * y_batch + start // 64 * y_span + start % 64
        yt: T.let = yt_at[0]
        rt_at = T.alloc_buffer((1,), "int64", scope="global")
        rt_at[0] = batch * res_batch + start // 64 * res_span + start % 64
        rt: T.let = rt_at[0]
        if left == 1:
            for i in range((last - first + 0) // 1):
                parent0: T.let = first // 1 + i
                row_1: T.let = first + i * 1
                acc0 = T.alloc_buffer((4,), "float32", scope="global")
                acc0[T.ramp(0, 1, 4)] = T.broadcast(bias[row_1 + 0], 4)
                groups0: T.let = (C0 + 3) // 4
                for g in range(groups0):
                    block_2: T.let = (parent0 * groups0 + g) * 2 + 0
                    xb_3: T.let = xt + (g * 4 + T.Cast("int64", idx0[(parent0 * groups0 + g) * 2 + 0])) * x_stride + T.int64(0)
                    acc0[T.ramp(0, 1, 4)] = acc0[T.ramp(0, 1, 4)] + T.broadcast(val0[(block_2 * 1 + 0) * 1 + 0 + 0], 4) * x[T.ramp(xb_3 + (0) * x_stride + 0, 1, 4)]
                    block_4: T.let = (parent0 * groups0 + g) * 2 + 1
                    xb_5: T.let = xt + (g * 4 + T.Cast("int64", idx0[(parent0 * groups0 + g) * 2 + 1])) * x_stride + T.int64(0)
                    acc0[T.ramp(0, 1, 4)] = acc0[T.ramp(0, 1, 4)] + T.broadcast(val0[(block_4 * 1 + 0) * 1 + 0 + 0], 4) * x[T.ramp(xb_5 + (0) * x_stride + 0, 1, 4)]
                y[T.ramp(yt + (row_1 + 0) * y_stride + T.int64(0) + 0, 1, 4)] = acc0[T.ramp(0, 1, 4)]
                for e_row in range(T.min(T.int64(1), N - (row_1))):
                    v_6: T.let = y[T.ramp(yt + (row_1 + e_row) * y_stride + T.int64(0) + 0, 1, 4)]
                    size_7: T.let = T.max(v_6, T.broadcast(T.float32(0.0), 4) - v_6)
                    a_8: T.let = T.min(size_7 * T.broadcast(T.float32(0.7071067811865476), 4), T.broadcast(T.float32(4.2), 4))
                    p_9: T.let = T.broadcast(T.float32(6.946010763553951e-05), 4) * a_8 + T.broadcast(T.float32(-0.00031989287500620866), 4)
                    p_10: T.let = p_9 * a_8 + T.broadcast(T.float32(-0.0015958874527117468), 4)
                    p_11: T.let = p_10 * a_8 + T.broadcast(T.float32(0.020415027302298022), 4)
                    p_12: T.let = p_11 * a_8 + T.broadcast(T.float32(-0.10325379641283151), 4)
                    p_13: T.let = p_12 * a_8 + T.broadcast(T.float32(-0.63653689985929), 4)
                    p_14: T.let = p_13 * a_8 + T.broadcast(T.float32(-1.1283838141773035), 4)
                    e_15: T.let = a_8 * p_14
                    sum_16: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", e_15, T.broadcast(T.float32(1.4426950408889634), 4), T.broadcast(T.float32(12583039.0), 4))
                    n_17: T.let = sum_16 - T.broadcast(T.float32(12583039.0), 4)
                    r_18: T.let = e_15 - n_17 * T.broadcast(T.float32(0.693359375), 4) + n_17 * T.broadcast(T.float32(0.00021219444), 4)
                    power_19: T.let = T.reinterpret("float32x4", T.shift_left(T.reinterpret("int32x4", sum_16), T.broadcast(T.int32(23), 4)))
                    p_20: T.let = T.broadcast(T.float32(0.0013888889225199819), 4) * r_18 + T.broadcast(T.float32(0.008333350531756878), 4)
                    p_21: T.let = p_20 * r_18 + T.broadcast(T.float32(0.04166654497385025), 4)
                    p_22: T.let = p_21 * r_18 + T.broadcast(T.float32(0.1666666716337204), 4)
                    p_23: T.let = p_22 * r_18 + T.broadcast(T.float32(0.5), 4)
                    p_24: T.let = p_23 * r_18 + T.broadcast(T.float32(1.0), 4)
                    p_25: T.let = p_24 * r_18 + T.broadcast(T.float32(1.0), 4)
                    exp_26: T.let = p_25 * power_19
                    y[T.ramp(yt + (row_1 + e_row) * y_stride + T.int64(0) + 0, 1, 4)] = T.broadcast(T.float32(0.5), 4) * (v_6 + size_7 * (T.broadcast(T.float32(1.0), 4) - exp_26)) + res[T.ramp(rt + (row_1 + e_row) * res_stride + T.int64(0) + 0, 1, 4)]
