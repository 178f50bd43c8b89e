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
                for e_row in range(1):
                    v_6: T.let = y[T.ramp(yt + (row_1 + e_row * 1 + 0) * y_stride + T.int64(0) + 0, 1, 4)]
                    size_7: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fabs", v_6)
                    p_8: T.let = T.broadcast(T.float32(2.9924127375124954e-05), 4) * size_7 + T.broadcast(T.float32(-0.0007398737361654639), 4)
                    p_9: T.let = p_8 * size_7 + T.broadcast(T.float32(0.007977461442351341), 4)
                    p_10: T.let = p_9 * size_7 + T.broadcast(T.float32(-0.05323818325996399), 4)
                    p_11: T.let = p_10 * size_7 + T.broadcast(T.float32(-0.45891568064689636), 4)
                    p_12: T.let = p_11 * size_7 + T.broadcast(T.float32(-1.1511471271514893), 4)
                    sum_13: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", size_7, p_12, T.broadcast(T.float32(12583038.0), 4))
                    r_14: T.let = T.call_llvm_pure_intrin("float32x4", "llvm.fmuladd", size_7, p_12, (T.broadcast(T.float32(0.0), 4) - (sum_13 - T.broadcast(T.float32(12583038.0), 4))))
                    p_15: T.let = T.broadcast(T.float32(0.0013264728477224708), 4) * r_14 + T.broadcast(T.float32(0.009671513922512531), 4)
                    p_16: T.let = p_15 * r_14 + T.broadcast(T.float32(0.05550733581185341), 4)
                    p_17: T.let = p_16 * r_14 + T.broadcast(T.float32(0.24022242426872253), 4)
                    p_18: T.let = p_17 * r_14 + T.broadcast(T.float32(0.6931470036506653), 4)
                    p_19: T.let = p_18 * r_14 + T.broadcast(T.float32(1.0), 4)
                    power_20: T.let = T.reinterpret("float32x4", T.shift_left(T.reinterpret("int32x4", sum_13), T.broadcast(T.int32(23), 4)))
                    exp_21: T.let = p_19 * power_20
                    tail_22: T.let = T.Select(size_7 < T.broadcast(T.float32(5.94), 4), size_7 * exp_21, T.broadcast(T.float32(0.0), 4))
                    y[T.ramp(yt + (row_1 + e_row * 1 + 0) * y_stride + T.int64(0) + 0, 1, 4)] = ((v_6 + size_7) * T.broadcast(T.float32(0.5), 4) - tail_22) + res[T.ramp(rt + (row_1 + e_row * 1 + 0) * res_stride + T.int64(0) + 0, 1, 4)]
